"""A training over two nodes of this machine: it ends well, is stopped, loses a rank and a node."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from trainings import Workshop, losses, small_model, train, workshop

from autotune import emit, environment
from autotune.errors import InterruptedRunError
from autotune.nodes import control
from autotune.nodes.control import Nodes, gather
from autotune.nodes.work import torchrun_of
from autotune.train.launch import Ended, OtherNodes, Training

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

FOLLOWER = """
import sys
from pathlib import Path
from autotune.nodes.follow import follow
sys.exit(follow(Path(sys.argv[1]), 1, 2, 1))
"""
STEPS = 60


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory, short_rows: Path) -> Workshop:
    directory = tmp_path_factory.mktemp("nodes-training")
    return workshop(directory, short_rows, small_model(directory / "model"))


class TwoNodes:
    """A controller here, and a process that follows it as another node would."""

    def __init__(self, directory: Path) -> None:
        self.second = subprocess.Popen([sys.executable, "-c", FOLLOWER, str(directory)])
        self.nodes: Nodes = gather(directory, 2, 0, None, None)
        self.nodes.detect("cpu:1", None)

    def training(self, directory: Path) -> Training:
        (directory / "logs").mkdir(exist_ok=True)
        logs = [directory / "logs" / f"node-{node}.log" for node in range(2)]
        arguments = [*emit.entry_arguments(), "--resume"]
        work = self.nodes.work(arguments, directory=directory, logs=logs)
        send = OtherNodes(
            (logs[1],), lambda: self.nodes.send(work, self.nodes.new_directory("training"))
        )
        return Training(
            torchrun_of(work, 0),
            directory=directory,
            environment=environment.rank_environment("cpu", ()),
            log=logs[0],
            output_dir=directory / "training",
            others=send,
        )

    def rank_of_second(self) -> psutil.Process:
        below = psutil.Process(self.second.pid).children(recursive=True)
        return next(one for one in below if "autotune.train.entry" in one.cmdline()[:5])


@pytest.fixture
def two(tmp_path: Path) -> Iterator[TwoNodes]:
    two = TwoNodes(tmp_path / "launch")
    yield two
    two.nodes.close(0)
    two.second.wait(timeout=30)


def live_ranks() -> list[psutil.Process]:
    return [
        one
        for one in psutil.Process().children(recursive=True)
        if "autotune.train.entry" in " ".join(_command(one))
    ]


def _command(process: psutil.Process) -> list[str]:
    """Return the command of a process, none of one that is dead."""
    try:
        return process.cmdline()
    except psutil.NoSuchProcess:
        return []


def test_it_learns_what_one_node_with_as_many_ranks_does(
    shop: Workshop, two: TwoNodes, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"zero_stage": 2, "trainer": {"max_steps": 6}}
    apart = shop.emit(tmp_path / "apart", **settings)
    (apart / "training").mkdir()

    ended = two.training(apart).run(lambda _: None)

    assert (ended.exit_code, ended.lost_nodes) == (0, ()), ended.tail
    together = train(shop.emit(tmp_path / "together", **settings), 2)
    assert losses(apart) == pytest.approx(together, rel=1e-3)
    assert (apart / "model" / "config.json").exists()
    assert live_ranks() == []


def test_a_stop_saves_a_checkpoint_of_all_ranks_and_the_training_goes_on(
    shop: Workshop, two: TwoNodes, tmp_path: Path
) -> None:
    trainer = {"max_steps": STEPS, "save_steps": 1000}
    directory = shop.emit(tmp_path / "job", zero_stage=2, trainer=trainer)
    (directory / "training").mkdir()

    def stop(line: dict[str, Any]) -> None:
        if line["step"] >= 3:
            msg = "stopped"
            raise InterruptedRunError(msg)

    with pytest.raises(InterruptedRunError):
        two.training(directory).run(stop)

    assert live_ranks() == []
    (complete,) = directory.glob("training/checkpoint-*/complete")
    assert 3 <= int(complete.parent.name.rpartition("-")[2]) < STEPS
    assert two.training(directory).run(lambda _: None).exit_code == 0
    assert len(losses(directory)) == STEPS


def killing(two: TwoNodes, *, node: bool) -> Any:  # noqa: ANN401 - a watcher of steps
    killed: list[int] = []

    def kill(line: dict[str, Any]) -> None:
        if line["step"] >= 3 and not killed:
            rank = two.rank_of_second()
            killed.append(rank.pid)
            if node:
                # As a node would: all of it at once, without a word.
                os.kill(two.second.pid, signal.SIGKILL)
            rank.kill()

    return kill


def ended_after(two: TwoNodes, shop: Workshop, directory: Path, *, node: bool) -> Ended:
    shop.emit(directory, zero_stage=2, trainer={"max_steps": 3000})
    (directory / "training").mkdir()
    ended = two.training(directory).run(killing(two, node=node))
    assert live_ranks() == []
    return ended


def test_a_rank_that_is_killed_on_another_node_is_told_from_its_log(
    shop: Workshop, two: TwoNodes, tmp_path: Path
) -> None:
    ended = ended_after(two, shop, tmp_path / "job", node=False)

    assert ended.exit_code != 0
    # The launchers of both nodes tell of it.
    assert set(ended.lost_by) == {signal.SIGKILL}
    assert ended.lost_nodes == ()


def test_a_lost_node_ends_the_training_on_the_others(
    shop: Workshop, two: TwoNodes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control, "LOST_S", 12.0)
    ended = ended_after(two, shop, tmp_path / "job", node=True)

    assert ended.exit_code != 0
    assert ended.lost_nodes == (os.uname().nodename,)
