"""Runs in allocations of two nodes, of a real Slurm on this machine: from the script to the model.

The jobs after the first two are one run, which is stopped in one way after the other and ends.
"""

import json
import re
import statistics
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import write_rows
from slurm_site import ask, state_of, two_nodes, wait_for
from trainings import small_model

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]

AUTOTUNE = Path(sys.executable).with_name("autotune")
LONG_S = 110
"""How long the training is that is stopped again and again, so that it is met at its work."""

OVER = {"", "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"}


@dataclass(frozen=True)
class Work:
    """A directory that both nodes see, with what is trained on."""

    directory: Path

    @property
    def command(self) -> list[str]:
        asked = ["--dataset", "rows.jsonl", "--model", "model", "--global-batch-size", "8"]
        return ["run", *asked, "--devices", "cpu:1", "--device-memory", "1GiB"]

    @property
    def steps(self) -> int:
        """How many steps the long training has, by those of the first run."""
        times = [line["step_time_s"] for line in self.lines("first", "training", "metrics.jsonl")]
        return max(100, int(LONG_S / float(statistics.median(times))))

    def submit_long(self) -> str:
        more = ("--no-cache", "--max-steps", self.steps, "--max-probes", 1)
        return self.submit("long", "--run-dir", "runs/long", *more)

    def submit(self, name: str, *more: object) -> str:
        """Submit a run on both nodes; returns the job's number."""
        job = ["--nodes", 2, "--cpus-per-node", 2, "--time", 20, "--warning", 60]
        job += ["--job-name", name, "--json", "--"]
        done = subprocess.run(
            list(map(str, [AUTOTUNE, "submit", *job, *self.command, *more])),
            cwd=self.directory,
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        return str(json.loads(done.stdout)["job_id"])

    def said(self, job: str) -> str:
        """Return what a job has written."""
        logs = (self.directory / "runs" / "submitted").glob(f"*-{job}.log")
        return "".join(log.read_text() for log in logs)

    def wait_for_end(self, job: str, seconds: float) -> str:
        """Wait until a job is over and nothing of it runs; returns its state."""
        wait_for(lambda: state_of(job) in OVER, seconds)
        wait_for(lambda: not self.left_running(), 30)
        return state_of(job)

    def left_running(self) -> list[list[str]]:
        """Return what runs in the directory, or works for what does."""
        found = []
        for process in psutil.process_iter():
            try:
                command, directory = process.cmdline(), process.cwd()
            except psutil.Error:
                continue
            if str(self.directory) in f"{directory} {' '.join(command)}":
                found.append(command)
        return [command for command in found if "pytest" not in " ".join(command)]

    def result(self, name: str) -> dict[str, Any]:
        document: dict[str, Any] = json.loads(self.path(name, "result.json").read_text())
        return document

    def lines(self, name: str, *parts: str) -> list[dict[str, Any]]:
        path = self.path(name, *parts)
        whole = path.read_text().rpartition("\n")[0] if path.exists() else ""
        return [json.loads(line) for line in whole.splitlines()]

    def last_step(self, name: str) -> int:
        return max(
            (int(line["step"]) for line in self.lines(name, "training", "metrics.jsonl")), default=0
        )

    def path(self, name: str, *parts: str) -> Path:
        return self.directory.joinpath("runs", name, *parts)

    def is_probing(self) -> bool:
        """Whether ranks of a probe on both nodes have answered."""
        answers = self.directory.glob("runs/.nodes-*/session-*/probe-*/rank-*.jsonl")
        return len(list(answers)) == 2


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Work]:
    directory = tmp_path_factory.mktemp("work")
    small_model(directory / "model")
    pairs = [(f"What is {n} plus {n}?", "It is " + f"{2 * n}, " * (1 + n % 6)) for n in range(48)]
    write_rows(directory / "rows.jsonl", pairs)
    with two_nodes(tmp_path_factory.mktemp("slurm")):
        yield Work(directory)


