"""The documents that a run leaves for people and machines: plan, figures, fallbacks."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, replace
from types import MappingProxyType
from typing import Any

import numpy as np

from autotune.emit import ds_config, train_spec
from autotune.errors import UsageError
from autotune.hardware import Cluster
from autotune.intake import NamedHardware, Workload, estimate_setting, total_steps
from autotune.memory import PARTS, MemoryEstimate, runtime_bytes
from autotune.outcome import Measured, Outcome, Rung
from autotune.plan import Plan
from autotune.prices import NO_PRICES, Prices
from autotune.profile.virtual import VirtualRun
from autotune.remedy import near_misses
from autotune.setting import Setting
from autotune.tune.loop import Tuned

_MAX_FALLBACKS = 5
_LESS = 0.75

ARITHMETIC, VIRTUAL_RUN = "arithmetic", "virtual run"
"""Where the memory of an estimate comes from."""


def tuning_figures(workload: Workload, tuned: Tuned, best: Rung, tuning_s: float) -> dict[str, Any]:
    """Return what result.json says of the tuning, which took so many seconds."""
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
        "rungs": sum(not rung.cached for rung in tuned.rungs),
        "cached_rungs": sum(rung.cached for rung in tuned.rungs),
        "stopped_by": tuned.stopped_by,
        "tuning_seconds": tuning_s,
        "break_even_step": break_even_step(default, chosen, tuning_s),
        "job": asdict(workload.job),
        "total_steps": total_steps(workload),
    }


def break_even_step(default: Outcome | None, chosen: Measured, tuning_s: float) -> int | None:
    """Return the step of the training by which tuning has saved the time that it took.

    None where it has not made steps faster, or that is not known.
    """
    if not isinstance(default, Measured) or default.step_time_s <= chosen.step_time_s:
        return None
    return math.ceil(tuning_s / (default.step_time_s - chosen.step_time_s))


def emission(
    workload: Workload, tuned: Tuned, chosen: Setting
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return what is emitted of the chosen setting, and of the ladder of fallbacks below it.

    The ladder has the best measured settings that need less memory, then estimated ones, each the
    fastest that needs a quarter less than the one before it.
    """
    measured = {
        rung.setting: rung.outcome for rung in tuned.rungs if isinstance(rung.outcome, Measured)
    }
    peak = measured[chosen].peak_bytes
    lighter = [one for one in measured if measured[one].peak_bytes < peak]
    lighter.sort(key=lambda one: -measured[one].tokens_per_s)
    ladder = [_emitted(workload, one, measured[one]) for one in lighter[:_MAX_FALLBACKS]]
    return _emitted(workload, chosen, measured[chosen]), [
        *ladder,
        *_estimated_below(workload, chosen, measured),
    ]


def _emitted(workload: Workload, setting: Setting, outcome: Measured) -> dict[str, Any]:
    longest = int(workload.lengths.max())
    return _files(workload, setting) | {
        "source": "measured",
        "tokens_per_s": outcome.tokens_per_s,
        "peak_bytes": outcome.peak_bytes,
        "promise": {
            "tokens_per_s": outcome.tokens_per_s,
            "peak_bytes": outcome.peak_bytes,
            "tokens_per_step": outcome.tokens_per_s * outcome.step_time_s,
            "longest_row": longest,
        },
    }


def _files(workload: Workload, setting: Setting) -> dict[str, Any]:
    job, cluster = workload.job, workload.question.cluster
    spec = train_spec(
        job,
        setting,
        cluster,
        dataset_dir="dataset",
        output_dir="training",
        model_output_dir="model",
        probed_tokens=math.prod(
            workload.drawn.heaviest(
                setting.structure.sampling,
                setting.micro_batch_size,
                setting.gradient_accumulation_steps,
            )
        ),
    )
    return {
        "setting": setting.to_json(),
        "ds_config": ds_config(job, setting, workload.profile, cluster),
        "train_args": spec.to_json(),
    }


def _estimated_below(
    workload: Workload, chosen: Setting, measured: Mapping[Setting, Measured]
) -> list[dict[str, Any]]:
    """Return fallbacks that were not probed, scaled by how the chosen one was misjudged."""
    plan = workload.plan
    row = plan.row_of(chosen)
    assert row is not None, "a probed setting is one of the plan"
    memory = measured[chosen].peak_bytes / plan.memory.device_bytes[row]
    peaks = plan.memory.device_bytes * memory
    speeds = plan.tokens_per_s * (measured[chosen].tokens_per_s / plan.tokens_per_s[row])
    entries: list[dict[str, Any]] = []
    limit = _LESS * float(peaks[row])
    while len(entries) < _MAX_FALLBACKS:
        fitting = np.flatnonzero(plan.fits & (peaks < limit))
        if not len(fitting):
            break
        best = int(fitting[np.argmax(speeds[fitting])])
        limit = _LESS * float(peaks[best])
        setting = plan.space.setting(best)
        if setting in measured:
            continue
        entries.append(
            _files(workload, setting)
            | {
                "source": "estimated",
                "tokens_per_s": float(speeds[best]),
                "peak_bytes": float(peaks[best]),
            }
        )
    return entries


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
        "source": ARITHMETIC if virtual is None else VIRTUAL_RUN,
        "ds_config": ds_config(workload.job, setting, workload.profile, cluster),
    }


