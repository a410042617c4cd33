"""The NVIDIA GPUs that NVML lists and CUDA_VISIBLE_DEVICES leaves visible."""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from autotune.detect.health import HEALTHY, Health, read_health
from autotune.detect.masks import MASK, apply_mask, find_entry, is_uuid
from autotune.detect.nvml import Nvml, NvmlUnavailableError, session

_MIG_ENABLED = 1  # NVML_DEVICE_MIG_ENABLE
_MEMORY_V2 = 0x02000028  # nvmlMemory_v2
_CPU_SET_WORDS = 64  # of 64 CPUs each
_MOST_LINKS = 18  # NVML_NVLINK_MAX_LINKS
_PCIE_LANE_BYTES_PER_S = {1: 0.25e9, 2: 0.5e9, 3: 1e9, 4: 2e9, 5: 4e9, 6: 8e9}
"""One direction of one lane, by generation (PCI-SIG), its encoding not taken off, as in the table
of known GPUs."""

COMPUTE_PROHIBITED, COMPUTE_EXCLUSIVE = 2, 3  # NVML_COMPUTEMODE_*


@dataclass(frozen=True, slots=True, kw_only=True)
class NvidiaDevice:
    """A GPU or an instance of one; None where NVML does not tell.

    Attributes:
        index: counts the GPUs that may be opened, in the order of the PCI bus.
        memory_reserved_bytes: of the total, what the driver keeps; 0 where it is not told apart.
        cpus: logical CPUs that are near it.
        pcie_bytes_per_s: one direction to the host, of the slot as it is wired.
        nvlinks: NVLinks that are up.
        pids: processes that compute on it, as the host numbers them.
        compute_mode: NVML's number: 0 anyone, 2 nobody, 3 one process.
        health: errors of its memory so far.
    """

    index: int
    uuid: str | None
    name: str | None
    memory_total_bytes: int | None
    memory_free_bytes: int | None
    compute_capability: tuple[int, int] | None
    memory_reserved_bytes: int = 0
    pci_bus_id: str | None = None
    cpus: tuple[int, ...] | None = None
    pcie_bytes_per_s: float | None = None
    nvlinks: int | None = None
    pids: tuple[int, ...] = ()
    compute_mode: int | None = None
    health: Health = HEALTHY

    @property
    def is_instance(self) -> bool:
        """Whether this is a MIG instance and no whole GPU."""
        return self.uuid is not None and self.uuid.startswith("MIG-")

    @property
    def label(self) -> str:
        """Return what messages call it."""
        named = f"GPU {self.index}"
        return f"{named} ({self.uuid})" if self.uuid else named


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """How two devices, by their place among the visible ones, reach each other; None is unknown."""

    places: tuple[int, int]
    by_nvlink: bool | None
    peer_access: bool | None

    def renumbered(self, places: Sequence[int]) -> "Pair":
        """Return the same pair by its places among fewer devices."""
        first, second = sorted(places.index(place) for place in self.places)
        return replace(self, places=(first, second))


@dataclass(frozen=True, slots=True, kw_only=True)
class NvidiaInventory:
    """The visible devices; `absence` says why there is none.

    Attributes:
        beside: what the mask leaves visible too but CUDA does not open beside `devices`.
        pairs: of `devices`.
        driver: of the machine.
    """

    devices: tuple[NvidiaDevice, ...]
    absence: str | None = None
    notes: tuple[str, ...] = ()
    beside: tuple[NvidiaDevice, ...] = ()
    pairs: tuple[Pair, ...] = ()
    driver: str | None = field(default=None, compare=False)
    cuda_driver: str | None = field(default=None, compare=False)

    @property
    def all_named(self) -> tuple[NvidiaDevice, ...]:
        """Everything that the mask leaves visible."""
        return self.devices + self.beside


def read_nvidia(
    binding: Any = None,  # noqa: ANN401 - the module pynvml, or what stands in for it
    environ: Mapping[str, str] = os.environ,
) -> NvidiaInventory:
    """List the GPUs; without a working NVML there is none, and `absence` tells NVML's reason."""
    try:
        with session(binding) as nvml:
            count, why = nvml.answer("nvmlDeviceGetCount")
            if why is not None:
                return _absent(why)
            handles, present, notes = _read_devices(nvml, count)
            found = select_visible(present, environ)
            visible = [handles[present.index(one)] for one in found.devices]
            pairs = _read_pairs(nvml, visible)
            return NvidiaInventory(
                devices=found.devices,
                absence=found.absence and "; ".join([found.absence, *notes]),
                notes=(*notes, *found.notes),
                beside=found.beside,
                pairs=pairs,
                driver=nvml.ask("nvmlSystemGetDriverVersion"),
                cuda_driver=_cuda_driver(nvml),
            )
    except NvmlUnavailableError as error:
        return _absent(str(error))


