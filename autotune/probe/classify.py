"""Tells how a probe died from the evidence that it left. Pure; unknown is never out of memory."""

import signal
from dataclasses import dataclass

from autotune.outcome import Crashed, Outcome, OutOfMemory, TimedOut, Unknown

_MEMORY_ERRORS = ("OutOfMemoryError", "MemoryError")
_MEMORY_TEXTS = (
    "DefaultCPUAllocator: can't allocate memory",
    "CUDA out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "cannot allocate memory",
    "std::bad_alloc",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Death:
    """The exception that a rank wrote down before it ended."""

    rank: int
    exception: str
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """What a probe left behind.

    Attributes:
        exit_codes: of each rank, negative for a signal, None if it had to be ended.
        phase: the last phase that all ranks reached, with `idle_s` seconds since a sign of life.
        kernel_kills: processes that the kernel killed for memory in this cgroup meanwhile.
        log_tail: the last lines of the log of the rank that died first.
    """

    deaths: tuple[Death, ...]
    exit_codes: tuple[int | None, ...]
    phase: str
    idle_s: float
    timed_out: bool
    kernel_kills: int
    log_tail: str


def classify(evidence: Evidence) -> Outcome:
    """Return how the probe ended."""
    memory = next((death for death in evidence.deaths if is_out_of_memory(death)), None)
    if memory is not None:
        text = f"rank {memory.rank}: {memory.exception}: {memory.message}"
        return OutOfMemory(where="device", evidence=text)
    if -signal.SIGKILL in evidence.exit_codes and evidence.kernel_kills > 0:
        return OutOfMemory(where="host", evidence="the kernel killed a rank for memory")
    if evidence.deaths:
        death = evidence.deaths[0]
        return Crashed(
            reason=f"rank {death.rank}: {death.exception}: {death.message}",
            evidence=evidence.log_tail,
        )
    if evidence.timed_out:
        return TimedOut(phase=evidence.phase, seconds=evidence.idle_s, evidence=evidence.log_tail)
    return _classify_exit(evidence)


def _classify_exit(evidence: Evidence) -> Outcome:
    for rank, code in enumerate(evidence.exit_codes):
        if code is not None and code < 0:
            name = signal.Signals(-code).name
            return Crashed(
                reason=f"rank {rank} was ended by {name} in phase {evidence.phase}",
                evidence=evidence.log_tail,
            )
    ended = [code for code in evidence.exit_codes if code is not None]
    return Unknown(exit_code=ended[0] if ended else None, evidence=evidence.log_tail)


def is_out_of_memory(death: Death) -> bool:
    """Whether an exception says that memory ran out, by its type or an allocator's own words."""
    if death.exception.rpartition(".")[2] in _MEMORY_ERRORS:
        return True
    text = death.message.lower()
    return any(words.lower() in text for words in _MEMORY_TEXTS)