def test_a_submitted_run_probes_and_trains_on_two_nodes(work: Work) -> None:
    job = work.submit("first", "--run-dir", "runs/first", "--max-probes", 2)

    state = work.wait_for_end(job, 600)

    assert state in {"COMPLETED", ""}, work.said(job)
    result = work.result("first")
    assert result["exit_reason"] == "trained", result
    hardware = json.loads(work.path("first", "hardware.json").read_text())
    assert (hardware["num_nodes"], hardware["num_devices"]) == (2, 2)
    assert hardware["rates"]["node_link_bytes_per_s"] > 0
    probed = work.lines("first", "probes.jsonl")
    measured = [line["ranks"] for line in probed if line["outcome"]["kind"] == "measured"]
    # Narrowed down on one node, decided on both.
    assert 2 in measured
    assert work.path("first", "logs", "training-node-1.log").exists()
    losses = [line["loss"] for line in work.lines("first", "training", "metrics.jsonl")]
    assert len(losses) == 6
    assert losses[-1] < losses[0]
    assert work.path("first", "model", "config.json").exists()
    assert list(work.directory.glob("runs/.nodes-*")) == []
    script = work.path("first", "launch.sh").read_text()
    assert "--nnodes=2 --nproc-per-node=1" in script


def test_srun_starts_the_same_run_directly(work: Work) -> None:
    step = ["srun", "--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=2", str(AUTOTUNE)]
    done = subprocess.run(
        [*step, *work.command, "--run-dir", "runs/direct", "--max-probes", "2", "--json"],
        cwd=work.directory,
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )

    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["exit_reason"] == "trained"
    # What was measured on nodes alike is taken over, so that both are of one setting.
    first = work.lines("first", "training", "metrics.jsonl")
    losses = [line["loss"] for line in work.lines("direct", "training", "metrics.jsonl")]
    if result["setting"] == work.result("first")["setting"]:
        assert losses == pytest.approx([line["loss"] for line in first], rel=1e-3)
    wait_for(lambda: not work.left_running(), 30)


def test_cancelled_while_tuning_nothing_runs_on(work: Work) -> None:
    job = work.submit_long()
    wait_for(work.is_probing, 200)

    ask("scancel", job, check=True)

    assert work.wait_for_end(job, 60) in {"CANCELLED", ""}
    assert work.last_step("long") == 0


def test_cancelled_while_training_nothing_runs_on(work: Work) -> None:
    job = work.submit_long()
    wait_for(lambda: work.last_step("long") >= work.steps // 10, 400)

    ask("scancel", job, check=True)

    assert work.wait_for_end(job, 60) in {"CANCELLED", ""}
    assert list(work.path("long", "training").glob("checkpoint-*/complete"))
    # The tuning was over, and is not done again.
    assert "tokens/s" in work.said(job)


def test_a_lost_node_and_a_time_limit_delay_a_run_and_do_not_end_it(work: Work) -> None:
    before = work.last_step("long")
    job = work.submit_long()
    wait_for(lambda: work.last_step("long") > before, 200)

    ask("scontrol", "update", "nodename=n2", "state=down", "reason=test", check=True)
    wait_for(lambda: state_of(job) == "PENDING", 60)
    wait_for(lambda: not work.left_running(), 30)
    # Its slurmd may have put it back by itself, which makes this one an error.
    ask("scontrol", "update", "nodename=n2", "state=resume")
    lost_at = work.last_step("long")
    start_now(job)
    wait_for(lambda: work.last_step("long") > max(before, lost_at), 200)

    # Slurm warns a minute or two before, and limits whole minutes.
    elapsed_s = read_seconds(ask("squeue", "-h", "-j", job, "-o", "%M").strip())
    minutes = (elapsed_s + 80) // 60 + 1
    ask("scontrol", "update", f"jobid={job}", f"TimeLimit={minutes}", check=True)
    wait_for(lambda: "Slurm starts this job again" in work.said(job), 120)
    wait_for(lambda: state_of(job) == "PENDING", 60)
    assert work.result("long")["exit_code"] == 75
    ask("scontrol", "update", f"jobid={job}", "TimeLimit=20", check=True)
    start_now(job)

    assert work.wait_for_end(job, 600) in {"COMPLETED", ""}, work.said(job)
    assert work.result("long")["exit_reason"] == "trained"
    assert work.last_step("long") == work.steps


def start_now(job: str) -> None:
    """Spare a requeued job the minutes that Slurm has it wait."""
    wait_for(lambda: "RUNNING" not in state_of(job))
    ask("scontrol", "update", f"jobid={job}", "StartTime=now", check=True)


def read_seconds(elapsed: str) -> int:
    """Read MINUTES:SECONDS or HOURS:MINUTES:SECONDS."""
    seconds = 0
    for part in re.split(r"[:-]", elapsed):
        seconds = 60 * seconds + int(part)
    return seconds
