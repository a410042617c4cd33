"""Checks a machine with GPUs from end to end, in minutes and without network: `make gpu-check`.

    python benchmarks/gpu_check/gpu_check.py [--results benchmarks/results] [--devices auto]

Detection, doctor, tests that need a GPU, the memory model against real peaks over a grid, the
search against the exhaustive grid, out-of-memory for real, and a whole run with its hand-off.
Without a GPU the same is done on the CPU with a smaller model, and what only a GPU can show is
skipped, with the reason. Writes gpu-check-<device>.json and .md; exits with 1 if a check failed.
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
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent / "probe"))
sys.path.insert(0, str(Path(__file__).parent.parent / "search"))

from bench_job import BenchJob, write_data
from exhaustive import compared, measure, resized

from autotune import intake
from autotune.cli import COMMANDS
from autotune.config import Layer, resolve
from autotune.environment import versions
from autotune.hardware import Cluster
from autotune.outcome import Measured, OutOfMemory, Rung
from autotune.pipeline import with_built_ops
from autotune.probe.local import LocalProber
from autotune.probe.protocol import RungFailure
from autotune.tune.loop import Tuner
from autotune.tune.site import JobSite
from autotune.units import MIB

if TYPE_CHECKING:
    from autotune.setting import Setting

BENCHMARKS = Path(__file__).parent.parent

MOST_OFF = 0.15
"""What the plan grants its estimates (plan.py)."""

BESIDE_TENSORS = 80 * MIB
"""Of a rank on a CPU, whose peak is its resident set: what gloo keeps for collectives is not
modelled, some 55 MiB at stages 1 and 2 of this model, which hides behind any larger one."""

WORTH_TELLING = 1.05
ROUNDS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """A job that fits the device at hand: a few minutes for all of it."""

    hidden_size: int | None
    layers: int | None
    longest: int
    rows: int
    batch_a_rank: int
    stages: str
    max_steps: int


ON_GPU = Size(
    hidden_size=1152,
    layers=24,
    longest=512,
    rows=512,
    batch_a_rank=16,
    stages="0,1,2,3",
    max_steps=12,
)
ON_CPU = Size(
    hidden_size=None, layers=None, longest=96, rows=160, batch_a_rank=4, stages="0,2", max_steps=6
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    name: str
    status: str
    said: str
    seconds: float = 0.0
    figures: dict[str, Any] = field(default_factory=dict)


class CheckFailedError(Exception):
    """A check did not hold; the text says what was seen, `figures` has it."""

    def __init__(self, said: str, **figures: Any) -> None:  # noqa: ANN401 - JSON
        super().__init__(said)
        self.figures = figures


class SkippedError(Exception):
    """A check cannot be made here; the text says why."""


Check = Callable[[], tuple[str, dict[str, Any]]]


def found(name: str, check: Check) -> Finding:
    """Make a check; nothing that goes wrong in it stops the others."""
    started = time.perf_counter()
    print(f"{name} ...", file=sys.stderr, flush=True)
    try:
        said, figures = check()
        status = "passed"
    except SkippedError as reason:
        said, figures, status = str(reason), {}, "skipped"
    except CheckFailedError as failure:
        said, figures, status = str(failure), failure.figures, "failed"
    except Exception as error:  # noqa: BLE001 - what it is goes into the result
        said, figures, status = f"{type(error).__name__}: {error}", {}, "failed"
    seconds = time.perf_counter() - started
    print(f"{name}: {status}, {seconds:.0f} s: {said}", file=sys.stderr, flush=True)
    return Finding(name=name, status=status, said=said, seconds=seconds, figures=figures)


def command(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run a command of ours as a user does."""
    program = [sys.executable, "-c", "from autotune.cli import main; main()"]
    return subprocess.run(
        [*program, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        stdin=subprocess.DEVNULL,
    )


def answer(*arguments: object) -> dict[str, Any]:
    """Run a command of ours with --json and return its answer."""
    done = command(*arguments, "--json")
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no word"])[-1]
        msg = f"{arguments[0]} ended with {done.returncode}: {last}"
        raise CheckFailedError(msg, stderr=done.stderr[-4000:])
    document: dict[str, Any] = json.loads(done.stdout)
    return document


class Machine:
    """The checks, in their order; later ones use what earlier ones found."""

    def __init__(self, scratch: Path, devices: str) -> None:
        self.scratch = scratch
        self.devices = devices
        self.question = intake.ask(resolve([Layer("gpu-check", {"devices": devices})]))
        self.on_gpu = self.cluster.kind == "cuda"
        self.size = ON_GPU if self.on_gpu else ON_CPU
        self.model = resized(scratch / "model", self.size.hidden_size, self.size.layers)
        self.data = scratch / "data.jsonl"
        write_data(self.data, self.size.rows, self.size.longest)
        self._job: BenchJob | None = None
        self.grid: dict[Setting, Measured] = {}

    @property
    def cluster(self) -> Cluster:
        return self.question.cluster

    def checks(self) -> Iterator[tuple[str, Check]]:
        yield "detection", self.detection
        yield "doctor", self.doctor
        yield "tests that need a GPU", self.marked_tests
        yield "memory model", self.memory_model
        yield "search against exhaustive", self.search
        yield "out of memory, capped", self.capped_out_of_memory
        yield "out of memory, of the device", self.real_out_of_memory
        yield "run and hand-off", self.hand_off
        yield "report", self.report

    def given(self) -> dict[str, str]:
        """Return the options of the job, the same for grid, search and run."""
        return {
            "dataset": str(self.data),
            "model": str(self.model),
            "devices": self.devices,
            "global_batch_size": str(self.size.batch_a_rank * self.cluster.num_devices),
            "set": f"zero_stage={self.size.stages}",
        }

    def job(self) -> BenchJob:
        if self._job is None:
            options = self.given() | {"set": [self.given()["set"], "checkpointing=none,full"]}
            question = intake.ask(resolve([Layer("gpu-check", options)]))
            intake.start_processes(question)
            dataset = self.scratch / "dataset"
            workload = intake.look_into(question, dataset_dir=dataset, logs=self.scratch)
            workload = with_built_ops(workload, self.scratch / "ops.log")
            site = JobSite(
                job=workload.job,
                cluster=question.cluster,
                profile=workload.profile,
                lengths_of_rows=workload.lengths,
                rebalanced=workload.drawn.rebalanced,
                dataset_dir=dataset,
                scratch_dir=self.scratch,
                total_steps=100,
            )
            self._job = BenchJob(site=site, workload=workload, directory=self.scratch)
        return self._job

    def detection(self) -> tuple[str, dict[str, Any]]:
        told = answer("detect", "--devices", self.devices)
        if told["kind"] == "cuda" and told["unusable"]:
            raise CheckFailedError(told["unusable"], detect=told)
        said = f"{told['num_devices']} x {told['device_name']} ({told['kind']})"
        return said, {"detect": told}

    def doctor(self) -> tuple[str, dict[str, Any]]:
        done = command("doctor", "--devices", self.devices, "--json")
        told = json.loads(done.stdout)
        unwell = [one for one in told["checks"] if one["status"] in {"failed", "warning"}]
        said = f"{len(told['checks'])} checks, {len(unwell)} to look at"
        if done.returncode:
            raise CheckFailedError(said, doctor=told)
        return said, {"doctor": told}

    def marked_tests(self) -> tuple[str, dict[str, Any]]:
        if not self.on_gpu:
            msg = "there is no GPU"
            raise SkippedError(msg)
        command_line = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider"]
        done = subprocess.run(
            command_line,
            cwd=BENCHMARKS.parent,
            capture_output=True,
            text=True,
            check=False,
        )
        last = (done.stdout.strip().splitlines() or ["no word"])[-1]
        if done.returncode:
            raise CheckFailedError(last, output=done.stdout[-8000:])
        return last, {}

    def memory_model(self) -> tuple[str, dict[str, Any]]:
        """Probe every setting of the grid, and hold its peaks against the estimate."""
        job, lines = self.job(), []
        plan = job.workload.plan
        for place in range(len(plan.space.structures)):
            rows = np.flatnonzero((plan.space.structure_index == place) & plan.surely_fits)
            settings = [plan.space.setting(int(row)) for row in rows]
            if not settings:
                continue
            for setting, (outcome, _) in measure(job, settings).items():
                line = {"setting": setting.to_json(), "outcome": asdict(outcome)}
                if isinstance(outcome, Measured):
                    self.grid[setting] = outcome
                    row = plan.row_of(setting)
                    assert row is not None, "it is of the plan"
                    line["estimate"] = plan.memory.row(row)
                lines.append(line)
        off = [self._off(line) for line in lines if "estimate" in line]
        figures = {"grid": lines, "off": off}
        if len(off) < len(lines):
            msg = f"{len(lines) - len(off)} of {len(lines)} settings were not measured"
            raise CheckFailedError(msg, **figures)
        said = (
            f"{len(off)} settings, the estimate is off by {statistics.median(off):+.1%} (median), "
            f"{min(off):+.1%} to {max(off):+.1%}"
        )
        if not all(self._is_near(line) for line in lines):
            raise CheckFailedError(said, **figures)
        return said, figures

    def _off(self, line: dict[str, Any]) -> float:
        """Return how far the estimate is off: of tensor bytes on a GPU, of the peak on a CPU."""
        outcome, estimate = line["outcome"], line["estimate"]
        if outcome["allocated_bytes"] is not None:
            return float(estimate["allocated_bytes"] / outcome["allocated_bytes"] - 1)
        return float(estimate["device_bytes"] / outcome["peak_bytes"] - 1)

    def _is_near(self, line: dict[str, Any]) -> bool:
        beside = 0 if self.on_gpu else BESIDE_TENSORS / line["outcome"]["peak_bytes"]
        return abs(self._off(line)) <= MOST_OFF + beside

    def search(self) -> tuple[str, dict[str, Any]]:
        """Search the grid, and measure what was chosen and the fastest again in turn."""
        if not self.grid:
            msg = "no grid was measured"
            raise SkippedError(msg)
        job, rungs = self.job(), list[Rung]()
        prober = LocalProber(job.directory / "logs")
        tuned = Tuner(job.workload.plan, prober, job.site, [], record=rungs.append).run(
            max_probes=1000, budget_s=None
        )
        assert tuned.best is not None, "something was measured in the grid"
        chosen = tuned.best.setting
        fastest = max(self.grid, key=lambda setting: self.grid[setting].tokens_per_s)
        figures: dict[str, Any] = {
            "chosen": chosen.to_json(),
            "fastest": fastest.to_json(),
            "probes": tuned.probes,
            "rungs": len(tuned.rungs),
            "settings": len(self.grid),
        }
        said = f"{len(tuned.rungs)} rungs for {len(self.grid)} settings, chosen {chosen.label()}"
        if chosen == fastest:
            return f"{said}, which is the fastest", figures
        times: dict[Setting, list[float]] = {fastest: [], chosen: []}
        for _ in range(ROUNDS):
            for setting, seconds in times.items():
                outcome, _ = measure(job, [setting])[setting]
                assert isinstance(outcome, Measured), outcome
                seconds.append(outcome.step_time_s)
        figures["fastest_against_chosen"] = compared(times[fastest], times[chosen])
        faster, (low, _) = (
            figures["fastest_against_chosen"]["faster"],
            figures["fastest_against_chosen"]["interval"],
        )
        said = f"{said}; {fastest.label()} is {faster:.2f} x as fast (at least {low:.2f})"
        if low > WORTH_TELLING:
            raise CheckFailedError(said, **figures)
        return said, figures

    def capped_out_of_memory(self) -> tuple[str, dict[str, Any]]:
        """Probe under a cap between what the smallest and the largest micro-batch need."""
        job = self.job()
        plan = job.workload.plan
        rows = np.flatnonzero(plan.space.structure_index == 0)
        needs = plan.memory.device_bytes[rows]
        cap = int((needs.min() + needs.max()) / 2)
        request = job.site.request([plan.space.setting(int(row)) for row in rows])
        request = replace(request, spec=replace(request.spec, device_memory_bytes=cap))
        *measured, last = LocalProber(job.directory / "logs").probe(request)
        outcome = last.outcome if isinstance(last, RungFailure) else None
        figures = {"cap_bytes": cap, "rungs": len(measured), "outcome": repr(outcome)}
        if not isinstance(outcome, OutOfMemory) or outcome.where != "device" or not measured:
            msg = f"a cap of {cap} bytes ended in {outcome!r} after {len(measured)} rungs"
            raise CheckFailedError(msg, **figures)
        return f"{len(measured)} rungs measured, then out of memory at the cap", figures

    def real_out_of_memory(self) -> tuple[str, dict[str, Any]]:
        """Ask the device for twice its memory, then for what fits: nothing may be left behind."""
        if not self.on_gpu:
            msg = "a CPU's memory is everybody's, so it is not filled"
            raise SkippedError(msg)
        job = self.job()
        plan = job.workload.plan
        setting = plan.space.setting(int(plan.ranking()[0]))
        request = job.site.request([setting])
        rung = request.rungs[0]
        times = 2 * int(np.ceil(plan.budget_bytes / plan.memory.activations_bytes.min()))
        huge = replace(rung, memory_rows=rung.memory_rows * times)
        outcomes = [
            list(LocalProber(job.directory / "logs").probe(replace(request, rungs=(one,))))[-1]
            for one in (huge, rung)
        ]
        first, second = outcomes
        ran_out = isinstance(first, RungFailure) and isinstance(first.outcome, OutOfMemory)
        figures = {"first": repr(first), "second": repr(second)}
        if not ran_out or isinstance(second, RungFailure):
            msg = f"{first!r}, then {second!r}"
            raise CheckFailedError(msg, **figures)
        return "out of memory is told as such, and the next probe is measured", figures

    def hand_off(self) -> tuple[str, dict[str, Any]]:
        given = self.given()
        flags = [part for name, text in given.items() for part in (_flag(name), text)]
        result = answer(
            *("run", *flags, "--run-dir", self.scratch / "run", "--no-cache"),
            *("--max-probes", 3, "--max-steps", self.size.max_steps, "--strict-handoff"),
        )
        if result["exit_reason"] != "trained":
            raise CheckFailedError(str(result["exit_reason"]), result=result)
        return f"trained {self.size.max_steps} steps as it was probed", {"result": result}

    def report(self) -> tuple[str, dict[str, Any]]:
        if "report" not in COMMANDS:
            msg = "there is no command `report` in this version"
            raise SkippedError(msg)
        done = command("report", self.scratch / "run")
        page = self.scratch / "run" / "report.html"
        if done.returncode or not page.exists():
            msg = f"report ended with {done.returncode}"
            raise CheckFailedError(msg, stderr=done.stderr[-4000:])
        return f"{page.stat().st_size} bytes", {}


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def table(findings: list[Finding], device: str) -> str:
    lines = [f"# gpu-check on {device}", "", "| check | | s | |", "|---|---|---:|---|"]
    lines += [f"| {one.name} | {one.status} | {one.seconds:.0f} | {one.said} |" for one in findings]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=BENCHMARKS / "results")
    parser.add_argument("--devices", default="auto")
    options = parser.parse_args()
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="autotune-gpu-check-") as scratch:
        machine = Machine(Path(scratch), options.devices)
        findings = [found(name, check) for name, check in machine.checks()]
        cluster = machine.cluster
        if any(one.status == "failed" for one in findings):
            kept = Path(tempfile.gettempdir()) / "gpu-check-failed"
            shutil.rmtree(kept, ignore_errors=True)
            shutil.copytree(scratch, kept, ignore=shutil.ignore_patterns("*.safetensors", "*.pt"))
            print(f"logs are kept in {kept}", file=sys.stderr)
    name = "cpu" if cluster.kind == "cpu" else f"{cluster.num_devices}x{cluster.device_name}"
    document = {
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs",
        "device": f"{cluster.num_devices} x {cluster.device_name}",
        "versions": versions(),
        "seconds": time.perf_counter() - started,
        "checks": [asdict(one) for one in findings],
    }
    options.results.mkdir(parents=True, exist_ok=True)
    path = options.results / f"gpu-check-{name.replace(' ', '-')}.json"
    path.write_text(json.dumps(document, indent=1) + "\n")
    text = table(findings, str(document["device"]))
    path.with_suffix(".md").write_text(text)
    print(text)
    sys.exit(any(one.status == "failed" for one in findings))


if __name__ == "__main__":
    main()
