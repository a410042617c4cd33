"""Functions run in processes of their own: warm, in their own session, dying with their parent.

The processes are forked from a server (multiprocessing's forkserver) that has imported the heavy
libraries and has not touched a device.
"""

import ctypes
import faulthandler
import functools
import multiprocessing
import multiprocessing.forkserver
import multiprocessing.resource_tracker
import multiprocessing.util
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import wait
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any, Protocol

import psutil

from autotune import session

_PRELOADED = ("autotune.engine.preload",)
_TERMINATE_GRACE_S = 5.0
_PR_SET_PDEATHSIG = 1

_server_environment: dict[str, str] = {}


class Process(Protocol):
    """A started process, forked or cold; `exitcode` is None while it lives."""

    @property
    def pid(self) -> int | None: ...
    @property
    def exitcode(self) -> int | None: ...
    @property
    def sentinel(self) -> int: ...
    def join(self, timeout: float | None = None) -> None: ...


@functools.cache
def temporary_dir() -> Path:
    """Return this process's own directory for what it and its children leave in passing.

    It goes when this process ends. A shell outside of its session sees to that where the process
    is killed.
    """
    directory = Path(tempfile.mkdtemp(prefix="autotune-"))
    keeper = subprocess.Popen(
        # Ranks die with this process; the second is for those that still write.
        ["/bin/sh", "-c", 'read -r _; sleep 1; rm -rf -- "$0"', str(directory)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd="/",
        start_new_session=True,
    )
    # After multiprocessing has removed its own directory in there, which has priority -100.
    multiprocessing.util.Finalize(None, _remove, args=(directory, keeper), exitpriority=-200)
    return directory


def _remove(directory: Path, keeper: "subprocess.Popen[bytes]") -> None:
    keeper.kill()
    keeper.wait()
    shutil.rmtree(directory, ignore_errors=True)


def start_server(environment: Mapping[str, str]) -> None:
    """Start the server in the background; later processes wait until it has imported everything.

    `environment` is what has to be there before the first import; it stays for all processes.
    """
    multiprocessing.set_forkserver_preload(list(_PRELOADED))
    _keep_sockets_in(temporary_dir())
    _server_environment.update(environment, TMPDIR=str(temporary_dir()))
    before = psutil.Process().children()
    with _environment(_server_environment):
        multiprocessing.forkserver.ensure_running()
    if helpers := [one for one in psutil.Process().children() if one not in before]:
        # After multiprocessing has ended the processes that are left, before their directory goes.
        multiprocessing.util.Finalize(None, _end_helpers, args=(helpers,), exitpriority=-150)


def _end_helpers(helpers: Sequence[psutil.Process]) -> None:
    """End the server and multiprocessing's tracker of resources, which else outlive this process.

    The server ends by the signal. The tracker takes none: it ends when nobody can tell it anything
    any more.
    """
    for helper in helpers:
        with suppress(psutil.NoSuchProcess):
            helper.terminate()
    # Python has no public end for it.
    multiprocessing.resource_tracker._resource_tracker._stop()  # type: ignore[attr-defined] # noqa: SLF001
    psutil.wait_procs(helpers, timeout=_TERMINATE_GRACE_S)


def _keep_sockets_in(directory: Path) -> None:
    """Have multiprocessing make its own temporary directory in this one."""
    before, tempfile.tempdir = tempfile.tempdir, str(directory)
    try:
        multiprocessing.util.get_temp_dir()
    finally:
        tempfile.tempdir = before


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
    """Start a module-level function in a process of its own; its output goes to the file `log`.

    The server has been started: one that multiprocessing starts by itself has imported nothing, and
    what a rank imports then counts as its memory.
    """
    assert _server_environment, "start_server comes first"
    context = multiprocessing.get_context("forkserver")
    process = context.Process(
        target=_enter, args=(function, args, str(log), dict(environment or {})), daemon=True
    )
    process.start()
    return process


class ColdProcess:
    """A program in a session of its own, with the environment that the server was given."""

    def __init__(
        self,
        command: Sequence[str],
        *,
        log: Path,
        environment: Mapping[str, str],
        directory: Path | None = None,
    ) -> None:
        with log.open("ab") as output:
            self._popen = subprocess.Popen(
                command,
                cwd=directory,
                env={**os.environ, **_server_environment, **environment},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.pid = self._popen.pid
        self.sentinel = os.pidfd_open(self.pid)
        weakref.finalize(self, os.close, self.sentinel)

    @property
    def exitcode(self) -> int | None:
        return self._popen.poll()

    def join(self, timeout: float | None = None) -> None:
        with suppress(subprocess.TimeoutExpired):
            self._popen.wait(timeout)


def end_session_with_this_process() -> None:
    """Have the programs that this process starts, in its session, killed when it is."""
    # The other end stays open, in no program that is started, until this process is gone.
    reader, _ = os.pipe()
    subprocess.Popen([sys.executable, "-m", "autotune.session"], stdin=reader)
    os.close(reader)


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


def wait_for_any(processes: Sequence[Process], timeout: float) -> None:
    """Wait until one of the processes ends, or for `timeout` seconds."""
    wait([process.sentinel for process in processes], timeout)


def end(processes: Sequence[Process]) -> None:
    """End the processes and what they started in their sessions: TERM, some seconds, KILL."""
    for process in processes:
        if process.exitcode is None:
            _terminate(process)
    deadline = time.monotonic() + _TERMINATE_GRACE_S
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
    for process in processes:
        assert process.pid is not None, "only started processes are ended"
        session.kill(process.pid)
        with suppress(ProcessLookupError):
            if process.exitcode is None:
                os.kill(process.pid, signal.SIGKILL)
        process.join()


def _terminate(process: Process) -> None:
    assert process.pid is not None, "only started processes are ended"
    if not session.send(process.pid, signal.SIGTERM):
        # It has not come to its own session yet, or has just gone.
        with suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGTERM)