def _absent(why: str) -> NvidiaInventory:
    return NvidiaInventory(devices=(), absence=f"NVML fails with {why!r}")


def _cuda_driver(nvml: Nvml) -> str | None:
    version = nvml.ask("nvmlSystemGetCudaDriverVersion")
    return None if version is None else f"{version // 1000}.{version % 1000 // 10}"


def used_bytes(binding: Any = None) -> dict[str, int]:  # noqa: ANN401 - as of read_nvidia
    """Return the bytes in use of each visible GPU that tells, whoever uses them, by its UUID."""
    return {
        device.uuid or str(device.index): device.memory_total_bytes - device.memory_free_bytes
        for device in read_nvidia(binding).devices
        if device.memory_total_bytes is not None and device.memory_free_bytes is not None
    }


def _read_devices(nvml: Nvml, count: int) -> tuple[list[object], list[NvidiaDevice], list[str]]:
    """Return handles and devices, in the order of the PCI bus, and what was left out and why."""
    handles: list[object] = []
    devices: list[NvidiaDevice] = []
    notes: list[str] = []
    opened = 0
    for number in range(count):
        gpu, why = nvml.answer("nvmlDeviceGetHandleByIndex", number)
        if gpu is None:
            # NVML counts the GPUs that are closed to this process too; CUDA does not number them.
            notes.append(f"GPU {number} of NVML's is left out: NVML says {why!r}")
            continue
        for handle in _instances(nvml, gpu):
            handles.append(handle)
            devices.append(_read_device(nvml, opened, gpu, handle))
        opened += 1
    return handles, devices, notes


def _instances(nvml: Nvml, gpu: object) -> list[object]:
    """List what CUDA can open of a GPU: itself, or with MIG on its instances only."""
    mode = nvml.ask("nvmlDeviceGetMigMode", gpu)
    if mode is None or mode[0] != _MIG_ENABLED:
        return [gpu]
    places = range(nvml.ask("nvmlDeviceGetMaxMigDeviceCount", gpu) or 0)
    found = (nvml.ask("nvmlDeviceGetMigDeviceHandleByIndex", gpu, place) for place in places)
    return [handle for handle in found if handle is not None]


def _read_device(nvml: Nvml, index: int, gpu: object, handle: object) -> NvidiaDevice:
    apart = nvml.ask("nvmlDeviceGetMemoryInfo", handle, version=_MEMORY_V2)
    memory = apart or nvml.ask("nvmlDeviceGetMemoryInfo", handle)
    processes = nvml.ask("nvmlDeviceGetComputeRunningProcesses", handle) or ()
    pci = nvml.ask("nvmlDeviceGetPciInfo", gpu)
    capability = nvml.ask("nvmlDeviceGetCudaComputeCapability", gpu)
    return NvidiaDevice(
        index=index,
        uuid=nvml.ask("nvmlDeviceGetUUID", handle),
        name=nvml.ask("nvmlDeviceGetName", handle),
        memory_total_bytes=None if memory is None else memory.total,
        memory_free_bytes=None if memory is None else memory.free,
        memory_reserved_bytes=0 if apart is None else apart.reserved,
        # An instance does not tell its own.
        compute_capability=None if capability is None else tuple(capability),
        pci_bus_id=_text(getattr(pci, "busId", None)),
        cpus=_cpus(nvml, gpu),
        pcie_bytes_per_s=_pcie_bytes_per_s(nvml, gpu),
        nvlinks=_nvlinks(nvml, gpu),
        pids=tuple(process.pid for process in processes),
        compute_mode=nvml.ask("nvmlDeviceGetComputeMode", handle),
        health=read_health(nvml, gpu),
    )


def _text(value: object) -> str | None:
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    return value if isinstance(value, str) else None


def _cpus(nvml: Nvml, gpu: object) -> tuple[int, ...] | None:
    words = nvml.ask("nvmlDeviceGetCpuAffinity", gpu, _CPU_SET_WORDS)
    if words is None:
        return None
    near = [
        64 * place + bit for place, word in enumerate(words) for bit in range(64) if word >> bit & 1
    ]
    return tuple(near) or None


