"""Times a warm structure of four micro-batch sizes against four cold probes of one size each.

    python benchmarks/probe/warm_against_cold.py [--pairs 5]

Both kinds measure the same rungs of the same model (4 layers, 2 ranks), one pair after the other in
one run, so that noise of the machine meets both. Prints one JSON document and writes it to
benchmarks/results/warm_against_cold.json.
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path

from bench_job import BenchJob, prepare

from autotune.probe.launch import ColdLauncher, Launcher, WarmLauncher
from autotune.probe.local import LocalProber
from autotune.probe.protocol import RungMeasurement

SIZES = [1, 2, 4, 8]
RESULT = Path(__file__).parent.parent / "results" / "warm_against_cold.json"


def probe(job: BenchJob, launcher: Launcher, sizes: list[int]) -> tuple[float, float]:
    """Return the seconds of a probe, and of the rungs in it."""
    started = time.perf_counter()
    request = job.request(0, sizes)
    answers = list(LocalProber(job.directory / "logs", launcher=launcher).probe(request))
    seconds = time.perf_counter() - started
    rungs = [answer for answer in answers if isinstance(answer, RungMeasurement)]
    if len(rungs) != len(sizes):
        msg = f"a probe failed: {answers[-1]}"
        raise SystemExit(msg)
    return seconds, sum(rung.seconds for rung in rungs)


def pair(job: BenchJob) -> dict[str, float]:
    """Time one warm probe of all sizes and a cold one of each size."""
    warm_s, warm_rungs_s = probe(job, WarmLauncher(), SIZES)
    cold = [probe(job, ColdLauncher(), [size]) for size in SIZES]
    return {
        "warm_s": warm_s,
        "warm_start_s": warm_s - warm_rungs_s,
        "cold_s": sum(seconds for seconds, _ in cold),
        "cold_start_s": statistics.mean(seconds - rungs for seconds, rungs in cold),
        "ratio": warm_s / sum(seconds for seconds, _ in cold),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=5)
    pairs = parser.parse_args().pairs
    with tempfile.TemporaryDirectory(prefix="autotune-benchmark-") as directory:
        job = prepare(Path(directory), global_batch_size=16, rows=64, longest=160)
        probe(job, WarmLauncher(), SIZES[:1])  # waits for the server's imports, once a run
        measured = [pair(job) for _ in range(pairs)]
    ratios = sorted(one["ratio"] for one in measured)
    result = {
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs",
        "micro_batch_sizes": SIZES,
        "pairs": measured,
        "ratio": {"median": statistics.median(ratios), "least": ratios[0], "most": ratios[-1]},
        "warm_start_s": statistics.median(one["warm_start_s"] for one in measured),
        "cold_start_s": statistics.median(one["cold_start_s"] for one in measured),
    }
    RESULT.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
