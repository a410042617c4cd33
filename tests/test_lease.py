"""Leases: they need no lock of the kernel, and do not outlive their holder."""

import fcntl
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from autotune import lease
from autotune.lease import HeldError, exclusive
from autotune.rundir import RunDir

ELSEWHERE = "filelock/2\npid=7\nhost=elsewhere\nmode=lease\ntoken=t\nduration=1.0\n"


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "_DURATION_S", 1.0)
    monkeypatch.setattr(lease, "_BEAT_S", 0.2)
    monkeypatch.setattr(lease, "_WATCH_S", 0.3)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / ".lock"


@contextmanager
def touched(path: Path) -> Iterator[None]:
    """Touch a file again and again, as a holder on another host does."""
    over = threading.Event()

    def touch() -> None:
        while not over.wait(0.1):
            with suppress(FileNotFoundError):
                os.utime(path)

    thread = threading.Thread(target=touch)
    thread.start()
    yield
    over.set()
    thread.join()


def test_it_is_there_while_it_is_held_and_the_users_alone(path: Path) -> None:
    with exclusive(path, wait=False):
        assert path.stat().st_mode & 0o777 == 0o600
    assert not path.exists()


def test_nothing_locks_a_file_by_the_kernel(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(38, os.strerror(38))

    monkeypatch.setattr(fcntl, "flock", refuse)
    monkeypatch.setattr(fcntl, "lockf", refuse)
    with exclusive(path, wait=True):
        pass
    run_dir = RunDir(path.parent / "run")
    run_dir.create()
    with run_dir.locked():
        pass


def test_a_holder_on_another_host_that_lives_is_named(path: Path) -> None:
    path.write_text(ELSEWHERE)
    with touched(path), pytest.raises(HeldError) as held, exclusive(path, wait=False):
        pass
    assert held.value.holder == "process 7 on elsewhere"


def test_one_that_has_stopped_to_show_it_holds_it_no_longer(path: Path) -> None:
    path.write_text(ELSEWHERE)
    started = time.monotonic()
    with exclusive(path, wait=False):
        assert time.monotonic() - started >= 0.9


def test_a_file_that_says_nothing_is_not_waited_for_for_ever(path: Path) -> None:
    path.touch()
    with exclusive(path, wait=True):
        pass


def test_who_waits_gets_it_when_the_holder_is_done(path: Path) -> None:
    path.write_text(ELSEWHERE)
    started = time.monotonic()
    with touched(path):
        threading.Timer(2, path.unlink).start()
        with exclusive(path, wait=True):
            assert time.monotonic() - started >= 2


def test_a_holder_whose_process_is_gone_from_this_host_is_not_waited_for(path: Path) -> None:
    hold = (
        "import os, sys; from pathlib import Path; from autotune import lease\n"
        "lease._DURATION_S, lease._BEAT_S = 1.0, 0.2\n"
        "with lease.exclusive(Path(sys.argv[1]), wait=False): os._exit(0)"
    )
    subprocess.run([sys.executable, "-c", hold, path], check=True)
    assert path.exists()
    started = time.monotonic()
    with exclusive(path, wait=False):
        assert time.monotonic() - started < 1
