"""Time of an optimizer step, from the time of micro-steps and the lengths of real rows."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from autotune.hardware import Cluster, Rates
from autotune.optimizer import Optimizer
from autotune.setting import NVME, RANDOM, WHOLE, Structure, recomputed_share
from autotune.workload import COMPUTE_BYTES, ModelProfile, Polynomial

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

_MAX_STEPS_INTEGRATED = 2000
_MAX_ROWS_INTEGRATED = 2**17
"""A dataset of more steps or rows is represented by the first ones: their order is random."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRate:
    """What training does on the real lengths, all ranks together."""

    step_time_s: float
    samples_per_s: float
    tokens_per_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Rebalanced:
    """Micro-batches of the steps that training draws first, as `batch_rebalance` splits them.

    Attributes:
        rows: of the dataset, micro-batch after micro-batch.
        sizes: rows of each micro-batch, an array (steps, micro-steps, ranks).
        heaviest: rows of the micro-batch of the most padded tokens that the training makes.
    """

    rows: Ints
    sizes: Ints
    heaviest: Ints


@dataclass(frozen=True, slots=True)
class DrawnRows:
    """The rows of a dataset as a training meets them.

    Attributes:
        lengths: tokens of each row.
        order: the rows in an order as random as the one that training draws them in.
        rebalanced: what `batch_rebalance` makes of them, by micro-steps; rows of one length need
            none, as they are split alike by any sampling.
    """

    lengths: Ints
    order: Ints
    rebalanced: Mapping[int, Rebalanced] = field(default_factory=dict)

    @classmethod
    def draw(
        cls, lengths: Ints, seed: int, rebalanced: Mapping[int, Rebalanced] | None = None
    ) -> "DrawnRows":
        order = np.random.default_rng(seed).permutation(len(lengths))
        return cls(lengths, order, rebalanced or {})

    def first(self, num_rows: int) -> "DrawnRows":
        """Return the rows drawn first; a smaller dataset is drawn again from its start."""
        return DrawnRows(self.lengths, np.resize(self.order, num_rows))

    def of_sampling(self, sampling: str, gradient_accumulation_steps: int) -> Rebalanced | None:
        """Return the micro-batches of a sampling that splits rows by length; else None."""
        alike = self.lengths.min() == self.lengths.max()
        return None if sampling == RANDOM or alike else self.rebalanced[gradient_accumulation_steps]

    def heaviest(
        self, sampling: str, micro_batch_size: int, gradient_accumulation_steps: int
    ) -> tuple[int, int]:
        """Return rows and padded length of the largest micro-batch that training can meet."""
        rebalanced = self.of_sampling(sampling, gradient_accumulation_steps)
        if rebalanced is None:
            return micro_batch_size, int(self.lengths.max())
        return len(rebalanced.heaviest), int(self.lengths[rebalanced.heaviest].max())

    def padded(self, rebalanced: Rebalanced) -> Ints:
        """Return the padded length of each micro-batch, in the shape of their sizes."""
        starts = np.cumsum(rebalanced.sizes) - rebalanced.sizes.ravel()
        longest: Ints = np.maximum.reduceat(self.lengths[rebalanced.rows], starts)
        return longest.reshape(rebalanced.sizes.shape)


def padded_lengths(rows: DrawnRows, micro_batch_size: int) -> Ints:
    """Return the padded length of each micro-batch, the last incomplete one included."""
    drawn = rows.lengths[rows.order]
    missing = -len(drawn) % micro_batch_size
    padded: Ints = np.pad(drawn, (0, missing)).reshape(-1, micro_batch_size).max(axis=1)
    return padded


