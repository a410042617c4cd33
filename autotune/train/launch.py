"""Starts the training as a program of its own and follows it to its end."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

from autotune.errors import TrainingFailedError
from autotune.processes import temporary_dir

_TERMINATE_GRACE_S = 15.0
_POLL_S = 0.25
_TAIL_BYTES = 3000


def run_training(
    command: Sequence[str],
    *,
    directory: Path,
    environment: Mapping[str, str],
    log: Path,
    metrics: Path,
    progress: Callable[[dict[str, Any]], None],
) -> None:
    """Run the training command in `directory` until it ends; `progress` gets each step's line.

    However this is left, no process of the training is.

    Raises:
        TrainingFailedError: it ended badly; the message has the end of its log.
    """
    lines = metrics.read_bytes().count(b"\n") if metrics.exists() else 0
    with log.open("ab") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "autotune.train.leash", *command],
            cwd=directory,
            # torchrun leaves its own there.
            env={**os.environ, "TMPDIR": str(temporary_dir()), **environment},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        while process.poll() is None:
            time.sleep(_POLL_S)
            lines = _report(metrics, lines, progress)
        _report(metrics, lines, progress)
    finally:
        end_tree(process)
    if process.returncode:
        tail = log.read_bytes()[-_TAIL_BYTES:].decode(errors="replace")
        msg = f"the training ended with exit code {process.returncode}; the end of {log}:\n{tail}"
        raise TrainingFailedError(msg)


def _report(metrics: Path, seen: int, progress: Callable[[dict[str, Any]], None]) -> int:
    """Hand on the whole lines after the first `seen`; a resumed training writes the file anew."""
    if not metrics.exists():
        return seen
    lines = metrics.read_bytes().rpartition(b"\n")[0].splitlines()
    for line in lines[seen:]:
        progress(json.loads(line))
    return len(lines)


def end_tree(process: "subprocess.Popen[bytes]") -> None:
    """End a launcher and its ranks, which torchrun puts into sessions of their own."""
    if process.poll() is not None:
        return
    tree = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    process.send_signal(signal.SIGTERM)
    _, alive = psutil.wait_procs(tree, timeout=_TERMINATE_GRACE_S)
    for member in alive:
        member.kill()
    psutil.wait_procs(alive, timeout=_TERMINATE_GRACE_S)
    process.wait()
