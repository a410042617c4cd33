"""The NVIDIA GPUs that NVML lists and CUDA_VISIBLE_DEVICES leaves visible."""

# ruff: noqa: N802 - the protocol has the names of NVML

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ParamSpec, Protocol, TypeVar

_P = ParamSpec("_P")
_T = TypeVar("_T")

_MIG_ENABLED = 1  # NVML_DEVICE_MIG_ENABLE
_MASK = "CUDA_VISIBLE_DEVICES"


class MemoryInfo(Protocol):
    """NVML's answer on memory, in bytes."""

    total: int
    free: int


class Nvml(Protocol):
    """The part of the module pynvml that is used; every function may raise its NVMLError."""

    @property
    def NVMLError(self) -> type[Exception]: ...
    def nvmlInit(self) -> None: ...
    def nvmlShutdown(self) -> None: ...
    def nvmlDeviceGetCount(self) -> int: ...
    def nvmlDeviceGetHandleByIndex(self, index: int) -> object: ...
    def nvmlDeviceGetName(self, handle: object) -> str: ...
    def nvmlDeviceGetUUID(self, handle: object) -> str: ...
    def nvmlDeviceGetMemoryInfo(self, handle: object) -> MemoryInfo: ...
    def nvmlDeviceGetCudaComputeCapability(self, handle: object) -> tuple[int, int]: ...
    def nvmlDeviceGetMigMode(self, handle: object) -> Sequence[int]: ...
    def nvmlDeviceGetMaxMigDeviceCount(self, handle: object) -> int: ...
    def nvmlDeviceGetMigDeviceHandleByIndex(self, handle: object, index: int) -> object: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class NvidiaDevice:
    """A GPU or an instance of one; None where NVML does not tell.

    `index` counts the GPUs that may be opened, in the order of the PCI bus.
    """

    index: int
    uuid: str | None
    name: str | None
    memory_total_bytes: int | None
    memory_free_bytes: int | None
    compute_capability: tuple[int, int] | None

    @property
    def is_instance(self) -> bool:
        """Whether this is a MIG instance and no whole GPU."""
        return self.uuid is not None and self.uuid.startswith("MIG-")


@dataclass(frozen=True, slots=True, kw_only=True)
class NvidiaInventory:
    """The visible devices; `absence` says why there is none."""

    devices: tuple[NvidiaDevice, ...]
    absence: str | None = None
    notes: tuple[str, ...] = ()


def read_nvidia(
    nvml: Nvml | None = None, environ: Mapping[str, str] = os.environ
) -> NvidiaInventory:
    """List the GPUs; without a working NVML there is none, and `absence` tells NVML's reason."""
    if nvml is None:
        import pynvml

        nvml = pynvml
    try:
        nvml.nvmlInit()
        try:
            present = tuple(_read_devices(nvml))
        finally:
            nvml.nvmlShutdown()
    except nvml.NVMLError as error:
        return NvidiaInventory(devices=(), absence=f"NVML fails with {str(error)!r}")
    return select_visible(present, environ)


def used_bytes(nvml: Nvml | None = None) -> dict[str, int]:
    """Return the bytes in use of each visible GPU that tells, whoever uses them, by its UUID."""
    return {
        device.uuid or str(device.index): device.memory_total_bytes - device.memory_free_bytes
        for device in read_nvidia(nvml).devices
        if device.memory_total_bytes is not None and device.memory_free_bytes is not None
    }


def _read_devices(nvml: Nvml) -> Iterator[NvidiaDevice]:
    found = (
        _ask(nvml, nvml.nvmlDeviceGetHandleByIndex, index)
        for index in range(nvml.nvmlDeviceGetCount())
    )
    # NVML counts the GPUs that are closed to this process too; CUDA does not number them.
    opened = (handle for handle in found if handle is not None)
    for index, gpu in enumerate(opened):
        for handle in _instances(nvml, gpu):
            yield _read_device(nvml, index, gpu, handle)


