"""Ways to start ranks: cold where a fork cannot use its device, and torchrun on two nodes."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from test_prober import failure, live_ranks, request_of, site

from autotune.hardware import Bench
from autotune.nodes.bench import bench_of_all
from autotune.nodes.control import gather
from autotune.nodes.launch import TorchrunLauncher
from autotune.outcome import Measured, Rung
from autotune.probe.launch import ColdLauncher
from autotune.probe.local import LocalProber
from autotune.probe.protocol import RungMeasurement
from autotune.tune.site import JobSite

__all__ = ["site"]

# What CUDA does after a fork, done to the CPU: torch.cuda tells a fork by the same hook.
UNUSABLE_AFTER_A_FORK = """
import os, sys

def forbid():
    if "deepspeed" in sys.modules:
        from deepspeed.accelerator import get_accelerator
        def set_device(index):
            raise RuntimeError("Cannot re-initialize the device in forked subprocess")
        get_accelerator().set_device = set_device

os.register_at_fork(after_in_child=forbid)
"""


@pytest.mark.slow
def test_cold_ranks_measure_what_warm_ones_do(site: JobSite, tmp_path: Path) -> None:
    answers = list(LocalProber(tmp_path, launcher=ColdLauncher()).probe(request_of(site, [1, 2])))

    assert [answer.micro_batch_size for answer in answers] == [1, 2]
    assert all(isinstance(answer, RungMeasurement) for answer in answers), answers
    assert live_ranks() == []


@pytest.mark.slow
def test_where_a_fork_cannot_use_its_device_all_probes_start_cold(
    tmp_path: Path, short_rows: Path
) -> None:
    (tmp_path / "sitecustomize.py").write_text(UNUSABLE_AFTER_A_FORK)
    paths = [str(tmp_path), os.environ.get("PYTHONPATH", "")]
    job = ["--devices", "2", "--global-batch-size", "16", "--max-probes", "2", "--run-dir", "run"]

    done = subprocess.run(
        [Path(sys.executable).parent / "autotune", "tune", "--dataset", short_rows, *job],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )

    assert done.returncode == 0, done.stderr
    (said,) = [line for line in done.stderr.splitlines() if "start cold" in line]
    assert "forked subprocess" in said
    lines = (tmp_path / "run" / "probes.jsonl").read_text().splitlines()
    outcomes = [Rung.from_json(json.loads(line)).outcome for line in lines]
    assert all(isinstance(outcome, Measured) for outcome in outcomes)


FOLLOWER = """
import sys
from pathlib import Path
from autotune.nodes.follow import follow
sys.exit(follow(Path(sys.argv[1]), 1, 2, 1))
"""


class TwoNodes:
    """A second node on this machine, and a launcher on the first."""

    def __init__(self, directory: Path) -> None:
        launch = directory / "launch"
        self.second = subprocess.Popen([sys.executable, "-c", FOLLOWER, str(launch)])
        self.nodes = gather(launch, 2, 0, None, None)
        self.directory = self.nodes.directory
        self.cluster = self.nodes.detect("cpu:1", None)

    def prober(self, logs: Path) -> LocalProber:
        launcher = TorchrunLauncher(self.nodes, self.cluster)
        return LocalProber(logs, launcher=launcher, scratch_dir=self.directory)


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.NoSuchProcess:
        return []


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[TwoNodes]:
    nodes = TwoNodes(tmp_path)
    yield nodes
    nodes.nodes.close(7)
    assert nodes.second.wait(timeout=30) == 7
    assert not nodes.directory.exists()


def probe_processes(directory: Path) -> list[psutil.Process]:
    """Return the agents and ranks of a probe on either node."""
    return [
        process
        for process in psutil.Process().children(recursive=True)
        if any(argument.startswith(f"{directory}/probe-") for argument in _command(process))
    ]


@pytest.mark.slow
def test_two_torchrun_agents_measure_and_leave_nothing(
    site: JobSite, nodes: TwoNodes, tmp_path: Path
) -> None:
    answers = list(nodes.prober(tmp_path / "logs").probe(request_of(site, [1, 2], zero_stage=2)))

    assert [answer.micro_batch_size for answer in answers] == [1, 2]
    assert all(isinstance(answer, RungMeasurement) for answer in answers), answers
    assert probe_processes(nodes.directory) == []
    assert list(nodes.directory.glob("probe-*")) == []
    assert nodes.cluster.num_nodes == nodes.cluster.num_devices == 2
    assert nodes.cluster.ranks_per_node == 1


@pytest.mark.slow
def test_the_ranks_of_two_nodes_are_measured_together(nodes: TwoNodes) -> None:
    bench = Bench.from_json(bench_of_all(nodes.nodes, nodes.cluster))

    assert bench.ranks == 2
    assert dict(bench.matmul_flops_per_s)["fp32"] > 0
    assert (bench.all_reduce_bytes_per_s or 0) > 0
    assert bench.collective_overhead_s > 0


@pytest.mark.slow
def test_a_rank_lost_on_the_other_node_ends_the_probe_and_not_the_next(
    site: JobSite, nodes: TwoNodes, tmp_path: Path
) -> None:
    prober = nodes.prober(tmp_path / "logs")
    answers = prober.probe(request_of(site, [1, 2, 4, 8]))
    assert isinstance(next(answers), RungMeasurement)
    below = psutil.Process(nodes.second.pid).children(recursive=True)
    (rank,) = [process for process in below if "autotune.probe.rank" in _command(process)[:4]]

    rank.kill()
    outcome = failure(answers)

    assert outcome.kind in ("crashed", "unknown")
    assert probe_processes(nodes.directory) == []
    (answer,) = prober.probe(request_of(site, [1]))
    assert isinstance(answer, RungMeasurement)
