"""Starts the training as a program of its own and follows it to its end."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from autotune.errors import InterruptedRunError, TrainingFailedError
from autotune.processes import temporary_dir
from autotune.train.deaths import STOPPED, take_deaths
from autotune.train.progress import PROGRESS

_TERMINATE_GRACE_S = 15.0
_POLL_S = 0.25
_TAIL_BYTES = 3000
_LOG_BYTES = 200_000
# A stop waits for the step at work and the checkpoint after it, as long as either goes on.
_STOP_GRACE_S = 60.0
_STEPS_OF_GRACE = 5

_KILLED_RANK = re.compile(r"exitcode\s*:\s*-(\d+)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """How a training ended.

    Attributes:
        exit_code: of torchrun, negative for a signal; 0 is well.
        stopped: whether it saved a checkpoint and ended because a rank was asked to.
        deaths: the exceptions that ranks wrote down.
        lost_by: the signals that took ranks away, those aside by which torchrun ends the others.
        tail: the end of its log.
    """

    exit_code: int
    stopped: bool
    deaths: tuple[dict[str, Any], ...]
    lost_by: tuple[int, ...]
    tail: str


class Training:
    """A training command, and the directory of its checkpoints and metrics."""

    def __init__(
        self,
        command: Sequence[str],
        *,
        directory: Path,
        environment: Mapping[str, str],
        log: Path,
        output_dir: Path,
    ) -> None:
        self._command = command
        self._directory = directory
        self._environment = environment
        self._log = log
        self._output_dir = output_dir
        self._slowest_step_s: float | None = None

    def run(
        self,
        progress: Callable[[dict[str, Any]], None],
        watch: Callable[[list[dict[str, Any]]], None] = lambda _: None,
    ) -> Ended:
        """Run until it ends.

        `progress` gets the line of each step that is taken; `watch` again and again the lines, if
        any, that ranks have written of loading the model and saving checkpoints.

        However this is left, no process of the training is.

        Raises:
            InterruptedRunError: stopped from outside, a checkpoint saved if a step was taken.
            TrainingFailedError: `progress` raised it; a checkpoint is saved too.
        """
        # What an earlier start has left.
        take_deaths(self._output_dir)
        (self._output_dir / STOPPED).unlink(missing_ok=True)
        log_start = self._log.stat().st_size if self._log.exists() else 0
        steps = _Follower(self._output_dir / "metrics.jsonl")
        others = _Follower(self._output_dir / PROGRESS)
        process = self._start()
        try:
            is_over = False
            while not is_over:
                time.sleep(_POLL_S)
                is_over = process.poll() is not None
                watch(others.new_lines())
                self._hand_on(steps, progress)
        except (InterruptedRunError, TrainingFailedError):
            self._stop(process)
            raise
        finally:
            end_tree(process)
        return self._ended(process.returncode, log_start)

    def _start(self) -> "subprocess.Popen[bytes]":
        with self._log.open("ab") as output:
            return subprocess.Popen(
                [sys.executable, "-m", "autotune.train.leash", *self._command],
                cwd=self._directory,
                # torchrun leaves its own there.
                env={**os.environ, "TMPDIR": str(temporary_dir()), **self._environment},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def _hand_on(self, follower: "_Follower", progress: Callable[[dict[str, Any]], None]) -> None:
        for line in follower.new_lines():
            self._slowest_step_s = max(self._slowest_step_s or 0.0, line["step_time_s"])
            progress(line)

    def _stop(self, process: "subprocess.Popen[bytes]") -> None:
        """Have the ranks save a checkpoint and end, unless no step was taken that could be lost."""
        if self._slowest_step_s is None:
            return
        for rank in _children(process):
            with suppress(psutil.NoSuchProcess):
                rank.send_signal(signal.SIGUSR1)
        grace_s = _STOP_GRACE_S + _STEPS_OF_GRACE * self._slowest_step_s
        started = time.time()
        while process.poll() is None:
            if time.time() - max(started, _last_write(self._output_dir)) > grace_s:
                return
            time.sleep(_POLL_S)

    def _ended(self, exit_code: int, log_start: int) -> Ended:
        with self._log.open("rb") as file:
            file.seek(max(log_start, self._log.stat().st_size - _LOG_BYTES))
            said = file.read().decode(errors="replace")
        signals = [int(number) for number in _KILLED_RANK.findall(said)]
        return Ended(
            exit_code=exit_code,
            stopped=(self._output_dir / STOPPED).exists(),
            deaths=tuple(take_deaths(self._output_dir)),
            lost_by=tuple(number for number in signals if number != signal.SIGTERM),
            tail=said[-_TAIL_BYTES:],
        )


class _Follower:
    """Reads metrics.jsonl as it grows; a resumed training writes it anew."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._inode, self._offset = 0, 0
        self._started = time.time()

    def new_lines(self) -> list[dict[str, Any]]:
        """Return the whole lines that were added, those of earlier trainings aside."""
        try:
            with self._path.open("rb") as file:
                inode = os.fstat(file.fileno()).st_ino
                if inode != self._inode:
                    self._inode, self._offset = inode, 0
                file.seek(self._offset)
                whole = file.read().rpartition(b"\n")[0]
        except FileNotFoundError:
            return []
        if not whole:
            return []
        self._offset += len(whole) + 1
        lines = [json.loads(line) for line in whole.splitlines()]
        return [line for line in lines if line["at"] >= self._started]


def _children(process: "subprocess.Popen[bytes]") -> list[psutil.Process]:
    try:
        return list(psutil.Process(process.pid).children())
    except psutil.NoSuchProcess:
        return []


def _last_write(directory: Path) -> float:
    """Return when something in a directory was written last, as seconds since the epoch."""
    times = [0.0]
    for path in directory.rglob("*"):
        with suppress(OSError):
            times.append(path.stat().st_mtime)
    return max(times)


def end_tree(process: "subprocess.Popen[bytes]") -> None:
    """End a launcher and its ranks, which torchrun puts into sessions of their own."""
    if process.poll() is not None:
        return
    tree = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    process.send_signal(signal.SIGTERM)
    # A rank takes this for a wish to save first; what has to end now is not asked twice.
    for rank in tree[1:]:
        with suppress(psutil.NoSuchProcess):
            rank.kill()
    _, alive = psutil.wait_procs(tree, timeout=_TERMINATE_GRACE_S)
    for member in alive:
        member.kill()
    psutil.wait_procs(alive, timeout=_TERMINATE_GRACE_S)
    process.wait()
