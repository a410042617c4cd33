"""Watches the GPUs of a run from its own process, through NVML: memory, clocks, faults."""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from autotune.detect.health import XIDS_OF_HARDWARE, read_health, slowed, worsened
from autotune.detect.nvml import NvmlUnavailableError, start

_log = logging.getLogger(__name__)

_XID_EVENT = 8  # nvmlEventTypeXidCriticalError
_NOTHING_TO_WAIT_FOR_MS = 0
_MOST_EVENTS = 100
_SAMPLE_S = 0.2
_MEMORY_V2 = 0x02000028  # nvmlMemory_v2


class GpuMonitor:
    """What NVML tells of GPUs while they work; a GPU that tells nothing is never at fault.

    Args:
        uuids: of the GPUs, or their numbers.
        binding: the module pynvml, or what stands in for it.
        clock: seconds.

    Raises:
        NvmlUnavailableError: NVML does not start.
    """

    def __init__(
        self,
        uuids: Sequence[str],
        binding: Any = None,  # noqa: ANN401 - a module
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._nvml = start(binding)
        self._clock = clock
        handles = {uuid: self._handle(uuid) for uuid in uuids}
        # What NVML does not know is not asked for: a null handle is not safe to pass on.
        self._handles = {uuid: gpu for uuid, gpu in handles.items() if gpu is not None}
        self._health = {uuid: read_health(self._nvml, gpu) for uuid, gpu in self._handles.items()}
        self._events = self._nvml.ask("nvmlEventSetCreate")
        for gpu in self._handles.values() if self._events is not None else ():
            self._nvml.ask("nvmlDeviceRegisterEvents", gpu, _XID_EVENT, self._events)
        self._sampled_at = -_SAMPLE_S
        self._slowed: dict[str, set[str]] = {}
        self._peaks: dict[str, int] = {}
        self._baseline = self._used()

    def _handle(self, name: str) -> object:
        if name.isdecimal():
            return self._nvml.ask("nvmlDeviceGetHandleByIndex", int(name))
        return self._nvml.ask("nvmlDeviceGetHandleByUUID", name)

    def begin(self) -> None:
        """Take what is in use now as the baseline; what was seen so far is forgotten."""
        self._baseline = self._used()
        self._peaks, self._slowed = {}, {}

    def sample(self) -> None:
        """Look at memory and clocks, a few times a second at most."""
        if self._clock() - self._sampled_at < _SAMPLE_S:
            return
        self._sampled_at = self._clock()
        self._look()

    def _look(self) -> None:
        for uuid, used in self._used().items():
            self._peaks[uuid] = max(used, self._peaks.get(uuid, 0))
        for uuid, gpu in self._handles.items():
            reasons = self._nvml.ask("nvmlDeviceGetCurrentClocksEventReasons", gpu)
            self._slowed.setdefault(uuid, set()).update(slowed(reasons or 0))

    def take_peak(self) -> int | None:
        """Return the most that a GPU had in use above its baseline since this was last asked."""
        self._look()
        grown = [peak - self._baseline.get(uuid, 0) for uuid, peak in self._peaks.items()]
        self._peaks = {}
        return max(0, *grown) if grown else None

    def slowed(self) -> Mapping[str, tuple[str, ...]]:
        """Return what has held back the clocks of which GPU since `begin`."""
        return {uuid: tuple(sorted(why)) for uuid, why in self._slowed.items() if why}

    def new_faults(self) -> tuple[str, ...]:
        """Return what has gone wrong with which GPU since this was last asked, a clause each."""
        faults = []
        for uuid, gpu in self._handles.items():
            now = read_health(self._nvml, gpu)
            if (what := worsened(self._health[uuid], now)) is not None:
                faults.append(f"GPU {uuid}: {what}")
            self._health[uuid] = now
        return (*faults, *self._xids())

    def _xids(self) -> list[str]:
        faults: list[str] = []
        for _ in range(_MOST_EVENTS if self._events is not None else 0):
            event = self._nvml.ask("nvmlEventSetWait_v2", self._events, _NOTHING_TO_WAIT_FOR_MS)
            if event is None:
                break
            number = int(event.eventData)
            name = self._nvml.ask("nvmlDeviceGetUUID", event.device) or "of unknown name"
            if number in XIDS_OF_HARDWARE:
                faults.append(f"GPU {name}: Xid {number}, {XIDS_OF_HARDWARE[number]}")
            else:
                _log.debug("GPU %s: Xid %d, which is a program's", name, number)
        return faults

    def _used(self) -> dict[str, int]:
        used = {}
        for uuid, gpu in self._handles.items():
            memory = self._nvml.ask("nvmlDeviceGetMemoryInfo", gpu, version=_MEMORY_V2)
            memory = memory or self._nvml.ask("nvmlDeviceGetMemoryInfo", gpu)
            if memory is not None:
                used[uuid] = int(memory.total - memory.free)
        return used

    def close(self) -> None:
        """Let go of NVML."""
        if self._events is not None:
            self._nvml.ask("nvmlEventSetFree", self._events)
        self._nvml.ask("nvmlShutdown")


def watch(uuids: Sequence[str]) -> GpuMonitor | None:
    """Return a monitor of the GPUs; None, with a line in the log, where NVML does not work."""
    try:
        return GpuMonitor(uuids)
    except NvmlUnavailableError as error:
        _log.warning("the GPUs are not watched while they work: NVML fails with %r", str(error))
        return None
