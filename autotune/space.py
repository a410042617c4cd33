"""Every setting that leaves the optimisation untouched, as columns."""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from autotune.errors import UsageError
from autotune.hardware import Cluster
from autotune.setting import ZERO_STAGES, Offload, Setting, Structure

Ints = NDArray[np.int64]

CHECKPOINTING_MODES = ("none", "full")
"""Of a model that transformers can checkpoint."""

PARTIAL_CHECKPOINTING = ("every-2", "every-4")
"""Modes that recompute a half and a quarter of the layers, for where `none` does not fit."""


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

    def column(self, field: str) -> NDArray[np.generic]:
        """Return a field of the structure for every row."""
        values = np.array([getattr(structure, field) for structure in self.structures])
        return values[self.structure_index]


def enumerate_space(
    cluster: Cluster,
    global_batch_size: int,
    *,
    attention: str = "sdpa",
    checkpointing_modes: tuple[str, ...] = CHECKPOINTING_MODES,
) -> Space:
    """Return all structures that make sense on the cluster, with every micro-batch size.

    Attention implementation and checkpointing modes are those that the model has.

    Raises:
        UsageError: the global batch cannot be split evenly over the ranks.
    """
    structures = tuple(_structures(cluster, attention, checkpointing_modes))
    sizes = micro_batch_sizes(global_batch_size, cluster.num_devices)
    micro_batch_size = np.tile(np.array(sizes), len(structures))
    return Space(
        structures=structures,
        structure_index=np.repeat(np.arange(len(structures)), len(sizes)),
        micro_batch_size=micro_batch_size,
        gradient_accumulation_steps=global_batch_size // (cluster.num_devices * micro_batch_size),
        ranks=cluster.num_devices,
    )


def _structures(
    cluster: Cluster, attention: str, checkpointing_modes: tuple[str, ...]
) -> list[Structure]:
    return [
        Structure(
            zero_stage=stage,
            offload_optimizer=offload,
            checkpointing=checkpointing,
            attention=attention,
        )
        for stage in ZERO_STAGES
        for offload in _optimizer_places(cluster, stage)
        for checkpointing in checkpointing_modes
    ]


def _optimizer_places(cluster: Cluster, zero_stage: int) -> tuple[Offload, ...]:
    # DeepSpeed offloads the optimizer from stage 1 on, and only another memory than the device's
    # is worth it.
    return ("none", "cpu") if cluster.has_separate_memory and zero_stage >= 1 else ("none",)


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
