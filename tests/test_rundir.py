"""Files of a run: whole or not there, the user's alone, and one run at a time."""

import os
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from records import as_rung, measured

from autotune.errors import CannotWriteError
from autotune.outcome import OutOfMemory
from autotune.rundir import RunDir, cached, read_json, write_json, write_text
from autotune.setting import Structure

SETTING = Structure(zero_stage=1).with_micro_batch(2, ranks=2, global_batch_size=8)
RUNG = as_rung(SETTING, measured(1000.0))
OTHER = as_rung(SETTING, OutOfMemory(where="device", evidence="no more"))

# A child may write files of 1000 bytes at most, as if the disk were full.
WRITE_ON_FULL_DISK = """
import resource, sys
from pathlib import Path
from autotune.errors import CannotWriteError
from autotune.rundir import write_text
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    write_text(Path(sys.argv[1]), "new" * 100_000)
except CannotWriteError as error:
    print(error)
"""

APPEND_ON_FULL_DISK = """
import resource, sys
from pathlib import Path
from autotune.errors import CannotWriteError
from autotune.rundir import RunDir
run_dir = RunDir(Path(sys.argv[1]))
(rung,) = run_dir.read_rungs()
room = run_dir.probes.stat().st_size + 100
resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
try:
    run_dir.append_rung(rung)
except CannotWriteError as error:
    print(error)
"""

HOLD_LOCK = """
import sys
from pathlib import Path
from autotune.rundir import RunDir
with RunDir(Path(sys.argv[1])).locked():
    print("held", flush=True)
    sys.stdin.read()
"""


def child(code: str, argument: Path) -> str:
    """Run Python code in a process of its own; returns what it printed."""
    return subprocess.run(
        [sys.executable, "-c", code, str(argument)],
        check=True,
        capture_output=True,
        text=True,
    ).stdout


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture
def run_dir(tmp_path: Path) -> RunDir:
    directory = RunDir(tmp_path / "runs" / "one")
    directory.create()
    return directory


def test_what_was_written_is_read(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"a": [1, None, "ü"]})
    assert read_json(tmp_path / "a.json") == {"a": [1, None, "ü"]}


def test_a_written_document_ends_with_a_line_end(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {})
    assert (tmp_path / "a.json").read_text() == "{}\n"


