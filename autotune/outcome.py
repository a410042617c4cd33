"""What a rung of a probe ended in. A failed probe is a value, never an exception."""

from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, Literal

from autotune.setting import Setting, Structure

SCHEMA = 1

Where = Literal["device", "host"]
Purpose = Literal["search", "verification", "final"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """A rung that ran.

    Attributes:
        step_time_s: seconds an optimizer step of the whole global batch takes on the dataset's
            real lengths, composed from the measured micro-steps.
        tokens_per_s: tokens that are not padding, all ranks together.
        accumulate_s: (padded length, median seconds) of micro-steps without an update, of the
            slowest rank.
        boundary_extra_s: what gradient synchronisation and the update add to the last micro-step.
        spread: median absolute deviation of repeated micro-steps over their median, the largest.
        peak_bytes: the highest device memory of the worst rank, its process baseline subtracted;
            on a GPU what its allocator reserved.
        allocated_bytes: of that what was in tensors; None where the device does not count it.
        device_used_bytes: what the fullest device had in use besides what others used before, as
            NVML sees it: context and communicators are in it; None where it was not watched.
    """

    kind: ClassVar[str] = "measured"
    step_time_s: float
    samples_per_s: float
    tokens_per_s: float
    accumulate_s: tuple[tuple[int, float], ...]
    boundary_extra_s: float
    spread: float
    peak_bytes: int
    allocated_bytes: int | None = None
    device_used_bytes: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class OutOfMemory:
    kind: ClassVar[str] = "out_of_memory"
    where: Where
    evidence: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TimedOut:
    kind: ClassVar[str] = "timed_out"
    phase: str
    seconds: float
    evidence: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Crashed:
    """An exception, or a signal that is not explained by memory."""

    kind: ClassVar[str] = "crashed"
    reason: str
    evidence: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Interrupted:
    """The probe was stopped from outside; it says nothing about the setting."""

    kind: ClassVar[str] = "interrupted"
    evidence: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Invalid:
    """A device went wrong meanwhile; what it did or did not do says nothing about the setting."""

    kind: ClassVar[str] = "invalid"
    evidence: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Unknown:
    """A death without a cause; never counted as out of memory."""

    kind: ClassVar[str] = "unknown"
    exit_code: int | None
    evidence: str


Outcome = Measured | OutOfMemory | TimedOut | Crashed | Interrupted | Invalid | Unknown

SAYS_NOTHING = (Interrupted, Invalid)
"""Ends of a rung from which nothing of its setting follows: it can be tried again."""

_KINDS: dict[str, type[Outcome]] = {
    kind.kind: kind
    for kind in (Measured, OutOfMemory, TimedOut, Crashed, Interrupted, Invalid, Unknown)
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Rung:
    """One line of probes.jsonl: a setting, the rows it was tried on, and what came of it.

    Attributes:
        lengths: those of the rows.
        seconds: what it took to find out.
        purpose: to find the best, to verify what an earlier run knew of it, or to tell it from the
            next best; only the first tries a setting for the first time.
        cached: whether another run found it out, an earlier one or one beside this.
        job: of a shared study, that found it out beside this one.
    """

    setting: Setting
    ranks: int
    lengths: dict[str, Any]
    outcome: Outcome
    at: str
    seconds: float = field(default=0.0)
    purpose: Purpose = "search"
    cached: bool = False
    job: str = ""

    def to_json(self) -> dict[str, Any]:
        figures = asdict(self.outcome)
        return {
            "schema": SCHEMA,
            "structure": self.setting.structure.to_json(),
            "micro_batch_size": self.setting.micro_batch_size,
            "gradient_accumulation_steps": self.setting.gradient_accumulation_steps,
            "ranks": self.ranks,
            "lengths": self.lengths,
            "outcome": {
                "kind": self.outcome.kind,
                "where": figures.pop("where", None),
                **figures,
                "took_s": self.seconds,
                "purpose": self.purpose,
                "cached": self.cached,
                **({"job": self.job} if self.job else {}),
            },
            "at": self.at,
        }

    @classmethod
    def from_json(cls, line: dict[str, Any]) -> "Rung":
        figures = dict(line["outcome"])
        kind = _KINDS[figures.pop("kind")]
        where, seconds = figures.pop("where", None), figures.pop("took_s", 0.0)
        purpose, cached = figures.pop("purpose", "search"), figures.pop("cached", False)
        job = figures.pop("job", "")
        if kind is OutOfMemory:
            figures["where"] = where
        if kind is Measured:
            figures["accumulate_s"] = tuple((s, t) for s, t in figures["accumulate_s"])
        return cls(
            setting=Setting(
                structure=Structure(**line["structure"]),
                micro_batch_size=line["micro_batch_size"],
                gradient_accumulation_steps=line["gradient_accumulation_steps"],
            ),
            ranks=line["ranks"],
            lengths=line["lengths"],
            outcome=kind(**figures),
            at=line["at"],
            seconds=seconds,
            purpose=purpose,
            cached=cached,
            job=job,
        )
