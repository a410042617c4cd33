"""Holds `autotune estimate` against published GPU measurements.

    python benchmarks/published/estimate_against_published.py [--from TABLE.csv [--keep]]

Each row that the estimate can express is put to the code behind `autotune estimate`, the GPU by its
name. A figure of allocated memory is held against allocated_bytes, one of nvidia-smi against
device_bytes, and one of reserved memory against device_bytes less what is not the allocator's:
context and communicators. Rows that are left out are counted by reason. Prints a table and writes
benchmarks/results/published.json. With --from it reads a larger table of the same columns, and
with --keep it writes those of its rows that are used to measurements.csv.
"""

import argparse
import json
import logging
import re
import statistics
import tempfile
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import measurements
from architectures import config_of, targets_of
from measurements import RESERVED_OVER_UNLIKE, Measurement

from autotune import intake
from autotune.cli.options import named_hardware
from autotune.config import Layer, resolve
from autotune.errors import AutotuneError
from autotune.memory import fixed_runtime_bytes
from autotune.setting import Structure
from autotune.units import GIB

RESULT = Path(__file__).parent.parent / "results" / "published.json"
LIMITS = {"allocated": 8.0, "reserved": 12.0, "nvidia-smi": 12.0, RESERVED_OVER_UNLIKE: None}
"""What the median error in per cent is to be at most."""

_LARGEST = "H200-141GB"
"""Stands in for a GPU that a row does not name, or that is not in the table of devices."""
_A_NODE = 8

