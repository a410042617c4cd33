"""What follows when a training ends before its time: the ladder of fallbacks. Pure."""

from collections.abc import Sequence
from typing import Any, Literal

from autotune.optimizer import ADAFACTOR
from autotune.workload import Job, ModelProfile
from autotune.zero import FP32

Cause = Literal["out_of_memory", "rank_lost", "launcher_lost"]

MAX_REPEATS = 2
"""Starts of the same setting in a row that get to no new checkpoint."""


def disk_bytes(job: Job, profile: ModelProfile, checkpoints: int | None) -> int:
    """Return what checkpoints and the final model will take on the disk.

    A checkpoint has fp32 weights and moments of what is trained, two as long unless they are
    Adafactor's, and the model or its adapters as they are saved; an older one is removed when the
    next is complete. Without a limit of their number, two are counted.
    """
    trained, every = profile.trainable_parameters, profile.parameters
    saved = job.compute_bytes * (every if job.lora is None else trained)
    final = saved + job.compute_bytes * every * (job.lora is not None and job.merge)
    base = job.compute_bytes * every * job.from_scratch
    moments = profile.factored_elements if job.optimizer == ADAFACTOR else 2 * trained
    state = FP32 * (trained + moments)
    return ((checkpoints or 2) + 1) * (state + saved) + final + base


def next_fallback(ladder: Sequence[dict[str, Any]], peak_bytes: float) -> int | None:
    """Return the fastest fallback that needs less memory, None if there is none."""
    lighter = [place for place, entry in enumerate(ladder) if entry["peak_bytes"] < peak_bytes]
    return max(lighter, key=lambda place: ladder[place]["tokens_per_s"], default=None)


def repeats_in_vain(recoveries: Sequence[dict[str, Any]]) -> int:
    """Count the last recoveries that began from one and the same step with one setting."""
    if not recoveries:
        return 0
    last = recoveries[-1]
    count = 0
    for entry in reversed(recoveries):
        if (entry["from_step"], entry["to"]) != (last["from_step"], last["to"]):
            break
        count += 1
    return count
