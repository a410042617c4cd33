"""Turns settings into what a script is started with, and what its ranks saw into outcomes. Pure."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from autotune.emit import train_spec
from autotune.hardware import Cluster
from autotune.outcome import Measured
from autotune.probe.protocol import ProbeRequest, RungMeasurement, RungPlan
from autotune.script.arguments import ACCUMULATION, GLOBAL_BATCH, MICRO_BATCH, STAGE
from autotune.script.errand import AS_IT_IS
from autotune.script.facts import ScriptFacts
from autotune.setting import Setting, Structure
from autotune.workload import Job

PROBED_ACCUMULATION = 2
"""Micro-steps of an update in a probe, at most: one that accumulates and one that updates tell the
time of any number."""


def job_of(facts: ScriptFacts, name: str) -> Job:
    """Return a script's training as a job, as far as estimates need to know of it."""
    return Job(
        model=facts.architecture,
        model_dir="",
        from_scratch=True,
        trust_remote_code=False,
        method=name,
        precision=facts.precision,
        max_seq_length=max(facts.tokens),
        global_batch_size=facts.global_batch_size,
        epochs=1.0,
        max_steps=None,
        learning_rate=0.0,
        lr_scheduler="",
        warmup_ratio=0.0,
        weight_decay=0.0,
        max_grad_norm=0.0,
        seed=0,
    )


def batches(setting: Setting, ranks: int, accumulation: int) -> dict[str, int]:
    """Return the sizes of DeepSpeed's config; they agree with each other."""
    return {
        GLOBAL_BATCH: setting.micro_batch_size * accumulation * ranks,
        MICRO_BATCH: setting.micro_batch_size,
        ACCUMULATION: accumulation,
    }


def overrides(setting: Setting, ranks: int, accumulation: int) -> dict[str, Any]:
    """Return what of a script's DeepSpeed config becomes another for a setting."""
    structure = setting.structure
    zero: dict[str, Any] = {"stage": structure.zero_stage}
    if structure.offload_optimizer != "none":
        zero["offload_optimizer"] = {"device": structure.offload_optimizer, "pin_memory": True}
    return {**batches(setting, ranks, accumulation), "zero_optimization": zero}


def carried(setting: Setting, ranks: int, accumulation: int) -> dict[str, str | int | None]:
    """Return what a script's own arguments have to say of a setting."""
    return {**batches(setting, ranks, accumulation), STAGE: setting.structure.zero_stage}


class ScriptSite:
    """A script on a cluster.

    Args:
        facts: what is known of it.
        job: it as a job.
        cluster: what it runs on.
    """

    def __init__(self, facts: ScriptFacts, job: Job, cluster: Cluster) -> None:
        self._facts = facts
        self._job = job
        self._cluster = cluster
        self._mean_length = statistics.fmean(facts.tokens)

    def request(self, ladder: Sequence[Setting]) -> ProbeRequest:
        return request_of(ladder, self._job, self._cluster, self._facts)

    def lengths(self, setting: Setting) -> dict[str, object]:  # noqa: ARG002 - all see the same
        return {"longest": max(self._facts.tokens), "mean": self._mean_length}

    def outcome(self, setting: Setting, measured: RungMeasurement) -> Measured:
        """Compose the time of a step from that of its micro-steps."""
        accumulate_s = _typical(measured.accumulate_s[0])
        boundary_s = _typical(measured.boundary_s[0]) if measured.boundary_s else accumulate_s
        accumulation = setting.gradient_accumulation_steps
        extra_s = max(0.0, boundary_s - accumulate_s)
        step_s = accumulation * accumulate_s + extra_s
        samples_per_s = self._facts.global_batch_size / step_s
        return Measured(
            step_time_s=step_s,
            samples_per_s=samples_per_s,
            tokens_per_s=samples_per_s * self._mean_length,
            accumulate_s=((measured.accumulate_s[0][0], accumulate_s),),
            boundary_extra_s=extra_s,
            spread=_spread(measured.accumulate_s[0][1]),
            peak_bytes=measured.peak_bytes,
            allocated_bytes=measured.allocated_bytes,
            device_used_bytes=measured.device_used_bytes,
        )


def request_of(
    ladder: Sequence[Setting], job: Job, cluster: Cluster, facts: ScriptFacts
) -> ProbeRequest:
    """Return the request of settings that differ in their micro-batch size."""
    first = ladder[0]
    changes = overrides(first, cluster.num_devices, probed_accumulation(first))
    if facts.scales_loss:
        # From 2^16 on updates would be left out until the scale has been halved often enough.
        changes["fp16"] = {"initial_scale_power": 0}
    return ProbeRequest(
        label=first.structure.label(),
        ranks=cluster.num_devices,
        spec=train_spec(job, first, cluster, dataset_dir="", output_dir="", model_output_dir=""),
        ds_config=changes,
        total_steps=1,
        rungs=tuple(_rung(one.micro_batch_size, probed_accumulation(one)) for one in ladder),
    )


def first_request(cluster: Cluster, changes: Mapping[str, Any]) -> ProbeRequest:
    """Return the request of a script as it is, of which nothing is known yet."""
    facts = ScriptFacts(
        given={}, micro_batch_size=1, accumulation=1, ranks=cluster.num_devices, zero_stage=0
    )
    setting = Setting(
        structure=Structure(zero_stage=0), micro_batch_size=1, gradient_accumulation_steps=1
    )
    known = request_of([setting], job_of(facts, "script"), cluster, facts)
    return ProbeRequest(
        label="as-it-is",
        ranks=known.ranks,
        spec=known.spec,
        ds_config=dict(changes),
        total_steps=1,
        rungs=(_rung(AS_IT_IS, 1),),
    )


def probed_accumulation(setting: Setting) -> int:
    return min(PROBED_ACCUMULATION, setting.gradient_accumulation_steps)


def _rung(micro_batch_size: int, accumulation: int) -> RungPlan:
    return RungPlan(
        micro_batch_size=micro_batch_size,
        gradient_accumulation_steps=accumulation,
        memory_rows=(),
        timed_rows=(),
    )


def _typical(entry: tuple[int, tuple[float, ...]]) -> float:
    """Return the median of rows that are all as long as each other, else the mean."""
    length, times = entry
    return statistics.median(times) if length else statistics.fmean(times)


def _spread(times: Sequence[float]) -> float:
    median = statistics.median(times)
    return statistics.median(abs(one - median) for one in times) / median
