"""Builds of DeepSpeed's ops: one that is killed neither hangs the next nor goes on."""

import os
import shutil
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from autotune.engine.ops import needed_ops

_MARK = "AUTOTUNE_TEST_BUILD"
_OP = "deepspeed_shm_comm"

CONTROLLER = """
import sys
from pathlib import Path
from autotune import processes
from autotune.environment import rank_environment
from autotune.profile.child import build_ops
processes.start_server(rank_environment("cpu", ()))
build_ops(["ShareMemCommBuilder"], Path(sys.argv[1]))
"""


class Builds:
    """Controllers that have the op built in one cache, told by a mark in their environment."""

    def __init__(self, directory: Path) -> None:
        self.cache = directory / "ops"
        self.lock = self.cache / _OP / "lock"
        self._directory = directory
        self._mark = uuid.uuid4().hex

    def start(self) -> "subprocess.Popen[bytes]":
        log = self._directory / f"{uuid.uuid4().hex}.log"
        environment = {"TORCH_EXTENSIONS_DIR": str(self.cache), _MARK: self._mark}
        return subprocess.Popen(
            [sys.executable, "-c", CONTROLLER, str(log)], env={**os.environ, **environment}
        )

    def members(self) -> list[psutil.Process]:
        return [process for process in psutil.process_iter() if self._is_member(process)]

    def _is_member(self, process: psutil.Process) -> bool:
        try:
            alive = process.status() != psutil.STATUS_ZOMBIE
            return alive and process.environ().get(_MARK) == self._mark
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            return False

    def compiles(self) -> bool:
        return any(process.name() == "cc1plus" for process in self.members())


def wait_for(reached: Callable[[], bool], limit_s: float) -> None:
    deadline = time.monotonic() + limit_s
    while not reached():
        assert time.monotonic() < deadline, "it takes too long"
        time.sleep(0.05)


@pytest.fixture
def builds(tmp_path: Path) -> Iterator[Builds]:
    builds = Builds(tmp_path)
    yield builds
    for process in builds.members():
        process.kill()


def test_a_lock_that_a_dead_build_left_hangs_nobody(builds: Builds) -> None:
    shutil.copytree(os.environ["TORCH_EXTENSIONS_DIR"], builds.cache)
    builds.lock.touch()

    assert builds.start().wait(timeout=120) == 0

    assert not builds.lock.exists()
    wait_for(lambda: builds.members() == [], 5)


def test_a_lock_whose_holder_lives_is_left_to_it(builds: Builds) -> None:
    shutil.copytree(os.environ["TORCH_EXTENSIONS_DIR"], builds.cache)
    with builds.lock.open("w"):
        controller = builds.start()
        with pytest.raises(subprocess.TimeoutExpired):
            controller.wait(timeout=20)
        builds.lock.unlink()
        assert controller.wait(timeout=120) == 0


@pytest.mark.slow
def test_a_build_that_is_killed_is_done_again_by_the_next_and_by_one_at_a_time(
    builds: Builds,
) -> None:
    killed = builds.start()
    wait_for(builds.compiles, 120)

    killed.kill()
    killed.wait()

    wait_for(lambda: builds.members() == [], 5)
    assert builds.lock.exists()
    again, beside = builds.start(), builds.start()
    assert again.wait(timeout=280) == 0
    assert beside.wait(timeout=280) == 0
    assert not builds.lock.exists()
    assert (builds.cache / _OP / f"{_OP}.so").exists()
    wait_for(lambda: builds.members() == [], 5)


def test_an_op_is_built_only_where_a_config_needs_it() -> None:
    plain = {"zero_optimization": {"stage": 2}, "optimizer": {"params": {"torch_adam": True}}}
    offloaded = {
        "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}},
        "optimizer": {"params": {}},
    }
    assert needed_ops("cpu", plain) == ("ShareMemCommBuilder",)
    assert needed_ops("cuda", plain) == ()
    assert needed_ops("cuda", offloaded) == ("CPUAdamBuilder",)
