"""Times a plan for 1024 devices, 128 nodes of eight, from the options to the ranked settings.

The model was traced before, by the first of the runs; data, where there is some, is drawn. Reports
CPU seconds beside those of the clock, as other work on the machine disturbs the latter.

    python benchmarks/plan/many_devices.py [--json FILE]
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from autotune import intake
from autotune.config import Layer, resolve
from autotune.devices import parse_gpus
from autotune.plan import make_plan
from autotune.space import enumerate_space
from autotune.throughput import DrawnRows

MODELS = ("llama-2-7b", "llama-2-70b")
NODES, GPUS = 128, "8xH100-80GB"
GLOBAL_BATCH_SIZE, SEQ_LENGTH = 8192, 4096
REPEATS = 3


def plan(model: str, logs: Path) -> tuple[intake.Workload, dict[str, float]]:
    cpu, wall = time.process_time(), time.perf_counter()
    options = resolve(
        [Layer("benchmark", {"model": model, "global_batch_size": GLOBAL_BATCH_SIZE})]
    )
    hardware = intake.NamedHardware(gpus=(parse_gpus(GPUS),), nodes=NODES)
    workload = intake.look_into(
        intake.ask(options, hardware),
        dataset_dir=logs / "dataset",
        logs=logs,
        imagined=intake.ImaginedRows(seq_length=SEQ_LENGTH),
    )
    workload.plan.ranking()
    return workload, {
        "cpu_s": time.process_time() - cpu,
        "wall_s": time.perf_counter() - wall,
    }


def plan_over_lengths(workload: intake.Workload) -> dict[str, float]:
    """Time the estimate of the same settings on rows of many lengths."""
    lengths = np.random.default_rng(0).integers(20, SEQ_LENGTH, 250_000)
    drawn = DrawnRows.draw(lengths, workload.job.seed)
    cpu, wall = time.process_time(), time.perf_counter()
    whole = replace(workload, drawn=drawn)
    cluster = whole.question.cluster
    space = enumerate_space(cluster, whole.job.global_batch_size)
    made = make_plan(space, whole.profile, whole.job, cluster, whole.rates, drawn)
    made.ranking()
    return {"cpu_s": time.process_time() - cpu, "wall_s": time.perf_counter() - wall}


def command(model: str) -> dict[str, float]:
    """Time the whole command, Python's start and the table included.

    Its CPU seconds have those of the server that it starts for what it does not need here.
    """
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(
        [
            str(Path(sys.executable).with_name("autotune")),
            *("plan", "--model", model, "--gpus", GPUS, "--nodes", str(NODES)),
            *("--global-batch-size", str(GLOBAL_BATCH_SIZE), "--seq-length", str(SEQ_LENGTH)),
        ],
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    wall_s, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    return {
        "cpu_s": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
        "wall_s": wall_s,
    }


def least(times: list[dict[str, float]]) -> dict[str, float]:
    return {name: round(min(one[name] for one in times), 3) for name in times[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    result: dict[str, Any] = {"devices": NODES * parse_gpus(GPUS).count}
    with tempfile.TemporaryDirectory(prefix="autotune-benchmark-") as scratch:
        for model in MODELS:
            first, _ = plan(model, Path(scratch))
            result[model] = {
                "settings": len(first.plan.space),
                "kept": int(first.plan.kept.sum()),
                "plan": least([plan(model, Path(scratch))[1] for _ in range(REPEATS)]),
                "plan_of_250000_lengths": least([plan_over_lengths(first) for _ in range(REPEATS)]),
                "command": least([command(model) for _ in range(REPEATS)]),
            }
    text = json.dumps(result, indent=2)
    print(text)
    if arguments.json:
        arguments.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
