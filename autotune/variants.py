"""Structures that may win only under a condition, added where it holds.

Overlapping takes a second bucket, and gains what communication it hides. Weights that are shared
out within each node take a second shard, and gain what is not gathered between nodes. Rows that are
split by length are padded less, and ranks wait less for each other. An optimizer on NVMe is slower
than one in host memory, which may have no room for it. Short buckets, small parameters that stage 3
shards too, and weights in host memory save memory and cost time, so that they cannot win where
their neighbour fits.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from autotune.hardware import Cluster
from autotune.knobs import Pins
from autotune.plan import Plan
from autotune.prune import best_beside
from autotune.setting import NVME, REBALANCE, ZERO_STAGES, Structure
from autotune.space import PARTITION, Space, space_of
from autotune.throughput import Ints
from autotune.workload import ModelProfile

SHORT_BUCKET_ELEMENTS = 50_000_000
"""A tenth of DeepSpeed's default: 0.1 GB in half precision, and long enough for any link."""

LOW_PERSISTENCE_THRESHOLD = 10_000
"""A tenth of DeepSpeed's default: norms of hidden sizes up to this stay whole."""

WORTH_TRYING = 0.01
"""Share of a step that overlapping or rebalancing must be estimated to save to be tried."""

MOST_ROWS_REBALANCED = 1024
"""Of a global batch: transformers' sampler takes 15 ms for so many, and eight times that for four
times as many."""


def with_overlap(
    plan: Plan, estimate: Callable[[Space], Plan], cluster: Cluster, pins: Pins
) -> Plan:
    """Add structures of stages 1 and 2 that overlap, where that is estimated to be worth it.

    Args:
        plan: of the structures that do as DeepSpeed does by default.
        estimate: makes a plan of a space.
        cluster: what it is for; a CPU has no streams to overlap in.
        pins: knobs that are left as they are.
    """
    if "overlap_comm" in pins or not cluster.has_separate_memory or cluster.num_devices == 1:
        return plan
    plain = [
        index
        for index in _kept_structures(plan)
        if plan.space.structures[index].zero_stage in {1, 2}
    ]
    return _with_faster(plan, estimate, plain, {"overlap_comm": True})


def with_partition(
    plan: Plan, estimate: Callable[[Space], Plan], cluster: Cluster, pins: Pins
) -> Plan:
    """Add structures of stage 3 whose nodes have all weights each, where that is worth it.

    Args:
        plan: of the structures whose weights all ranks share.
        estimate: makes a plan of a space.
        cluster: what it is for; a single node has nothing to keep apart.
        pins: knobs that are left as they are.
    """
    group = cluster.ranks_per_node
    if PARTITION in pins or cluster.num_nodes == 1 or group == 1:
        return plan
    plain = [
        index
        for index in _kept_structures(plan)
        if plan.space.structures[index].zero_stage == ZERO_STAGES[-1]
    ]
    return _with_faster(plan, estimate, plain, {PARTITION: group})


def may_rebalance(lengths: Ints, global_batch_size: int, pins: Pins) -> bool:
    """Tell whether splitting rows by length is to be looked at: it is asked for, or may win.

    It cannot where rows are alike, or a step is one row.
    """
    if lengths.min() == lengths.max():
        return False
    if "sampling" in pins:
        return REBALANCE in pins["sampling"]
    return 1 < global_batch_size <= MOST_ROWS_REBALANCED


def with_rebalancing(plan: Plan, estimate: Callable[[Space], Plan], pins: Pins) -> Plan:
    """Add structures that split rows by length, where that is estimated to be worth it.

    Args:
        plan: of the structures that take rows as they are drawn.
        estimate: makes a plan of a space, and knows how rows are split.
        pins: knobs that are left as they are.
    """
    if "sampling" in pins:
        return plan
    return _with_faster(plan, estimate, _kept_structures(plan), {"sampling": REBALANCE})


def _with_faster(
    plan: Plan, estimate: Callable[[Space], Plan], plain: list[int], change: dict[str, Any]
) -> Plan:
    """Add structures that are changed so, where that saves enough of a step of the plain ones."""
    if not plain:
        return plan
    added = [replace(plan.space.structures[index], **change) for index in plain]
    longer = estimate(_with(plan.space, added))
    step_time_s = longer.step_time_s.reshape(len(longer.space.structures), -1)
    may_fit = longer.kept.reshape(step_time_s.shape)[-len(added) :]
    saved = 1 - step_time_s[-len(added) :] / step_time_s[plain]
    worth = (may_fit & (saved >= WORTH_TRYING)).any(axis=1)
    added = [added[place] for place in np.flatnonzero(worth)]
    return _with_added(plan, estimate, added)


