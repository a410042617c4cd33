"""Device memory of every setting of a space, one term a function, in bytes a rank.

N is the number of data-parallel ranks, Psi the parameters, Psi_t the trainable ones, b the bytes of
the compute type. Sources: ZeRO (arXiv:1910.02054, section 3 and 5) and DeepSpeed's runtime/zero.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from autotune import zero
from autotune.hardware import Cluster
from autotune.setting import Structure
from autotune.space import Space
from autotune.workload import Job, ModelProfile, Moment, Trace
from autotune.zero import Engine, Shards

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

_MIB = 1024 * 1024

_CPU_RUNTIME_BYTES = 48 * _MIB
"""What a CPU rank holds besides tensors: code paged in, communicator, allocator. Measured on ranks
of a 3 M parameter model, stages 0 to 3, as resident set less the tensor bytes: 35 to 56 MiB."""

GPU_RUNTIME_BYTES = 2048 * _MIB
"""CUDA context 0.5 to 0.9 GiB (measured, stas00/ml-engineering) and communicators up to 1.5 GiB,
which a rank pays once and which free memory at the start does not show yet."""

_FRAGMENTATION = 0.03
"""Share of the allocated peak that the allocator holds besides."""


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

    def row(self, index: int) -> dict[str, int]:
        """Return one setting's terms in the order of the contract."""
        names = (*PARTS, "allocated_bytes", "runtime_bytes", "device_bytes", "host_bytes")
        rounded = {name: round(float(getattr(self, name)[index])) for name in names}
        rounded["allocated_bytes"] = sum(rounded[name] for name in PARTS)
        rounded["device_bytes"] = rounded["allocated_bytes"] + rounded["runtime_bytes"]
        return rounded


PARTS = tuple(
    field.name
    for field in fields(MemoryEstimate)
    if field.name not in ("runtime_bytes", "host_bytes")
)


def estimate_memory(
    space: Space, profile: ModelProfile, job: Job, cluster: Cluster, longest_row: int
) -> MemoryEstimate:
    """Estimate every setting at its worst micro-batch: all rows as long as the longest."""
    shards = shards_of(profile, space.ranks)
    columns = {name: np.zeros(len(space)) for name in (*PARTS, "host_bytes")}
    for structure, accumulates, places in _alike(space):
        engine = Engine(
            shards=shards,
            zero_stage=structure.zero_stage,
            compute_bytes=job.compute_bytes,
            accumulates=accumulates,
            gloo=not cluster.has_separate_memory,
        )
        trace = profile.trace(structure.checkpointing)
        peak = _Peak.of_trace(trace, engine, space.micro_batch_size[places], longest_row)
        for name, values in _terms(structure, engine, cluster, peak).items():
            columns[name][places] = values
    allocated = np.sum([columns[name] for name in PARTS], axis=0)
    return MemoryEstimate(**columns, runtime_bytes=runtime_bytes(cluster, allocated))


def shards_of(profile: ModelProfile, ranks: int) -> Shards:
    """Return a model's parameters as they are divided, with the buckets of the emitted config."""
    return Shards(
        trained=np.array(profile.trained_sizes, dtype=np.int64),
        frozen=np.array(profile.frozen_sizes, dtype=np.int64),
        ranks=ranks,
        bucket=profile.bucket_elements,
        prefetched=profile.prefetch_elements,
    )


def _alike(space: Space) -> Iterator[tuple[Structure, bool, Ints]]:
    """Yield the rows of the space that differ in their micro-batch size alone."""
    accumulates = space.gradient_accumulation_steps > 1
    for index, structure in enumerate(space.structures):
        for more in (False, True):
            places = np.flatnonzero((space.structure_index == index) & (accumulates == more))
            if len(places):
                yield structure, more, places


