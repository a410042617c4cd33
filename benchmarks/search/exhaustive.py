"""Measures every setting of a job that fits, then searches it, and says what the search missed.

    python benchmarks/search/exhaustive.py --name glm-tiny-160 [--longest 160] [--layers 4]

On two CPU ranks. The fastest setting of the exhaustive run and the chosen one, if they differ, are
measured again in turn; regret is how much slower the chosen one is, with the spread of the pairs.
Writes benchmarks/search/grids/<name>.json, which benchmarks/search/simulated.py draws on too.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "probe"))

from bench_job import RANKS, BenchJob, prepare

from autotune import builtin
from autotune.outcome import Measured, Rung
from autotune.probe.local import LocalProber
from autotune.probe.protocol import RungMeasurement
from autotune.setting import Setting
from autotune.tune.loop import Tuned, Tuner

GRIDS = Path(__file__).parent / "grids"


def measure(job: BenchJob, settings: list[Setting]) -> dict[Setting, tuple[Measured | str, float]]:
    """Measure settings of one structure in one probe; what fails is named."""
    found: dict[Setting, tuple[Measured | str, float]] = {}
    by_size = {setting.micro_batch_size: setting for setting in settings}
    for answer in LocalProber(job.directory / "logs").probe(job.site.request(settings)):
        setting = by_size[answer.micro_batch_size]
        outcome: Measured | str
        if isinstance(answer, RungMeasurement):
            outcome = job.site.outcome(setting, answer)
        else:
            outcome = answer.outcome.kind
        found[setting] = outcome, answer.seconds
        print(setting.label(), outcome, file=sys.stderr, flush=True)
    return found


def measure_all(job: BenchJob) -> tuple[list[dict[str, Any]], float]:
    """Return a line for each setting of the plan, and the seconds that measuring them took."""
    plan, lines = job.workload.plan, []
    started = time.perf_counter()
    for place in range(len(plan.space.structures)):
        rows = [row for row in range(len(plan.space)) if plan.space.structure_index[row] == place]
        settings = [plan.space.setting(row) for row in rows]
        found = measure(job, settings)
        for row, setting in zip(rows, settings, strict=True):
            outcome, seconds = found.get(setting, ("not reached", 0.0))
            lines.append(
                {
                    "setting": setting.to_json(),
                    "predicted_tokens_per_s": float(plan.tokens_per_s[row]),
                    "predicted_bytes": float(plan.memory.device_bytes[row]),
                    "kept": bool(plan.kept[row]),
                    "outcome": asdict(outcome) if isinstance(outcome, Measured) else outcome,
                    "seconds": seconds,
                }
            )
    return lines, time.perf_counter() - started


def search(job: BenchJob) -> tuple[Tuned, float]:
    """Search the same job for real."""
    rungs: list[Rung] = []
    tuner = Tuner(
        job.workload.plan,
        LocalProber(job.directory / "logs"),
        job.site,
        [],
        record=rungs.append,
    )
    started = time.perf_counter()
    tuned = tuner.run(max_probes=1000, budget_s=None)
    return tuned, time.perf_counter() - started


def in_turn(job: BenchJob, one: Setting, other: Setting, rounds: int) -> list[float]:
    """Return the speed of one over that of the other, measured in turn."""
    ratios = []
    for _ in range(rounds):
        speeds = []
        for setting in (one, other):
            outcome, _ = measure(job, [setting])[setting]
            assert isinstance(outcome, Measured), outcome
            speeds.append(outcome.tokens_per_s)
        ratios.append(speeds[0] / speeds[1])
    return ratios


def resized(directory: Path, hidden_size: int | None, layers: int | None) -> Path:
    """Copy the demo model's directory, its configuration changed."""
    shutil.copytree(builtin.directory("glm-tiny"), directory)
    path = directory / "config.json"
    config = json.loads(path.read_text())
    if hidden_size is not None:
        scale = hidden_size / config["hidden_size"]
        config["hidden_size"] = hidden_size
        config["intermediate_size"] = round(config["intermediate_size"] * scale)
        config["head_dim"] = hidden_size // config["num_attention_heads"]
    config["num_hidden_layers"] = layers or config["num_hidden_layers"]
    path.write_text(json.dumps(config))
    return directory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--name", default="glm-tiny")
    parser.add_argument("--rows", type=int, default=640)
    parser.add_argument("--longest", type=int, default=160)
    parser.add_argument("--global-batch-size", type=int, default=32)
    parser.add_argument("--hidden-size", type=int, help="Of glm-tiny's configuration, changed so.")
    parser.add_argument("--layers", type=int, help="The same.")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="autotune-benchmark-") as directory:
        model = resized(Path(directory) / "model", options.hidden_size, options.layers)
        job = prepare(
            Path(directory),
            global_batch_size=options.global_batch_size,
            rows=options.rows,
            longest=options.longest,
            model=str(model),
        )
        lines, exhaustive_s = measure_all(job)
        measured = [line for line in lines if isinstance(line["outcome"], dict)]
        best = max(measured, key=lambda line: line["outcome"]["tokens_per_s"])
        tuned, search_s = search(job)
        assert tuned.best is not None
        chosen, fastest = tuned.best.setting, Setting.from_json(best["setting"])
        ratios = [1.0] if chosen == fastest else in_turn(job, fastest, chosen, options.rounds)
    of_grid = {Setting.from_json(line["setting"]): line["outcome"] for line in measured}
    result = {
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs",
        "ranks": RANKS,
        "job": {name: value for name, value in vars(options).items() if name != "rounds"},
        "settings_measured": len(measured),
        "exhaustive_s": exhaustive_s,
        "fastest": best["setting"],
        "search_s": search_s,
        "search_rungs": len(tuned.rungs),
        "search_probes": tuned.probes,
        "share_probed": len({rung.setting for rung in tuned.rungs}) / len(measured),
        "chosen": chosen.to_json(),
        "regret_in_grid": 1 - of_grid[chosen]["tokens_per_s"] / best["outcome"]["tokens_per_s"],
        "fastest_over_chosen": {
            "median": statistics.median(ratios),
            "least": min(ratios),
            "most": max(ratios),
        },
        "grid": lines,
    }
    GRIDS.mkdir(exist_ok=True)
    (GRIDS / f"{options.name}.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({name: value for name, value in result.items() if name != "grid"}, indent=2))


if __name__ == "__main__":
    main()
