"""Which devices a job runs on: the visible NVIDIA GPUs, or the CPU if there is none."""

import os
from collections.abc import Collection, Sequence

from autotune.detect.affinity import near_cpus, threads_near
from autotune.detect.budget import (
    Budget,
    capacity,
    capped,
    gpu_budget,
    is_busy,
    used_by_others,
)
from autotune.detect.by_torch import read_by_torch
from autotune.detect.health import unfit, worry
from autotune.detect.host import read_host
from autotune.detect.links import read_links
from autotune.detect.nvidia import (
    COMPUTE_EXCLUSIVE,
    COMPUTE_PROHIBITED,
    NvidiaDevice,
    NvidiaInventory,
    read_nvidia,
)
from autotune.detect.request import DeviceRequest, named_devices, parse_devices
from autotune.detect.torch_build import TorchBuild, read_torch_build
from autotune.devices import canonical_name, known_gpu
from autotune.errors import NoUsableDeviceError, UsageError
from autotune.hardware import Cluster, Device, Host
from autotune.units import format_bytes

__all__ = ["DeviceRequest", "choose_cluster", "detect", "parse_devices", "read_gpus"]

# GPUs of one product can differ by a few MiB (pages retired after memory errors).
_ALIKE_MEMORY_RATIO = 0.99


def detect(devices: str = "auto", device_memory_bytes: int | None = None) -> Cluster:
    """Find the devices to use; `device_memory_bytes` caps what one rank may allocate.

    Raises:
        UsageError: `devices` cannot be read, or asks for GPUs that are not there.
        NoUsableDeviceError: there are GPUs, but they cannot be used.
    """
    request = parse_devices(devices)
    build = read_torch_build()
    # NVML is not even started for the CPU: a broken driver must not be in the way.
    gpus = NvidiaInventory(devices=()) if request.on_cpu else read_gpus(build)
    return choose_cluster(request, read_host(), gpus, build, device_memory_bytes)


def read_gpus(build: TorchBuild) -> NvidiaInventory:
    """List the GPUs by NVML, or where that does not work by a torch that can open them."""
    gpus = read_nvidia()
    failed = gpus.absence is not None and gpus.absence.startswith("NVML fails")
    return read_by_torch(gpus.absence or "") if failed and build.cuda_version else gpus


def choose_cluster(
    request: DeviceRequest,
    host: Host,
    gpus: NvidiaInventory,
    torch_build: TorchBuild,
    device_memory_bytes: int | None,
    allowed_cpus: Collection[int] | None = None,
) -> Cluster:
    """Decide on the devices from what was found.

    GPUs that the installed torch cannot use can still be planned for: `unusable` says why.

    Raises:
        UsageError: GPUs are asked for that are not visible.
        NoUsableDeviceError: GPUs are visible, but they are unlike, others use them, they are
            defect, or their free memory is neither told by NVML nor by `device_memory_bytes`.
    """
    if request.on_cpu or not gpus.devices:
        if request.entries:
            msg = f"--devices names GPUs, and none is usable: {gpus.absence}"
            raise NoUsableDeviceError(msg)
        return _cpu_cluster(request, host, gpus, torch_build, device_memory_bytes)
    devices = _choose(gpus, request, device_memory_bytes)
    for device in devices:
        _require_fit(device)
    _require_alike(devices)
    budget = _budget(devices, device_memory_bytes)
    places = [gpus.all_named.index(device) for device in devices]
    pairs = [pair for pair in gpus.pairs if set(pair.places) <= set(places)]
    cpus = near_cpus(devices, os.sched_getaffinity(0) if allowed_cpus is None else allowed_cpus)
    return Cluster(
        kind="cuda",
        device_name=canonical_name(devices[0].name or "NVIDIA GPU"),
        num_devices=len(devices),
        device_memory_bytes=budget.num_bytes,
        device_memory_source=budget.source,
        threads_per_rank=threads_near(cpus, host, len(devices)),
        compute_capability=devices[0].compute_capability,
        visible_devices=_mask_entries(devices),
        host=host,
        notes=gpus.notes + tuple(_worries(devices)) + budget.notes,
        headroom_bytes=budget.headroom_bytes,
        devices=tuple(map(_describe, devices)),
        links=read_links(devices, [pair.renumbered(places) for pair in pairs]),
        rank_cpus=cpus,
        unusable=_why_unusable(devices, torch_build),
    )


def _why_unusable(devices: Sequence[NvidiaDevice], torch_build: TorchBuild) -> str | None:
    if torch_build.cuda_version is not None:
        return None
    why = torch_build.note or f"torch {torch_build.version} is built without CUDA"
    alike = f" and {len(devices) - 1} alike" if len(devices) > 1 else ""
    return (
        f"{_name_devices(devices[:1])}{alike} cannot be used because {why}: install a CUDA build of"
        " torch, or pass --devices cpu"
    )


def _describe(device: NvidiaDevice) -> Device:
    return Device(
        index=device.index,
        uuid=device.uuid,
        name=device.name,
        memory_bytes=device.memory_total_bytes,
        free_bytes=device.memory_free_bytes,
    )


