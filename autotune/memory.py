"""Device memory of every setting of a space, one term a function, in bytes a rank.

N is the number of data-parallel ranks, Psi the parameters, Psi_t the trainable ones, b the bytes of
the compute type. Sources: ZeRO (arXiv:1910.02054, section 3 and 5) and DeepSpeed's runtime/zero.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from autotune import zero
from autotune.hardware import Cluster
from autotune.optimizer import ADAFACTOR
from autotune.setting import NVME, Structure
from autotune.space import Space
from autotune.workload import Job, ModelProfile, Moment
from autotune.zero import Engine, Shards

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

_MIB = 1024 * 1024

_CPU_RUNTIME_BYTES = 48 * _MIB
"""What a CPU rank holds besides tensors: code paged in, communicator, allocator. Measured on ranks
of a 3 M parameter model, stages 0 to 3, as resident set less the tensor bytes: 35 to 56 MiB."""

_CONTEXT_BYTES = 768 * _MIB
"""A CUDA context takes 0.47 to 0.92 GiB (measured on an A100, stas00/ml-engineering)."""

_COMMUNICATORS_BYTES = 1280 * _MIB
"""Communicators take up to 1.5 GiB (same source), once there are ranks to talk to."""

_CPU_FRAGMENTATION = 0.03
"""Share of the allocated peak that malloc holds besides."""

GPU_FRAGMENTATION = 0.4
"""Share of what comes and goes within a step that torch's caching allocator holds besides: blocks
that were let go of and fit nothing since. Weights and states stay where they are. Fitted to
published figures of reserved memory and of nvidia-smi (benchmarks/published). What a probe
measures of it on this machine goes before it (tune/beliefs.py)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryEstimate:
    """A column a term; `allocated_bytes` is the sum of the terms above it."""

    weights_bytes: Floats
    gradients_bytes: Floats
    optimizer_bytes: Floats
    activations_bytes: Floats
    logits_bytes: Floats
    buffers_bytes: Floats
    other_bytes: Floats
    runtime_bytes: Floats
    host_bytes: Floats

    @property
    def allocated_bytes(self) -> Floats:
        """Return the peak of live tensor bytes of a rank."""
        total: Floats = sum(getattr(self, name) for name in PARTS)
        return total

    @property
    def device_bytes(self) -> Floats:
        """Return what the device must have free."""
        total: Floats = self.allocated_bytes + self.runtime_bytes
        return total

    @property
    def fleeting_bytes(self) -> Floats:
        """Return what comes and goes within a step, which is what fragments a GPU's memory."""
        total: Floats = sum(getattr(self, name) for name in _FLEETING)
        return total

    def row(self, index: int) -> dict[str, int]:
        """Return one setting's terms in the order of the contract."""
        return self.rows(np.array([index]))[0]

    def rows(self, indices: NDArray[np.int64]) -> list[dict[str, int]]:
        """Return the terms of some settings, in whole bytes that add up."""
        rounded = {
            name: np.rint(getattr(self, name)[indices]).astype(np.int64)
            for name in (*PARTS, "runtime_bytes", "host_bytes")
        }
        columns = {name: rounded[name] for name in PARTS}
        columns["allocated_bytes"] = np.sum(list(columns.values()), axis=0)
        columns["runtime_bytes"] = rounded["runtime_bytes"]
        columns["device_bytes"] = columns["allocated_bytes"] + columns["runtime_bytes"]
        columns["host_bytes"] = rounded["host_bytes"]
        values = zip(*(column.tolist() for column in columns.values()), strict=True)
        return [dict(zip(columns, row, strict=True)) for row in values]


PARTS = tuple(
    field.name
    for field in fields(MemoryEstimate)
    if field.name not in ("runtime_bytes", "host_bytes")
)

STATES = ("weights_bytes", "gradients_bytes", "optimizer_bytes")
_FLEETING = ("activations_bytes", "logits_bytes", "buffers_bytes")


def estimate_memory(
    space: Space,
    profile: ModelProfile,
    job: Job,
    cluster: Cluster,
    heaviest: int | tuple[Ints, Ints],
) -> MemoryEstimate:
    """Estimate every setting at its worst micro-batch.

    Args:
        space: the settings.
        profile: of the model.
        job: what is trained.
        cluster: on what.
        heaviest: rows and padded length of that micro-batch for every setting; of a number alone,
            all rows are as long as that.
    """
    if isinstance(heaviest, int):
        heaviest = space.micro_batch_size, np.full(len(space), heaviest)
    micro_batches, lengths = heaviest
    shards: dict[tuple[int, int, int], Shards] = {}
    columns = {name: np.zeros(len(space)) for name in (*PARTS, "host_bytes")}
    passes: dict[tuple[object, ...], _Pass] = {}
    for structure, accumulates, length, places in _alike(space, lengths):
        sizes = (
            structure.reduce_bucket_size,
            structure.stage3_param_persistence_threshold,
            structure.zero_hpz_partition_size,
        )
        if sizes not in shards:
            shards[sizes] = shards_of(profile, space.ranks, structure)
        engine = Engine(
            shards=shards[sizes],
            zero_stage=structure.zero_stage,
            compute_bytes=job.compute_bytes,
            accumulates=accumulates,
            gloo=not cluster.has_separate_memory,
            offloads=structure.offload_optimizer != "none" and cluster.has_separate_memory,
            overlaps=structure.overlap_comm,
            optimizer=job.optimizer,
            scales_loss=job.precision == "fp16",
        )
        rows = micro_batches[places]
        trace = profile.trace(structure.checkpointing, structure.attention, structure.loss)
        peaks = []
        for moments in (trace.one_row, trace.more_rows):
            # Structures whose engines are alike share what does not depend on the rows.
            key = (id(moments), length, sizes, *engine.kind)
            if key not in passes:
                passes[key] = _Pass.of(moments, engine, length)
            peaks.append(passes[key].peak(rows))
        peak = _Peak.of_one_or_more(rows, *peaks)
        for name, values in _terms(structure, engine, cluster, peak).items():
            columns[name][places] = values
    return MemoryEstimate(**columns, runtime_bytes=runtime_bytes(cluster, columns))


