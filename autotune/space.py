"""Every setting that leaves the optimisation untouched, as columns."""

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autotune.errors import ConfigError, UsageError
from autotune.hardware import Cluster
from autotune.knobs import BY_NAME, KNOBS, MICRO_BATCH_SIZE, NO_PINS, Pins, Value, as_text
from autotune.optimizer import Limit
from autotune.setting import NVME, ZERO_STAGES, Setting, Structure

Ints = NDArray[np.int64]

_LAST_STAGE = ZERO_STAGES[-1]

PARTITION = "zero_hpz_partition_size"

CHECKPOINTING_MODES = ("none", "full")
"""Of a model that transformers can checkpoint."""

PARTIAL_CHECKPOINTING = ("every-2", "every-4")
"""Modes that recompute a half and a quarter of the layers, for where `none` does not fit."""


NO_LIMITS: Mapping[str, Limit] = MappingProxyType({})


@dataclass(frozen=True, slots=True, kw_only=True)
class Space:
    """Settings as columns: row i is `structures[structure_index[i]]` at `micro_batch_size[i]`."""

    structures: tuple[Structure, ...]
    structure_index: Ints
    micro_batch_size: Ints
    gradient_accumulation_steps: Ints
    ranks: int

    def __len__(self) -> int:
        return len(self.micro_batch_size)

    def setting(self, row: int) -> Setting:
        return Setting(
            structure=self.structures[self.structure_index[row]],
            micro_batch_size=int(self.micro_batch_size[row]),
            gradient_accumulation_steps=int(self.gradient_accumulation_steps[row]),
        )

    def row_of(self, setting: Setting) -> int | None:
        """Find a setting's row; None if there is none."""
        if setting.structure not in self.structures:
            return None
        rows = np.flatnonzero(
            (self.structure_index == self.structures.index(setting.structure))
            & (self.micro_batch_size == setting.micro_batch_size)
            & (self.gradient_accumulation_steps == setting.gradient_accumulation_steps)
        )
        return int(rows[0]) if len(rows) else None

    def column(self, field: str) -> NDArray[np.generic]:
        """Return a field of the structure for every row."""
        values = np.array([getattr(structure, field) for structure in self.structures])
        return values[self.structure_index]


def enumerate_space(
    cluster: Cluster,
    global_batch_size: int,
    *,
    attentions: tuple[str, ...] = ("sdpa",),
    checkpointing_modes: tuple[str, ...] = CHECKPOINTING_MODES,
    pins: Pins = NO_PINS,
    limits: Mapping[str, Limit] = NO_LIMITS,
) -> Space:
    """Return all structures that make sense on the cluster, with every micro-batch size.

    Attention implementations and checkpointing modes are those that the model has. A pinned knob
    has its pinned values and no others, those among them that DeepSpeed can do at a stage, and all
    knobs have only values within the limits.

    Raises:
        UsageError: the global batch cannot be split evenly over the ranks.
        ConfigError: the pins leave nothing.
    """
    sizes = micro_batch_sizes(global_batch_size, cluster.num_devices)
    if MICRO_BATCH_SIZE in pins:
        sizes = _pinned_sizes(sizes, pins[MICRO_BATCH_SIZE], global_batch_size, cluster)
    offered = {"attention": attentions, "checkpointing": checkpointing_modes}
    structures = tuple(_structures(cluster, offered, pins, limits))
    if not structures:
        raise ConfigError(_why_nothing_is_left(cluster, offered, pins, limits))
    return space_of(structures, sizes, global_batch_size, cluster.num_devices)


def space_of(
    structures: tuple[Structure, ...], sizes: tuple[int, ...], global_batch_size: int, ranks: int
) -> Space:
    """Return every structure with every micro-batch size."""
    micro_batch_size = np.tile(np.array(sizes), len(structures))
    return Space(
        structures=structures,
        structure_index=np.repeat(np.arange(len(structures)), len(sizes)),
        micro_batch_size=micro_batch_size,
        gradient_accumulation_steps=global_batch_size // (ranks * micro_batch_size),
        ranks=ranks,
    )


def _pinned_sizes(
    sizes: tuple[int, ...], pinned: tuple[Value, ...], global_batch_size: int, cluster: Cluster
) -> tuple[int, ...]:
    left = tuple(size for size in sizes if size in pinned)
    if not left:
        msg = (
            f"a global batch of {global_batch_size} over {cluster.num_devices} ranks has no "
            f"micro-batch of {' or '.join(map(str, pinned))}: micro_batch_size can be "
            f"{', '.join(map(str, sizes))}"
        )
        raise ConfigError(msg)
    return left


def require_possible(structure: Structure, limits: Mapping[str, Limit]) -> None:
    """Refuse a structure that is beyond the limits.

    Raises:
        UsageError: with the limit, and why it is one.
    """
    for knob, limit in limits.items():
        if getattr(structure, knob) not in limit.values:
            raise UsageError(_said(knob, limit))


def _said(knob: str, limit: Limit) -> str:
    return f"{knob} can be {' or '.join(map(str, limit.values))} here, as {limit.reason}"


def _structures(
    cluster: Cluster,
    offered: Mapping[str, tuple[Value, ...]],
    pins: Pins,
    limits: Mapping[str, Limit],
) -> Iterator[Structure]:
    for stage in _within(limits, "zero_stage", pins.get("zero_stage", ZERO_STAGES)):
        assert isinstance(stage, int)
        by_default = {**_offered(cluster, stage), **offered}
        choices = {
            knob: _within(
                limits, knob, _choices(cluster, stage, knob, by_default.get(knob, ()), pins)
            )
            for knob in _STRUCTURAL
        }
        for values in itertools.product(*choices.values()):
            fields: dict[str, Any] = dict(zip(choices, values, strict=True))
            yield Structure(zero_stage=stage, **fields)