@dataclass(frozen=True, slots=True)
class DrawnSteps:
    """The optimizer steps of the rows that training draws; ranks get micro-batches in turn.

    Attributes:
        padded: padded length of each micro-batch, an array (steps, micro-steps, ranks). Of steps of
            very many rows it has the first micro-steps, and of each the first rows.
        sizes: rows of each micro-batch, an array like it or one that is broadcast to it.
        micro_steps: micro-steps an optimizer step.
        rows: rows an optimizer step.
        tokens: tokens an optimizer step, without padding, on average.
    """

    padded: Ints
    sizes: Ints
    micro_steps: int
    rows: int
    tokens: float

    @classmethod
    def draw(
        cls,
        rows: DrawnRows,
        micro_batch_size: int,
        gradient_accumulation_steps: int,
        ranks: int,
        sampling: str = RANDOM,
    ) -> "DrawnSteps":
        rebalanced = rows.of_sampling(sampling, gradient_accumulation_steps)
        if rebalanced is not None:
            steps = len(rebalanced.sizes)
            return cls(
                padded=rows.padded(rebalanced),
                sizes=rebalanced.sizes,
                micro_steps=gradient_accumulation_steps,
                rows=micro_batch_size * gradient_accumulation_steps * ranks,
                tokens=float(rows.lengths[rebalanced.rows].sum()) / steps,
            )
        width = min(micro_batch_size, max(1, _MAX_ROWS_INTEGRATED // ranks))
        micro_steps = min(
            gradient_accumulation_steps, max(1, _MAX_ROWS_INTEGRATED // (width * ranks))
        )
        rows_a_step = micro_batch_size * gradient_accumulation_steps * ranks
        available = min(len(rows.order), _MAX_ROWS_INTEGRATED)
        steps = min(max(1, available // rows_a_step), _MAX_STEPS_INTEGRATED)
        drawn = rows.first(steps * micro_steps * ranks * width)
        return cls(
            padded=padded_lengths(drawn, width).reshape(steps, micro_steps, ranks),
            sizes=np.full((1, 1, 1), micro_batch_size),
            micro_steps=gradient_accumulation_steps,
            rows=rows_a_step,
            tokens=rows_a_step * float(drawn.lengths[drawn.order].mean()),
        )

    def mean_s(
        self, micro_step_s: Callable[[Ints, Ints], Floats], *, synchronises_every_micro_step: bool
    ) -> float:
        """Return the mean seconds of a step without its update, where the slowest rank counts.

        Where every micro-step synchronises (ZeRO 2 and 3), each waits for the slowest rank;
        elsewhere only the update does.
        """
        seconds = micro_step_s(self.sizes, self.padded)
        if synchronises_every_micro_step:
            steps = seconds.max(axis=2).sum(axis=1)
        else:
            steps = seconds.sum(axis=1).max(axis=1)
        return float(steps.mean()) * self._not_drawn

    @property
    def padding_share(self) -> float:
        """Return the share of the computed tokens that is padding."""
        computed = float((self.sizes * self.padded).sum(axis=(1, 2)).mean()) * self._not_drawn
        return max(0.0, 1 - self.tokens / computed)

    @property
    def _not_drawn(self) -> float:
        """How many times the micro-steps that were drawn make a step."""
        counted: int = self.padded.shape[1]
        return self.micro_steps / counted

    def mean_s_of(self, micro_steps: "Sequence[MicroStepTime]") -> Floats:
        """Return `mean_s` of many kinds of micro-steps at once, an array (kinds, 2).

        The second column is for synchronising in every micro-step. A time is linear in its
        coefficients, so its sums over micro-steps are those of rows times powers of the lengths;
        ranks that wait for each other take the time of the one that has the most padded tokens.
        """
        kinds = np.array([one.coefficients for one in micro_steps])
        sizes = np.broadcast_to(self.sizes, self.padded.shape)
        slowest = (sizes * self.padded).argmax(axis=2)[:, :, None]
        by_rank = _sums(sizes, self.padded)
        of_slowest = _sums(
            np.take_along_axis(sizes, slowest, axis=2),
            np.take_along_axis(self.padded, slowest, axis=2),
        )
        apart = np.tensordot(kinds, by_rank, axes=1).max(axis=2).mean(axis=1)
        together = np.tensordot(kinds, of_slowest, axes=1)[:, :, 0].mean(axis=1)
        return np.stack([apart, together], axis=1) * self._not_drawn


def _sums(sizes: Ints, lengths: Ints) -> Floats:
    """Sum 1, m, m s and m s^2 over the micro-steps: an array (4, steps, ranks)."""
    exact = lengths.astype(np.float64)
    started = np.full(exact.shape, 1.0).sum(axis=1)
    return np.stack([started, *((sizes * exact**power).sum(axis=1) for power in range(3))])


def integrate(
    rows: DrawnRows,
    *,
    micro_batch_size: int,
    gradient_accumulation_steps: int,
    ranks: int,
    micro_step_s: Callable[[Ints, Ints], Floats],
    boundary_extra_s: float,
    synchronises_every_micro_step: bool,
    sampling: str = RANDOM,
) -> StepRate:
    """Integrate the time of micro-steps over the batches that training draws.

    Args:
        rows: what is drawn, and in which order.
        micro_batch_size: rows a micro-step and rank.
        gradient_accumulation_steps: micro-steps an optimizer step.
        ranks: data-parallel ranks.
        micro_step_s: seconds of a micro-step without an update, for arrays of rows and of padded
            lengths.
        boundary_extra_s: seconds that the update adds to an optimizer step.
        synchronises_every_micro_step: whether ranks wait for each other in each micro-step.
        sampling: how the rows of a step are split.
    """
    steps = DrawnSteps.draw(rows, micro_batch_size, gradient_accumulation_steps, ranks, sampling)
    step_time_s = boundary_extra_s + steps.mean_s(
        micro_step_s, synchronises_every_micro_step=synchronises_every_micro_step
    )
    return StepRate(
        step_time_s=step_time_s,
        samples_per_s=steps.rows / step_time_s,
        tokens_per_s=steps.tokens / step_time_s,
    )


def synchronises_every_micro_step(zero_stage: int, ranks: int) -> bool:
    """ZeRO 2 reduces gradients in each backward pass, ZeRO 3 gathers weights as well."""
    return zero_stage >= 2 and ranks > 1  # noqa: PLR2004 - a ZeRO stage


def evaluate(
    polynomial: Polynomial, micro_batch_size: int | Ints, lengths: Ints | Floats
) -> Floats:
    """Evaluate m (c0 + c1 s + c2 s^2) for each length s."""
    values: Floats = micro_batch_size * (
        polynomial.c0 + polynomial.c1 * lengths + polynomial.c2 * lengths.astype(np.float64) ** 2
    )
    return values


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroStepTime:
    """Seconds of a micro-step: those of its start, and those of each row by its padded length."""

    start_s: float
    a_row_s: Polynomial

    @property
    def coefficients(self) -> tuple[float, float, float, float]:
        """Those of 1, m, m s and m s^2."""
        a_row = self.a_row_s
        return self.start_s, a_row.c0, a_row.c1, a_row.c2

    def __call__(self, sizes: Ints, lengths: Ints) -> Floats:
        """Return the seconds of micro-steps of so many rows of these padded lengths."""
        return self.start_s + evaluate(self.a_row_s, sizes, lengths)


def predicted_micro_step(
    profile: ModelProfile,
    checkpointing: str,
    rates: Rates,
    attention: str | None = None,
    loss: str = WHOLE,
) -> MicroStepTime:
    """Return the predicted seconds of a micro-step.

    The operators of a pass cost their FLOPs at the measured matrix-multiplication rate, and each
    of them what it takes to start one. Weights in 4 bits are dequantised in every pass.
    """
    trace = profile.trace(checkpointing, attention, loss)
    a_flop_s = 1 / rates.matmul_flops_per_s
    return MicroStepTime(
        start_s=trace.operators * rates.operator_overhead_s
        + _dequantisation_s(profile, checkpointing, rates),
        a_row_s=Polynomial(
            c0=trace.flops.c0 * a_flop_s,
            c1=trace.flops.c1 * a_flop_s,
            c2=trace.flops.c2 * a_flop_s,
        ),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Communication:
    """Seconds that a rank communicates, by what of an optimizer step that belongs to.

    Attributes:
        forward_s: each forward pass.
        backward_s: each backward pass.
        first_forward_s: the forward pass of the first micro-step after an update, besides.
        last_backward_s: the backward pass of the last micro-step of an update, besides.
        update_s: each update.
    """

    forward_s: float = 0.0
    backward_s: float = 0.0
    first_forward_s: float = 0.0
    last_backward_s: float = 0.0
    update_s: float = 0.0


def predicted_communication(
    profile: ModelProfile,
    structure: Structure,
    ranks: int,
    rates: Rates,
    element_bytes: int,
    ranks_per_node: int | None = None,
) -> Communication:
    """Return what a rank communicates: its bytes over the link, and the start of each collective.

    A ring through several nodes goes as fast as its slowest link, which the rate of all ranks is;
    what stays within a node (zero_hpz_partition_size) goes at that of a node.

    Bytes that a rank sends, by the ring algorithms, as in the ZeRO paper (arXiv:1910.02054, section
    7), but for stages 1 and 2, which reduce a bucket of gradients to all ranks and then keep their
    own part (average_tensor of stage_1_and_2.py, use_multi_rank_bucket_allreduce): twice the size
    of the gradients. They gather the weights that were trained after the update. Stage 3 gathers
    all weights in either pass and scatters the gradients.

    Args:
        profile: of the model.
        structure: whose stage, partition and buckets count.
        ranks: all of them.
        rates: of a rank.
        element_bytes: of weights and gradients.
        ranks_per_node: how many ranks in a row are in one node; all unless told.
    """
    if ranks == 1:
        return Communication()
    a_byte_s = (ranks - 1) / ranks / rates.link_bytes_per_s
    gradients_s = a_byte_s * element_bytes * profile.trainable_parameters

    def started_s(bucket: int) -> float:
        buckets = -(-profile.trainable_parameters // profile.bucket(bucket))
        return buckets * rates.collective_overhead_s

    reduced_s = 2 * gradients_s + started_s(structure.reduce_bucket_size)
    gathered_s = gradients_s + started_s(structure.allgather_bucket_size)
    match structure.zero_stage:
        case 0:
            return Communication(update_s=reduced_s)
        case 1:
            return Communication(last_backward_s=reduced_s, update_s=gathered_s)
        case 2:
            return Communication(backward_s=reduced_s, update_s=gathered_s)
        case _:
            gathers = profile.longer_than(structure.stage3_param_persistence_threshold)
            weights_s = _gathered_s(profile.parameters, gathers, ranks, rates, element_bytes)
            scattered_s = reduced_s - gradients_s
            group = min(structure.zero_hpz_partition_size, ranks)
            if group == 1:
                return Communication(forward_s=weights_s, backward_s=weights_s + scattered_s)
            inside = (ranks_per_node or ranks) % group == 0
            group_rates = rates.of_one_node() if inside else rates
            near_s = _gathered_s(profile.parameters, gathers, group, group_rates, element_bytes)
            # Its ranks keep what they gathered until the weights change: frozen ones never do
            # (invalidate_secondary_tensor of stage3.py).
            changing = profile.trainable_parameters / profile.parameters
            return Communication(
                forward_s=near_s,
                backward_s=near_s + scattered_s,
                first_forward_s=changing * (weights_s - near_s),
            )


def _gathered_s(elements: int, gathers: int, ranks: int, rates: Rates, element_bytes: int) -> float:
    """Return the seconds in which all ranks of a ring get what each has a part of."""
    sent_bytes = (ranks - 1) / ranks * element_bytes * elements
    return sent_bytes / rates.link_bytes_per_s + gathers * rates.collective_overhead_s


def predicted_hideable(
    communication: Communication, structure: Structure, cluster: Cluster
) -> Communication:
    """Return what of it runs beside computing in a stream of its own (overlap_comm).

    Gradients are reduced there as the backward pass makes them (reduction_stream of
    stage_1_and_2.py, reduce_and_partition_stream of stage3.py), at stage 1 in the last micro-step
    alone; stage 3 gathers the weights of the next layers there in either pass
    (partitioned_param_coordinator.py). On a CPU there are no streams.
    """
    if not structure.overlap_comm or not cluster.has_separate_memory:
        return Communication()
    return replace(communication, update_s=0.0)


_BACKWARD = 2 / 3
"""The share of a pass that the backward one is: it multiplies twice where the forward one does
once. Recomputing makes it more."""


def hidden_s(hideable: Sequence[Floats], computing_s: Floats, micro_steps: Ints) -> Floats:
    """Return the seconds of an optimizer step in which communication is hidden.

    Arguments are columns: those of `Communication` that can be, and what a step computes in how
    many micro-steps.
    """
    forward_s, backward_s, first_s, last_s, _ = hideable
    a_micro_step = computing_s / micro_steps
    backward, forward = _BACKWARD * a_micro_step, (1 - _BACKWARD) * a_micro_step
    each = np.minimum(backward_s, backward) + np.minimum(forward_s, forward)
    first = np.minimum(first_s, np.maximum(forward - forward_s, 0.0))
    hidden: Floats = micro_steps * each + first + np.minimum(last_s, backward)
    return hidden


def _dequantisation_s(profile: ModelProfile, checkpointing: str, rates: Rates) -> float:
    """Return the seconds in which a micro-step reads weights in 4 bits and writes them wide.

    In the forward and the backward pass, and once more in layers that recompute.
    """
    recomputed = recomputed_share(checkpointing)
    bytes_ = (0.5 + COMPUTE_BYTES[profile.precision]) * sum(profile.quantised_sizes)
    return (2 + recomputed) * bytes_ / rates.memory_bytes_per_s


_BYTES_OF_AN_UPDATE: dict[Optimizer, int] = {"adamw": 28, "adamw-8bit": 16, "adafactor": 68}
"""AdamW reads weight, gradient and two moments in fp32 and writes all but the gradient, once; the
moments may have 8 bits. Adafactor is a row of operators (torch/optim/_adafactor.py), each of which
reads and writes what it works on: the weight for its norm and the update, the gradient for rows,
columns and the update, and seven times the estimate that becomes the update."""


def predicted_update_s(
    profile: ModelProfile,
    structure: Structure,
    cluster: Cluster,
    rates: Rates,
    optimizer: Optimizer = "adamw",
) -> float:
    """Return the seconds of the optimizer update, by the bytes that it touches for a parameter."""
    offloaded = structure.offload_optimizer != "none"
    rate = rates.host_memory_bytes_per_s if offloaded else rates.memory_bytes_per_s
    return (
        _BYTES_OF_AN_UPDATE[optimizer]
        * _share(structure, cluster)
        * profile.trainable_parameters
        / rate
    )


def predicted_offload_s(
    profile: ModelProfile,
    structure: Structure,
    cluster: Cluster,
    rates: Rates,
    element_bytes: int,
) -> tuple[float, float]:
    """Return the seconds of copies between device and host (each micro-step, each update).

    Gradients go to the host as they are reduced, stage 1's before the update, and updated weights
    come back. Offloaded weights come for forward and for backward. What is on NVMe goes through
    the host for the update.
    """
    a_shard = _share(structure, cluster) * element_bytes / rates.host_link_bytes_per_s
    micro_step_s = update_s = 0.0
    if structure.offload_optimizer != "none":
        gradients_s = weights_s = a_shard * profile.trainable_parameters
        late = structure.zero_stage == 1
        micro_step_s += gradients_s * (not late)
        update_s += weights_s + gradients_s * late
    if structure.offload_param != "none":
        micro_step_s += 2 * a_shard * profile.parameters
    if structure.offload_optimizer == NVME:
        a_node = profile.trainable_parameters / cluster.num_nodes
        update_s += _BYTES_ON_NVME * a_node / _NVME_BYTES_PER_S
    return micro_step_s, update_s


_BYTES_ON_NVME = 32
"""An update reads and writes a parameter's weight, two moments and gradient in fp32."""

_NVME_BYTES_PER_S = 3e9
"""Of the drive that the ranks of a node share: about what one on four lanes of PCIe 3.0 does. It is
for the order of the settings alone; what is chosen was probed on the drive itself."""


def _share(structure: Structure, cluster: Cluster) -> float:
    """Return the part of the states that a rank has."""
    return 1 / cluster.num_devices if structure.zero_stage >= 1 else 1.0