def shards_of(profile: ModelProfile, ranks: int, structure: Structure) -> Shards:
    """Return a model's parameters as they are divided, with the sizes of the emitted config."""
    return Shards(
        trained=np.array(profile.trained_sizes, dtype=np.int64),
        frozen=np.array(profile.frozen_sizes, dtype=np.int64),
        factored=profile.factored_elements,
        quantised=np.array(profile.quantised_sizes, dtype=np.int64),
        ranks=ranks,
        bucket=profile.bucket(structure.reduce_bucket_size),
        persistence=structure.stage3_param_persistence_threshold,
        group=structure.zero_hpz_partition_size,
    )


def _alike(space: Space, lengths: Ints) -> Iterator[tuple[Structure, bool, int, Ints]]:
    """Yield the rows of the space that differ in their micro-batch size alone."""
    accumulates = space.gradient_accumulation_steps > 1
    different, length = np.unique(lengths, return_inverse=True)
    kinds = (space.structure_index * 2 + accumulates) * len(different) + length
    order = np.argsort(kinds, kind="stable")
    found, first = np.unique(kinds[order], return_index=True)
    for kind, places in zip(found.tolist(), np.split(order, first[1:]), strict=True):
        structure, rest = divmod(kind, 2 * len(different))
        accumulating, place = divmod(rest, len(different))
        yield space.structures[structure], bool(accumulating), int(different[place]), places


@dataclass(frozen=True, slots=True, kw_only=True)
class _Peak:
    """What is alive when a micro-step needs the most, for each micro-batch size."""

    activations: Floats
    logits: Floats
    gradients: Floats
    buffers: Floats

    @classmethod
    def of_one_or_more(cls, rows: Ints, single: "_Peak", several: "_Peak") -> "_Peak":
        """Choose for each micro-batch size between a pass of one row and one of several."""
        return cls(
            **{
                field.name: np.where(
                    rows == 1, getattr(single, field.name), getattr(several, field.name)
                )
                for field in fields(cls)
            }
        )

    @property
    def total(self) -> Floats:
        total: Floats = self.activations + self.gradients + self.buffers
        return total


@dataclass(frozen=True, slots=True, kw_only=True)
class _Pass:
    """What is alive at each moment of a pass over rows of one length, in bytes, in its order.

    The first two are of each row, the others of the batch whatever its rows.
    """

    of_a_row: Floats
    logits: Floats
    of_a_batch: Floats
    gradients: Floats
    buffers: Floats

    @classmethod
    def of(cls, moments: tuple[Moment, ...], engine: Engine, length: int) -> "_Pass":
        moments = tuple(one for one in moments if one.lengths[0] <= length <= one.lengths[1])
        powers = np.array([1.0, length, float(length) ** 2])
        names = ("rows_bytes", "batch_bytes", "logits_bytes")
        columns = [
            np.array([_coefficients(moment, name) for moment in moments]) @ powers for name in names
        ]
        rest = [
            np.array([getattr(moment, name) for moment in moments], dtype=np.float64)
            for name in ("gradients", "hands_over")
        ]
        of_a_row, of_a_batch, logits, handed_over, hands_over = _with_full_bucket(
            np.array([*columns, *rest]), engine.shards.bucket
        )
        return cls(
            of_a_row=of_a_row,
            logits=logits,
            of_a_batch=of_a_batch,
            gradients=zero.gradients_in_pass(engine, handed_over),
            buffers=zero.buffers_in_pass(engine, handed_over, hands_over > 0),
        )

    def peak(self, rows: Ints) -> _Peak:
        """Take the moment at which activations, gradients and buffers together are the most."""
        alive = rows[:, None] * self.of_a_row + self.of_a_batch
        place = np.argmax(alive + self.gradients + self.buffers, axis=1)
        alive = alive[np.arange(len(rows)), place]
        return _Peak(
            activations=alive,
            logits=np.minimum(rows * self.logits[place], alive),
            gradients=self.gradients[place],
            buffers=self.buffers[place],
        )