def _instances(nvml: Nvml, gpu: object) -> list[object]:
    """List what CUDA can open of a GPU: itself, or with MIG on its instances only."""
    mode = _ask(nvml, nvml.nvmlDeviceGetMigMode, gpu)
    if mode is None or mode[0] != _MIG_ENABLED:
        return [gpu]
    places = range(_ask(nvml, nvml.nvmlDeviceGetMaxMigDeviceCount, gpu) or 0)
    found = (_ask(nvml, nvml.nvmlDeviceGetMigDeviceHandleByIndex, gpu, place) for place in places)
    return [handle for handle in found if handle is not None]


def _read_device(nvml: Nvml, index: int, gpu: object, handle: object) -> NvidiaDevice:
    memory = _ask(nvml, nvml.nvmlDeviceGetMemoryInfo, handle)
    return NvidiaDevice(
        index=index,
        uuid=_ask(nvml, nvml.nvmlDeviceGetUUID, handle),
        name=_ask(nvml, nvml.nvmlDeviceGetName, handle),
        memory_total_bytes=None if memory is None else memory.total,
        memory_free_bytes=None if memory is None else memory.free,
        # An instance does not tell its own.
        compute_capability=_ask(nvml, nvml.nvmlDeviceGetCudaComputeCapability, gpu),
    )


def _ask(nvml: Nvml, question: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T | None:
    """Put one question to NVML; any of them may be unsupported on a device or under a driver."""
    try:
        return question(*args, **kwargs)
    except nvml.NVMLError:
        return None


def select_visible(present: Sequence[NvidiaDevice], environ: Mapping[str, str]) -> NvidiaInventory:
    """Keep what a CUDA process with this environment would see, and note what may surprise."""
    if not present:
        return NvidiaInventory(devices=(), absence="NVML lists no GPU")
    mask = environ.get(_MASK)
    masked = tuple(present) if mask is None else apply_mask(mask, present)
    if not masked:
        return NvidiaInventory(
            devices=(), absence=f"{_MASK}={mask!r} leaves none of {len(present)} visible"
        )
    # CUDA opens one MIG instance a process, and no whole GPU beside it.
    visible = tuple(device for device in masked if device.is_instance)[:1] or masked
    return NvidiaInventory(
        devices=visible, notes=tuple(_surprises(present, masked, visible, environ))
    )


def _surprises(
    present: Sequence[NvidiaDevice],
    masked: tuple[NvidiaDevice, ...],
    visible: tuple[NvidiaDevice, ...],
    environ: Mapping[str, str],
) -> Iterator[str]:
    mask = environ.get(_MASK, "")
    named = mask.count(",") + 1
    if mask and len(masked) < named:
        yield f"{_MASK}={mask!r}: entry {len(masked) + 1} is not valid, so CUDA ends the list there"
    unlike = len({device.name for device in present}) > 1
    by_number = mask.strip()[:1].isdigit()
    if by_number and unlike and environ.get("CUDA_DEVICE_ORDER") != "PCI_BUS_ID":
        yield (
            f"{_MASK}={mask!r} is read in the order of the PCI bus, while CUDA by default numbers"
            " the fastest GPU first: name GPUs by UUID, or set CUDA_DEVICE_ORDER=PCI_BUS_ID"
        )
    if len(visible) < len(masked):
        yield f"CUDA opens one MIG instance a process, so {visible[0].uuid} is used alone"


def apply_mask(mask: str, devices: Sequence[NvidiaDevice]) -> tuple[NvidiaDevice, ...]:
    """Choose devices as CUDA reads CUDA_VISIBLE_DEVICES.

    An entry is a number, a UUID or a prefix of exactly one UUID. The first that is none of these
    ends the list, so "" and "-1" hide everything; a device named twice hides everything too.
    """
    chosen: list[NvidiaDevice] = []
    for entry in mask.split(","):
        device = _find(entry.strip(), devices)
        if device is None:
            break
        if device in chosen:
            return ()
        chosen.append(device)
    return tuple(chosen)


def _find(entry: str, devices: Sequence[NvidiaDevice]) -> NvidiaDevice | None:
    if entry.startswith(("GPU-", "MIG-")):
        matches = [device for device in devices if (device.uuid or "").startswith(entry)]
        return matches[0] if len(matches) == 1 else None
    # CUDA reads as strtoul does: what follows the digits is passed over.
    if (digits := re.match(r"[0-9]+", entry)) is None:
        return None
    number = digits[0].lstrip("0") or "0"
    return next((device for device in devices if str(device.index) == number), None)