def _choose(
    gpus: NvidiaInventory, request: DeviceRequest, device_memory_bytes: int | None
) -> tuple[NvidiaDevice, ...]:
    """Return the devices that are asked for: those named, so many that are free, or all.

    Raises:
        UsageError: there are not as many.
        NoUsableDeviceError: others use one of them, and it is not said how much may be taken.
    """
    if request.entries:
        chosen = named_devices(request, gpus)
    elif request.count is None:
        chosen = gpus.devices
    else:
        chosen = _first(gpus, request.count)
    busy = [device for device in chosen if device_memory_bytes is None and _others_have_it(device)]
    if busy:
        raise NoUsableDeviceError(_say_busy(busy, gpus, request))
    return chosen


def _first(gpus: NvidiaInventory, count: int) -> tuple[NvidiaDevice, ...]:
    visible = len(gpus.devices)
    if count > visible:
        reason = "".join(f" ({note})" for note in gpus.notes)
        msg = (
            f"--devices {count} asks for more GPUs than the {visible} visible{reason}: pass"
            f" --devices {visible}, or let CUDA_VISIBLE_DEVICES show more"
        )
        raise UsageError(msg)
    # Any will do, so those that others use come last.
    free_first = sorted(gpus.devices, key=_others_have_it)
    return tuple(sorted(free_first[:count], key=gpus.devices.index))


def _say_busy(busy: Sequence[NvidiaDevice], gpus: NvidiaInventory, request: DeviceRequest) -> str:
    said = "; ".join(map(_say_used, busy))
    free = [place for place, one in enumerate(gpus.devices) if not _others_have_it(one)]
    ways = [] if request.entries or not free else [f"pass --devices gpu:{','.join(map(str, free))}"]
    ways.append("say with --device-memory, 4GiB for instance, what may be taken all the same")
    return f"others use {said}: wait until they are done, {', or '.join(ways)}"


def _say_used(device: NvidiaDevice) -> str:
    assert device.memory_free_bytes is not None, "what is busy tells its memory"
    by = f" by process {', '.join(map(str, device.pids))}" if device.pids else ""
    if device.compute_mode == COMPUTE_EXCLUSIVE and device.pids:
        return f"{device.label}{by}, and it is set to serve one process at a time"
    room = _capacity(device)
    used = used_by_others(room, device.memory_free_bytes)
    return f"{format_bytes(used)} of the {format_bytes(room)} of {device.label}{by}"


def _others_have_it(device: NvidiaDevice) -> bool:
    if device.memory_free_bytes is None or device.memory_total_bytes is None:
        return False
    if device.compute_mode == COMPUTE_EXCLUSIVE and device.pids:
        return True
    return is_busy(_capacity(device), device.memory_free_bytes)


def _require_fit(device: NvidiaDevice) -> None:
    """Refuse a device that would fail.

    Raises:
        NoUsableDeviceError: with the reason.
    """
    why = unfit(device.health)
    if device.compute_mode == COMPUTE_PROHIBITED:
        why = "it is set to serve no process (compute mode prohibited)"
    if why is not None:
        msg = f"{device.label} cannot be used: {why}. Leave it out with --devices"
        raise NoUsableDeviceError(msg)


def _worries(devices: Sequence[NvidiaDevice]) -> list[str]:
    told = ((device.label, worry(device.health)) for device in devices)
    return [f"{label}: {what}" for label, what in told if what is not None]


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


def _capacity(device: NvidiaDevice) -> int:
    assert device.memory_total_bytes is not None, "a device that tells what is free tells its size"
    known = known_gpu(device.name or "")
    return capacity(
        device.memory_total_bytes,
        device.memory_reserved_bytes,
        known.memory_bytes if known else None,
    )


def _budget(devices: Sequence[NvidiaDevice], asked: int | None) -> Budget:
    """Return the budget of a rank: that of the device with the least.

    Raises:
        NoUsableDeviceError: the free memory of one is not known.
    """
    told = [
        (gpu_budget(_capacity(device), device.memory_free_bytes), device.memory_free_bytes)
        for device in devices
        if device.memory_free_bytes is not None and device.memory_total_bytes is not None
    ]
    if len(told) == len(devices):
        least, free = min(told, key=lambda one: one[0].num_bytes)
        return capped(least, asked, free)
    if asked is None:
        msg = (
            f"NVML does not tell the free memory of {_name_devices(devices)}: say what a rank may"
            " use, for instance with --device-memory 16GiB"
        )
        raise NoUsableDeviceError(msg)
    note = "NVML does not tell the free memory, so --device-memory is believed as it stands"
    return Budget(num_bytes=asked, source="--device-memory", notes=(note,))


def _cpu_cluster(
    request: DeviceRequest,
    host: Host,
    gpus: NvidiaInventory,
    torch_build: TorchBuild,
    device_memory_bytes: int | None,
) -> Cluster:
    ranks = request.count or _default_cpu_ranks(host)
    budget = capped(_cpu_budget(host, ranks), device_memory_bytes)
    return Cluster(
        kind="cpu",
        device_name=host.cpu_name,
        num_devices=ranks,
        device_memory_bytes=budget.num_bytes,
        device_memory_source=budget.source,
        threads_per_rank=threads_near((), host, ranks),
        compute_capability=None,
        visible_devices=("cpu",) * ranks,
        host=host,
        notes=(*_cpu_notes(request, host, gpus, ranks), *_torch_notes(torch_build), *budget.notes),
    )


def _default_cpu_ranks(host: Host) -> int:
    """Choose one rank a socket, and two at least so that sharding over ranks saves something."""
    return min(max(host.sockets, 2), host.usable_cores)


def _cpu_budget(host: Host, ranks: int) -> Budget:
    source = "nine tenths of the host's available memory"
    return Budget(
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