def measured_memory(virtual: VirtualRun, cluster: Cluster) -> MemoryEstimate:
    """Return the memory of a virtual run in the terms of an estimate."""
    named = {f"{part}_bytes": size for part, size in virtual.parts.items()}
    parts = {name: np.array([float(named.pop(name, 0))]) for name in PARTS}
    parts["other_bytes"] = parts["other_bytes"] + sum(named.values())
    return MemoryEstimate(
        **parts,
        runtime_bytes=runtime_bytes(cluster, parts),
        host_bytes=np.array([float(virtual.peak_host_bytes)]),
    )


def plan_document(
    workload: Workload,
    *,
    everything: bool = False,
    prices: Prices = NO_PRICES,
    exactly: Mapping[int, VirtualRun] = MappingProxyType({}),
) -> dict[str, Any]:
    """Return plan.json; the memory of rows that ran virtually is what was seen there."""
    cluster = workload.question.cluster
    longest = int(workload.lengths.max())
    plan = with_exact_memory(workload.plan, exactly, cluster)
    exact = {plan.space.setting(row).key() for row in exactly}
    rows = plan.listed_rows(everything=everything)
    settings = plan.entries(rows)
    for entry, terms in zip(settings, plan.terms.rows(rows), strict=True):
        entry["terms"] = terms
        by_virtual_run = Setting.from_json(entry["setting"]).key() in exact
        entry["source"] = VIRTUAL_RUN if by_virtual_run else ARITHMETIC
        entry.update(training_figures(workload, entry, prices))
    return {
        "schema": 1,
        "model": _model(workload),
        "cluster": asdict(cluster),
        "job": asdict(workload.job),
        "pins": {name: list(values) for name, values in workload.question.pins.values.items()},
        "rows": {
            "longest": longest,
            "mean": float(workload.lengths.mean()),
            "count": workload.rows,
        },
        "settings": settings,
        "counts": {"kept": int(plan.kept.sum()), "rejected_by_rule": plan.rejected_by_rule()},
        "near_misses": near_misses(plan, workload.profile, workload.job, cluster, longest),
    }


def with_exact_memory(plan: Plan, exactly: Mapping[int, VirtualRun], cluster: Cluster) -> Plan:
    """Return the plan with the memory of virtual runs in their rows."""
    columns = {field.name: getattr(plan.memory, field.name).copy() for field in fields(plan.memory)}
    for row, run in exactly.items():
        seen = measured_memory(run, cluster)
        for name, column in columns.items():
            column[row] = getattr(seen, name)[0]
    return replace(plan, memory=MemoryEstimate(**columns))


def _model(workload: Workload) -> dict[str, Any]:
    figures = asdict(workload.profile)
    figures.pop("traces")
    return {"name": workload.job.model, **figures}


def training_figures(workload: Workload, entry: dict[str, Any], prices: Prices) -> dict[str, Any]:
    """Return steps, hours and cost of the whole training, as far as they are known."""
    steps = total_steps(workload)
    if steps is None:
        return {}
    cluster = workload.question.cluster
    hours = steps * entry["step_time_s"] / 3600
    figures = {"training_steps": steps, "training_hours": hours}
    price = prices.of(cluster.device_name)
    if price is not None:
        figures["training_cost"] = hours * cluster.num_devices * price
    return figures


def matrix_document(
    cells: Sequence[tuple[NamedHardware, Workload | UsageError]], prices: Prices
) -> dict[str, Any]:
    """Return what `plan --matrix` answers: the best setting of each hardware, or what it lacks."""
    looked_into = [found for _, found in cells if isinstance(found, Workload)]
    return {
        "schema": 1,
        "model": _model(looked_into[0]) if looked_into else None,
        "job": asdict(looked_into[0].job) if looked_into else None,
        "cells": [_cell(named, found, prices) for named, found in cells],
    }


def _cell(named: NamedHardware, found: Workload | UsageError, prices: Prices) -> dict[str, Any]:
    place = {"gpu": named.gpus[0].gpu.name, "count": named.num_devices, "nodes": len(named.gpus)}
    if isinstance(found, UsageError):
        return place | {"best": None, "shortfall": None, "refused": str(found)}
    plan = found.plan
    best = plan.best()
    if best is not None:
        entry = plan.entry(best)
        answer = {"best": entry | training_figures(found, entry, prices), "shortfall": None}
    else:
        answer = {"best": None, "shortfall": plan.shortfall()}
    return place | {"precision": found.job.precision, **answer, "refused": None}