def _with_full_bucket(moments: Floats, bucket: int) -> Floats:
    """Add the moment at which gradients fill the bucket for the first time, between its neighbours.

    It can be the peak without being one of the model's own. What comes before and after it is alike
    but for the layers that are done by then.

    Args:
        moments: columns in the order of a pass; bytes for each row, of the batch and of the logits,
            elements whose gradients are handed over, and whether one is just then.
        bucket: elements.
    """
    handing = np.flatnonzero(moments[-1])
    later = handing[moments[-2, handing] >= bucket]
    earlier = handing[moments[-2, handing] < bucket]
    if not len(later) or not len(earlier):
        return moments
    before, after = moments[:, earlier[-1]], moments[:, later[0]]
    share = (bucket - before[-2]) / (after[-2] - before[-2])
    return np.insert(moments, later[0], before + share * (after - before), axis=1)


def _coefficients(moment: Moment, name: str) -> tuple[float, float, float]:
    polynomial = getattr(moment, name)
    return polynomial.c0, polynomial.c1, polynomial.c2


def _terms(
    structure: Structure, engine: Engine, cluster: Cluster, peak: _Peak
) -> dict[str, Floats | float]:
    """Return the terms of settings that differ in their micro-batch size alone.

    What another moment than that of `peak` needs beyond it is in other_bytes, but for the gradients
    that are whole by then.
    """
    weights, optimizer = zero.weights(engine), zero.optimizer(engine)
    params_off = structure.offload_param != "none"
    optimizer_off = structure.offload_optimizer != "none"
    on_nvme = structure.offload_optimizer == NVME
    on_device = weights * (not params_off) + optimizer * (not optimizer_off)
    creation = _creation(engine, cluster) - on_device
    step = max(
        zero.reducing(engine),
        zero.looking_for_overflow(engine),
        zero.updating(engine, _temporaries(engine, cluster)),
    )
    beyond = np.maximum(0.0, max(creation, step) - peak.total)
    missing = zero.resident_gradients(engine) - peak.gradients
    gradients = np.clip(missing, 0.0, beyond) if step >= creation else np.zeros_like(beyond)
    return {
        "weights_bytes": weights * (not params_off),
        "gradients_bytes": peak.gradients + gradients,
        "optimizer_bytes": optimizer * (not optimizer_off),
        "activations_bytes": peak.activations - peak.logits,
        "logits_bytes": peak.logits,
        "buffers_bytes": peak.buffers,
        "other_bytes": beyond - gradients,
        "host_bytes": weights * params_off
        + zero.offloaded_optimizer(engine, nvme=on_nvme) * optimizer_off
        + zero.offloaded_gradients(engine, nvme=on_nvme),
    }


def _creation(engine: Engine, cluster: Cluster) -> float:
    """Return what building the engine takes.

    Stages 1 and 2 flatten the trained weights beside themselves, on the device if it has as much
    free by then and else on the host (stage_1_and_2.py, flatten_on_accelerator). What is to be in
    4 bits is drawn wide on the host, for a probe.
    """
    drawn = zero.drawn_wide(engine) * (not cluster.has_separate_memory)
    if engine.zero_stage not in {1, 2}:
        return drawn
    flattened = zero.weights(engine) + zero.flattened(engine)
    runtime = fixed_runtime_bytes(cluster) if cluster.has_separate_memory else 0
    return max(drawn, flattened * (flattened + runtime <= cluster.device_memory_bytes))


_TEMPORARIES_ON_A_CPU = {"adamw": 2, "adamw-8bit": 5, "adafactor": 1}
"""In fp32: of torch/optim/adam.py; moments, gradient and denominator of bitsandbytes'
backends/cpu/ops.py; the estimate of torch/optim/_adafactor.py."""


def _temporaries(engine: Engine, cluster: Cluster) -> int:
    """Return how many copies of what it updates the optimizer makes on the device.

    On a GPU AdamW's kernels work in place, fused or in 8 bits, and so does the one on the host.
    """
    if engine.offloads:
        return 0
    if cluster.has_separate_memory and engine.optimizer != ADAFACTOR:
        return 0
    return _TEMPORARIES_ON_A_CPU[engine.optimizer]


def runtime_bytes(cluster: Cluster, parts: Mapping[str, Floats]) -> Floats:
    """Return what a rank holds besides tensors, for peaks of these parts."""
    names, share = PARTS, _CPU_FRAGMENTATION
    if cluster.has_separate_memory:
        names, share = _FLEETING, GPU_FRAGMENTATION
    held: Floats = np.sum([parts[name] for name in names], axis=0)
    return fixed_runtime_bytes(cluster) + share * held


def fixed_runtime_bytes(cluster: Cluster) -> int:
    """Return what of it is there whatever is allocated; free memory at the start has it still."""
    if not cluster.has_separate_memory:
        return _CPU_RUNTIME_BYTES
    return gpu_runtime_bytes(cluster.num_devices)


def gpu_runtime_bytes(ranks: int) -> int:
    """Return what a process on a GPU takes besides its allocator: context and communicators."""
    return _CONTEXT_BYTES + (_COMMUNICATORS_BYTES if ranks > 1 else 0)
