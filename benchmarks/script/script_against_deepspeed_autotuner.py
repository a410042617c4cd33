"""`autotune run --script` against DeepSpeed's own autotuner, on the same unedited script.

    pip install 'deepspeed[autotuning]==0.19.8' && apt-get install pdsh openssh-server
    python benchmarks/script/script_against_deepspeed_autotuner.py [--rounds 5] [--steps 12]

On two CPU ranks, with a way for pdsh to localhost by ssh. Both tune `training.py` with the same
global batch: the autotuner as its manual says, with that as its max_train_batch_size; autotune with
a config of one row a micro-step. `autotune run` then also trains, whose steps are counted. Both
configs are trained with in turn by the same script under torchrun; samples a second are compared,
as the autotuner's batch may be smaller. Prints one JSON document and writes it to
benchmarks/results/script_against_deepspeed_autotuner.json.
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

sys.path.insert(0, str(Path(__file__).parent.parent / "search"))
sys.path.insert(0, str(Path(__file__).parent.parent / "probe"))

from exhaustive import compared

RESULT = Path(__file__).parent.parent / "results" / "script_against_deepspeed_autotuner.json"
SCRIPT = Path(__file__).parent / "training.py"
BIN = Path(sys.executable).parent
RANKS = 2
WARM_UP = 2

_CPU_RANKS = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
_OF_THEIRS = {"LOCAL_SIZE": str(RANKS)}
"""Without it DeepSpeed's launcher counts a device for each NUMA node."""

_BASE = {
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
    "gradient_clipping": 1.0,
}


def run(command: list[str], directory: Path, **more: str) -> float:
    """Run a command in a directory, its output in log.txt there; returns the seconds it took."""
    environment = os.environ | {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"} | _CPU_RANKS
    started = time.perf_counter()
    with (directory / "log.txt").open("ab") as log:
        subprocess.run(
            command,
            cwd=directory,
            env=environment | more,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            check=True,
        )
    return time.perf_counter() - started


def by_deepspeed(directory: Path, batch: int, script: list[str]) -> tuple[dict[str, Any], float]:
    """Return the config that DeepSpeed's autotuner ends with, and the seconds it took."""
    directory.mkdir()
    tuning = {"enabled": True, "max_train_batch_size": batch}
    config = {**_BASE, "train_micro_batch_size_per_gpu": "auto", "autotuning": tuning}
    (directory / "ds.json").write_text(json.dumps(config))
    command = [str(BIN / "deepspeed"), "--num_gpus", str(RANKS), "--autotuning", "tune"]
    config_arguments = ["--deepspeed", "--deepspeed_config", "ds.json"]
    seconds = run([*command, str(SCRIPT), *config_arguments, *script], directory, **_OF_THEIRS)
    (best,) = directory.glob("autotuning_results/**/ds_config_optimal.json")
    found = json.loads(best.read_text())
    size = found["train_micro_batch_size_per_gpu"]
    found.pop("train_batch_size", None)
    # The most of the global batch that its micro-batch divides.
    found["gradient_accumulation_steps"] = max(1, batch // (size * RANKS))
    return found, seconds


def by_autotune(directory: Path, batch: int, script: list[str]) -> tuple[dict[str, Any], Any]:
    """Return the config that autotune ends with, and its result; it has trained by then."""
    directory.mkdir()
    config = {
        **_BASE,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": batch // RANKS,
    }
    (directory / "ds.json").write_text(json.dumps(config))
    command = [str(BIN / "autotune"), "run", "--devices", str(RANKS), "--run-dir", "run"]
    config_arguments = ["--deepspeed", "--deepspeed_config", "ds.json", "--report", "report.json"]
    run([*command, "--script", str(SCRIPT), "--", *config_arguments, *script], directory)
    tuned = json.loads((directory / "run" / "ds_config.json").read_text())
    return tuned, json.loads((directory / "run" / "result.json").read_text())


def sample_s(directory: Path, config: dict[str, Any], steps: int) -> float:
    """Return the seconds that a sample takes in a training with a config."""
    directory.mkdir()
    (directory / "ds.json").write_text(json.dumps(config))
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={RANKS}"]
    command += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", str(SCRIPT)]
    command += ["--deepspeed", "--deepspeed_config", "ds.json", "--report", "report.json"]
    run([*command, "--steps", str(steps + WARM_UP)], directory)
    report = json.loads((directory / "report.json").read_text())
    seconds = statistics.median(report["seconds"][WARM_UP:])
    return float(seconds / report["batch"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--global-batch-size", type=int, default=32)
    options = parser.parse_args()
    if shutil.which("pdsh") is None:
        msg = "DeepSpeed's autotuner needs pdsh: apt-get install pdsh"
        raise SystemExit(msg)
    batch, script = options.global_batch_size, ["--steps", "60"]
    with tempfile.TemporaryDirectory(prefix="autotune-benchmark-") as name:
        directory = Path(name)
        ours, result = by_autotune(directory / "autotune", batch, script)
        trained = json.loads((directory / "autotune" / "report.json").read_text())
        theirs, their_s = by_deepspeed(directory / "deepspeed", batch, script)
        configs = {"autotune": ours, "deepspeed": theirs}
        seconds: dict[str, list[float]] = {name: [] for name in configs}
        for turn in range(options.rounds):
            for who, config in configs.items():
                found = sample_s(directory / f"{turn}-{who}", config, options.steps)
                seconds[who].append(found)
                print(turn, who, found, file=sys.stderr, flush=True)
    our_s = result["tuning_seconds"]
    document = {
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs",
        "ranks": RANKS,
        "job": vars(options),
        "tuning_s": {"autotune": our_s, "deepspeed": their_s},
        "times_less_tuning": their_s / our_s,
        "steps_trained_by_run": len(trained["seconds"]),
        "configs": configs,
        "samples_per_s": {who: 1 / statistics.median(times) for who, times in seconds.items()},
        **compared(seconds["autotune"], seconds["deepspeed"]),
    }
    RESULT.write_text(json.dumps(document, indent=2) + "\n")
    print(json.dumps(document, indent=2))


if __name__ == "__main__":
    main()
