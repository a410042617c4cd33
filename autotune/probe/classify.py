"""Tells how a probe died from the evidence that it left. Pure; unknown is never out of memory."""

import re
import signal
from dataclasses import dataclass

from autotune.outcome import Crashed, Outcome, OutOfMemory, TimedOut, Unknown, Where

_SIGNALS = {number.value: number.name for number in signal.Signals}

_DEVICE_ERRORS = frozenset({"OutOfMemoryError"})
_DEVICE_TEXTS = re.compile(
    r"CUDA out of memory"
    r"|CUDA error: out of memory"
    r"|cudaErrorMemoryAllocation"
    # A library's handle or workspace, which lies outside torch's allocator.
    r"|(?:CUBLAS|CUDNN|CUSOLVER|CUSPARSE)_STATUS_ALLOC_FAILED"
    # NCCL's buffers, with the number of the error or without.
    r"|Cuda failure (?:2 )?'out of memory'"
    r"|Failed to CUDA calloc",
    re.IGNORECASE,
)
_HOST_ERRORS = frozenset({"MemoryError"})
_HOST_TEXTS = re.compile(
    r"DefaultCPUAllocator: can't allocate memory|cannot allocate memory|std::bad_alloc",
    re.IGNORECASE,
)
_NO_MEMORY_IS_THAT_LARGE = re.compile(r"more than 1EB memory", re.IGNORECASE)
"""A size that has been garbled, by a collective that failed for instance: torch calls it out of
memory, and no smaller setting would have fitted."""

_PINS_ON_THE_HOST = "pin_memory"
"""Where CUDA runs out of memory in a function of this name, it is of host memory to be pinned."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Death:
    """The exception that a rank wrote down before it ended.

    Attributes:
        raised_in: the innermost function of Python's that was at work; empty if it is not known.
    """

    rank: int
    exception: str
    message: str
    raised_in: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """What a probe left behind.

    Attributes:
        device_kind: what the ranks ran on; a CPU's own memory is the device's.
        exit_codes: of each rank, negative for a signal, None if it had to be ended.
        phase: the last phase that all ranks reached, with `idle_s` seconds since a sign of life.
        kernel_kills: processes that the kernel killed for memory in this cgroup meanwhile.
        log_tail: the last lines of the log of the rank that died first.
    """

    device_kind: str
    deaths: tuple[Death, ...]
    exit_codes: tuple[int | None, ...]
    phase: str
    idle_s: float
    timed_out: bool
    kernel_kills: int
    log_tail: str


def classify(evidence: Evidence) -> Outcome:
    """Return how the probe ended."""
    for death in evidence.deaths:
        where = exhausted_memory(death, evidence.device_kind)
        if where is not None:
            return OutOfMemory(where=where, evidence=_words(death))
    killed = -signal.SIGKILL in evidence.exit_codes
    if killed and evidence.kernel_kills > 0:
        return OutOfMemory(where="host", evidence="the kernel killed a rank for memory")
    # SIGKILL comes from outside; what other ranks then say of a lost connection follows from it.
    if evidence.deaths and not killed:
        return Crashed(reason=_words(evidence.deaths[0]), evidence=evidence.log_tail)
    if evidence.timed_out and not killed:
        return TimedOut(phase=evidence.phase, seconds=evidence.idle_s, evidence=evidence.log_tail)
    return _classify_exit(evidence)


def _classify_exit(evidence: Evidence) -> Outcome:
    killed_first = sorted(
        enumerate(evidence.exit_codes), key=lambda ended: ended[1] != -signal.SIGKILL
    )
    for rank, code in killed_first:
        if code is not None and code < 0:
            name = _SIGNALS.get(-code, f"signal {-code}")
            return Crashed(
                reason=f"rank {rank} was ended by {name} in phase {evidence.phase}",
                evidence=evidence.log_tail,
            )
    # A rank that failed says more than one that went in good order.
    ended = [code for code in evidence.exit_codes if code is not None]
    return Unknown(exit_code=max(ended, default=None), evidence=evidence.log_tail)


def exhausted_memory(death: Death, device_kind: str) -> Where | None:
    """Return whose memory ran out, by the exception's type or an allocator's own words."""
    if _NO_MEMORY_IS_THAT_LARGE.search(death.message):
        return None
    if _says(death, _DEVICE_ERRORS, _DEVICE_TEXTS):
        return "host" if death.raised_in == _PINS_ON_THE_HOST else "device"
    if _says(death, _HOST_ERRORS, _HOST_TEXTS):
        return "device" if device_kind == "cpu" else "host"
    return None


def _says(death: Death, errors: frozenset[str], texts: re.Pattern[str]) -> bool:
    kind = death.exception.rpartition(".")[2]
    return kind in errors or texts.search(death.message) is not None


def _words(death: Death) -> str:
    return f"rank {death.rank}: {death.exception}: {death.message}"
