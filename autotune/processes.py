"""Functions run in processes of their own: warm, in their own session, dying with their parent.

The processes are forked from a server (multiprocessing's forkserver) that has imported the heavy
libraries and has not touched a device.
"""

import ctypes
import faulthandler
import multiprocessing
import multiprocessing.forkserver
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing.connection import wait
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

_PRELOADED = ("autotune.engine.preload",)
_TERMINATE_GRACE_S = 5.0
_PR_SET_PDEATHSIG = 1


def start_server(environment: Mapping[str, str]) -> None:
    """Start the server in the background; later processes wait until it has imported everything.

    `environment` is what has to be there before the first import; it stays for all processes.
    """
    multiprocessing.set_forkserver_preload(list(_PRELOADED))
    with _environment(environment):
        multiprocessing.forkserver.ensure_running()


@contextmanager
def _environment(changes: Mapping[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(changes)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def start(
    function: Callable[..., None],
    *args: Any,  # noqa: ANN401 - whatever the function takes
    log: Path,
    environment: Mapping[str, str] | None = None,
) -> ForkServerProcess:
    """Start a module-level function in a process of its own; its output goes to the file `log`."""
    context = multiprocessing.get_context("forkserver")
    process = context.Process(
        target=_enter, args=(function, args, str(log), dict(environment or {})), daemon=True
    )
    process.start()
    return process


def _enter(
    function: Callable[..., None], args: Sequence[Any], log: str, environment: Mapping[str, str]
) -> None:
    os.setsid()
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.environ.update(environment)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(output, sys.stdout.fileno())
    os.dup2(output, sys.stderr.fileno())
    faulthandler.enable()
    function(*args)


def die_with_parent(number: signal.Signals = signal.SIGKILL) -> None:
    """Ask the kernel for a signal to this process when the process that started it dies.

    Ranks die with the server that they were forked from, and the server with its client.
    """
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, number)
    if os.getppid() != parent:
        os._exit(1)


def wait_for_any(processes: Sequence[ForkServerProcess], timeout: float) -> None:
    """Wait until one of the processes ends, or for `timeout` seconds."""
    wait([process.sentinel for process in processes], timeout)


def end(processes: Sequence[ForkServerProcess]) -> None:
    """End the processes and what they started in their sessions: TERM, some seconds, KILL."""
    for process in processes:
        if process.exitcode is None:
            _signal_session(process, signal.SIGTERM)
    deadline = time.monotonic() + _TERMINATE_GRACE_S
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
    for process in processes:
        _signal_session(process, signal.SIGKILL)
        process.join()


def _signal_session(process: ForkServerProcess, number: signal.Signals) -> None:
    assert process.pid is not None, "only started processes are ended"
    try:
        os.killpg(process.pid, number)
    except ProcessLookupError:
        # It has not come to its own session yet, or all of it is gone.
        if process.exitcode is None:
            os.kill(process.pid, number)
