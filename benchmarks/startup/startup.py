"""Times how long commands that only look take, against what importing rich and click takes.

A small run is made first, unless --run-dir names one. Commands and the import take turns, so that
other work on the machine disturbs all alike; the medians are reported, with CPU seconds beside
those of the clock, and the latter as ratios to the import.

    python benchmarks/startup/startup.py [--run-dir DIR] [--rounds 9] [--json FILE]
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from autotune.cli import COMMANDS

AUTOTUNE = str(Path(sys.executable).parent / "autotune")
DATA = Path(__file__).parents[2] / "examples" / "quickstart" / "data.jsonl"
BASELINE = "import rich, click"
LIMITS_S = {"--help": 1.5, "report": 1.5, "explain": 1.5, "status": 1.5, "plan, cached": 2.0}
"""What each may take on two cores that do nothing else."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    wall_s: float
    cpu_s: float


def timed(command: list[str]) -> Timing:
    """Run a command to its end; CPU seconds are those of its children too."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    started = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wall_s = time.perf_counter() - started
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Timing(wall_s=wall_s, cpu_s=cpu_s)


def make_run(directory: Path) -> Path:
    """Tune and train for a few steps."""
    limits = ("--max-probes", "4", "--max-steps", "4", "--no-cache")
    subprocess.run(
        [AUTOTUNE, "run", "--dataset", str(DATA), "--run-dir", str(directory), *limits],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    return directory


def commands(run_dir: Path) -> dict[str, list[str]]:
    """Return what is timed by name; what this version does not have is left out."""
    wanted = {
        "--help": [AUTOTUNE, "--help"],
        "report": [AUTOTUNE, "report", str(run_dir)],
        "explain": [AUTOTUNE, "explain", str(run_dir)],
        "status": [AUTOTUNE, "status", str(run_dir)],
        "plan, cached": [AUTOTUNE, "plan", "--dataset", str(DATA)],
    }
    known = {"--help", *COMMANDS}
    return {name: line for name, line in wanted.items() if line[1] in known}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run-dir", type=Path)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="autotune-startup-") as scratch:
        run_dir = arguments.run_dir or make_run(Path(scratch) / "run")
        lines = {"import": [sys.executable, "-c", BASELINE], **commands(run_dir)}
        for line in lines.values():
            timed(line)
        taken: dict[str, list[Timing]] = {name: [] for name in lines}
        for _ in range(arguments.rounds):
            for name, line in lines.items():
                taken[name].append(timed(line))
    medians = {
        name: Timing(
            wall_s=statistics.median(one.wall_s for one in found),
            cpu_s=statistics.median(one.cpu_s for one in found),
        )
        for name, found in taken.items()
    }
    result = {
        "rounds": arguments.rounds,
        "load": round(os.getloadavg()[0], 1),
        "cores": os.cpu_count(),
        "baseline": BASELINE,
        "commands": {
            name: {
                "wall_s": round(one.wall_s, 3),
                "cpu_s": round(one.cpu_s, 3),
                "ratio": round(one.wall_s / medians["import"].wall_s, 1),
                "limit_s": LIMITS_S.get(name),
            }
            for name, one in medians.items()
        },
    }
    text = json.dumps(result, indent=2)
    print(text)
    if arguments.json:
        arguments.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
