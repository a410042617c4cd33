"""What results look like on a terminal."""

from collections.abc import Callable
from typing import Any

from autotune.cli.options import table
from autotune.setting import Setting
from autotune.units import format_bytes, format_count, format_duration

_SHOWN = 12
_BAR_CELLS = 10


def plan_text(document: dict[str, Any]) -> str:
    """Lay out plan.json: the best settings, and the nearest of those that do not fit."""
    cluster = document["cluster"]
    kept = [entry for entry in document["settings"] if entry["rejected_by"] is None]
    head = (
        f"{_model_and_job(document)}, on {_devices(cluster)}, "
        f"{format_bytes(cluster['device_memory_bytes'])} each"
    )
    counts = document["counts"]
    parts = [head, f"{counts['kept']} settings may fit; estimates, best first:"]
    parts.append(_plan_table(kept[:_SHOWN]))
    if len(kept) > _SHOWN:
        parts.append(f"and {len(kept) - _SHOWN} more, see --json")
    misses = {miss["rejected_by"]["rule"]: miss for miss in document["near_misses"]}
    for rule, count in counts["rejected_by_rule"].items():
        parts.append(f"{count} settings rejected by {rule}")
        if rule in misses:
            parts += _near_miss(misses[rule])
    return "\n".join(parts)


def _near_miss(miss: dict[str, Any]) -> list[str]:
    return [
        f"  nearest: {Setting.from_json(miss['setting']).label()}: {miss['rejected_by']['detail']}",
        f"  it would fit with {_remedies(miss['remedies'])}",
    ]


def _devices(cluster: dict[str, Any]) -> str:
    nodes = f" in {cluster['num_nodes']} nodes" if cluster["num_nodes"] > 1 else ""
    return f"{cluster['num_devices']} x {cluster['device_name']}{nodes}"


def _model_and_job(document: dict[str, Any]) -> str:
    model = document["model"]
    count = format_count(model["parameters"])
    return f"{model['name']}: {count} parameters, {document['job']['precision']}"


def _plan_table(entries: list[dict[str, Any]]) -> str:
    columns = ["ZeRO", "micro-batch", "accumulation", "checkpointing", "offload"]
    columns += ["memory", "of the device", "tok/s"]
    more = [name for name in _TRAINING if entries and name in entries[0]]
    others = [_other_knobs(entry["setting"]) for entry in entries]
    columns += ["other knobs"] * any(others)
    columns += [_TRAINING[name] for name in more]
    rows = [
        [
            str(entry["setting"]["zero_stage"]),
            str(entry["setting"]["micro_batch_size"]),
            str(entry["setting"]["gradient_accumulation_steps"]),
            entry["setting"]["checkpointing"],
            entry["setting"]["offload_optimizer"],
            format_bytes(entry["memory"]["device_bytes"])
            + (" exact" if entry["source"] == "virtual run" else ""),
            bar(entry["memory"]["device_bytes"] / entry["budget_bytes"]),
            f"{entry['tokens_per_s']:.0f}",
            *([other] if any(others) else []),
            *(_TRAINING_FORMATS[name](entry[name]) for name in more),
        ]
        for entry, other in zip(entries, others, strict=True)
    ]
    return table(columns, rows)


def _other_knobs(setting: dict[str, Any]) -> str:
    parameters = setting["offload_param"]
    words = [f"parameters on {parameters}"] if parameters != "none" else []
    return ", ".join([*words, *Setting.from_json(setting).structure.other_knobs()])


_TRAINING = {"training_hours": "training", "training_cost": "cost"}
_TRAINING_FORMATS: dict[str, Callable[[float], str]] = {
    "training_hours": lambda hours: format_duration(3600 * hours),
    "training_cost": "{:.2f}".format,
}


def bar(share: float) -> str:
    """Draw a share of a device: `[#######---]  68 %`; what is over it fills the bar."""
    filled = min(_BAR_CELLS, round(share * _BAR_CELLS))
    return f"[{'#' * filled}{'-' * (_BAR_CELLS - filled)}] {share:4.0%}".replace("%", " %")


def _remedies(remedies: list[dict[str, Any]]) -> str:
    from autotune.remedy import in_words

    if not remedies:
        return "no single change of micro-batch, checkpointing, offload, stage, length or devices"
    return "; or ".join(
        f"{in_words(remedy)} ({format_bytes(remedy['device_bytes'])})" for remedy in remedies
    )


