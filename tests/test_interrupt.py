"""Stops from outside: nothing is left running, nothing that was learned is lost."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import autotune

RANKS = 2
JOB = ("--devices", "2", "--global-batch-size", "16", "--max-probes", "2", "--max-steps", "12")
LIMIT_S = 240
_MARK = "AUTOTUNE_TEST_RUN"


class Controller:
    """A run in the background; all its processes carry a mark in their environment."""

    def __init__(self, workplace: Path, dataset: Path) -> None:
        self.arguments = ["run", "--dataset", str(dataset), *JOB, "--run-dir", "run", "--no-cache"]
        self.run_dir = workplace / "run"
        self._workplace = workplace
        self._mark = uuid.uuid4().hex
        # Short, as paths of sockets have to be.
        self.temporary = Path(tempfile.mkdtemp(prefix="t-"))
        self._segments = shared_segments()
        self.process = self._start()

    def _start(self) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            [Path(sys.executable).parent / "autotune", *self.arguments],
            cwd=self._workplace,
            env={**os.environ, _MARK: self._mark, "TMPDIR": str(self.temporary)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            # Its own group, as a shell gives it, for signals as a terminal sends them.
            start_new_session=True,
        )

    def start_again(self) -> None:
        self.process = self._start()

    def wait_for(self, reached: Callable[[], bool]) -> None:
        deadline = time.monotonic() + LIMIT_S
        while not reached():
            assert self.process.poll() is None, self.process.communicate()[1]
            assert time.monotonic() < deadline, "it takes too long"
            time.sleep(0.05)

    def stop(self, send: Callable[[], None]) -> str:
        """Send a signal and wait for the end, 30 s at most; returns what was said."""
        send()
        _, stderr = self.process.communicate(timeout=30)
        return stderr

    def finish(self, limit_s: float = LIMIT_S) -> None:
        _, stderr = self.process.communicate(timeout=limit_s)
        assert self.process.returncode == 0, stderr

    def members(self) -> list[psutil.Process]:
        return [process for process in psutil.process_iter() if self._is_member(process)]

    def ranks(self) -> list[psutil.Process]:
        """Return the processes of a probe: forked from the server, each leads a session."""
        ranks = []
        for member in self.members():
            with suppress(ProcessLookupError, psutil.NoSuchProcess):
                if os.getsid(member.pid) == member.pid and "forkserver" in str(member.cmdline()):
                    ranks.append(member)
        return sorted(ranks, key=lambda rank: rank.pid)

    def _is_member(self, process: psutil.Process) -> bool:
        try:
            environment = process.environ()
            alive = process.status() != psutil.STATUS_ZOMBIE
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            return False
        return alive and environment.get(_MARK) == self._mark

    def leftovers(self) -> list[object]:
        """Return what a run must not leave: processes, temporary files, shared memory."""
        segments = shared_segments() - self._segments
        return [*self.members(), *self.temporary.iterdir(), *segments]

    def wait_until_nothing_is_left(self, limit_s: float) -> None:
        deadline = time.monotonic() + limit_s
        while left := self.leftovers():
            assert time.monotonic() < deadline, left
            time.sleep(0.1)

    def rungs(self) -> list[dict[str, Any]]:
        return json_lines(self.run_dir / "probes.jsonl")

    def steps(self) -> list[int]:
        return [line["step"] for line in json_lines(self.run_dir / "training" / "metrics.jsonl")]

    def document(self, name: str) -> dict[str, Any]:
        content: dict[str, Any] = json.loads((self.run_dir / name).read_text())
        return content

    def clear_up(self) -> None:
        for process in self.members():
            process.kill()
        self.process.wait()
        shutil.rmtree(self.temporary)


def shared_segments() -> set[str]:
    """Return the segments of DeepSpeed and gloo; other libraries' may be another test's."""
    return {
        path.name
        for path in Path("/dev/shm").iterdir()
        if path.name.startswith(("deepspeed", "gloo"))
    }


def json_lines(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    return [
        json.loads(line)
        for line in path.read_text().splitlines(keepends=True)
        if line.endswith("\n")
    ]


@pytest.fixture
def controller(tmp_path: Path, short_rows: Path) -> Iterator[Controller]:
    controller = Controller(tmp_path, short_rows)
    yield controller
    controller.clear_up()


def assert_stopped(controller: Controller, said: str, name: str) -> None:
    """Check that a run has ended in good order and says that it can go on."""
    assert controller.process.returncode == 75, said
    assert controller.leftovers() == []
    last = said.splitlines()[-1]
    assert name in last
    assert "same command" in last
    assert "Traceback" not in said
    assert controller.document("status.json")["phase"] == "stopped"
    result = controller.document("result.json")
    assert (result["exit_code"], result["exit_reason"]) == (75, "InterruptedRunError")


def assert_finished_without_repeating(controller: Controller) -> None:
    measured = Counter(
        (json.dumps(rung["structure"], sort_keys=True), rung["micro_batch_size"])
        for rung in controller.rungs()
        if rung["outcome"]["kind"] == "measured" and rung["outcome"]["purpose"] == "search"
    )
    result = controller.document("result.json")
    assert set(measured.values()) == {1}
    assert result["exit_reason"] == "trained"
    assert result["gain_over_default"] >= 1
    assert result["training"]["steps"] == 12
    assert result["tuning_seconds"] >= sum(rung["outcome"]["took_s"] for rung in controller.rungs())
    status = controller.document("status.json")
    assert status["probes"] == result["probes"]
    assert status["best"]["setting"] == result["setting"]
    assert controller.steps() == list(range(1, 13))
    assert controller.leftovers() == []


@pytest.mark.slow
def test_stopped_while_probing_and_while_training_it_goes_on(controller: Controller) -> None:
    controller.wait_for(lambda: bool(controller.rungs()))
    held = autotune(*controller.arguments, cwd=controller.run_dir.parent)
    assert held.returncode == 73
    assert f"process {controller.process.pid}" in held.stderr
    said = controller.stop(lambda: os.killpg(controller.process.pid, signal.SIGINT))
    assert_stopped(controller, said, "SIGINT")
    probed = controller.rungs()

    controller.start_again()
    controller.wait_for(lambda: len(controller.steps()) >= 4)
    assert controller.rungs()[: len(probed)] == probed
    emitted = (controller.run_dir / "ds_config.json").read_bytes()
    said = controller.stop(controller.process.terminate)
    assert_stopped(controller, said, "SIGTERM")

    controller.start_again()
    controller.finish()
    assert_finished_without_repeating(controller)
    assert (controller.run_dir / "ds_config.json").read_bytes() == emitted


def test_no_rank_survives_a_controller_that_is_killed_while_probing(
    controller: Controller,
) -> None:
    controller.wait_for(lambda: bool(controller.rungs()))
    assert len(controller.members()) > 2

    controller.process.kill()
    controller.process.wait()

    controller.wait_until_nothing_is_left(5)


@pytest.mark.slow
@pytest.mark.long
def test_no_rank_survives_a_controller_that_is_killed_while_training(
    controller: Controller,
) -> None:
    controller.wait_for(lambda: len(controller.steps()) >= 4)
    controller.process.kill()
    controller.process.wait()
    controller.wait_until_nothing_is_left(10)

    controller.start_again()
    controller.finish()
    assert_finished_without_repeating(controller)


@pytest.mark.slow
@pytest.mark.long
def test_it_goes_on_after_sigterm_while_probing_and_sigint_while_training(
    controller: Controller,
) -> None:
    controller.wait_for(lambda: bool(controller.rungs()))
    assert_stopped(controller, controller.stop(controller.process.terminate), "SIGTERM")

    controller.start_again()
    controller.wait_for(lambda: len(controller.steps()) >= 1)
    said = controller.stop(lambda: os.killpg(controller.process.pid, signal.SIGINT))
    assert_stopped(controller, said, "SIGINT")

    controller.start_again()
    controller.finish()
    assert_finished_without_repeating(controller)


def spoil_an_answer(controller: Controller) -> None:
    (answer, *_) = controller.temporary.rglob("probe-*/rank-1.jsonl")
    with answer.open("ab") as file:
        file.write(b"\x00garbage\n")


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "harm",
    [
        pytest.param(lambda run: run.ranks()[-1].kill(), id="killed"),
        pytest.param(lambda run: run.ranks()[-1].suspend(), id="hung", marks=pytest.mark.long),
        pytest.param(spoil_an_answer, id="garbled", marks=pytest.mark.long),
    ],
)
def test_a_rank_that_comes_to_harm_costs_a_rung_and_not_the_run(
    controller: Controller, harm: Callable[[Controller], None]
) -> None:
    controller.wait_for(lambda: len(controller.ranks()) == RANKS and bool(controller.rungs()))
    harm(controller)
    # A hang is one after two minutes of silence.
    controller.finish(120 + LIMIT_S)
    kinds = {rung["outcome"]["kind"] for rung in controller.rungs()}
    assert kinds & {"crashed", "timed_out", "out_of_memory", "unknown"}
    assert controller.leftovers() == []

    controller.start_again()
    controller.finish()
    assert controller.document("result.json")["exit_reason"] == "trained"
    assert controller.leftovers() == []


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["detect", "profile", "tune", "emit"])
def test_a_stop_in_any_phase_leaves_nothing_behind(controller: Controller, phase: str) -> None:
    status = controller.run_dir / "status.json"
    # Its phase is null until the first begins.
    order = [None, "detect", "profile", "tune", "emit", "train", "stopped", "done"]
    controller.wait_for(
        lambda: (
            status.exists()
            and order.index(controller.document("status.json")["phase"]) >= order.index(phase)
        )
    )

    assert_stopped(controller, controller.stop(controller.process.terminate), "SIGTERM")


IN_A_CALLBACK = """
import os, signal, sys, time, weakref
from autotune import cli
from autotune.errors import InterruptedRunError

def run():
    try:
        thing = Thing()
        reference = weakref.ref(thing, in_a_callback)
        del thing
        time.sleep(20)
    except InterruptedRunError as stop:
        os._exit(75 if stop.warned else 1)

class Thing:
    pass

def in_a_callback(reference):
    os.kill(os.getpid(), signal.SIGUSR1)
    time.sleep(0)

cli._run = run
cli.main()
"""


def test_a_stop_that_comes_where_python_drops_exceptions_is_not_lost() -> None:
    done = subprocess.run(
        [sys.executable, "-c", IN_A_CALLBACK], capture_output=True, text=True, check=False
    )
    assert done.returncode == 75, done.stderr
    assert done.stderr == ""
