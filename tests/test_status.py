"""`autotune status`, and what a run looks like on a terminal."""

import json
import os
import pty
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from conftest import autotune
from rich.console import Console
from test_events import EVERY, event

from autotune.cli.live import drawn
from autotune.rundir import RunDir, write_json
from autotune.status import Status, fold, fresh


def status_after(*kinds: str, **changes: Any) -> Status:  # noqa: ANN401 - JSON values
    # It lives for the length of a test, also on a machine that is busy.
    status = fresh() | {"heartbeat": (datetime.now(UTC) + timedelta(hours=1)).isoformat()}
    for kind in kinds:
        status = fold(status, event(kind))
    return status | changes


TUNING = ("phase", "planned", "probe_started", "probe_phase", "rung", "best")


@pytest.fixture
def run_dir(tmp_path: Path) -> RunDir:
    run_dir = RunDir(tmp_path / "run")
    run_dir.create()
    return run_dir


def test_where_there_is_no_run_that_is_said(tmp_path: Path) -> None:
    done = autotune("status", "nowhere", cwd=tmp_path)
    assert done.returncode == 66
    assert "nowhere holds no run" in done.stderr


def test_a_run_that_goes_on_is_shown(run_dir: RunDir) -> None:
    write_json(run_dir.status, status_after(*TUNING))
    text = autotune("status", run_dir.root, cwd=run_dir.root)
    assert text.returncode == 0
    assert f"running, process {os.getpid()}" in text.stdout
    assert "120 tokens/s (1.00 x the default)" in text.stdout
    assert "zero2: the engine is built" in text.stdout
    document = json.loads(autotune("status", run_dir.root, "--json", cwd=run_dir.root).stdout)
    assert (document["state"], document["phase"]) == ("running", "tune")
    assert document["best"]["tokens_per_s"] == 120.0
    assert document["run_dir"] == str(run_dir.root)


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"phase": "done", "exit_code": 0}, 0),
        ({"phase": "stopped", "exit_code": 71, "message": "no setting fits"}, 71),
        ({"pid": 2**22 + 1}, 75),
    ],
)
def test_a_watch_ends_with_the_run_and_with_its_code(
    run_dir: RunDir, changes: dict[str, Any], code: int
) -> None:
    write_json(run_dir.status, status_after(*TUNING))
    with subprocess.Popen(
        [Path(sys.executable).parent / "autotune", "status", run_dir.root, "--watch", "--json"],
        stdout=subprocess.PIPE,
        text=True,
    ) as watching:
        assert watching.stdout is not None
        assert json.loads(watching.stdout.readline())["state"] == "running"
        write_json(run_dir.status, status_after(*TUNING, **changes))
        last = json.loads(watching.stdout.readline())
        assert last["state"] == ("lost" if code == 75 else changes["phase"])
        assert watching.wait(timeout=120) == code


def picture(status: Status, width: int = 100) -> str:
    console = Console(width=width, force_terminal=False)
    with console.capture() as captured:
        console.print(drawn(status))
    return captured.get()


def test_a_picture_of_tuning_has_the_ladder_and_memory_foretold_beside_measured() -> None:
    shown = picture(status_after(*TUNING))
    assert "tune" in shown
    assert "at most 12 to go" in shown
    (row,) = [line for line in shown.splitlines() if "120" in line and "GiB" in line]
    assert row.count("1.00 GiB [#####-----]  50 %") == 2
    assert "best so far  120 tokens/s (1.00 x the default)" in shown


def test_a_picture_has_a_bar_for_what_takes_long() -> None:
    for what, word in (("data", "tokenising"), ("ops", "building"), ("model", "loading")):
        status = fold(status_after("phase"), event("progress", what=what, note="a note"))
        assert word in (shown := picture(status))
        assert "50 %" in shown
        assert "a note" in shown
    unknown = fold(status_after("phase"), event("progress", what="checkpoint", total=None))
    assert "saving a checkpoint" in picture(unknown)
    line = {"step": 3, "max_steps": 9, "loss": 2.5, "tokens_per_s": 10.0, "left_s": 60.0}
    training = fold(fold(status_after(), event("phase", phase="train")), event("step", **line))
    assert "step 3/9, loss 2.5000, 10 tokens/s, 1 min 00 s left" in picture(training)


@pytest.mark.parametrize("width", [30, 80, 200])
def test_a_picture_fits_the_terminal(width: int) -> None:
    for line in picture(status_after(*TUNING), width).splitlines():
        assert len(line) <= width


SHOW = """
import logging, sys, time
sys.path[:0] = sys.argv[1:2]
from test_events import event
from autotune.cli.live import view
logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="%(message)s")
logging.getLogger("autotune").setLevel(logging.INFO)
log = logging.getLogger("autotune.x")
with view(quiet="--quiet" in sys.argv) as listeners:
    for kind in ("phase", "planned", "probe_started", "probe_phase", "rung", "best"):
        for listener in listeners:
            listener(event(kind))
    log.info("a line")
    log.info("a step", extra={"in_view": True})
    time.sleep(1)
log.error("an error")
print("the result")
"""


def show(*arguments: str, environment: dict[str, str], terminal: bool) -> tuple[str, str]:
    """Run a view; returns what was written to stdout and to stderr, which may be a terminal."""
    reader, writer = pty.openpty() if terminal else os.pipe()
    names = {name: value for name, value in os.environ.items() if name != "CI"}
    with subprocess.Popen(
        [sys.executable, "-c", SHOW, str(Path(__file__).parent), *arguments],
        env={**names, "TERM": "xterm", "COLUMNS": "100", **environment},
        stdout=subprocess.PIPE,
        stderr=writer,
        text=True,
    ) as running:
        os.close(writer)
        said = b""
        while chunk := _read(reader):
            said += chunk
        os.close(reader)
        assert running.stdout is not None
        out = running.stdout.read()
        assert running.wait() == 0, said
    return out, said.decode()


def _read(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, 65536)
    except OSError:
        # The other end of a terminal is closed.
        return b""


def test_on_a_terminal_there_is_a_picture_below_the_log() -> None:
    out, said = show(environment={}, terminal=True)
    assert out == "the result\n"
    assert "zero2: the engine is built" in said
    assert "a line" in said
    assert "an error" in said
    assert "a step" not in said, "the picture has it"
    assert "\x1b[?25h" in said, "the cursor is back"


@pytest.mark.parametrize(
    ("environment", "terminal"), [({}, False), ({"CI": "1"}, True), ({"TERM": "dumb"}, True)]
)
def test_elsewhere_there_are_plain_lines(environment: dict[str, str], *, terminal: bool) -> None:
    out, said = show(environment=environment, terminal=terminal)
    assert out == "the result\n"
    assert said.split() == ["a", "line", "a", "step", "an", "error"]


def test_quiet_leaves_only_errors() -> None:
    out, said = show("--quiet", environment={}, terminal=True)
    assert out == "the result\n"
    assert said.split() == ["an", "error"]


def test_every_example_of_an_event_can_be_drawn() -> None:
    status = fresh()
    for kind in EVERY:
        status = fold(status, event(kind))
        assert picture(status)