def matrix_text(document: dict[str, Any]) -> str:
    """Lay out a matrix: a line of cells a kind of device, a column a number of them."""
    cells = document["cells"]
    counts = list(dict.fromkeys(cell["count"] for cell in cells))
    rows: list[list[str]] = []
    for gpu in dict.fromkeys(cell["gpu"] for cell in cells):
        of_kind = [_cell_lines(cell) for cell in cells if cell["gpu"] == gpu]
        height = max(map(len, of_kind))
        for line in range(height):
            name = gpu if line == 0 else ""
            rows.append([name, *(one[line] if line < len(one) else "" for one in of_kind)])
    head = [_model_and_job(document)] if document["model"] else []
    return "\n".join([*head, table(["devices", *map(str, counts)], rows)])


def _cell_lines(cell: dict[str, Any]) -> list[str]:
    if cell["refused"]:
        return ["global batch", "cannot be split"]
    if cell["best"] is None:
        short = cell["shortfall"]
        lacks = short["device_bytes"] or short["host_bytes"]
        where = "a device" if short["device_bytes"] else "of the host"
        return [f"lacks {format_bytes(lacks)}", f"{where}{', may fit' * short['may_fit']}"]
    best = cell["best"]
    setting = best["setting"]
    offload = ", offload" if setting["offload_optimizer"] != "none" else ""
    kept = ", ckpt" if setting["checkpointing"] != "none" else ""
    share = best["memory"]["device_bytes"] / best["budget_bytes"]
    lines = [
        f"ZeRO {setting['zero_stage']} x {setting['micro_batch_size']}{kept}{offload}",
        f"{format_count(best['tokens_per_s'])} tok/s, {share:.0%} full",
    ]
    training = [_TRAINING_FORMATS[name](best[name]) for name in _TRAINING if name in best]
    return [*lines, " for ".join(training)] if training else lines


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
    for recovery in result.get("recoveries", []):
        rows[f"from step {recovery['from_step']}"] = (
            f"after {recovery['cause'].replace('_', ' ')} with "
            f"{Setting.from_json(recovery['setting']).label()}"
        )
    rows["DeepSpeed config"] = f"{result['run_dir']}/ds_config.json"
    rows["by hand"] = f"bash {result['run_dir']}/launch.sh"
    return _aligned(rows)


def rehearsal_text(document: dict[str, Any]) -> str:
    """Lay out a rehearsal: what would be probed, in its order, and what would be chosen."""
    cluster = document["cluster"]
    head = (
        f"{_model_and_job(document)}, on {_devices(cluster)}, "
        f"{format_bytes(cluster['device_memory_bytes'])} each"
    )
    narrowing = document.get("on_one_node", {}).get("probes", [])
    probes = [(probe, " on one node") for probe in narrowing]
    probes += [(probe, "") for probe in document["probes"]]
    rows = [
        [
            f"{number}  {probe['structure']}{where}",
            str(rung["setting"]["micro_batch_size"]),
            rung["outcome"].replace("_", " "),
            f"{rung['tokens_per_s']:.0f}" if rung["tokens_per_s"] else "",
            format_bytes(rung["device_bytes"]) if rung["device_bytes"] else "",
        ]
        for number, (probe, where) in enumerate(probes, start=1)
        for rung in probe["rungs"]
    ]
    gain = document["gain_over_default"]
    figures = {
        "chosen": Setting.from_json(document["chosen"]["setting"]).label(),
        "speed": f"{document['chosen']['tokens_per_s']:.0f} tokens/s",
        "gain": f"{gain:.2f} x the default" if gain else "the default does not fit",
        "tuning": f"about {format_duration(document['tuning_seconds'])}, "
        f"{document['rungs']} rungs of {document['settings']} settings, "
        f"until {document['stopped_by']}",
    }
    columns = ["probe", "micro-batch", "outcome", "tok/s", "memory"]
    return "\n".join([head, table(columns, rows), _aligned(figures)])


def _aligned(rows: dict[str, str]) -> str:
    width = max(map(len, rows))
    return "\n".join(f"{name.ljust(width)}  {value}" for name, value in rows.items())


def _gain(gain: float | None, default: dict[str, Any]) -> str:
    if gain is None:
        return "unknown: the default setting could not be measured"
    label = Setting.from_json(default["setting"]).label()
    return f"{gain:.2f} x the default ({label}, {default['tokens_per_s']:.0f} tokens/s)"