def _pcie_bytes_per_s(nvml: Nvml, gpu: object) -> float | None:
    """Return what the slot carries; an idle GPU turns down its generation, and not its width."""
    lane = _PCIE_LANE_BYTES_PER_S.get(nvml.ask("nvmlDeviceGetMaxPcieLinkGeneration", gpu) or 0)
    widths = (
        nvml.ask("nvmlDeviceGetMaxPcieLinkWidth", gpu),
        nvml.ask("nvmlDeviceGetCurrPcieLinkWidth", gpu),
    )
    wired = [width for width in widths if width]
    return lane * min(wired) if lane and wired else None


def _nvlinks(nvml: Nvml, gpu: object) -> int | None:
    states = [nvml.ask("nvmlDeviceGetNvLinkState", gpu, link) for link in range(_MOST_LINKS)]
    told = [state for state in states if state is not None]
    return sum(map(bool, told)) if told else None


# NVML_P2P_CAPS_INDEX_READ and _NVLINK, and NVML_P2P_STATUS_OK; the binding has a tuple for one.
_READ, _NVLINK, _P2P_OK = 0, 2, 0


def _read_pairs(nvml: Nvml, handles: Sequence[object]) -> tuple[Pair, ...]:
    def told(one: object, other: object, of: int) -> bool | None:
        status = nvml.ask("nvmlDeviceGetP2PStatus", one, other, of)
        return None if status is None else status == _P2P_OK

    return tuple(
        Pair(
            places=(first, second),
            by_nvlink=told(handles[first], handles[second], _NVLINK),
            peer_access=told(handles[first], handles[second], _READ),
        )
        for second in range(len(handles))
        for first in range(second)
    )


def select_visible(present: Sequence[NvidiaDevice], environ: Mapping[str, str]) -> NvidiaInventory:
    """Keep what a CUDA process with this environment would see, and note what may surprise."""
    if not present:
        return NvidiaInventory(devices=(), absence="NVML lists no GPU")
    mask = environ.get(MASK)
    masked = tuple(present) if mask is None else apply_mask(mask, present)
    if not masked:
        return NvidiaInventory(
            devices=(),
            absence=f"{MASK}={mask!r} leaves none of {len(present)} visible"
            + _why_mask_fails(mask or "", present),
        )
    # CUDA opens one MIG instance a process, and no whole GPU beside it.
    visible = tuple(device for device in masked if device.is_instance)[:1] or masked
    return NvidiaInventory(
        devices=visible,
        notes=tuple(_surprises(present, masked, visible, environ)),
        beside=tuple(device for device in masked if device not in visible),
    )


def _why_mask_fails(mask: str, present: Sequence[NvidiaDevice]) -> str:
    """Say what is wrong with a mask that hides everything without being made for it."""
    entry = mask.partition(",")[0].strip()
    if entry in {"", "-1"}:
        return ""
    if find_entry(entry, present) is not None:
        return ": it names a device twice"
    alike = [
        device for device in present if is_uuid(entry) and (device.uuid or "").startswith(entry)
    ]
    if len(alike) > 1:
        return f": {entry!r} is the beginning of {len(alike)} UUIDs"
    return f": {entry!r} names no GPU of this machine"


def _surprises(
    present: Sequence[NvidiaDevice],
    masked: tuple[NvidiaDevice, ...],
    visible: tuple[NvidiaDevice, ...],
    environ: Mapping[str, str],
) -> Iterator[str]:
    mask = environ.get(MASK, "")
    named = mask.count(",") + 1
    if mask and len(masked) < named:
        yield f"{MASK}={mask!r}: entry {len(masked) + 1} is not valid, so CUDA ends the list there"
    unlike = len({device.name for device in present}) > 1
    by_number = mask.strip()[:1].isdigit()
    if by_number and unlike and environ.get("CUDA_DEVICE_ORDER") != "PCI_BUS_ID":
        yield (
            f"{MASK}={mask!r} is read in the order of the PCI bus, while CUDA by default numbers"
            " the fastest GPU first: name GPUs by UUID, or set CUDA_DEVICE_ORDER=PCI_BUS_ID"
        )
    if len(visible) < len(masked):
        yield f"CUDA opens one MIG instance a process, so {visible[0].uuid} is used alone"
