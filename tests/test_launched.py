"""The same run, started in each way as two processes: as of one process with as many ranks."""

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from conftest import autotune
from trainings import small_model

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

AUTOTUNE = Path(sys.executable).with_name("autotune")
MARK = "exited with "

# What a launcher starts: the command, and then a line with its exit code. Launchers stop the others
# when one has failed.
WRAPPER = f"""#!/bin/sh
trap : TERM
"{AUTOTUNE}" "$@"
code=$?
echo "{MARK}$code" >&2
exit $code
"""


@dataclass(frozen=True)
class Started:
    """What the processes of a launch ended with."""

    exit_codes: list[int]
    stdout: str
    stderr: str


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a directory with a wrapper of the command and a small model."""
    directory = tmp_path_factory.mktemp("launched")
    wrapper = directory / "wrapper"
    wrapper.write_text(WRAPPER)
    wrapper.chmod(0o755)
    small_model(directory / "model")
    return directory


def by_torchrun(place: Path, words: Sequence[str]) -> Started:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return launch(place, [*torchrun, "--nproc-per-node=2", "--no-python", "./wrapper", *words])


def by_mpirun(place: Path, words: Sequence[str]) -> Started:
    if shutil.which("mpirun") is None:
        pytest.skip("needs the Debian package openmpi-bin")
    mpirun = ["mpirun", "--allow-run-as-root", "--oversubscribe", "-np", "2"]
    return launch(place, [*mpirun, "./wrapper", *words])


def by_kubernetes(place: Path, words: Sequence[str]) -> Started:
    """Start what two pods would, each a node with one rank."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"PET_NNODES": "2", "PET_NPROC_PER_NODE": "1", "PET_MASTER_PORT": str(port)}
    pods = [
        subprocess.Popen(
            ["./wrapper", *words],
            cwd=place,
            env={
                **os.environ,
                **common,
                "PET_MASTER_ADDR": "localhost",
                "PET_NODE_RANK": str(rank),
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    return started([pod.communicate(timeout=400) for pod in pods])


def launch(place: Path, command: Sequence[str]) -> Started:
    done = subprocess.run(
        command, cwd=place, capture_output=True, text=True, check=False, timeout=400
    )
    return started([(done.stdout, done.stderr)])


def started(said: Sequence[tuple[str, str]]) -> Started:
    stderr = "".join(errors for _, errors in said)
    codes = [int(line.rpartition(MARK)[2]) for line in stderr.splitlines() if line.startswith(MARK)]
    return Started(codes, "".join(output for output, _ in said), stderr)


WAYS = {"torchrun": by_torchrun, "mpirun": by_mpirun, "kubernetes": by_kubernetes}


@pytest.fixture(scope="module")
def alone(place: Path, short_rows: Path) -> dict[str, Any]:
    """Return the result of one process with two ranks."""
    done = autotune(*words(short_rows, "alone"), "--devices", "2", cwd=place, timeout=400)
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def words(rows: Path, name: str) -> list[str]:
    job = ["run", "--dataset", str(rows), "--model", "model", "--global-batch-size", "8"]
    # What can be compared is of one setting, which a search by the clock need not find twice.
    pinned = ["--set", "zero_stage=2", "--set", "checkpointing=none", "--max-probes", "1"]
    return [*job, *pinned, "--device-memory", "1GiB", "--run-dir", f"runs/{name}", "--json"]


def losses(place: Path, name: str) -> list[float]:
    lines = (place / "runs" / name / "training" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


@pytest.mark.parametrize(
    "way",
    ["torchrun", *(pytest.param(way, marks=pytest.mark.long) for way in ("mpirun", "kubernetes"))],
)
def test_a_run_of_two_processes_is_that_of_one_with_two_ranks(
    place: Path, short_rows: Path, alone: dict[str, Any], way: str
) -> None:
    found = WAYS[way](place, words(short_rows, way))

    assert found.exit_codes == [0, 0], found.stderr
    result = json.loads(found.stdout)
    assert result["exit_reason"] == "trained"
    assert result["setting"]["zero_stage"] == alone["setting"]["zero_stage"]
    assert len(losses(place, way)) == 6
    assert losses(place, way) == pytest.approx(losses(place, "alone"), rel=1e-3)
    hardware = json.loads((place / "runs" / way / "hardware.json").read_text())
    assert hardware["num_devices"] == 2
    assert list((place / "runs").glob(".nodes-*")) == []


@pytest.mark.parametrize("way", WAYS)
def test_all_processes_end_with_the_code_of_what_went_wrong(place: Path, way: str) -> None:
    (place / "empty.jsonl").write_text("")
    asked = ["run", "--dataset", "empty.jsonl", "--model", "model", "--run-dir", f"runs/bad-{way}"]

    found = WAYS[way](place, asked)

    # mpirun kills what has not followed the first within a second, the line of the wrapper with it.
    assert set(found.exit_codes) == {65}, found.stderr
    assert len(found.exit_codes) == 2 or way == "mpirun"
    assert found.stderr.count("autotune: ") == 1