_LORA_DROPOUT = {"Lightning-AI/litgpt": 0.05}
"""Of the scripts that measured, by repository, where it is not 0 (finetune/lora.py)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """A measurement and what is said of it; sizes in GiB, the error in per cent of the stated."""

    id: str
    source: str
    model: str
    setting: str
    kind: str | None
    predicted: float
    stated: float | None
    error: float | None
    outcome: str
    fits: bool | None


def compare(measurement: Measurement, directory: Path) -> Comparison:
    """Put a row to the estimate.

    Raises:
        AutotuneError: it refuses.
    """
    question = _ask(measurement, directory)
    structure = Structure(
        zero_stage=int(measurement.zero_stage),
        offload_optimizer="cpu" if measurement.offload_optimizer == "cpu" else "none",
        offload_param="cpu" if measurement.offload_param == "cpu" else "none",
        checkpointing="full" if measurement.grad_ckpt == "yes" else "none",
        attention="eager" if measurement.attn_impl.startswith("eager") else "sdpa",
    )
    ranks, rows = question.cluster.num_devices, int(measurement.micro_batch)
    setting = structure.with_micro_batch(rows, ranks, question.options["global_batch_size"])
    intake.start_processes(question)
    workload = intake.look_into(
        question,
        dataset_dir=directory / "dataset",
        logs=directory,
        imagined=intake.ImaginedRows(seq_length=int(measurement.seq_len)),
        attention=structure.attention,
    )
    entry = intake.estimate_setting(workload, setting).entry(0)
    kind, memory = measurement.kind, entry["memory"]
    of_kind = {
        "allocated": memory["allocated_bytes"],
        "reserved": memory["device_bytes"] - fixed_runtime_bytes(question.cluster),
    }
    of_kind[RESERVED_OVER_UNLIKE] = of_kind["reserved"]
    predicted = of_kind.get(str(kind), memory["device_bytes"]) / GIB
    figure = None
    if kind is not None and not measurement.saturated:
        figure = float(measurement.peak_mem_gib_per_gpu)
    return Comparison(
        id=measurement.id,
        source=f"{measurement.source_repo} {measurement.source_path_or_issue}",
        model=measurement.model,
        setting=_described(measurement),
        kind=kind if figure else None,
        predicted=round(predicted, 2),
        stated=figure,
        error=round(100 * (predicted / figure - 1), 1) if figure else None,
        outcome=measurement.outcome,
        fits=entry["fits"] if measurement.capacity_gib else None,
    )


def _ask(measurement: Measurement, directory: Path) -> intake.Question:
    ranks = int(measurement.n_gpus)
    nodes = -(-ranks // _A_NODE)
    accumulation = re.search(r"\bGA ?(\d+)", measurement.notes)
    options: dict[str, Any] = {
        "model": _model(measurement, directory),
        "method": measurement.method,
        "precision": _precision(measurement),
        "global_batch_size": ranks
        * int(measurement.micro_batch)
        * (int(accumulation[1]) if accumulation else 1),
    }
    if measurement.method == "lora":
        options["lora_rank"] = int(measurement.lora_rank or 8)
        options["lora_targets"] = targets_of(measurement.row)
        options["lora_dropout"] = _LORA_DROPOUT.get(measurement.source_repo, 0.0)
    gpu, cap = _gpu(measurement)
    if cap is not None:
        options["device_memory"] = cap
    return intake.ask(
        resolve([Layer("the published row", options)]),
        named_hardware((f"{ranks // nodes}x{gpu}",), nodes),
    )


def _gpu(measurement: Measurement) -> tuple[str, str | None]:
    """Return the name of the GPU, and a cap on its memory where another stands in for it."""
    kind = re.sub(r"[- ].*", "", measurement.gpu)
    capacity = measurement.capacity_gib
    name = f"{kind}-{capacity:.0f}GB" if capacity else _LARGEST
    try:
        named_hardware((name,), 1)
    except AutotuneError:
        return _LARGEST, f"{capacity}GiB"
    return name, None


def _model(measurement: Measurement, directory: Path) -> str:
    config = config_of(measurement.row)
    if isinstance(config, str):
        return config
    path = directory / measurement.id
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    return str(path)


def _precision(measurement: Measurement) -> str:
    """Return the precision; `16-bit` is what frameworks load by default on such a GPU."""
    known = re.match(r"bf16|fp16|fp32", measurement.precision)
    return known[0] if known else "bf16"


def _described(measurement: Measurement) -> str:
    offload = [
        name
        for name, place in (
            ("optimizer", measurement.offload_optimizer),
            ("parameters", measurement.offload_param),
        )
        if place == "cpu"
    ]
    return ", ".join(
        (
            f"{measurement.method} {measurement.precision.split(' (')[0]}",
            f"{measurement.n_gpus}x{measurement.gpu}",
            f"ZeRO {measurement.zero_stage}",
            *(f"{name} offloaded" for name in offload),
            f"{measurement.micro_batch} x {measurement.seq_len} tokens",
            "checkpointing" if measurement.grad_ckpt == "yes" else "no checkpointing",
        )
    )


def summary(compared: list[Comparison], left_out: Counter[str]) -> dict[str, Any]:
    """Return medians by kind of figure, verdicts, and what was left out for which reason."""
    errors = {
        kind: [abs(one.error) for one in compared if one.kind == kind and one.error is not None]
        for kind in LIMITS
    }
    judged = [one for one in compared if one.fits is not None]
    ran = [one for one in judged if one.outcome == "ok"]
    ran_out = [one for one in judged if one.outcome == "oom"]
    return {
        "figures": {
            kind: {
                "rows": len(of_kind),
                "median_error_percent": statistics.median(of_kind),
                "largest_error_percent": max(of_kind),
                "limit_percent": LIMITS[kind],
            }
            for kind, of_kind in errors.items()
            if of_kind
        },
        "ran": {"rows": len(ran), "said_to_fit": sum(bool(one.fits) for one in ran)},
        "ran_out_of_memory": {
            "rows": len(ran_out),
            "said_to_fit": sum(bool(one.fits) for one in ran_out),
        },
        "left_out": dict(left_out.most_common()),
    }


def print_table(compared: list[Comparison]) -> None:
    for one in sorted(compared, key=lambda one: (one.kind or "", int(one.id))):
        stated = f"{one.stated:7.2f} {one.error:+6.1f} %" if one.stated else " " * 16
        verdict = {True: "fits", False: "does not fit", None: "-"}[one.fits]
        print(
            f"{one.id:>4} {one.kind or '-':<21} {one.predicted:7.2f} {stated} "
            f" {one.outcome:<3} {verdict:<12}  {one.model}: {one.setting}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--from", dest="table", type=Path, default=measurements.MEASUREMENTS)
    parser.add_argument("--keep", action="store_true")
    options = parser.parse_args()
    logging.getLogger("autotune").setLevel(logging.WARNING)
    every = measurements.read(options.table)
    reasons = {one.id: one.reason_left_out() for one in every}
    used = [one for one in every if reasons[one.id] is None]
    if options.keep:
        measurements.write(used)
    with tempfile.TemporaryDirectory(prefix="autotune-published-") as directory:
        compared = [compare(one, Path(directory)) for one in used]
    found = summary(compared, Counter(reason for reason in reasons.values() if reason))
    print_table(compared)
    print(json.dumps(found, indent=2))
    RESULT.write_text(
        json.dumps({**found, "rows": [asdict(one) for one in compared]}, indent=2) + "\n"
    )


if __name__ == "__main__":
    main()
