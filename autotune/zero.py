"""What DeepSpeed 0.19 holds of weights, gradients and states at each ZeRO stage, in bytes a rank.

One term a function, each with the place in DeepSpeed's source that allocates it. They follow a
step through its moments: building the engine, forward and backward of a micro-step, reducing the
gradients when the backward pass is done, and the update.
"""

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from autotune.optimizer import Optimizer

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

FP32 = 4

_BLOCK, _BLOCK_OF_4BIT = 256, 64
_CODES_OF_4BIT = 16
_LEAST_8BIT_ELEMENTS = 4096
_CODE_BYTES = 256 * FP32
"""Of bitsandbytes' 8-bit optimizers (optim/optimizer.py): a moment has a scale in fp32 for each
block; what is shorter stays in fp32; each moment has a table of what its codes mean."""

MAX_LIVE_PARAMETERS = 1_000_000_000
"""Of the emitted config, and its max_reuse_distance too."""

_ALL_REDUCE_ELEMENTS = 500_000_000
_SUB_GROUP_ELEMENTS = 1_000_000_000
"""DeepSpeed's defaults: of allreduce_no_retain (engine.py) and of sub_group_size."""

NVME_BUFFERS, NVME_SUB_GROUP_ELEMENTS = 4, 100_000_000
"""Of the emitted config where the optimizer is on NVMe: weights, gradient and two moments of so
many elements are in host memory at a time (partitioned_optimizer_swapper.py)."""

_ALIGNMENT = 2
"""nccl_start_alignment_factor of stage_1_and_2.py: partitions start at whole four bytes."""


