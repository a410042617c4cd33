"""What differs between kinds of device: memory readings, memory caps, CPUs nearby, waiting."""

import os
import re
import resource
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from autotune.engine import cuda
from autotune.workload import TrainSpec

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")


class MemoryMeter(Protocol):
    """Peak device memory of this process since the last reset, its baseline subtracted.

    Attributes:
        growth: share of a peak seen in a few steps that many steps may add to it.
    """

    growth: float

    def reset(self) -> None: ...

    def peak_bytes(self) -> int: ...

    def allocated_bytes(self) -> int | None:
        """Return the peak of the bytes in tensors alone, where the device counts them."""
        ...


class ResidentSetMeter:
    """A CPU rank: the peak resident set, read from the kernel, which can reset it.

    Made when the process group is up and before the model is built; the resident set of that moment
    (interpreter, libraries) is the baseline. Over steps of ever other shapes malloc's heap grows a
    little: 20 to 300 micro-steps after a probe were seen to add up to 4.1 % to its peak.

    Args:
        held_bytes: of a model that is built already, which are none of the baseline.
    """

    growth = 0.06

    def __init__(self, held_bytes: int = 0) -> None:
        self._baseline = _status_bytes("VmRSS") - held_bytes

    def reset(self) -> None:
        # Writing 5 resets the peak to the current resident set: proc(5).
        _CLEAR_REFS.write_text("5")

    def peak_bytes(self) -> int:
        return max(0, _status_bytes("VmHWM") - self._baseline)

    def allocated_bytes(self) -> int | None:
        return None


class AllocatorMeter:
    """A rank on an accelerator: the peaks that the allocator reserved, and that tensors took."""

    growth = 0.0

    def reset(self) -> None:
        from deepspeed.accelerator import get_accelerator

        # What smaller micro-batches left cached is no memory that this one needs.
        get_accelerator().empty_cache()
        get_accelerator().reset_peak_memory_stats()

    def peak_bytes(self) -> int:
        from deepspeed.accelerator import get_accelerator

        return int(get_accelerator().max_memory_reserved())

    def allocated_bytes(self) -> int | None:
        from deepspeed.accelerator import get_accelerator

        return int(get_accelerator().max_memory_allocated())


class MemoryCap:
    """Holds this process to a number of bytes above what it uses when the cap is made.

    On a CPU it is a soft limit on private writable memory (RLIMIT_DATA, setrlimit(2)), so that an
    allocation beyond it fails like that of a full device. On an accelerator it is the allocator's
    share of the device.
    """

    def __init__(self, device_kind: str, num_bytes: int) -> None:
        self._device_kind = device_kind
        self._num_bytes = num_bytes
        self._data_limit = _status_bytes("VmData") + num_bytes

    def enforce(self) -> None:
        if self._device_kind == "cpu":
            _, hard = resource.getrlimit(resource.RLIMIT_DATA)
            limit = (
                self._data_limit if hard == resource.RLIM_INFINITY else min(self._data_limit, hard)
            )
            resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))
        else:
            _cap_allocator(self._num_bytes)

    @contextmanager
    def lifted(self) -> Iterator[None]:
        """Let go of the cap for work that is done in host memory on other devices: saving."""
        if self._device_kind != "cpu":
            yield
            return
        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        resource.setrlimit(resource.RLIMIT_DATA, (hard, hard))
        try:
            yield
        finally:
            self.enforce()


def open_device(local_rank: int) -> None:
    """Open this rank's device; what keeps a forked process from using it shows here."""
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    accelerator.set_device(local_rank)
    accelerator.synchronize()


def enter_rank(spec: TrainSpec, local_rank: int) -> tuple[MemoryMeter, MemoryCap]:
    """Make this process a rank: CPUs, process group, threads, allocator, memory baseline and cap.

    A process group that is there already is used; else it is made from the environment of torchrun.
    """
    import deepspeed
    import torch

    _stay_near(spec.rank_cpus, local_rank)
    torch.set_num_threads(spec.threads_per_rank)
    if spec.expandable_segments:
        cuda.expand_segments()
    deepspeed.init_distributed()
    # Threads that the first backward and the first collective start belong to the baseline.
    torch.ones(1, requires_grad=True).sum().backward()
    torch.distributed.barrier()
    meter = ResidentSetMeter() if spec.device_kind == "cpu" else AllocatorMeter()
    cap = MemoryCap(spec.device_kind, spec.device_memory_bytes)
    cap.enforce()
    return meter, cap


def _stay_near(rank_cpus: Sequence[Sequence[int]], local_rank: int) -> None:
    """Keep this process, and the threads that it will start, on the CPUs near its device.

    Where none of them may be used, as on another node or under another allocation, it stays free.
    """
    near = set(rank_cpus[local_rank]) if local_rank < len(rank_cpus) else set()
    if allowed := near & os.sched_getaffinity(0):
        os.sched_setaffinity(0, allowed)


def synchronize() -> None:
    """Wait until the device has done what it was given; on a CPU it always has."""
    from deepspeed.accelerator import get_accelerator

    get_accelerator().synchronize()


def _cap_allocator(num_bytes: int) -> None:
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    cuda.cap_allocator(num_bytes / accelerator.total_memory(), accelerator.current_device())


def _status_bytes(field: str) -> int:
    match = re.search(rf"^{field}:\s+(\d+) kB$", _STATUS.read_text(), re.MULTILINE)
    assert match is not None, f"{_STATUS} has no {field}"
    return int(match[1]) * 1024
