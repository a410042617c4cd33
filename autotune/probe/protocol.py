"""What is asked of a prober and what it answers; standard library only."""

import math
from collections.abc import Generator
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from autotune.outcome import Outcome
from autotune.workload import TrainSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class RungPlan:
    """A micro-batch size to try.

    Attributes:
        memory_rows: dataset rows of the largest micro-batch that training can meet.
        timed_rows: (padded length, dataset rows) of micro-batches to time, shortest first.
    """

    micro_batch_size: int
    gradient_accumulation_steps: int
    memory_rows: tuple[int, ...]
    timed_rows: tuple[tuple[int, tuple[int, ...]], ...]


PHASES = ("start", "meet", "build")
"""What every rank goes through before its first rung: its device, the other ranks, the engine."""


def rung_phase(rung: RungPlan) -> str:
    """Name the phase in which a rung is measured."""
    return f"micro-batch {rung.micro_batch_size}"


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeRequest:
    """One structure and the ladder to climb in it."""

    label: str
    ranks: int
    spec: TrainSpec
    ds_config: dict[str, Any]
    total_steps: int
    rungs: tuple[RungPlan, ...]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> "ProbeRequest":
        rungs = tuple(
            RungPlan(
                **{
                    **rung,
                    "memory_rows": tuple(rung["memory_rows"]),
                    "timed_rows": tuple(
                        (length, tuple(rows)) for length, rows in rung["timed_rows"]
                    ),
                }
            )
            for rung in fields["rungs"]
        )
        return cls(**{**fields, "spec": TrainSpec.from_json(fields["spec"]), "rungs": rungs})


@dataclass(frozen=True, slots=True, kw_only=True)
class RungMeasurement:
    """What one rank saw, or the worst of all ranks.

    Attributes:
        accumulate_s: (padded length, seconds of each repetition) of micro-steps without an update.
        boundary_s: the same of micro-steps with gradient synchronisation and update.
        peak_bytes: the rung's peak of device memory; on a GPU, what the allocator reserved.
        seconds: what the rung took to measure.
        allocated_bytes: of that peak what was in tensors, where the device counts it.
        device_used_bytes: what the device had in use besides what others used before, as NVML sees
            it from outside: context and communicators are in it.
    """

    micro_batch_size: int
    accumulate_s: tuple[tuple[int, tuple[float, ...]], ...]
    boundary_s: tuple[tuple[int, tuple[float, ...]], ...]
    peak_bytes: int
    seconds: float
    allocated_bytes: int | None = None
    device_used_bytes: int | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> "RungMeasurement":
        """Read what a rank wrote.

        Raises:
            KeyError, TypeError, ValueError: it is not what a rank writes.
        """
        return cls(
            micro_batch_size=_whole(fields["micro_batch_size"]),
            accumulate_s=_timings(fields["accumulate_s"]),
            boundary_s=_timings(fields["boundary_s"]),
            peak_bytes=_whole(fields["peak_bytes"]),
            seconds=_seconds(fields["seconds"]),
            allocated_bytes=_whole_if_told(fields.get("allocated_bytes")),
        )


def _timings(entries: list[Any]) -> tuple[tuple[int, tuple[float, ...]], ...]:
    return tuple((_whole(length), tuple(map(_seconds, times))) for length, times in entries)


def _whole(value: object) -> int:
    if type(value) is int and value >= 0:
        return value
    msg = f"{value!r} is no count"
    raise ValueError(msg)


def _whole_if_told(value: object) -> int | None:
    return None if value is None else _whole(value)


def _seconds(value: object) -> float:
    if type(value) in (int, float) and math.isfinite(value) and value >= 0:  # type: ignore[arg-type, operator]
        return value  # type: ignore[return-value]
    msg = f"{value!r} is no number of seconds"
    raise ValueError(msg)


def worst_of(measurements: list[RungMeasurement]) -> RungMeasurement:
    """Merge what the ranks saw of the same rung: the slowest rank's times, the largest memory.

    Ranks that do not wait for each other in a micro-step do so over many of them, so the times of
    one rank are kept together: the slower of two at each repetition, or at each length, is slower
    than either.

    Raises:
        ValueError: they timed other lengths than each other, or unlike often.
    """
    if len({(_timed(one.accumulate_s), _timed(one.boundary_s)) for one in measurements}) > 1:
        msg = "ranks have timed unlike lengths, or unlike often"
        raise ValueError(msg)
    slowest = max(measurements, key=_total_s)
    return RungMeasurement(
        micro_batch_size=slowest.micro_batch_size,
        accumulate_s=slowest.accumulate_s,
        boundary_s=slowest.boundary_s,
        peak_bytes=max(measured.peak_bytes for measured in measurements),
        seconds=max(measured.seconds for measured in measurements),
        allocated_bytes=max(
            (one.allocated_bytes for one in measurements if one.allocated_bytes is not None),
            default=None,
        ),
    )


def _timed(entries: tuple[tuple[int, tuple[float, ...]], ...]) -> tuple[tuple[int, int], ...]:
    return tuple((length, len(times)) for length, times in entries)


def _total_s(measured: RungMeasurement) -> float:
    return sum(sum(times) for _, times in (*measured.accumulate_s, *measured.boundary_s))


@dataclass(frozen=True, slots=True, kw_only=True)
class RungFailure:
    """The rung that a probe ended on before it was measured, and the phase it was in by then."""

    micro_batch_size: int
    outcome: Outcome
    seconds: float
    phase: str = ""


class Prober(Protocol):
    """Anything that can try a structure: real processes, recorded answers, a fake."""

    def probe(self, request: ProbeRequest) -> Generator[RungMeasurement | RungFailure]:
        """Yield each rung as it is measured; a failure, if there is one, comes last.

        Closing the iterator ends the probe and leaves no process behind.
        """
        ...
