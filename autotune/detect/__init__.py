"""Which devices a job runs on: the visible NVIDIA GPUs, or the CPU if there is none."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from autotune.detect.host import read_host
from autotune.detect.nvidia import NvidiaDevice, NvidiaInventory, read_nvidia
from autotune.detect.torch_build import TorchBuild, read_torch_build
from autotune.errors import NoUsableDeviceError, UsageError
from autotune.hardware import Cluster, Host
from autotune.units import format_bytes

__all__ = ["DeviceRequest", "choose_cluster", "detect", "parse_devices"]

# GPUs of one product can differ by a few MiB (pages retired after memory errors).
_ALIKE_MEMORY_RATIO = 0.99


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceRequest:
    """What `--devices` asks for; without a count the number of ranks is chosen."""

    on_cpu: bool
    count: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Budget:
    """What a rank may allocate, and where that figure comes from."""

    num_bytes: int
    source: str
    notes: tuple[str, ...] = ()


def detect(devices: str = "auto", device_memory_bytes: int | None = None) -> Cluster:
    """Find the devices to use; `device_memory_bytes` caps what one rank may allocate.

    Raises:
        UsageError: `devices` cannot be read, or asks for more GPUs than there are.
        NoUsableDeviceError: there are GPUs, but they or the installed torch cannot be used.
    """
    request = parse_devices(devices)
    # NVML is not even started for the CPU: a broken driver must not be in the way.
    gpus = NvidiaInventory(devices=()) if request.on_cpu else read_nvidia()
    return choose_cluster(request, read_host(), gpus, read_torch_build(), device_memory_bytes)


def parse_devices(text: str) -> DeviceRequest:
    """Read `auto`, `cpu`, `cpu:N` or `N`.

    Raises:
        UsageError: the text has none of these forms.
    """
    match = re.fullmatch(r"auto|cpu|(?:cpu:)?(?P<count>[1-9][0-9]{0,5})", text)
    if match is None:
        msg = (
            f"--devices {text!r} names no devices: pass auto, cpu, cpu:N for N ranks on the CPU,"
            " or N for N devices (N at least 1)"
        )
        raise UsageError(msg)
    count = match["count"]
    return DeviceRequest(on_cpu=text.startswith("cpu"), count=int(count) if count else None)


def choose_cluster(
    request: DeviceRequest,
    host: Host,
    gpus: NvidiaInventory,
    torch_build: TorchBuild,
    device_memory_bytes: int | None,
) -> Cluster:
    """Decide on the devices from what was found.

    Raises:
        UsageError: more GPUs are asked for than are visible.
        NoUsableDeviceError: GPUs are visible, but torch cannot use them, or they are unlike, or
            their free memory is neither told by NVML nor by `device_memory_bytes`.
    """
    if request.on_cpu or not gpus.devices:
        return _cpu_cluster(request, host, gpus, torch_build, device_memory_bytes)
    if torch_build.cuda_version is None:
        why = torch_build.note or f"torch {torch_build.version} is built without CUDA"
        msg = (
            f"{_name_devices(gpus.devices)} cannot be used because {why}: install a CUDA build of"
            " torch, or pass --devices cpu"
        )
        raise NoUsableDeviceError(msg)
    return _cuda_cluster(request, host, gpus, device_memory_bytes)


def _cuda_cluster(
    request: DeviceRequest, host: Host, gpus: NvidiaInventory, device_memory_bytes: int | None
) -> Cluster:
    devices = _first(gpus, request.count)
    _require_alike(devices)
    budget = _gpu_budget(devices, device_memory_bytes)
    return Cluster(
        kind="cuda",
        device_name=devices[0].name or "NVIDIA GPU",
        num_devices=len(devices),
        device_memory_bytes=budget.num_bytes,
        device_memory_source=budget.source,
        threads_per_rank=_threads_per_rank(host, len(devices)),
        compute_capability=devices[0].compute_capability,
        visible_devices=_mask_entries(devices),
        host=host,
        notes=gpus.notes + budget.notes,
    )


def _first(gpus: NvidiaInventory, count: int | None) -> tuple[NvidiaDevice, ...]:
    visible = len(gpus.devices)
    if count is not None and count > visible:
        reason = "".join(f" ({note})" for note in gpus.notes)
        msg = (
            f"--devices {count} asks for more GPUs than the {visible} visible{reason}: pass"
            f" --devices {visible}, or let CUDA_VISIBLE_DEVICES show more"
        )
        raise UsageError(msg)
    return gpus.devices[:count]


def _require_alike(devices: Sequence[NvidiaDevice]) -> None:
    alike = [device for device in devices if _is_alike(device, devices[0])]
    if len(alike) == len(devices):
        return
    numbers = ",".join(str(device.index) for device in alike)
    msg = (
        f"the GPUs are unlike ({_name_devices(devices)}), and every rank needs the same: choose"
        " alike ones, for instance with"
        f" CUDA_DEVICE_ORDER=PCI_BUS_ID CUDA_VISIBLE_DEVICES={numbers}"
    )
    raise NoUsableDeviceError(msg)


def _is_alike(one: NvidiaDevice, other: NvidiaDevice) -> bool:
    less, more = sorted((one.memory_total_bytes or 0, other.memory_total_bytes or 0))
    return one.name == other.name and less >= more * _ALIKE_MEMORY_RATIO


def _name_devices(devices: Sequence[NvidiaDevice]) -> str:
    return ", ".join(
        f"GPU {device.index} {device.name or 'of unknown name'}"
        + (f" {format_bytes(device.memory_total_bytes)}" if device.memory_total_bytes else "")
        for device in devices
    )


def _mask_entries(devices: Sequence[NvidiaDevice]) -> tuple[str, ...]:
    """Give the devices as CUDA_VISIBLE_DEVICES names them: UUIDs mean the same in any order."""
    uuids = tuple(device.uuid for device in devices if device.uuid is not None)
    if len(uuids) == len(devices):
        return uuids
    return tuple(str(device.index) for device in devices)


def _gpu_budget(devices: Sequence[NvidiaDevice], asked: int | None) -> _Budget:
    free = [d.memory_free_bytes for d in devices if d.memory_free_bytes is not None]
    if len(free) == len(devices):
        source = "free memory of the GPU" if len(free) == 1 else "least free memory of the GPUs"
        # What NVML calls free is not all to be had: the driver rounds and keeps pages of its own.
        return _cap(_Budget(num_bytes=min(free) * 98 // 100, source=f"{source} less 2 %"), asked)
    if asked is None:
        msg = (
            f"NVML does not tell the free memory of {_name_devices(devices)}: say what a rank may"
            " use, for instance with --device-memory 16GiB"
        )
        raise NoUsableDeviceError(msg)
    note = "NVML does not tell the free memory, so --device-memory is believed as it stands"
    return _Budget(num_bytes=asked, source="--device-memory", notes=(note,))


def _cap(there: _Budget, asked: int | None) -> _Budget:
    if asked is None:
        return there
    if asked <= there.num_bytes:
        return _Budget(num_bytes=asked, source="--device-memory")
    note = (
        f"--device-memory {format_bytes(asked)} is more than there is, so"
        f" {format_bytes(there.num_bytes)} is kept ({there.source})"
    )
    return _Budget(num_bytes=there.num_bytes, source=there.source, notes=(note,))


def _cpu_cluster(
    request: DeviceRequest,
    host: Host,
    gpus: NvidiaInventory,
    torch_build: TorchBuild,
    device_memory_bytes: int | None,
) -> Cluster:
    ranks = request.count or _default_cpu_ranks(host)
    budget = _cap(_cpu_budget(host, ranks), device_memory_bytes)
    return Cluster(
        kind="cpu",
        device_name=host.cpu_name,
        num_devices=ranks,
        device_memory_bytes=budget.num_bytes,
        device_memory_source=budget.source,
        threads_per_rank=_threads_per_rank(host, ranks),
        compute_capability=None,
        visible_devices=("cpu",) * ranks,
        host=host,
        notes=(*_cpu_notes(request, host, gpus, ranks), *_torch_notes(torch_build), *budget.notes),
    )


def _default_cpu_ranks(host: Host) -> int:
    """Choose one rank a socket, and two at least so that sharding over ranks saves something."""
    return min(max(host.sockets, 2), host.usable_cores)


def _threads_per_rank(host: Host, ranks: int) -> int:
    # Two threads on one physical core slow each other down in matrix products.
    return max(1, min(host.usable_cores, host.physical_cores) // ranks)


def _cpu_budget(host: Host, ranks: int) -> _Budget:
    source = "nine tenths of the host's available memory"
    return _Budget(
        num_bytes=host.available_bytes * 9 // 10 // ranks,
        source=source if ranks == 1 else f"{source}, shared by {ranks} ranks",
    )


def _cpu_notes(
    request: DeviceRequest, host: Host, gpus: NvidiaInventory, ranks: int
) -> tuple[str, ...]:
    cores = _count(host.usable_cores, "usable core")
    notes: list[str] = []
    if not request.on_cpu or request.count is None:
        why = "--devices says so" if request.on_cpu else f"no NVIDIA GPU is usable: {gpus.absence}"
        how = "as asked" if request.count else f"one a socket, at least 2, at most the {cores}"
        notes.append(f"runs on the CPU with {_count(ranks, 'rank')} ({how}), because {why}")
    if ranks > host.usable_cores:
        notes.append(f"{ranks} ranks share {cores}: they take turns and every step slows down")
    return tuple(notes)


def _torch_notes(torch_build: TorchBuild) -> tuple[str, ...]:
    return () if torch_build.note is None else (torch_build.note,)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
