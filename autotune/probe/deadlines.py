"""How long a phase of a probe may take, and how long it may be silent. Pure."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from autotune.probe.protocol import RungMeasurement, RungPlan


@dataclass(frozen=True, slots=True, kw_only=True)
class Deadline:
    """Limits of a phase.

    Attributes:
        silence_s: without a word or work of any rank. Ranks that wait for each other do not work.
        total_s: from its beginning, however busy the ranks are: some waits on a device spin.
    """

    silence_s: float
    total_s: float


# Nothing that a rank does is silent for long: it computes, or a device does it within seconds.
# What is left are disks of a cluster that stall, for tens of seconds.
_SILENCE_S = 120.0

# A cold rank imports for some 10 s, over a busy network disk for minutes; a device takes seconds.
_START = Deadline(silence_s=_SILENCE_S, total_s=600.0)
# Addresses and a handshake; a communicator over many devices takes tens of seconds.
_MEET = Deadline(silence_s=_SILENCE_S, total_s=300.0)
# Random weights of tens of billions of parameters, made shard by shard, and an op if one is built.
_BUILD = Deadline(silence_s=_SILENCE_S, total_s=3600.0)
# Some 20 micro-steps; one of a minute is the slowest that anyone would train with.
_FIRST_RUNG = Deadline(silence_s=_SILENCE_S, total_s=1800.0)

_PATIENCE = 10.0
_LEAST_RUNG_S = 120.0


def _phases() -> dict[str, Deadline]:
    return {"start": _START, "meet": _MEET, "build": _BUILD}


@dataclass(frozen=True, slots=True, kw_only=True)
class Deadlines:
    """The limits of each phase, and of a rung before any was measured."""

    phases: Mapping[str, Deadline] = field(default_factory=_phases)
    first_rung: Deadline = _FIRST_RUNG

    def of(self, phase: str, rung: RungPlan, before: RungMeasurement | None) -> Deadline:
        """Return the limits of a phase; a rung has ten times what the one before foretells."""
        if phase in self.phases:
            return self.phases[phase]
        if before is None:
            return self.first_rung
        foretold = before.seconds * max(1.0, rung.micro_batch_size / before.micro_batch_size)
        total = min(self.first_rung.total_s, max(_LEAST_RUNG_S, _PATIENCE * foretold))
        return Deadline(silence_s=self.first_rung.silence_s, total_s=total)
