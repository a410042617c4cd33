"""What is assumed of settings that other jobs are measuring just now. Pure.

A constant liar (Ginsbourger et al., Kriging is well-suited to parallelize optimization, 2010): what
is at work is taken for measured, and for no better than the best, so that jobs look elsewhere.
"""

import math

import numpy as np

from autotune.outcome import Measured, Rung
from autotune.plan import Plan
from autotune.setting import Structure
from autotune.tune.beliefs import Beliefs


def lies(plan: Plan, beliefs: Beliefs, at_work: frozenset[Structure]) -> list[Rung]:
    """Return an outcome for each setting of these structures that was not tried.

    Its speed is what is believed of it, and that of the best at most; of memory it says nothing.
    """
    if not at_work:
        return []
    space = plan.space
    places = [place for place, one in enumerate(space.structures) if one in at_work]
    rows = np.flatnonzero(beliefs.possible & np.isin(space.structure_index, places))
    best = beliefs.best_tokens_per_s or math.inf
    return [
        _lie(plan, row, min(best, math.exp(beliefs.log_tokens_per_s[row])), beliefs.noise)
        for row in rows.tolist()
    ]


def _lie(plan: Plan, row: int, tokens_per_s: float, spread: float) -> Rung:
    outcome = Measured(
        step_time_s=0.0,
        samples_per_s=0.0,
        tokens_per_s=tokens_per_s,
        accumulate_s=(),
        boundary_extra_s=0.0,
        spread=spread,
        peak_bytes=0,
    )
    setting = plan.space.setting(row)
    return Rung(setting=setting, ranks=plan.space.ranks, lengths={}, outcome=outcome, at="")
