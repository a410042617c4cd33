"""The documents that a run leaves for people and machines: plan, figures, fallbacks."""

from dataclasses import asdict, replace
from typing import Any

import numpy as np

from autotune.emit import ds_config
from autotune.hardware import Cluster
from autotune.intake import Workload, estimate_setting, total_steps
from autotune.memory import PARTS, MemoryEstimate, runtime_bytes
from autotune.outcome import Measured, Rung
from autotune.profile.virtual import VirtualRun
from autotune.setting import Setting
from autotune.tune.loop import Tuned

_MAX_FALLBACKS = 5


def tuning_figures(workload: Workload, tuned: Tuned, best: Rung) -> dict[str, Any]:
    """Return what result.json says of the tuning."""
    chosen, plan = best.outcome, workload.plan
    assert isinstance(chosen, Measured)
    row = plan.row_of(best.setting)
    assert row is not None, "a probed setting is one of the plan"
    default = tuned.default.outcome if tuned.default else None
    default_speed = default.tokens_per_s if isinstance(default, Measured) else None
    return {
        "setting": best.setting.to_json(),
        "tokens_per_s": chosen.tokens_per_s,
        "samples_per_s": chosen.samples_per_s,
        "step_time_s": chosen.step_time_s,
        "default": {
            "setting": tuned.default.setting.to_json() if tuned.default else None,
            "tokens_per_s": default_speed,
        },
        "gain_over_default": chosen.tokens_per_s / default_speed if default_speed else None,
        "memory": {
            "predicted_bytes": plan.memory.row(row)["device_bytes"],
            "measured_bytes": chosen.peak_bytes,
            "budget_bytes": plan.budget_bytes,
        },
        "probes": tuned.probes,
        "rungs": len(tuned.rungs),
        "stopped_by": tuned.stopped_by,
        "job": asdict(workload.job),
        "total_steps": total_steps(workload),
    }


def fallbacks(workload: Workload, tuned: Tuned, chosen: Setting) -> list[dict[str, Any]]:
    """Return the next best measured settings that need less memory than the chosen one."""
    peaks = {
        rung.setting: rung.outcome for rung in tuned.rungs if isinstance(rung.outcome, Measured)
    }
    lighter = [
        (setting, outcome)
        for setting, outcome in peaks.items()
        if outcome.peak_bytes < peaks[chosen].peak_bytes
    ]
    lighter.sort(key=lambda pair: -pair[1].tokens_per_s)
    return [
        {
            "setting": setting.to_json(),
            "tokens_per_s": outcome.tokens_per_s,
            "peak_bytes": outcome.peak_bytes,
            "ds_config": ds_config(
                workload.job, setting, workload.profile, workload.question.cluster
            ),
        }
        for setting, outcome in lighter[:_MAX_FALLBACKS]
    ]


def estimate_document(
    workload: Workload, setting: Setting, virtual: VirtualRun | None
) -> dict[str, Any]:
    """Return what `estimate` answers: by arithmetic, or by a virtual run where there was one."""
    plan = estimate_setting(workload, setting)
    if virtual is not None:
        plan = replace(plan, memory=measured_memory(virtual, workload.question.cluster))
    entry = plan.entry(0)
    cluster = workload.question.cluster
    return entry | {
        "source": "arithmetic" if virtual is None else "virtual run",
        "ds_config": ds_config(workload.job, setting, workload.profile, cluster),
    }


def measured_memory(virtual: VirtualRun, cluster: Cluster) -> MemoryEstimate:
    """Return the memory of a virtual run in the terms of an estimate."""
    named = {f"{part}_bytes": size for part, size in virtual.parts.items()}
    parts = {name: np.array([float(named.pop(name, 0))]) for name in PARTS}
    parts["other_bytes"] = parts["other_bytes"] + sum(named.values())
    allocated = np.array([float(virtual.peak_device_bytes)])
    return MemoryEstimate(
        **parts,
        runtime_bytes=runtime_bytes(cluster, allocated),
        host_bytes=np.array([float(virtual.peak_host_bytes)]),
    )


def plan_document(workload: Workload, *, everything: bool = False) -> dict[str, Any]:
    """Return plan.json."""
    profile, plan = workload.profile, workload.plan
    return {
        "schema": 1,
        "model": {
            "name": workload.job.model,
            **{k: v for k, v in asdict(profile).items() if k != "traces"},
        },
        "cluster": asdict(workload.question.cluster),
        "job": asdict(workload.job),
        "settings": plan.listed(everything=everything),
        "counts": {"kept": int(plan.kept.sum()), "rejected_by_rule": plan.rejected_by_rule()},
    }
