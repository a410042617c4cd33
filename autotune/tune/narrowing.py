"""Several nodes: what is narrowed down on one of them is decided on all.

A probe on one node measures how a setting computes, and what it needs; what nodes say to each other
it cannot. A job of as many rows a node has the same micro-batches and micro-steps there, so that
its settings are those of all nodes, each with an estimate of its own for one.
"""

import math
from collections.abc import Sequence

from autotune.outcome import Measured, Rung
from autotune.plan import Plan
from autotune.tune.beliefs import Hint, outcomes

SHARE = 0.5
"""Of the probes, and of the time, that narrowing may take."""


def hints(plan: Plan, one_node: Plan, rungs: Sequence[Rung]) -> dict[int, Hint]:
    """Return what was measured on one node of rows of the plan for all.

    Args:
        plan: of all nodes.
        one_node: the same job's share on one of them.
        rungs: what was tried there.
    """
    found = {}
    for row, outcome in outcomes(one_node, rungs).items():
        place = plan.row_of(one_node.space.setting(row))
        if place is None or not isinstance(outcome, Measured):
            continue
        found[place] = Hint(
            faster=math.log(outcome.tokens_per_s / one_node.tokens_per_s[row]),
            larger=math.log(outcome.peak_bytes / one_node.memory.device_bytes[row])
            if outcome.peak_bytes
            else None,
        )
    return found
