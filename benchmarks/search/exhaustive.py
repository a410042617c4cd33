"""Measures every setting of a job that fits, then searches it, and says what the search missed.

    python benchmarks/search/exhaustive.py --name glm-tiny-160 [--longest 160] [--layers 4]

On two CPU ranks. The grid is measured in several sweeps, and a setting's figure is the median of
them. The fastest setting and the chosen one, if they differ, are measured again in turn; how much
faster the fastest is comes with the 95 % interval of the pairs, and one that has 1 in it is no
difference.
Writes benchmarks/search/grids/<name>.json, which benchmarks/search/simulated.py draws on too.
"""

import argparse
import json
import math
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

import numpy as np
from scipy import stats  # type: ignore[import-untyped]

sys.path.insert(0, str(Path(__file__).parent.parent / "probe"))

from bench_job import RANKS, BenchJob, prepare

from autotune import builtin
from autotune.outcome import Measured, Outcome, Rung
from autotune.probe.local import LocalProber
from autotune.probe.protocol import RungMeasurement
from autotune.setting import Setting
from autotune.tune.beliefs import in_one
from autotune.tune.loop import Tuned, Tuner

GRIDS = Path(__file__).parent / "grids"


def measure(job: BenchJob, settings: list[Setting]) -> dict[Setting, tuple[Outcome, float]]:
    """Measure settings of one structure in one probe: what came of each, in how many seconds."""
    found: dict[Setting, tuple[Outcome, float]] = {}
    by_size = {setting.micro_batch_size: setting for setting in settings}
    for answer in LocalProber(job.directory / "logs").probe(job.site.request(settings)):
        setting = by_size[answer.micro_batch_size]
        outcome: Outcome
        if isinstance(answer, RungMeasurement):
            outcome = job.site.outcome(setting, answer)
        else:
            outcome = answer.outcome
        found[setting] = outcome, answer.seconds
        print(setting.label(), outcome, file=sys.stderr, flush=True)
    return found


def sweep(job: BenchJob, seed: int) -> dict[Setting, tuple[Outcome, float]]:
    """Measure every setting of the plan once, in an order of its own: a machine's speed drifts."""
    space = job.workload.plan.space
    found: dict[Setting, tuple[Outcome, float]] = {}
    for place in np.random.default_rng(seed).permutation(len(space.structures)):
        rows = np.flatnonzero(space.structure_index == place)
        found |= measure(job, [space.setting(int(row)) for row in rows])
    return found


def measure_all(job: BenchJob, sweeps: int) -> tuple[list[dict[str, Any]], float]:
    """Return a line for each setting of the plan, and the seconds that a sweep took on average."""
    plan, lines = job.workload.plan, []
    started = time.perf_counter()
    found = [sweep(job, seed) for seed in range(sweeps)]
    sweep_s = (time.perf_counter() - started) / sweeps
    for row in range(len(plan.space)):
        setting = plan.space.setting(row)
        answers = [answer[setting] for answer in found if setting in answer]
        outcome = in_one([one for one, _ in answers]) if answers else None
        lines.append(
            {
                "setting": setting.to_json(),
                "predicted_tokens_per_s": float(plan.tokens_per_s[row]),
                "predicted_bytes": float(plan.memory.device_bytes[row]),
                "kept": bool(plan.kept[row]),
                "outcome": asdict(outcome) if isinstance(outcome, Measured) else None,
                "tokens_per_s": [
                    one.tokens_per_s for one, _ in answers if isinstance(one, Measured)
                ],
                "seconds": statistics.mean(seconds for _, seconds in answers) if answers else 0.0,
            }
        )
    return lines, sweep_s


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


def in_turn(job: BenchJob, one: Setting, other: Setting, rounds: int) -> dict[str, Any]:
    """Return how many times faster one is than the other, measured in turn."""
    seconds: dict[Setting, list[float]] = {one: [], other: []}
    for _ in range(rounds):
        for setting, times in seconds.items():
            outcome, _ = measure(job, [setting])[setting]
            assert isinstance(outcome, Measured), outcome
            times.append(outcome.step_time_s)
    return compared(seconds[one], seconds[other])


def compared(ours: list[float], theirs: list[float]) -> dict[str, Any]:
    """Return how many times faster ours is, of seconds a step taken in turn."""
    logs = [math.log(their / our) for our, their in zip(ours, theirs, strict=True)]
    mean = statistics.mean(logs)
    half = float(stats.t.ppf(0.975, len(logs) - 1)) * statistics.stdev(logs) / math.sqrt(len(logs))
    return {
        "faster": math.exp(statistics.median(logs)),
        "interval": [math.exp(mean - half), math.exp(mean + half)],
    }


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
    parser.add_argument("--sweeps", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=6)
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
        lines, sweep_s = measure_all(job, options.sweeps)
        measured = [line for line in lines if line["outcome"]]
        best = max(measured, key=lambda line: line["outcome"]["tokens_per_s"])
        tuned, search_s = search(job)
        assert tuned.best is not None
        chosen, fastest = tuned.best.setting, Setting.from_json(best["setting"])
        faster = None if chosen == fastest else in_turn(job, fastest, chosen, options.rounds)
    of_grid = {Setting.from_json(line["setting"]): line["outcome"] for line in measured}
    result = {
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs",
        "ranks": RANKS,
        "job": vars(options),
        "settings_measured": len(measured),
        "sweep_s": sweep_s,
        "fastest": best["setting"],
        "search_s": search_s,
        "search_rungs": len(tuned.rungs),
        "search_probes": tuned.probes,
        "share_probed": len({rung.setting for rung in tuned.rungs}) / len(measured),
        "chosen": chosen.to_json(),
        "regret_in_grid": 1 - of_grid[chosen]["tokens_per_s"] / best["outcome"]["tokens_per_s"],
        "fastest_against_chosen": faster,
        "grid": lines,
    }
    GRIDS.mkdir(exist_ok=True)
    (GRIDS / f"{options.name}.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({name: value for name, value in result.items() if name != "grid"}, indent=2))


if __name__ == "__main__":
    main()
