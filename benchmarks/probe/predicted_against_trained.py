"""Holds the step time that a probe predicts against real optimizer steps of the real training.

    python benchmarks/probe/predicted_against_trained.py [--rounds 3] [--steps 20]

For accumulation 1, 4 and 16 at the same micro-batch size: probes and trainings take turns, each
training is the entry point that `autotune run` starts. Prints one JSON document and writes it to
benchmarks/results/predicted_against_trained.json.
"""

import argparse
import itertools
import json
import os
import platform
import statistics
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench_job import RANKS, BenchJob, prepare

from autotune.emit import ds_config, torchrun_command, train_spec
from autotune.environment import rank_environment
from autotune.probe.local import LocalProber
from autotune.probe.protocol import RungMeasurement
from autotune.setting import Setting, Structure
from autotune.train.launch import Training

MICRO_BATCH = 2
ACCUMULATIONS = (1, 4, 16)
RESULT = Path(__file__).parent.parent / "results" / "predicted_against_trained.json"


def predicted(job: BenchJob, setting: Setting) -> tuple[float, int]:
    """Return the composed seconds of an optimizer step, and the peak bytes."""
    (answer,) = LocalProber(job.directory / "logs").probe(job.site.request([setting]))
    if not isinstance(answer, RungMeasurement):
        msg = f"the probe failed: {answer}"
        raise SystemExit(msg)
    outcome = job.site.outcome(setting, answer)
    return outcome.step_time_s, outcome.peak_bytes


def trained(job: BenchJob, setting: Setting, steps: int, name: str) -> tuple[list[float], int]:
    """Return the seconds of each optimizer step of a training, and the peak bytes."""
    directory = job.directory / name
    directory.mkdir()
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
    config = ds_config(theirs, setting, job.workload.profile, cluster)
    (directory / "train_args.json").write_text(json.dumps(spec.to_json()))
    (directory / "ds_config.json").write_text(json.dumps(config))
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
    # From log to log, so that what is between steps counts too.
    ends = [line["at"] for line in lines]
    between = [later - earlier for earlier, later in itertools.pairwise(ends)]
    return between, max(line["peak_bytes"] for line in lines)


def compare(accumulation: int, rounds: int, steps: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="autotune-benchmark-") as directory:
        batch = MICRO_BATCH * RANKS * accumulation
        job = prepare(Path(directory), global_batch_size=batch, rows=1280, longest=160)
        setting = Structure(zero_stage=0).with_micro_batch(MICRO_BATCH, RANKS, batch)
        pairs = []
        for turn in range(rounds):
            step_time_s, probe_peak = predicted(job, setting)
            times, peak = trained(job, setting, steps + 1, f"training-{turn}")
            pairs.append(
                {
                    "predicted_s": step_time_s,
                    "trained_s": statistics.mean(times),
                    "trained_median_s": statistics.median(times),
                    "ratio": step_time_s / statistics.mean(times),
                    "probe_peak_bytes": probe_peak,
                    "training_peak_bytes": peak,
                }
            )
            print(accumulation, pairs[-1], file=sys.stderr, flush=True)
    ratios = [one["ratio"] for one in pairs]
    return {
        "gradient_accumulation_steps": accumulation,
        "pairs": pairs,
        "ratio": {"median": statistics.median(ratios), "least": min(ratios), "most": max(ratios)},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--accumulation", type=int, nargs="+", default=ACCUMULATIONS)
    options = parser.parse_args()
    result = {
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs",
        "micro_batch_size": MICRO_BATCH,
        "steps": options.steps,
        "settings": [
            compare(accumulation, options.rounds, options.steps)
            for accumulation in options.accumulation
        ],
    }
    RESULT.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
