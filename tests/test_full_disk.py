"""No room under the run directory: said in a sentence, nothing lost, and it goes on afterwards."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import autotune

from autotune.rundir import RunDir

JOB = ("--devices", "2", "--global-batch-size", "16", "--max-probes", "2")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Mount a file system of 2 MiB, where root is to be had."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.geteuid() != 0:
        pytest.skip("mounting takes root")
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


def fill(disk: Path, leave_bytes: int) -> Path:
    """Fill the disk but for so many bytes."""
    stat = os.statvfs(disk)
    filler = disk / "filler"
    filler.write_bytes(b"0" * max(0, stat.f_bavail * stat.f_frsize - leave_bytes))
    return filler


@pytest.mark.slow
def test_a_disk_that_checkpoints_will_not_fit_on_is_told_before_the_first_probe(
    small_disk: Path, short_rows: Path
) -> None:
    done = autotune("run", "--dataset", short_rows, "--run-dir", "run", *JOB, cwd=small_disk)

    assert done.returncode == 73, done.stderr
    sentence = done.stderr.splitlines()[-1]
    assert "checkpoints and the final model" in sentence
    # Three checkpoints of 12 + 4 bytes a parameter, the model, and the weights that it starts from.
    assert "will take 168 MiB" in sentence
    assert not RunDir(small_disk / "run").read_rungs()


@pytest.mark.slow
@pytest.mark.parametrize(
    "room",
    [8_192, 131_072, *(pytest.param(room, marks=pytest.mark.long) for room in (40_960, 73_728))],
)
def test_a_full_disk_is_said_in_a_sentence_and_the_same_command_goes_on(
    small_disk: Path, short_rows: Path, room: int
) -> None:
    command = ["tune", "--dataset", short_rows, "--run-dir", "run", *JOB]
    filler = fill(small_disk, room)

    stopped = autotune(*command, cwd=small_disk)

    assert stopped.returncode == 73, stopped.stderr
    assert "Traceback" not in stopped.stderr
    assert "No space left on device" in stopped.stderr.splitlines()[-1]
    learned = RunDir(small_disk / "run").read_rungs()
    filler.unlink()
    done = autotune(*command, cwd=small_disk)
    assert done.returncode == 0, done.stderr
    assert RunDir(small_disk / "run").read_rungs()[: len(learned)] == learned