@dataclass(frozen=True, slots=False, kw_only=True)
class Shards:
    """A model's parameters as ZeRO divides them among N ranks; all in elements.

    Attributes:
        trained: elements of each trained parameter, in the order of the model.
        frozen: the same of the others, but for those in 4 bits.
        quantised: the same of these.
        factored: elements of what Adafactor keeps of the trained ones.
        bucket: what gradients are reduced in (reduce_bucket_size).
        persistence: up to how many stage 3 leaves a parameter whole
            (stage3_param_persistence_threshold).
        group: ranks that have all weights of stage 3 among them (zero_hpz_partition_size).
    """

    trained: Ints
    frozen: Ints
    ranks: int
    bucket: int
    persistence: int
    factored: int = 0
    group: int = 1
    quantised: Ints = field(default_factory=lambda: np.zeros(0, dtype=np.int64))

    @cached_property
    def elements(self) -> int:
        """Elements of all trained parameters, Psi_t."""
        return int(self.trained.sum())

    @cached_property
    def frozen_elements(self) -> int:
        return int(self.frozen.sum())

    @cached_property
    def largest(self) -> int:
        return int(self.trained.max(initial=0))

    @cached_property
    def partition(self) -> int:
        """Return a rank's share of the flat parameters, padded to equal shares (stages 1 and 2)."""
        return _ALIGNMENT * -(-self.elements // (_ALIGNMENT * self.ranks))

    @cached_property
    def overlapped(self) -> Ints:
        """Return for each rank the elements of the parameters that its partition has a part of.

        get_partition_info of stage_1_and_2.py.
        """
        ends = np.cumsum(self.trained)
        starts = ends - self.trained
        left = np.arange(self.ranks) * self.partition
        first = np.searchsorted(ends, left, side="right")
        last = np.searchsorted(starts, left + self.partition, side="left")
        covered = np.concatenate([[0], ends])
        return np.asarray(np.maximum(0, covered[last] - covered[first]), dtype=np.int64)

    @cached_property
    def worst_rank(self) -> int:
        """Return the rank that holds the most at stages 1 and 2; at 0 and 3 all hold the same."""
        return int(np.argmax(self.overlapped))

    @cached_property
    def most_overlapped(self) -> int:
        return int(self.overlapped.max(initial=0))

    @cached_property
    def shard(self) -> int:
        """Return a rank's share at stage 3, where each parameter is divided and padded by itself.

        _partition_param of partition_parameters.py.
        """
        return int(np.sum(-(-self.trained // self.ranks)))

    @cached_property
    def frozen_shard(self) -> int:
        return int(np.sum(-(-self.frozen // self.ranks)))

    @cached_property
    def _padded(self) -> Ints:
        every = np.concatenate([self.trained, self.frozen])
        return np.asarray(-(-every // self.ranks) * self.ranks, dtype=np.int64)

    @cached_property
    def secondary(self) -> int:
        """Return what a rank keeps of the weights for the others of its group.

        _partition_param_sec of partition_parameters.py; parameters that stay whole have it too, as
        all are partitioned when the engine is built.
        """
        group = min(self.group, self.ranks)
        return int(self._padded.sum()) // group if group > 1 else 0

    @cached_property
    def _persists(self) -> NDArray[np.bool_]:
        every = np.concatenate([self.trained, self.frozen])
        return np.asarray(every <= self.persistence)

    @cached_property
    def persistent(self) -> int:
        """Return what stage 3 gathers after an update and keeps until the next.

        mark_persistent_parameters of parameter_offload.py; a single rank has nothing to gather.
        """
        return int(self._padded[self._persists].sum()) if self.ranks > 1 else 0

    @cached_property
    def gathered(self) -> int:
        """Return what else a pass gathers in all."""
        return int(self._padded[~self._persists].sum()) if self.ranks > 1 else 0

    @cached_property
    def outermost(self) -> int:
        """Return the first parameter of the model, the embedding: the last that backward needs."""
        first = self._padded[:1][~self._persists[:1]]
        return int(first.sum()) if self.ranks > 1 else 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Engine:
    """How the engine is set up.

    Attributes:
        compute_bytes: of an element of the type that the model computes in.
        accumulates: whether an update takes more than one micro-step.
        gloo: whether collectives are gloo's, as they are on a CPU.
        offloads: whether the optimizer is in host memory, as gradients are then once reduced.
        overlaps: whether gradients are reduced beside the backward pass (overlap_comm).
        optimizer: what updates the weights.
        scales_loss: whether gradients are looked through for overflow, as those of fp16 are.
    """

    shards: Shards
    zero_stage: int
    compute_bytes: int
    accumulates: bool
    gloo: bool
    offloads: bool = False
    overlaps: bool = False
    optimizer: Optimizer = "adamw"
    scales_loss: bool = False

    @property
    def kind(self) -> tuple[int, bool, bool, bool]:
        """What of it differs between the settings of a job besides the sizes of its shards."""
        return self.zero_stage, self.accumulates, self.offloads, self.overlaps

    @property
    def share(self) -> int:
        """Elements that this rank updates."""
        return (
            self.shards.elements,
            self.shards.partition,
            self.shards.partition,
            self.shards.shard,
        )[self.zero_stage]


def weights(engine: Engine) -> float:
    """Return b Psi, at stage 3 a shard of each parameter (ZeRO section 5.3).

    And one among the ranks of a group, where there is one (ZeRO++, arXiv:2306.10209, section 3.2).
    Of weights in 4 bits, which stage 3 does not have, every rank has all.
    """
    shards, size = engine.shards, engine.compute_bytes
    if engine.zero_stage == 3:  # noqa: PLR2004 - a ZeRO stage
        return float(size * (shards.shard + shards.frozen_shard + shards.secondary))
    flat = shards.elements if engine.zero_stage == 0 else shards.ranks * shards.partition
    return float(size * (flat + shards.frozen_elements) + _in_4_bits(engine))


def _in_4_bits(engine: Engine) -> float:
    """Return the weights in 4 bits with what they are scaled by (arXiv:2305.14314, section 3).

    bitsandbytes' functional.quantize_4bit: a scale in 8 bits for each block of 64, which has an
    offset and blocks of 256 with a scale in fp32; the meaning of 16 codes, and of 256 where it is
    not shared on the host.
    """
    sizes = engine.shards.quantised
    scales = -(-sizes // _BLOCK_OF_4BIT)
    tables = FP32 * (_CODES_OF_4BIT + 1) + _CODE_BYTES * (not engine.gloo)
    return float(np.sum(-(-sizes // 2) + scales + FP32 * -(-scales // _BLOCK) + tables))


def drawn_wide(engine: Engine) -> float:
    """Return the weights before those that are to be in 4 bits are quantised."""
    quantised = int(engine.shards.quantised.sum())
    return float(
        engine.compute_bytes * (quantised + engine.shards.frozen_elements) * (quantised > 0)
    )


def flattened(engine: Engine) -> float:
    """Return the flat copy of the trained weights with which stages 1 and 2 begin."""
    return float(engine.compute_bytes * engine.shards.ranks * engine.shards.partition)


def optimizer(engine: Engine) -> float:
    """Return what the optimizer remembers, and a flat fp32 copy of the weights.

    In mixed precision the copy is always there (ZeRO section 3.1: 12 Psi), in fp32 from stage 1 on,
    as DeepSpeed's sharded optimizers keep their own partition whatever the type.
    """
    keeps_copy = engine.zero_stage >= 1 or engine.compute_bytes < FP32
    return float(FP32 * keeps_copy * engine.share + moments(engine))


def moments(engine: Engine) -> float:
    """Return the moments: of AdamW two in fp32, or in 8 bits with a scale for each block.

    Adafactor has the second one, factored, and needs parameters in their shapes: those of stage 0.
    """
    match engine.optimizer:
        case "adamw":
            return float(2 * FP32 * engine.share)
        case "adafactor":
            return float(FP32 * engine.shards.factored)
        case "adamw-8bit":
            flats = engine.shards.trained if engine.zero_stage == 0 else np.array([engine.share])
            in_8_bits = flats >= _LEAST_8BIT_ELEMENTS
            short = 2 * FP32 * flats * ~in_8_bits
            quantised = 2 * (flats + FP32 * -(-flats // _BLOCK)) * in_8_bits
            return float(np.sum(short + quantised) + 2 * _CODE_BYTES * in_8_bits.any())


def gradients_in_pass(engine: Engine, handed_over: Floats) -> Floats:
    """Return the gradients that are kept while others are still to come.

    Stages 0 and 1 leave them where autograd puts them until the last micro-step. Stage 2 keeps
    those of its partition from one micro-step to the next, whole parameters (all_grad_tensors of
    stage_1_and_2.py), stage 3 has a flat buffer for its shard (grad_partitions_flat_buffer of
    stage3.py). They are of the compute type, which is DeepSpeed's gradient accumulation type
    unless told otherwise. What stage 2 reduces within the pass counts with the buffers.

    Args:
        engine: as it is set up.
        handed_over: elements whose gradients the backward pass has made, moment by moment.
    """
    kept = np.full_like(handed_over, resident_gradients(engine))
    match engine.zero_stage:
        case 1 if engine.overlaps and not engine.accumulates:
            # Each goes into the bucket as it is made, as at stage 2.
            return np.zeros_like(kept)
        case 0 | 1:
            return kept if engine.accumulates else engine.compute_bytes * handed_over
        case 2:
            return kept * float(engine.accumulates)
        case _:
            return kept


def resident_gradients(engine: Engine) -> float:
    """Return the gradients that an update takes, as they are before it."""
    shards = engine.shards
    match engine.zero_stage:
        case 0 | 1:
            elements = shards.elements
        case _ if engine.offloads:
            elements = 0
        case 2:
            elements = shards.most_overlapped
        case _:
            elements = shards.shard
    return float(engine.compute_bytes * elements)


def buffers_in_pass(engine: Engine, handed_over: Floats, hands_over: NDArray[np.bool_]) -> Floats:
    """Return the buckets and the gathered weights while a pass runs.

    Stages 1 and 2 make their bucket for the first gradient of a micro-step, and a second one where
    one is reduced while the other is filled (setup_buckets of stage_1_and_2.py).

    Stage 2 lets go of it after each, stage 1 after the last. A full bucket is
    copied to be reduced, and stage 2 then has the gradients of its partition beside those of
    earlier micro-steps (averaged_gradients). Stage 3 has its bucket from the start
    (_setup_for_real_optimizer of stage3.py).
    """
    shards, size = engine.shards, engine.compute_bytes
    passage = _passage(engine)
    begun = handed_over > 0
    full = hands_over & (shards.elements > shards.bucket) & (handed_over >= shards.bucket)
    match engine.zero_stage:
        case 0:
            return np.zeros_like(handed_over)
        case 1 if engine.accumulates or not engine.overlaps:
            bucket = shards.bucket * (1.0 + engine.overlaps) * (begun | engine.accumulates)
            return np.asarray(size * (bucket + passage), np.float64)
        case 1 | 2:
            reduced = np.where(handed_over > shards.bucket, handed_over, 0.0)
            reduced = np.minimum(reduced, shards.most_overlapped * (not engine.offloads))
            bucket = shards.bucket * ((1.0 + engine.overlaps) * begun + full)
            return np.asarray(size * (bucket + reduced + passage), np.float64)
        case _:
            bucket = shards.bucket * (1.0 + full * _copies_to_scatter(engine))
            return np.asarray(size * (bucket + _gathered(shards, handed_over)), np.float64)


def _passage(engine: Engine) -> int:
    """Return the elements of the buffer through which stages 1 and 2 offload a gradient.

    As long as the largest (temp_grad_buffer_for_gpu_offload of stage_1_and_2.py).
    """
    return engine.shards.largest * (engine.offloads and engine.zero_stage < 3)  # noqa: PLR2004


def _gathered(shards: Shards, handed_over: Floats) -> Floats:
    """Return the weights that stage 3 has gathered.

    What is needed next is gathered ahead, a module at a time, until max_live_parameters are
    (fetch_sub_module of partitioned_param_coordinator.py), and what was used is kept where it is
    used again within as many (__params_to_release), so that there are as many at the turn from
    forward to backward and from there on.
    """
    to_come = np.maximum(0.0, shards.gathered - handed_over)
    return np.minimum(to_come, MAX_LIVE_PARAMETERS) + shards.persistent


def _copies_to_scatter(engine: Engine) -> int:
    """Return the copies of a bucket that reducing it takes.

    Its parts are put in the order of the ranks (reduce_scatter_coalesced of
    coalesced_collectives.py), and gloo reduces a copy of its own (ProcessGroupGloo.cpp).
    """
    return 2 if engine.gloo else 1


def reducing(engine: Engine) -> float:
    """Return the gradients and buffers when the last of a backward pass are reduced.

    Stage 0 flattens them (allreduce_bucket of engine.py). Stages 1 and 2 have them in a bucket,
    and copy it to be reduced (allreduce_bucket of stage_1_and_2.py); what did not fit into one
    bucket is in the partition's own gradients, or at stage 1 still to come.
    """
    shards, size = engine.shards, engine.compute_bytes
    whole, passage = shards.elements, _passage(engine)
    copied = min(whole, shards.bucket)
    bucket = shards.bucket * (1 + (engine.overlaps and engine.zero_stage < 3))  # noqa: PLR2004
    match engine.zero_stage:
        case 0:
            return float(size * (whole + min(whole, _ALL_REDUCE_ELEMENTS)))
        case 1:
            reduced = shards.most_overlapped * (whole > copied and not engine.offloads)
            to_come = (whole - copied) * (not engine.overlaps)
            return float(size * (max(to_come, reduced) + bucket + copied + passage))
        case 2:
            kept = 0.0 if engine.offloads else float(engine.accumulates) + (whole > copied)
            return float(size * (kept * shards.most_overlapped + bucket + copied + passage))
        case _:
            gathered = shards.persistent + shards.outermost
            bucket += copied * _copies_to_scatter(engine)
            return float(size * (shards.shard * (not engine.offloads) + bucket + gathered))


def looking_for_overflow(engine: Engine) -> float:
    """Return gradients and temporaries while those of fp16 are looked through before an update.

    Stage 3 takes the absolute value of its flat buffer and compares it (has_overflow of stage3.py,
    torch.isinf); the others reduce each gradient to its extremes (has_inf_or_nan of utils.py).
    """
    if not engine.scales_loss or engine.zero_stage < 3 or engine.offloads:  # noqa: PLR2004
        return 0.0
    shards, size = engine.shards, engine.compute_bytes
    compared = 1
    return float(size * (shards.shard + shards.bucket) + (size + compared) * shards.shard)


def updating(engine: Engine, temporaries: int) -> float:
    """Return gradients and temporaries when the optimizer updates.

    The gradients of the share are made flat and fp32. The optimizer may then take temporaries as
    long as what it updates at once: at stage 0 one parameter after the other, else
    the whole share, at stage 3 no more than a sub-group. Offloaded, all that is on the host.

    Args:
        engine: as it is set up.
        temporaries: how many the optimizer takes.
    """
    shards, size = engine.shards, engine.compute_bytes
    converted = FP32 * (size < FP32)
    if engine.offloads:
        return float(size * (_passage(engine) + shards.bucket * (engine.zero_stage == 3)))  # noqa: PLR2004
    match engine.zero_stage:
        case 0:
            kept = (size + converted) * shards.elements
            return float(kept + temporaries * FP32 * shards.largest)
        case 1 | 2:
            flattened = size * (shards.most_overlapped + shards.partition)
            flattened += converted * shards.partition
            return float(max(flattened, (1 + temporaries) * FP32 * shards.partition))
        case _:
            at_once = min(shards.shard, _SUB_GROUP_ELEMENTS)
            flattened = size * at_once + converted * at_once
            bucket = size * shards.bucket
            moving = max(flattened, (1 + temporaries) * FP32 * at_once)
            return float(size * shards.shard + bucket + moving)


def offloaded_optimizer(engine: Engine, *, nvme: bool) -> float:
    """Return what an offloaded optimizer has in host memory: all, or what is swapped in at once.

    A sub-group grows by whole parameters until it has its size (_create_fp16_sub_groups of
    stage3.py).
    """
    if not nvme:
        return optimizer(engine)
    shards = engine.shards
    sub_group = min(shards.shard, NVME_SUB_GROUP_ELEMENTS + -(-shards.largest // shards.ranks))
    return float(NVME_BUFFERS * FP32 * sub_group)


def offloaded_gradients(engine: Engine, *, nvme: bool = False) -> float:
    """Return what of the gradients is in host memory beside an offloaded optimizer.

    Those of the share in fp32, as the update takes them, and as they were reduced; stages 1 and 2
    (stage_1_and_2.py) have a pinned copy of the largest and those of earlier micro-steps besides
    (accumulated_grads_in_cpu), stage 3 the flat buffer of its shard. On NVMe are those in fp32.
    """
    if not engine.offloads:
        return 0.0
    size, more = engine.compute_bytes, 0
    if nvme:
        return float(size * engine.share)
    if engine.zero_stage < 3:  # noqa: PLR2004 - a ZeRO stage
        more = engine.shards.largest + engine.share * engine.accumulates
    return float((FP32 + size) * engine.share + size * more)