def test_a_write_that_fails_leaves_the_old_content_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "status.json"
    path.write_text("old")
    said = child(WRITE_ON_FULL_DISK, path)
    assert said.startswith(f"cannot write {path}: ")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_target_that_cannot_be_replaced_stays_and_no_draft_is_left(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    (path / "inside").mkdir(parents=True)
    with pytest.raises(CannotWriteError, match="Is a directory"):
        write_text(path, "new")
    assert list(tmp_path.iterdir()) == [path]


def test_a_write_that_is_stopped_in_the_middle_leaves_no_draft(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(_: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", stop)
    with pytest.raises(KeyboardInterrupt):
        write_text(tmp_path / "a.txt", "new")
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_is_not_there_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(CannotWriteError) as refused:
        write_text(tmp_path / "none" / "a.txt", "new")
    assert str(refused.value) == f"cannot write {tmp_path}/none/a.txt: No such file or directory"


def test_files_are_the_users_alone(tmp_path: Path, run_dir: RunDir) -> None:
    before = os.umask(0)
    try:
        write_json(tmp_path / "a.json", 1)
        write_text(tmp_path / "launch.sh", "", mode=0o700)
        run_dir.append_rung(RUNG)
        with run_dir.locked():
            assert mode(run_dir.root / ".lock") == 0o600
        other = RunDir(tmp_path / "other")
        other.create()
    finally:
        os.umask(before)
    assert mode(tmp_path / "a.json") == mode(run_dir.probes) == 0o600
    assert mode(tmp_path / "launch.sh") == 0o700
    assert mode(other.root) == mode(other.logs) == 0o700


def test_a_text_may_hold_a_path_that_is_no_utf8(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9")
    write_text(tmp_path / "launch.sh", f"cd {name}\n")
    assert (tmp_path / "launch.sh").read_bytes() == b"cd caf\xe9\n"


@pytest.mark.parametrize("content", [None, b"", b'{"a": 1', b"\xff\xfe"])
def test_a_document_that_is_missing_or_torn_reads_as_none(
    tmp_path: Path, content: bytes | None
) -> None:
    if content is not None:
        (tmp_path / "a.json").write_bytes(content)
    assert read_json(tmp_path / "a.json") is None


@pytest.mark.parametrize("content", ['{"times"', "[]", "{}", '{"times": "many"}'])
def test_a_cached_document_is_made_once_and_again_if_it_is_corrupt(
    tmp_path: Path, content: str
) -> None:
    path = tmp_path / "cache" / "a.json"
    made: list[int] = []

    def make() -> dict[str, int]:
        made.append(1)
        return {"times": len(made)}

    def times(document: dict[str, int]) -> int:
        return int(document["times"])

    assert cached(path, make, times) == cached(path, make, times) == 1
    path.write_text(content)
    assert cached(path, make, times) == cached(path, make, times) == 2


def test_a_directory_can_be_created_again(run_dir: RunDir) -> None:
    run_dir.create()
    assert run_dir.logs.is_dir()


def test_a_file_in_the_place_of_the_directory_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CannotWriteError, match="cannot write"):
        RunDir(tmp_path / "file").create()


def test_every_path_of_a_run_is_below_its_root_and_different(run_dir: RunDir) -> None:
    names = [name for name, value in vars(RunDir).items() if isinstance(value, property)]
    paths = [getattr(run_dir, name) for name in names]
    assert len(set(paths)) == len(paths)
    assert {path.parent for path in paths} == {run_dir.root}


def test_rungs_are_read_in_the_order_in_which_they_were_added(run_dir: RunDir) -> None:
    assert run_dir.read_rungs() == []
    run_dir.append_rung(RUNG)
    run_dir.append_rung(OTHER)
    assert run_dir.read_rungs() == [RUNG, OTHER]
    assert len(run_dir.probes.read_text().splitlines()) == 2


@pytest.mark.parametrize("kept", [1, 20, -2])
def test_a_torn_last_line_is_skipped_and_the_next_rung_starts_a_new_one(
    run_dir: RunDir, kept: int
) -> None:
    run_dir.append_rung(RUNG)
    whole = run_dir.probes.read_bytes()
    run_dir.probes.write_bytes(whole + whole[:kept])
    assert run_dir.read_rungs() == [RUNG]
    run_dir.append_rung(OTHER)
    assert run_dir.read_rungs() == [RUNG, OTHER]


def test_a_whole_last_line_without_its_end_is_still_a_rung(run_dir: RunDir) -> None:
    run_dir.append_rung(RUNG)
    run_dir.probes.write_bytes(run_dir.probes.read_bytes().rstrip(b"\n"))
    run_dir.append_rung(OTHER)
    assert run_dir.read_rungs() == [RUNG, OTHER]


@pytest.mark.parametrize(
    "line", ["", "null", "7", "[]", "{}", '{"outcome": {"kind": "new"}}', "\x00\x00\xff"]
)
def test_a_line_that_is_no_rung_is_left_out(run_dir: RunDir, line: str) -> None:
    run_dir.append_rung(RUNG)
    with run_dir.probes.open("a") as file:
        file.write(line + "\n")
    run_dir.append_rung(OTHER)
    assert run_dir.read_rungs() == [RUNG, OTHER]


def test_a_full_disk_tears_at_most_the_line_at_work(run_dir: RunDir) -> None:
    run_dir.append_rung(RUNG)
    said = child(APPEND_ON_FULL_DISK, run_dir.root)
    assert said.startswith(f"cannot write {run_dir.probes}: ")
    assert run_dir.read_rungs() == [RUNG]
    run_dir.append_rung(OTHER)
    assert run_dir.read_rungs() == [RUNG, OTHER]


@contextmanager
def held_by_another(run_dir: RunDir) -> Iterator["subprocess.Popen[str]"]:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD_LOCK, str(run_dir.root)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        yield holder
        holder.kill()


def try_to_lock(run_dir: RunDir) -> None:
    with run_dir.locked():
        pass


def test_a_second_process_is_told_who_holds_the_directory(run_dir: RunDir) -> None:
    with held_by_another(run_dir) as holder:
        with pytest.raises(CannotWriteError) as refused:
            try_to_lock(run_dir)
        assert f"process {holder.pid} on {os.uname().nodename}" in str(refused.value)
        assert "--run-dir" in str(refused.value)


def test_the_lock_is_free_again_when_its_holder_is_killed(run_dir: RunDir) -> None:
    with held_by_another(run_dir) as holder:
        holder.send_signal(signal.SIGKILL)
        assert holder.wait() == -signal.SIGKILL
        try_to_lock(run_dir)


def test_the_lock_is_free_again_when_its_holder_is_done(run_dir: RunDir) -> None:
    with held_by_another(run_dir) as holder:
        holder.communicate()
        assert holder.returncode == 0
        try_to_lock(run_dir)


def test_a_lock_that_cannot_be_made_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CannotWriteError, match=r"cannot write .*\.lock: "):
        try_to_lock(RunDir(tmp_path / "file"))