def _within(limits: Mapping[str, Limit], knob: str, values: tuple[Value, ...]) -> tuple[Value, ...]:
    if knob not in limits:
        return values
    return tuple(value for value in values if value in limits[knob].values)


_STRUCTURAL = tuple(
    knob.name for knob in KNOBS if knob.name not in {MICRO_BATCH_SIZE, "zero_stage"}
)


def _offered(cluster: Cluster, zero_stage: int) -> dict[str, tuple[Value, ...]]:
    """Return the values that a search has of knobs which it turns wherever a stage has them.

    Only another memory than the device's is worth offloading to. What may win only under a
    condition is added where it holds: see variants.py.
    """
    if not cluster.has_separate_memory or zero_stage < 1:
        return {}
    return {"offload_optimizer": ("none", "cpu")}


def _choices(
    cluster: Cluster, zero_stage: int, knob: str, offered: tuple[Value, ...], pins: Pins
) -> tuple[Value, ...]:
    """Return a knob's values at a stage; none if no pinned one can be there."""
    plain: Value = getattr(Structure(zero_stage=zero_stage), knob)
    if knob not in pins:
        return offered or (plain,)
    if not _has(cluster, zero_stage, knob):
        return _plain_alone(plain, knob, pins)
    if knob in _OF_THE_MODEL:
        return tuple(value for value in pins[knob] if value in offered)
    if knob == PARTITION:
        groups = tuple(size for size in pins[knob] if _divides(size, cluster))
        return groups or ((plain,) if knob in pins.where_there else ())
    if NVME in pins[knob] and zero_stage < _LAST_STAGE:
        others = tuple(value for value in pins[knob] if value != NVME)
        return others or _plain_alone(plain, knob, pins)
    return pins[knob]


def _plain_alone(plain: Value, knob: str, pins: Pins) -> tuple[Value, ...]:
    """Return the value that a knob has where it cannot be turned; none if that is not pinned."""
    return (plain,) if plain in pins[knob] or knob in pins.where_there else ()


def _divides(size: Value, cluster: Cluster) -> bool:
    """Tell whether the ranks make groups of this size, as DeepSpeed asks (utils/groups.py)."""
    return cluster.num_devices % int(size) == 0


_OF_THE_MODEL = ("attention", "checkpointing")
"""What the model must have, so that it is offered before it can be chosen."""


def _has(cluster: Cluster, zero_stage: int, knob: str) -> bool:
    """Tell whether a knob can be turned at a stage."""
    if (knob.startswith("offload_") or knob == "expandable_segments") and (
        not cluster.has_separate_memory
    ):
        return False
    if knob == "threads_per_rank" and cluster.has_separate_memory:
        return False
    return zero_stage in BY_NAME[knob].stages


def _why_nothing_is_left(
    cluster: Cluster,
    offered: Mapping[str, tuple[Value, ...]],
    pins: Pins,
    limits: Mapping[str, Limit],
) -> str:
    """Say which pins leave no structure: those without any one of which some would be left."""
    blamed = [
        name
        for name in pins.values
        if any(_structures(cluster, offered, pins.without(name), limits))
    ]
    blamed = blamed or [name for name in pins.values if name != MICRO_BATCH_SIZE]
    reasons = []
    for name in blamed:
        knob = BY_NAME[name]
        if name in offered:
            has = ", ".join(map(as_text, offered[name]))
            reasons.append(f"of {name} this model has {has} here")
        elif name.startswith("offload_") and not cluster.has_separate_memory:
            reasons.append(f"{name} needs GPUs, with a memory beside the host's")
        elif name in limits:
            reasons.append(_said(name, limits[name]))
        elif name == "expandable_segments" and not cluster.has_separate_memory:
            reasons.append(f"{name} is of torch's allocator on GPUs")
        elif name == "threads_per_rank" and cluster.has_separate_memory:
            reasons.append(f"{name} is of ranks on a CPU")
        elif name == PARTITION and not any(_divides(size, cluster) for size in pins[name]):
            reasons.append(f"{name} has to divide the {cluster.num_devices} ranks")
        elif set(pins[name]) == {NVME}:
            reasons.append(f"DeepSpeed offloads to {NVME} at ZeRO {_LAST_STAGE} alone")
        elif knob.stages != ZERO_STAGES:
            reasons.append(f"{name} is of ZeRO {', '.join(map(str, knob.stages))}")
    because = "; ".join(reasons)
    return f"the pins {pins} leave no setting: {because}. Drop one of them, or pin other values"


def micro_batch_sizes(global_batch_size: int, ranks: int) -> tuple[int, ...]:
    """Return the micro-batch sizes that keep the global batch exact, ascending.

    Raises:
        UsageError: there are none; the message names the nearest global batch sizes that work.
    """
    per_rank, rest = divmod(global_batch_size, ranks)
    if rest or not per_rank:
        nearest = [size for size in (per_rank * ranks, (per_rank + 1) * ranks) if size]
        msg = (
            f"a global batch of {global_batch_size} cannot be split over {ranks} ranks: "
            f"use --global-batch-size {' or '.join(map(str, nearest))}"
        )
        raise UsageError(msg)
    small = [size for size in range(1, math.isqrt(per_rank) + 1) if per_rank % size == 0]
    return tuple(sorted({*small, *(per_rank // size for size in small)}))
