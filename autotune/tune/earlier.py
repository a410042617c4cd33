"""What earlier runs of like jobs found out, and whether it still holds. Pure."""

import math
from collections.abc import Sequence

from autotune.outcome import Measured, Rung
from autotune.setting import Setting
from autotune.tune.beliefs import in_one

_AGREEMENT = 0.1
"""How far (in logarithm) the best may be off what an earlier run measured, for that to hold."""


def holds(rung: Rung, had_bytes: int, budget_bytes: int) -> bool:
    """Tell whether an outcome on devices that had so much memory is one where so much is there.

    What ran out of memory says nothing where there is more now, and what was measured nothing where
    it would not fit.
    """
    if isinstance(rung.outcome, Measured):
        return rung.outcome.peak_bytes <= budget_bytes
    return budget_bytes <= had_bytes


def unverified(rungs: Sequence[Rung]) -> Setting | None:
    """Return the best setting of earlier runs; None if it was verified, or there is none."""
    if any(rung.purpose == "verification" and not rung.cached for rung in rungs):
        return None
    best = _best_cached(rungs)
    return best.setting if best else None


def trustworthy(rungs: Sequence[Rung]) -> list[Rung]:
    """Leave out what earlier runs found where a verification did not bear it out."""
    best = _best_cached(rungs)
    checks = [
        rung.outcome
        for rung in rungs
        if rung.purpose == "verification" and rung.outcome.kind != "interrupted" and not rung.cached
    ]
    if best is None or not checks or _agree(best, in_one(checks)):
        return list(rungs)
    return [rung for rung in rungs if not rung.cached or rung.job]


def _best_cached(rungs: Sequence[Rung]) -> Rung | None:
    # What another job measures now is no earlier run's.
    measured = [
        rung
        for rung in rungs
        if rung.cached and not rung.job and isinstance(rung.outcome, Measured)
    ]
    return max(measured, key=_speed, default=None)


def _agree(best: Rung, check: object) -> bool:
    return (
        isinstance(check, Measured)
        and abs(math.log(check.tokens_per_s / _speed(best))) <= _AGREEMENT
    )


def _speed(rung: Rung) -> float:
    assert isinstance(rung.outcome, Measured)
    return rung.outcome.tokens_per_s
