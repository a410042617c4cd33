"""Device memory of every setting of a space, one term a function, in bytes a rank.

N is the number of data-parallel ranks, Psi the parameters, Psi_t the trainable ones, b the bytes of
the compute type. Sources: ZeRO (arXiv:1910.02054, section 3 and 5) and DeepSpeed's runtime/zero.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from autotune.hardware import Cluster
from autotune.space import Space
from autotune.throughput import evaluate
from autotune.workload import Job, ModelProfile, Peak

Floats = NDArray[np.float64]

_FP32 = 4
_MIB = 1024 * 1024

_CPU_RUNTIME_BYTES = 48 * _MIB
"""What a CPU rank holds besides tensors: code paged in, communicator, allocator. Measured on ranks
of a 3 M parameter model, stages 0 to 3, as resident set less the tensor bytes: 35 to 56 MiB."""

_CONTEXT_BYTES = 768 * _MIB
"""A CUDA context takes 0.47 to 0.92 GiB (measured on an A100, stas00/ml-engineering)."""

_COMMUNICATORS_BYTES = 1280 * _MIB
"""Communicators take up to 1.5 GiB (same source), once there are ranks to talk to."""

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
    activations, logits = _activations(space, profile, longest_row)
    optimizer = _optimizer(space, profile, job)
    weights = _weights(space, profile, job)
    params_off = _offloaded(space, "offload_param")
    optimizer_off = _offloaded(space, "offload_optimizer")
    allocated = {
        "weights_bytes": np.where(params_off, 0.0, weights),
        "gradients_bytes": _gradients(space, profile, job),
        "optimizer_bytes": np.where(optimizer_off, 0.0, optimizer),
        "activations_bytes": activations - logits,
        "logits_bytes": logits,
        "buffers_bytes": _buffers(space, profile, job),
    }
    elsewhere = _other_peaks(space, profile, job, cluster, allocated)
    in_micro_step = np.sum(list(allocated.values()), axis=0)
    allocated["other_bytes"] = np.maximum(0.0, elsewhere - in_micro_step)
    return MemoryEstimate(
        **allocated,
        runtime_bytes=runtime_bytes(cluster, np.sum(list(allocated.values()), axis=0)),
        host_bytes=np.where(params_off, weights, 0.0) + np.where(optimizer_off, optimizer, 0.0),
    )


def _stage(space: Space) -> NDArray[np.int64]:
    return space.column("zero_stage").astype(np.int64)


def _sharded(space: Space, from_stage: int) -> Floats:
    """Return N where ZeRO shards from that stage on, else 1."""
    return np.where(_stage(space) >= from_stage, float(space.ranks), 1.0)


def _offloaded(space: Space, field: str) -> NDArray[np.bool_]:
    offloaded: NDArray[np.bool_] = space.column(field) != "none"
    return offloaded


def _weights(space: Space, profile: ModelProfile, job: Job) -> Floats:
    """Return b Psi, a shard of it at stage 3 (ZeRO section 5.3)."""
    return job.compute_bytes * profile.parameters / _sharded(space, 3)


def _gradients(space: Space, profile: ModelProfile, job: Job) -> Floats:
    """Return b Psi_t, a shard of it from stage 2 on (ZeRO section 5.2)."""
    return job.compute_bytes * profile.trainable_parameters / _sharded(space, 2)


def _optimizer(space: Space, profile: ModelProfile, job: Job) -> Floats:
    """Two fp32 moments, and a flat fp32 copy of the weights.

    In mixed precision the copy is always there (ZeRO section 3.1: 12 Psi), in fp32 from stage 1 on,
    as DeepSpeed's sharded optimizers keep their own partition whatever the type.
    """
    keeps_copy = (_stage(space) >= 1) | (job.precision != "fp32")
    bytes_a_parameter = np.where(keeps_copy, 3 * _FP32, 2 * _FP32)
    return bytes_a_parameter * profile.trainable_parameters / _sharded(space, 1)


def _activations(space: Space, profile: ModelProfile, length: int) -> tuple[Floats, Floats]:
    """Return activations and the logits among them, by checkpointing mode and micro-batch."""
    modes, place = np.unique(space.column("checkpointing"), return_inverse=True)
    traces = [profile.trace(mode) for mode in modes.tolist()]
    peaks = np.array([peak_of_a_row(trace.activations_bytes, length) for trace in traces])
    logits = np.array([evaluate(trace.logits_bytes, 1, np.array([length]))[0] for trace in traces])
    rows = space.micro_batch_size
    return peaks[place] * rows, np.minimum(logits, peaks)[place] * rows


def peak_of_a_row(peak: Peak, length: int) -> float:
    """Evaluate a traced peak at a length."""
    if length < peak.lengths[-3]:
        return float(np.interp(length, peak.lengths, peak.values))
    return float(evaluate(peak.tail, 1, np.array([length]))[0])


def _buffers(space: Space, profile: ModelProfile, job: Job) -> Floats:
    """Return the reduce bucket of stage 1, and of stage 3 the bucket and gathered weights.

    Stage 1 keeps its bucket from one micro-step to the next, stage 2 lets go of it after each, so
    that it is not there when activations peak. Stage 3 holds the block at work and the one
    prefetched, and the largest parameter outside them.
    """
    bucket = float(job.compute_bytes * profile.bucket_elements)
    gathered = job.compute_bytes * (
        2 * profile.largest_layer_parameters + profile.largest_parameter
    )
    a_stage = np.array([0.0, bucket, 0.0, bucket + gathered])
    buffers: Floats = a_stage[_stage(space)]
    return buffers


def _other_peaks(
    space: Space,
    profile: ModelProfile,
    job: Job,
    cluster: Cluster,
    allocated: Mapping[str, Floats],
) -> Floats:
    """Return the larger of the peaks outside of micro-steps.

    When the engine is built, stages 1 and 2 flatten the weights beside themselves, on the device
    if it has as much free by then and else on the host (stage_1_and_2.py,
    flatten_on_accelerator). In the update, torch's AdamW takes its
    foreach path on a GPU, which holds three temporaries as long as the fp32 shard (torch/optim/
    adamw.py); beside the activations' peak that shows where activations are small.
    """
    stage = _stage(space)
    flattens = (stage == 1) | (stage == 2)  # noqa: PLR2004 - ZeRO stages
    flattened = 2.0 * job.compute_bytes * profile.parameters
    runtime = fixed_runtime_bytes(cluster) if cluster.has_separate_memory else 0
    on_device = flattened + runtime <= cluster.device_memory_bytes
    creation = np.where(flattens & on_device, flattened, 0.0)
    states = (
        allocated["weights_bytes"] + allocated["gradients_bytes"] + allocated["optimizer_bytes"]
    )
    temporaries = 3 * _FP32 * profile.trainable_parameters / _sharded(space, 1)
    on_gpu = cluster.has_separate_memory & ~_offloaded(space, "offload_optimizer")
    update: Floats = states + np.where(on_gpu, temporaries, 0.0)
    return np.maximum(creation, update)


def runtime_bytes(cluster: Cluster, allocated: Floats) -> Floats:
    """Return what a rank holds besides tensors, for each peak of allocated bytes."""
    return fixed_runtime_bytes(cluster) + _FRAGMENTATION * allocated


def fixed_runtime_bytes(cluster: Cluster) -> int:
    """Return what of it is there whatever is allocated; free memory at the start has it still."""
    if not cluster.has_separate_memory:
        return _CPU_RUNTIME_BYTES
    return gpu_runtime_bytes(cluster.num_devices)


def gpu_runtime_bytes(ranks: int) -> int:
    """Return what a process on a GPU takes besides its allocator: context and communicators."""
    return _CONTEXT_BYTES + (_COMMUNICATORS_BYTES if ranks > 1 else 0)
