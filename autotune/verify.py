"""Holds the first steps of a training against what the probe promised. Pure."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from autotune.units import format_bytes

SPEED_TOLERANCE = 0.25
"""Of tokens a second: a few steps on a machine that is not all ours differ by more than a tenth."""

MEMORY_TOLERANCE = 0.15
FIRST_STEPS = 10
"""How many steps count; the one before them, which allocates and warms up, does not."""

_BUSY_SHARE = 0.15
_LONG_ROWS = 1.25


@dataclass(frozen=True, slots=True, kw_only=True)
class Promise:
    """What a probe measured: speed on the real lengths, memory on the longest rows.

    Attributes:
        tokens_per_s: all ranks together.
        peak_bytes: of the worst rank.
        tokens_per_step: of a step on average.
        longest_row: the longest row that was probed.
    """

    tokens_per_s: float
    peak_bytes: int
    tokens_per_step: float
    longest_row: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What was seen in the first steps.

    Attributes:
        speed_deviation: tokens a second over what was promised, less one.
        memory_deviation: the same of the peak of memory; the longest rows may come later.
        causes: a sentence each.
    """

    steps: int
    tokens_per_s: float
    peak_bytes: int
    speed_deviation: float
    memory_deviation: float
    causes: tuple[str, ...]

    @property
    def falls_short(self) -> bool:
        """Whether it is slower or larger than promised, beyond the tolerances."""
        return self.speed_deviation < -SPEED_TOLERANCE or self.memory_deviation > MEMORY_TOLERANCE

    @property
    def within(self) -> bool:
        return not self.falls_short and self.speed_deviation <= SPEED_TOLERANCE

    def to_json(self, promise: Promise) -> dict[str, Any]:
        return {
            "promised": asdict(promise),
            "seen": asdict(self),
            "tolerance": {"speed": SPEED_TOLERANCE, "memory": MEMORY_TOLERANCE},
            "within": self.within,
        }


def verdict(
    promise: Promise, lines: Sequence[dict[str, Any]], *, others_share: float | None
) -> Verdict | None:
    """Judge the steps of a training so far; None while there are too few.

    `lines` are those of metrics.jsonl since the start, `others_share` the share of this machine's
    processors that other programs took meanwhile, if that is known.
    """
    over = bool(lines) and lines[-1]["step"] >= lines[-1]["max_steps"]
    counted = lines[1 : 1 + FIRST_STEPS]
    if len(counted) < (1 if over else FIRST_STEPS):
        return None
    tokens = sum(line["tokens"] for line in counted)
    tokens_per_s = tokens / sum(line["step_time_s"] for line in counted)
    peak_bytes = max(line["peak_bytes"] for line in lines[: 1 + FIRST_STEPS])
    speed = tokens_per_s / promise.tokens_per_s - 1
    memory = peak_bytes / promise.peak_bytes - 1
    longest = max(line["longest_row"] for line in counted)
    causes = [
        *_speed_causes(speed, tokens / len(counted), promise, others_share),
        *_memory_causes(memory, longest, promise, peak_bytes),
    ]
    return Verdict(
        steps=len(counted),
        tokens_per_s=tokens_per_s,
        peak_bytes=peak_bytes,
        speed_deviation=speed,
        memory_deviation=memory,
        causes=tuple(causes),
    )


def _speed_causes(
    deviation: float, tokens_per_step: float, promise: Promise, others_share: float | None
) -> list[str]:
    if abs(deviation) <= SPEED_TOLERANCE:
        return []
    how = f"{abs(deviation):.0%} {'slower' if deviation < 0 else 'faster'} than probed"
    if deviation < 0 and others_share is not None and others_share > _BUSY_SHARE:
        return [f"{how}: other programs took {others_share:.0%} of the processors"]
    relative = tokens_per_step / promise.tokens_per_step
    if not 1 / _LONG_ROWS < relative < _LONG_ROWS:
        which = "longer" if relative > 1 else "shorter"
        return [f"{how}: the rows of these steps are {which} than the average"]
    if deviation > 0:
        return [f"{how}: the probe was disturbed by something that is over"]
    besides = "evaluation, a tracker, workers that load data"
    return [f"{how}: what the Trainer does between steps ({besides}), or a device that slowed down"]


def _memory_causes(
    deviation: float, longest_row: int, promise: Promise, peak_bytes: int
) -> list[str]:
    if deviation <= MEMORY_TOLERANCE:
        return []
    how = f"{format_bytes(peak_bytes)} where {format_bytes(promise.peak_bytes)} were probed"
    if longest_row > promise.longest_row:
        return [
            f"{how}: a row of {longest_row} tokens is longer than the {promise.longest_row} probed"
        ]
    return [f"{how}: memory that the Trainer holds besides a step, or that was fragmented"]