@dataclass(frozen=True, slots=True, kw_only=True)
class _Peak:
    """What is alive when a micro-step needs the most, for each micro-batch size."""

    activations: Floats
    logits: Floats
    gradients: Floats
    buffers: Floats

    @classmethod
    def of_trace(cls, trace: Trace, engine: Engine, rows: Ints, length: int) -> "_Peak":
        single = cls.of(trace.one_row, engine, rows, length)
        several = cls.of(trace.more_rows, engine, rows, length)
        return cls(
            **{
                field.name: np.where(
                    rows == 1, getattr(single, field.name), getattr(several, field.name)
                )
                for field in fields(cls)
            }
        )

    @classmethod
    def of(cls, moments: tuple[Moment, ...], engine: Engine, rows: Ints, length: int) -> "_Peak":
        """Take the moment at which activations, gradients and buffers together are the most."""
        moments = tuple(one for one in moments if one.lengths[0] <= length <= one.lengths[1])
        powers = np.array([1.0, length, float(length) ** 2])
        of_a_row, of_a_batch, logits = (
            np.array([_coefficients(moment, name) for moment in moments]) @ powers
            for name in ("rows_bytes", "batch_bytes", "logits_bytes")
        )
        handed_over = np.array([moment.gradients for moment in moments])
        gradients = zero.gradients_in_pass(engine, handed_over)
        buffers = zero.buffers_in_pass(engine, handed_over)
        alive = rows[:, None] * of_a_row + of_a_batch
        place = np.argmax(alive + gradients + buffers, axis=1)
        alive = alive[np.arange(len(rows)), place]
        return cls(
            activations=alive,
            logits=np.minimum(rows * logits[place], alive),
            gradients=gradients[place],
            buffers=buffers[place],
        )

    @property
    def total(self) -> Floats:
        total: Floats = self.activations + self.gradients + self.buffers
        return total


def _coefficients(moment: Moment, name: str) -> tuple[float, float, float]:
    polynomial = getattr(moment, name)
    return polynomial.c0, polynomial.c1, polynomial.c2


def _terms(
    structure: Structure, engine: Engine, cluster: Cluster, peak: _Peak
) -> dict[str, Floats | float]:
    """Return the terms of settings that differ in their micro-batch size alone.

    What another moment than that of `peak` needs beyond it is in other_bytes.
    """
    weights, optimizer = zero.weights(engine), zero.optimizer(engine)
    params_off = structure.offload_param != "none"
    optimizer_off = structure.offload_optimizer != "none"
    on_device = weights * (not params_off) + optimizer * (not optimizer_off)
    elsewhere = max(
        _creation(engine, cluster) - on_device,
        zero.reducing(engine),
        zero.updating(engine, _temporaries(structure, cluster)),
    )
    return {
        "weights_bytes": weights * (not params_off),
        "gradients_bytes": peak.gradients,
        "optimizer_bytes": optimizer * (not optimizer_off),
        "activations_bytes": peak.activations - peak.logits,
        "logits_bytes": peak.logits,
        "buffers_bytes": peak.buffers,
        "other_bytes": np.maximum(0.0, elsewhere - peak.total),
        "host_bytes": weights * params_off + optimizer * optimizer_off,
    }


def _creation(engine: Engine, cluster: Cluster) -> float:
    """Return what building the engine takes.

    Stages 1 and 2 flatten the weights beside themselves, on the device if it has as much free by
    then and else on the host (stage_1_and_2.py, flatten_on_accelerator).
    """
    if engine.zero_stage not in {1, 2}:
        return 0.0
    flattened = 2.0 * zero.weights(engine)
    runtime = GPU_RUNTIME_BYTES if cluster.has_separate_memory else 0
    return flattened if flattened + runtime <= cluster.device_memory_bytes else 0.0


def _temporaries(structure: Structure, cluster: Cluster) -> int:
    """Return how many copies of what it updates torch's AdamW makes on the device.

    The foreach path of a GPU three, the other two (torch/optim/adamw.py, adam.py).
    """
    if structure.offload_optimizer != "none":
        return 0
    return 3 if cluster.has_separate_memory else 2


def runtime_bytes(cluster: Cluster, allocated: Floats) -> Floats:
    """Return what a rank holds besides tensors, for each peak of allocated bytes."""
    fixed = GPU_RUNTIME_BYTES if cluster.has_separate_memory else _CPU_RUNTIME_BYTES
    return fixed + _FRAGMENTATION * allocated
