"""Tells the fastest settings apart by measuring them again in turn, or calls them equal. Pure."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from autotune.outcome import SAYS_NOTHING, Measured, Rung
from autotune.setting import Setting
from autotune.tune.beliefs import in_one

_LEAST_NOISE = 0.01
"""What another process, at another time, adds to the spread within one."""

_CERTAIN = 2.0
"""Differences beyond so many standard errors are no noise."""

_ALIKE = 0.01
"""Settings that differ by no more are equal, and the one that needs less memory is the better."""

_MAX_CONTENDERS = 4
_MAX_ROUNDS = 3
_STUDENT_95 = {2: 12.71, 3: 4.30}
"""Two-sided 95 % quantiles of Student's t for the mean of so many pairs."""


@dataclass(frozen=True, slots=True)
class Finals:
    """Settings whose first measurements do not tell them apart, and what came of later ones.

    In a round each of those that are left is measured once; who is surely slower than the fastest
    of them then leaves.

    Attributes:
        contenders: the one that seemed fastest first.
        noise: by how much (in logarithm) two may differ though they seem alike.
        again: logarithms of the speeds that were measured in the rounds; None for a failure.
    """

    contenders: tuple[Setting, ...]
    noise: float
    again: Mapping[Setting, tuple[float | None, ...]]

    @property
    def is_over(self) -> bool:
        left, rounds = self._left()
        return len(left) <= 1 or rounds == _MAX_ROUNDS

    def next(self) -> Setting:
        """Return the setting to measure now: they take turns."""
        left, _ = self._left()
        return min(left, key=lambda setting: len(self.again[setting]))

    def winner(self, rungs: Sequence[Rung]) -> Setting:
        """Return the fastest; of equal ones that which needs the least memory."""
        left, rounds = self._left()
        if not left:
            return self.contenders[0]
        if not rounds:
            return left[0]
        means = {setting: statistics.mean(self._logs(setting, rounds)) for setting in left}
        fastest = max(means.values())
        equal = [setting for setting in left if fastest - means[setting] <= _ALIKE]
        return min(equal, key=lambda setting: _peak_bytes(rungs, setting))

    def _left(self) -> tuple[tuple[Setting, ...], int]:
        """Return who may still win, and how many rounds are complete."""
        left = tuple(one for one in self.contenders if None not in self.again[one])
        for rounds in range(1, _MAX_ROUNDS + 1):
            if len(left) <= 1 or any(len(self.again[one]) < rounds for one in left):
                return left, rounds - 1
            left = self._not_surely_slower(left, rounds)
        return left, _MAX_ROUNDS

    def _not_surely_slower(self, left: tuple[Setting, ...], rounds: int) -> tuple[Setting, ...]:
        if rounds not in _STUDENT_95:
            return left
        leader = max(left, key=lambda one: statistics.mean(self._logs(one, rounds)))
        best = self._logs(leader, rounds)

        def may_win(one: Setting) -> bool:
            behind = [a - b for a, b in zip(best, self._logs(one, rounds), strict=True)]
            error = statistics.stdev(behind) / math.sqrt(rounds)
            uncertain = max(_ALIKE, _STUDENT_95[rounds] * error)
            return one == leader or statistics.mean(behind) <= uncertain

        return tuple(filter(may_win, left))

    def _logs(self, setting: Setting, rounds: int) -> list[float]:
        return [speed for speed in self.again[setting][:rounds] if speed is not None]


def finals(rungs: Sequence[Rung]) -> Finals | None:
    """Return the finals of a search; None if one setting is clearly the fastest."""
    first = {
        rung.setting: rung.outcome
        for rung in rungs
        if rung.purpose == "search" and isinstance(rung.outcome, Measured)
    }
    ranked = sorted(first, key=lambda setting: -first[setting].tokens_per_s)[:_MAX_CONTENDERS]
    if not ranked:
        return None
    best = first[ranked[0]]
    noises = {one: math.hypot(_noise(best), _noise(first[one])) for one in ranked[1:]}
    close = tuple(
        one
        for one, noise in noises.items()
        if math.log(best.tokens_per_s / first[one].tokens_per_s) < _CERTAIN * noise
    )
    if not close:
        return None
    contenders = (ranked[0], *close)
    again = {setting: _again(rungs, setting) for setting in contenders}
    return Finals(contenders, max(noises[one] for one in close), again)


def _noise(outcome: Measured) -> float:
    return max(outcome.spread, _LEAST_NOISE)


def _again(rungs: Sequence[Rung], setting: Setting) -> tuple[float | None, ...]:
    """Return what the rounds measured of a setting, in order."""
    outcomes = (
        rung.outcome for rung in rungs if rung.purpose == "final" and rung.setting == setting
    )
    return tuple(
        math.log(outcome.tokens_per_s) if isinstance(outcome, Measured) else None
        for outcome in outcomes
        if not isinstance(outcome, SAYS_NOTHING)
    )


def _peak_bytes(rungs: Sequence[Rung], setting: Setting) -> int:
    outcome = in_one([rung.outcome for rung in rungs if rung.setting == setting])
    assert isinstance(outcome, Measured), "a finalist was measured"
    return outcome.peak_bytes
