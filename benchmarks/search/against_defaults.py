"""The setting that a search chooses against those that people run without one.

    python benchmarks/search/against_defaults.py [--rounds 5] [--steps 10] [--longest 160]

On two CPU ranks, all at one global batch. Every setting is trained by the same neutral loop, the
entry point of a training, and they take turns: a round trains each once. Said is how much faster
the chosen one is, the median of the rounds' ratios with the 95 % interval of their mean logarithm;
an interval that has 1 in it is no difference. Beside it:

- transformers' `auto_find_batch_size`: eight rows a device, its default, halved until one fits;
  plain data parallelism. Here a probe says whether it fits.
- TRL's defaults: eight rows a device, gradient checkpointing on, with accelerate's ZeRO 2 or 3.
- LLaMA-Factory's examples: one row a device, gradient checkpointing on, ZeRO 2 or 3.
- The common advice of two rows a device, no checkpointing, ZeRO 2.

Prints one JSON document and writes it to benchmarks/results/against_defaults.json.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "probe"))

from bench_job import RANKS, BenchJob, prepare
from exhaustive import compared, measure, search
from predicted_against_trained import trained

from autotune.outcome import Measured
from autotune.setting import Setting, Structure

RESULT = Path(__file__).parent.parent / "results" / "against_defaults.json"
_ROWS_A_DEVICE = 8


def auto_found(job: BenchJob) -> Setting:
    """Return the setting that halving from transformers' default ends at."""
    size = _ROWS_A_DEVICE
    while size:
        setting = at(job, size, zero_stage=0)
        outcome, _ = measure(job, [setting])[setting]
        if isinstance(outcome, Measured):
            return setting
        size //= 2
    msg = "not even one row a device fits"
    raise SystemExit(msg)


def at(job: BenchJob, micro_batch_size: int, **structure: Any) -> Setting:  # noqa: ANN401 - knobs
    """Return a setting at the job's global batch, or the nearest micro-batch that divides it."""
    batch = job.workload.job.global_batch_size
    return Structure(**structure).with_micro_batch(
        min(micro_batch_size, batch // RANKS), RANKS, batch
    )


def opponents(job: BenchJob) -> dict[str, Setting]:
    """Return what people run, by where it comes from."""
    return {
        "transformers auto_find_batch_size": auto_found(job),
        "TRL, ZeRO 2": at(job, _ROWS_A_DEVICE, zero_stage=2, checkpointing="full"),
        "TRL, ZeRO 3": at(job, _ROWS_A_DEVICE, zero_stage=3, checkpointing="full"),
        "LLaMA-Factory, ZeRO 2": at(job, 1, zero_stage=2, checkpointing="full"),
        "LLaMA-Factory, ZeRO 3": at(job, 1, zero_stage=3, checkpointing="full"),
        "two rows, ZeRO 2": at(job, 2, zero_stage=2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--longest", type=int, default=160)
    parser.add_argument("--global-batch-size", type=int, default=32)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="autotune-benchmark-") as directory:
        job = prepare(
            Path(directory),
            global_batch_size=options.global_batch_size,
            rows=640,
            longest=options.longest,
        )
        tuned, search_s = search(job)
        assert tuned.best is not None
        settings = {"autotune": tuned.best.setting} | opponents(job)
        seconds: dict[Setting, list[float]] = {setting: [] for setting in settings.values()}
        for turn in range(options.rounds):
            for place, setting in enumerate(seconds):
                times, _ = trained(job, setting, options.steps + 1, f"training-{turn}-{place}")
                seconds[setting].append(statistics.median(times))
                print(turn, setting.label(), seconds[setting][-1], file=sys.stderr, flush=True)
    ours = seconds[settings["autotune"]]
    result = {
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs",
        "ranks": RANKS,
        "job": vars(options),
        "search_s": search_s,
        "chosen": settings["autotune"].to_json(),
        "against": {
            name: {
                "setting": setting.to_json(),
                "step_time_s": statistics.median(seconds[setting]),
                **compared(ours, seconds[setting]),
            }
            for name, setting in settings.items()
            if name != "autotune"
        },
        "step_time_s": statistics.median(ours),
    }
    RESULT.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
