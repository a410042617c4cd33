"""Tells the best two settings apart by measuring them again in turn, or calls them equal. Pure."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from autotune.outcome import Interrupted, Measured, Rung
from autotune.setting import Setting
from autotune.tune.beliefs import in_one

_LEAST_NOISE = 0.01
"""What another process, at another time, adds to the spread within one."""

_CERTAIN = 2.0
"""Differences beyond so many standard errors are no noise."""

_MAX_ROUNDS = 3
_STUDENT_95 = {2: 12.71, 3: 4.30}
"""Two-sided 95 % quantiles of Student's t for the mean of so many pairs."""


@dataclass(frozen=True, slots=True)
class Finals:
    """Two settings whose first measurements do not tell them apart, and what came of later ones.

    Attributes:
        pair: the one that seemed faster first.
        noise: by how much (in logarithm) they may differ though they seem alike.
        rounds: logarithm of the speed of the first over that of the second, a figure a round.
        failed: those of the pair that could not be measured again.
    """

    pair: tuple[Setting, Setting]
    noise: float
    rounds: tuple[float, ...]
    failed: frozenset[Setting]

    @property
    def is_over(self) -> bool:
        return bool(self.failed) or len(self.rounds) >= _MAX_ROUNDS or self._decided() is not None

    def next(self, rungs: Sequence[Rung]) -> Setting:
        """Return the setting to measure now: the two take turns."""
        first, second = (_times(rungs, setting) for setting in self.pair)
        return self.pair[0] if len(first) <= len(second) else self.pair[1]

    def winner(self, rungs: Sequence[Rung]) -> Setting:
        """Return the faster one; of equal ones that which needs less memory."""
        for setting in self.pair:
            if setting in self.failed:
                return self.pair[1 - self.pair.index(setting)]
        decided = self._decided()
        if decided is not None:
            return decided
        return min(self.pair, key=lambda setting: _peak_bytes(rungs, setting))

    def _decided(self) -> Setting | None:
        count = len(self.rounds)
        if count not in _STUDENT_95:
            return None
        mean = statistics.mean(self.rounds)
        error = statistics.stdev(self.rounds) / math.sqrt(count)
        if abs(mean) <= _STUDENT_95[count] * error:
            return None
        return self.pair[0] if mean > 0 else self.pair[1]


def finals(rungs: Sequence[Rung]) -> Finals | None:
    """Return the finals of a search; None if one setting is clearly the fastest."""
    first = {
        rung.setting: rung.outcome
        for rung in rungs
        if rung.purpose == "search" and isinstance(rung.outcome, Measured)
    }
    ranked = sorted(first, key=lambda setting: -first[setting].tokens_per_s)
    if len(ranked) < 2:  # noqa: PLR2004 - a pair
        return None
    one, other = ranked[:2]
    noise = math.hypot(*(max(first[setting].spread, _LEAST_NOISE) for setting in (one, other)))
    difference = math.log(first[one].tokens_per_s / first[other].tokens_per_s)
    if difference >= _CERTAIN * noise:
        return None
    again = {setting: _times(rungs, setting) for setting in (one, other)}
    rounds = tuple(
        math.log(first.tokens_per_s / second.tokens_per_s)
        for first, second in zip(again[one], again[other], strict=False)
        if first is not None and second is not None
    )
    failed = frozenset(setting for setting, times in again.items() if None in times)
    return Finals((one, other), noise, rounds, failed)


def _times(rungs: Sequence[Rung], setting: Setting) -> list[Measured | None]:
    """Return what the finals measured of a setting, None for a failure, in order."""
    outcomes = (
        rung.outcome for rung in rungs if rung.purpose == "final" and rung.setting == setting
    )
    return [
        outcome if isinstance(outcome, Measured) else None
        for outcome in outcomes
        if not isinstance(outcome, Interrupted)
    ]


def _peak_bytes(rungs: Sequence[Rung], setting: Setting) -> int:
    outcome = in_one([rung.outcome for rung in rungs if rung.setting == setting])
    assert isinstance(outcome, Measured), "a finalist was measured"
    return outcome.peak_bytes
