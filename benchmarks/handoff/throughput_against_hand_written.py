"""Holds the training against a loop written by hand, with the same emitted DeepSpeed config.

    PYTHONPATH=benchmarks/probe python benchmarks/handoff/throughput_against_hand_written.py \
        [--rounds 3] [--steps 20]

Trainings and loops take turns, on the same rows in the same order. The ratio is that of the medians
of step times, the loop's over the training's: 1 is as fast. Prints one JSON document and writes it
to benchmarks/results/throughput_against_hand_written.json.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench_job import RANKS, BenchJob, prepare

from autotune.emit import ds_config, torchrun_command, train_spec
from autotune.environment import rank_environment
from autotune.setting import Setting, Structure
from autotune.train.launch import Training

MICRO_BATCH, ACCUMULATION = 2, 4
# Allocating and the first build of states are in these.
WARM_UP = 3
RESULT = Path(__file__).parent.parent / "results" / "throughput_against_hand_written.json"


def emit(job: BenchJob, setting: Setting, directory: Path, steps: int) -> None:
    theirs = replace(job.workload.job, max_steps=steps)
    cluster = job.workload.question.cluster
    spec = train_spec(
        theirs,
        setting,
        cluster,
        dataset_dir=str(job.directory / "dataset"),
        output_dir="training",
        model_output_dir="model",
    )
    spec = replace(spec, trainer=spec.trainer | {"save_strategy": "no"})
    directory.mkdir()
    (directory / "train_args.json").write_text(json.dumps(spec.to_json()))
    config = ds_config(theirs, setting, job.workload.profile, cluster)
    (directory / "ds_config.json").write_text(json.dumps(config))


def trained_s(job: BenchJob, directory: Path) -> float:
    cluster = job.workload.question.cluster
    lines: list[dict[str, Any]] = []
    ended = Training(
        torchrun_command(sys.executable, RANKS),
        directory=directory,
        environment=rank_environment(cluster.kind, cluster.visible_devices),
        log=directory / "training.log",
        output_dir=directory / "training",
    ).run(lines.append)
    if ended.exit_code:
        raise SystemExit(ended.tail)
    return float(statistics.median(line["step_time_s"] for line in lines[WARM_UP:]))


def by_hand_s(job: BenchJob, directory: Path, steps: int) -> float:
    cluster = job.workload.question.cluster
    script, out = Path(__file__).parent / "hand_written.py", directory / "seconds.json"
    torchrun = torchrun_command(sys.executable, RANKS)
    before_the_module = torchrun[: torchrun.index("autotune.train.entry") - 1]
    subprocess.run(
        [*before_the_module, str(script), "--steps", str(steps), "--out", str(out)],
        cwd=directory,
        env={**os.environ, **rank_environment(cluster.kind, cluster.visible_devices)},
        check=True,
        capture_output=True,
    )
    return float(statistics.median(json.loads(out.read_text())[WARM_UP:]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()
    steps = options.steps + WARM_UP
    batch = MICRO_BATCH * RANKS * ACCUMULATION
    rounds = []
    with tempfile.TemporaryDirectory(prefix="autotune-benchmark-") as root:
        job = prepare(Path(root), global_batch_size=batch, rows=640, longest=160)
        setting = Structure(zero_stage=1).with_micro_batch(MICRO_BATCH, RANKS, batch)
        for turn in range(options.rounds):
            directory = job.directory / f"turn-{turn}"
            emit(job, setting, directory, steps)
            trained, by_hand = trained_s(job, directory), by_hand_s(job, directory, steps)
            rounds.append({"trained_s": trained, "by_hand_s": by_hand, "ratio": by_hand / trained})
            print(rounds[-1], file=sys.stderr, flush=True)
    result = {
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs",
        "setting": setting.label(),
        "steps": options.steps,
        "rounds": rounds,
        "ratio": statistics.median(one["ratio"] for one in rounds),
    }
    RESULT.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
