"""What results look like on a terminal."""

from typing import Any

from autotune.cli.options import table
from autotune.setting import Setting
from autotune.units import format_bytes, format_count, format_duration

_SHOWN = 12


def plan_text(document: dict[str, Any]) -> str:
    """Lay out plan.json: the best settings, and the nearest of those that do not fit."""
    model, cluster = document["model"], document["cluster"]
    kept = [entry for entry in document["settings"] if entry["rejected_by"] is None]
    rejected = [entry for entry in document["settings"] if entry["rejected_by"] is not None]
    head = (
        f"{model['name']}: {format_count(model['parameters'])} parameters, "
        f"{document['job']['precision']}, on {cluster['num_devices']} x {cluster['device_name']}, "
        f"{format_bytes(cluster['device_memory_bytes'])} each"
    )
    counts = document["counts"]
    parts = [head, f"{counts['kept']} settings may fit; estimates, best first:"]
    parts.append(_plan_table(kept[:_SHOWN]))
    for rule, count in counts["rejected_by_rule"].items():
        parts.append(f"{count} settings rejected by {rule}; nearest: {_nearest(rejected)}")
    return "\n".join(parts)


def _plan_table(entries: list[dict[str, Any]]) -> str:
    columns = ("ZeRO", "micro-batch", "accumulation", "checkpointing", "offload", "memory", "tok/s")
    rows = [
        (
            str(entry["setting"]["zero_stage"]),
            str(entry["setting"]["micro_batch_size"]),
            str(entry["setting"]["gradient_accumulation_steps"]),
            entry["setting"]["checkpointing"],
            entry["setting"]["offload_optimizer"],
            format_bytes(entry["memory"]["device_bytes"]),
            f"{entry['tokens_per_s']:.0f}",
        )
        for entry in entries
    ]
    return table(columns, rows)


def _nearest(rejected: list[dict[str, Any]]) -> str:
    nearest = rejected[0]
    return f"{Setting.from_json(nearest['setting']).label()}: {nearest['rejected_by']['detail']}"


def estimate_text(entry: dict[str, Any]) -> str:
    """Lay out one setting's estimate: the terms of its memory, and its speed."""
    memory = entry["memory"]
    rows = {
        "setting": Setting.from_json(entry["setting"]).label(),
        **{
            name.removesuffix("_bytes"): format_bytes(size)
            for name, size in memory.items()
            if size or name == "device_bytes"
        },
        "budget": format_bytes(entry["budget_bytes"]),
        "fits": "yes" if entry["fits"] else "no",
        "step time": format_duration(entry["step_time_s"]),
        "speed": f"{entry['tokens_per_s']:.0f} tokens/s, {entry['samples_per_s']:.2f} samples/s",
        "memory by": entry["source"],
    }
    return _aligned(rows)


def result_text(result: dict[str, Any]) -> str:
    """Lay out result.json."""
    memory = result["memory"]
    rows = {
        "setting": Setting.from_json(result["setting"]).label(),
        "speed": f"{result['tokens_per_s']:.0f} tokens/s, {result['samples_per_s']:.2f} samples/s",
        "gain": _gain(result["gain_over_default"], result["default"]),
        "memory a rank": f"{format_bytes(memory['measured_bytes'])} measured, "
        f"{format_bytes(memory['predicted_bytes'])} predicted, "
        f"of {format_bytes(memory['budget_bytes'])}",
        "tuning": f"{format_duration(result['tuning_seconds'])}, {result['probes']} structures, "
        f"{result['rungs']} rungs, until {result['stopped_by']}",
    }
    if "training" in result:
        training = result["training"]
        rows["training"] = (
            f"{format_duration(result['training_seconds'])}, {training['steps']} steps, "
            f"loss {training['loss_start']:.3f} to {training['loss_end']:.3f}"
        )
        rows["model"] = result["model_dir"]
    rows["DeepSpeed config"] = f"{result['run_dir']}/ds_config.json"
    rows["by hand"] = f"bash {result['run_dir']}/launch.sh"
    return _aligned(rows)


def _aligned(rows: dict[str, str]) -> str:
    width = max(map(len, rows))
    return "\n".join(f"{name.ljust(width)}  {value}" for name, value in rows.items())


def _gain(gain: float | None, default: dict[str, Any]) -> str:
    if gain is None:
        return "unknown: the default setting could not be measured"
    label = Setting.from_json(default["setting"]).label()
    return f"{gain:.2f} x the default ({label}, {default['tokens_per_s']:.0f} tokens/s)"
