"""The search against DeepSpeed's own autotuner, on the same model, data and global batch.

    pip install 'deepspeed[autotuning]==0.19.8' && apt-get install pdsh openssh-server
    python benchmarks/search/against_deepspeed_autotuner.py [--rounds 5] [--steps 10]

On two CPU ranks. The autotuner is started as its manual says (`deepspeed --autotuning tune`) with
`plain_script.py` and the global batch as its max_train_batch_size; autotune searches what
`autotune tune` would, its start, its look at data and model and its building of ops included. Both
results are then trained at the same global batch by the same neutral loop, the entry point of a
training, in turn. Prints one JSON document and writes it to
benchmarks/results/against_deepspeed_autotuner.json.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "probe"))

from bench_job import RANKS, BenchJob, prepare
from exhaustive import compared, search
from predicted_against_trained import trained

from autotune import builtin
from autotune.setting import Setting, Structure

RESULT = Path(__file__).parent.parent / "results" / "against_deepspeed_autotuner.json"
SCRIPT = Path(__file__).parent / "plain_script.py"


_CPU_RANKS = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "LOCAL_SIZE": str(RANKS)}
"""Without LOCAL_SIZE DeepSpeed counts a device for each NUMA node."""


def start_config(global_batch_size: int) -> dict[str, Any]:
    """Return the config that a user of the autotuner starts from."""
    return {
        "train_micro_batch_size_per_gpu": "auto",
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
        "gradient_clipping": 1.0,
        "autotuning": {"enabled": True, "max_train_batch_size": global_batch_size},
    }


def deepspeed_autotuner(job: BenchJob, directory: Path) -> tuple[Setting, float, dict[str, Any]]:
    """Return what DeepSpeed's autotuner chooses, the seconds it takes, and its config."""
    directory.mkdir()
    batch = job.workload.job.global_batch_size
    (directory / "ds.json").write_text(json.dumps(start_config(batch)))
    command = [
        *(str(Path(sys.executable).parent / "deepspeed"), "--num_gpus", str(RANKS)),
        *("--autotuning", "tune", str(SCRIPT), "--deepspeed", "--deepspeed_config", "ds.json"),
        *("--model", str(builtin.directory("glm-tiny"))),
        *("--dataset", str(job.directory / "dataset")),
    ]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    started = time.perf_counter()
    with (directory / "log.txt").open("wb") as log:
        subprocess.run(
            command,
            cwd=directory,
            env=os.environ | {"PATH": path} | _CPU_RANKS,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            check=True,
        )
    seconds = time.perf_counter() - started
    (best,) = directory.glob("autotuning_results/**/ds_config_optimal.json")
    config = json.loads(best.read_text())
    structure = Structure(zero_stage=config.get("zero_optimization", {}).get("stage", 0))
    size = config["train_micro_batch_size_per_gpu"]
    return structure.with_micro_batch(size, RANKS, batch), seconds, config


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--longest", type=int, default=160)
    parser.add_argument("--global-batch-size", type=int, default=32)
    options = parser.parse_args()
    if shutil.which("pdsh") is None:
        msg = "DeepSpeed's autotuner needs pdsh: apt-get install pdsh"
        raise SystemExit(msg)
    with tempfile.TemporaryDirectory(prefix="autotune-benchmark-") as directory:
        started = time.perf_counter()
        job = prepare(
            Path(directory),
            global_batch_size=options.global_batch_size,
            rows=640,
            longest=options.longest,
        )
        preparing_s = time.perf_counter() - started
        tuned, search_s = search(job)
        assert tuned.best is not None
        theirs, their_s, config = deepspeed_autotuner(job, Path(directory) / "deepspeed")
        settings = {"autotune": tuned.best.setting, "deepspeed": theirs}
        seconds: dict[str, list[float]] = {name: [] for name in settings}
        for turn in range(options.rounds):
            for name, setting in settings.items():
                times, _ = trained(job, setting, options.steps + 1, f"training-{turn}-{name}")
                seconds[name].append(statistics.median(times))
                print(turn, name, seconds[name][-1], file=sys.stderr, flush=True)
    our_s = preparing_s + search_s
    result = {
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs",
        "ranks": RANKS,
        "job": vars(options),
        "tuning_s": {"autotune": our_s, "deepspeed": their_s},
        "times_less_tuning": their_s / our_s,
        "chosen": {name: setting.to_json() for name, setting in settings.items()},
        "deepspeed_config": config,
        "step_time_s": {name: statistics.median(times) for name, times in seconds.items()},
        **compared(seconds["autotune"], seconds["deepspeed"]),
    }
    RESULT.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