def with_nvme(plan: Plan, estimate: Callable[[Space], Plan], pins: Pins) -> Plan:
    """Add structures of stage 3 with the optimizer on NVMe, where the host has no room for it.

    Args:
        plan: of the structures that offload to host memory.
        estimate: makes a plan of a space.
        pins: knobs that are left as they are.
    """
    if "offload_optimizer" in pins:
        return plan
    space = plan.space
    beyond = np.unique(space.structure_index[plan.rule() == "host_memory"])
    added = [
        replace(space.structures[index], offload_optimizer=NVME)
        for index in beyond
        if space.structures[index].zero_stage == ZERO_STAGES[-1]
    ]
    return _with_added(plan, estimate, added)


def with_frugal(
    plan: Plan, estimate: Callable[[Space], Plan], profile: ModelProfile, pins: Pins
) -> Plan:
    """Add structures that save memory, those of them that may fit and are not outdone.

    Args:
        plan: of the structures that save none.
        estimate: makes a plan of a space.
        profile: of the model, whose size says what can be saved.
        pins: knobs that are left as they are.
    """
    space = plan.space
    wanting = ~plan.surely_fits & (
        plan.tokens_per_s > best_beside(space, plan.surely_fits, plan.tokens_per_s)
    )
    tight = [space.structures[index] for index in np.unique(space.structure_index[wanting])]
    added = [one for structure in tight for one in _savers(structure, profile, pins)]
    added = [one for one in dict.fromkeys(added) if one not in space.structures]
    if not added:
        return plan
    longer = estimate(_with(space, added))
    useful = {longer.space.structures[index] for index in _kept_structures(longer)}
    added = [one for one in added if one in useful]
    return _with_added(plan, estimate, added)


def _with_added(plan: Plan, estimate: Callable[[Space], Plan], added: list[Structure]) -> Plan:
    """Add structures, and what differs from them in checkpointing: some of it lies between."""
    modes = dict.fromkeys(structure.checkpointing for structure in plan.space.structures)
    alike = [replace(structure, checkpointing=mode) for structure in added for mode in modes]
    return estimate(_with(plan.space, list(dict.fromkeys(alike)))) if added else plan


def _savers(structure: Structure, profile: ModelProfile, pins: Pins) -> Iterator[Structure]:
    """Yield structures that save ever more, each a knob more than the one before."""
    for knob, value in _steps(structure, profile):
        if knob not in pins:
            change: dict[str, Any] = {knob: value}
            structure = replace(structure, **change)
            yield structure


def _steps(structure: Structure, profile: ModelProfile) -> Iterator[tuple[str, bool | int | str]]:
    if structure.zero_stage == 0:
        return
    if profile.bucket_elements >= 2 * SHORT_BUCKET_ELEMENTS:
        yield "reduce_bucket_size", SHORT_BUCKET_ELEMENTS
    if structure.zero_stage < 3:  # noqa: PLR2004 - a ZeRO stage
        return
    sizes = np.array(profile.trained_sizes + profile.frozen_sizes)
    usual = structure.stage3_param_persistence_threshold
    if ((sizes > LOW_PERSISTENCE_THRESHOLD) & (sizes <= usual)).any():
        yield "stage3_param_persistence_threshold", LOW_PERSISTENCE_THRESHOLD
    # The optimizer is six times as large: what has no room for weights has none for it.
    if structure.offload_optimizer != "none" and structure.offload_param == "none":
        yield "offload_param", "cpu"


def _with(space: Space, added: list[Structure]) -> Space:
    sizes = tuple(np.unique(space.micro_batch_size).tolist())
    rows = int(space.micro_batch_size[0] * space.gradient_accumulation_steps[0])
    return space_of((*space.structures, *added), sizes, rows * space.ranks, space.ranks)


def _kept_structures(plan: Plan) -> list[int]:
    kept: list[int] = np.unique(plan.space.structure_index[plan.kept]).tolist()
    return kept
