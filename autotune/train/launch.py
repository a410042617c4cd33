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
from typing import Any, Protocol

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
# On the other nodes: for a torchrun to end after the training has, or after a rank of it was lost.
_OTHERS_GRACE_S = 30.0

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
        lost_nodes: names of nodes that are not there any more.
    """

    exit_code: int
    stopped: bool
    deaths: tuple[dict[str, Any], ...]
    lost_by: tuple[int, ...]
    tail: str
    lost_nodes: tuple[str, ...] = ()


class Elsewhere(Protocol):
    """The same training at other nodes, where it was sent to."""

    def exit_codes(self) -> tuple[int | None, ...]:
        """Return an exit code a node, negative for a signal, None where there is none yet."""
        ...

    def lost(self) -> tuple[str, ...]:
        """Name the nodes that are not there any more."""
        ...

    def end(self, *, patience_s: float = 0.0) -> None:
        """End it, after `patience_s` in which it may end by itself."""
        ...


@dataclass(frozen=True, slots=True)
class OtherNodes:
    """The nodes besides this one: a log of each, and what has them start their part."""

    logs: tuple[Path, ...]
    send: Callable[[], Elsewhere]


class Training:
    """A training command, and the directory of its checkpoints and metrics.

    Of a training over several nodes `command` is what runs on this one. The ranks of all stop
    together when one is asked to.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        directory: Path,
        environment: Mapping[str, str],
        log: Path,
        output_dir: Path,
        others: OtherNodes | None = None,
    ) -> None:
        self._command = command
        self._directory = directory
        self._environment = environment
        self._logs = (log, *(others.logs if others is not None else ()))
        self._others = others
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
        log_starts = [log.stat().st_size if log.exists() else 0 for log in self._logs]
        steps = _Follower(self._output_dir / "metrics.jsonl")
        others = _Follower(self._output_dir / PROGRESS)
        elsewhere = self._others.send() if self._others is not None else None
        process = self._start()
        try:
            is_over = False
            while not is_over:
                time.sleep(_POLL_S)
                is_over = process.poll() is not None or _has_failed(elsewhere)
                watch(others.new_lines())
                self._hand_on(steps, progress)
            if elsewhere is not None:
                # Ranks that have lost others fall by themselves, with what they have to say.
                _wait_for_end(process)
                elsewhere.end(patience_s=_OTHERS_GRACE_S)
        except (InterruptedRunError, TrainingFailedError):
            self._stop(process)
            raise
        finally:
            end_tree(process)
            if elsewhere is not None:
                elsewhere.end()
        return self._ended(process.returncode, elsewhere, log_starts)

    def _start(self) -> "subprocess.Popen[bytes]":
        with self._logs[0].open("ab") as output:
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

    def _ended(
        self, exit_code: int, elsewhere: Elsewhere | None, log_starts: Sequence[int]
    ) -> Ended:
        codes = [exit_code, *(elsewhere.exit_codes() if elsewhere is not None else ())]
        said = [_said(log, start) for log, start in zip(self._logs, log_starts, strict=True)]
        signals = [int(number) for text in said for number in _KILLED_RANK.findall(text)]
        failed = [node for node, code in enumerate(codes) if code]
        # A node whose rank was killed tells more than one that has only lost its peers.
        telling = [node for node in failed if _KILLED_RANK.search(said[node])] or failed or [0]
        return Ended(
            exit_code=exit_code or next((code for code in codes if code), 0),
            stopped=(self._output_dir / STOPPED).exists(),
            deaths=tuple(take_deaths(self._output_dir)),
            lost_by=tuple(number for number in signals if number != signal.SIGTERM),
            tail=said[telling[0]][-_TAIL_BYTES:],
            lost_nodes=elsewhere.lost() if elsewhere is not None else (),
        )


def _has_failed(elsewhere: Elsewhere | None) -> bool:
    return elsewhere is not None and any(elsewhere.exit_codes())


def _wait_for_end(process: "subprocess.Popen[bytes]") -> None:
    with suppress(subprocess.TimeoutExpired):
        process.wait(_OTHERS_GRACE_S)


def _said(log: Path, start: int) -> str:
    if not log.exists():
        return ""
    with log.open("rb") as file:
        file.seek(max(start, log.stat().st_size - _LOG_BYTES))
        return file.read().decode(errors="replace")


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
