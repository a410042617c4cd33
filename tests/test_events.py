"""Events: the file, the hooks that may fail or hang, and the status that follows from them."""

import http.server
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import REPOSITORY

from autotune import events as module
from autotune.events import KINDS, Event, EventLog, Events, Hook, hooks, read_events, sentence
from autotune.setting import Structure
from autotune.status import StatusFile, fold, fresh, state_of, tuning_left_s

SETTING = Structure(zero_stage=2).with_micro_batch(2, 2, 16).to_json()
RUNG: dict[str, Any] = {
    "setting": SETTING,
    "kind": "measured",
    "tokens_per_s": 120.0,
    "peak_bytes": 2**30,
    "seconds": 3.0,
    "purpose": "search",
    "cached": False,
}
FORETOLD: dict[str, Any] = {
    "micro_batch_size": 2,
    "gradient_accumulation_steps": 4,
    "predicted_bytes": 2.0**30,
    "predicted_tokens_per_s": 100.0,
    "kind": None,
    "tokens_per_s": None,
    "peak_bytes": None,
}
EVERY: dict[str, dict[str, Any]] = {
    "run_started": {
        "command": "run",
        "fingerprint": "f",
        "pid": 1,
        "host": "h",
        "run_dir": "/r",
    },
    "phase": {"phase": "tune"},
    "known": {"rungs": 1, "probes": 1, "best": None, "default": None},
    "planned": {
        "model": "m",
        "parameters": 1,
        "rows": 2,
        "kept": 3,
        "budget_bytes": 2**31,
        "default": {"setting": SETTING, "tokens_per_s": None},
        "max_probes": 12,
        "budget_s": None,
    },
    "probe_started": {
        "structure": {},
        "label": "zero2",
        "purpose": "search",
        "rungs": [FORETOLD],
    },
    "probe_phase": {"phase": "build"},
    "rung": RUNG,
    "best": {"setting": SETTING, "tokens_per_s": 120.0, "gain_over_default": 1.0},
    "probe_ended": {"probes": 1, "seconds": 30.0},
    "waiting": {"structures": ["zero3"]},
    "chosen": {
        "setting": SETTING,
        "tokens_per_s": 120.0,
        "gain_over_default": 1.2,
        "stopped_by": "max_probes",
    },
    "step": {
        "step": 1,
        "max_steps": 2,
        "loss": 2.5,
        "tokens_per_s": 100.0,
        "peak_bytes": 2**30,
        "left_s": 60.0,
    },
    "checkpoint": {"step": 1, "seconds": 2.0},
    "recovery": {"cause": "rank_lost", "from_step": 1, "setting": SETTING},
    "progress": {
        "what": "data",
        "done": 1,
        "total": 2,
        "unit": "bytes",
        "note": "",
        "left_s": None,
    },
    "hook_failed": {"hook": "h", "reason": "r"},
    "run_ended": {"exit_reason": "trained", "exit_code": 0, "message": None},
}


@pytest.fixture(autouse=True)
def _patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give hooks time on a machine that is busy."""
    monkeypatch.setattr(Hook, "_LAST_S", 60.0)
    monkeypatch.setattr(Hook, "_LIMIT_S", 60.0)


def event(kind: str, **changes: Any) -> Event:  # noqa: ANN401 - JSON values
    return Event(kind, module.now(), {**EVERY[kind], **changes})


def test_every_kind_has_an_example_with_its_fields_here() -> None:
    assert {kind: set(fields) for kind, fields in EVERY.items()} == {
        kind: set(one.fields) for kind, one in KINDS.items()
    }


def test_the_documentation_has_every_kind_and_field() -> None:
    text = (REPOSITORY / "docs" / "monitoring.md").read_text().split("## For machines")[1]
    for kind, one in KINDS.items():
        (row,) = [line for line in text.splitlines() if line.startswith(f"| `{kind}` |")]
        for field in one.fields:
            assert f"`{field}`" in row, (kind, field)
        assert row.rstrip().endswith("| yes |" if one.is_news else "| |")


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_can_be_said_and_changes_a_status(kind: str) -> None:
    assert sentence(event(kind))
    assert set(fold(fresh(), event(kind))) == set(fresh())


def test_events_are_lines_also_after_a_torn_one(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    log = EventLog(path)
    log(event("phase"))
    path.write_text(path.read_text() + '{"torn":')
    log(event("run_ended"))
    first, last = read_events(path)
    assert (first["event"], first["phase"], first["schema"]) == ("phase", "tune", 1)
    assert (last["event"], last["exit_code"]) == ("run_ended", 0)
    assert path.stat().st_mode & 0o777 == 0o600


def test_of_progress_a_line_is_written_now_and_then_and_at_its_end(tmp_path: Path) -> None:
    path, seconds = tmp_path / "events.jsonl", [0.0]
    log = EventLog(path, clock=lambda: seconds[0])
    for done in range(101):
        seconds[0] += 1
        log(event("progress", done=done, total=100))
    assert [one["done"] for one in read_events(path)] == [*range(0, 100, 10), 100]


def test_a_listener_that_fails_is_left_out_and_the_others_are_told() -> None:
    told: list[str] = []

    def broken(_: Event) -> None:
        raise OSError

    events = Events([broken, lambda one: told.append(one.kind)])
    events.tell("phase", phase="tune")
    events.tell("phase", phase="emit")
    assert told == ["phase", "phase"]


def test_a_full_disk_is_no_affair_of_events(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "nowhere" / "events.jsonl")
    log(event("phase"))
    with StatusFile(tmp_path / "nowhere" / "status.json") as status:
        status(event("phase"))


def test_a_command_gets_each_event_with_its_kind_and_those_that_come_often_do_not(
    tmp_path: Path,
) -> None:
    out = tmp_path / "it's here"
    command = f'(cat; echo; echo "$AUTOTUNE_EVENT") >> {json.dumps(str(out))}'
    events = Events()
    with hooks([command], {"run_dir": "/r"}, events):
        for kind, fields in EVERY.items():
            events.tell(kind, **fields)
    lines = out.read_text().splitlines()
    news = [kind for kind in EVERY if KINDS[kind].is_news]
    assert lines[1::2] == news
    documents = [json.loads(line) for line in lines[::2]]
    assert [document["event"] for document in documents] == news
    assert all(document["run_dir"] == "/r" and document["text"] for document in documents)


@pytest.fixture
def site() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Give a web address, and what was posted to it."""
    posted: list[dict[str, Any]] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            posted.append(json.loads(body))
            self.send_response(204 if self.path == "/hook" else 500)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - as inherited
            del format, args

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", posted
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_web_address_gets_each_event_as_json(
    site: tuple[str, list[dict[str, Any]]],
) -> None:
    address, posted = site
    events = Events()
    with hooks([f"{address}/hook"], {"host": "h"}, events):
        events.tell("run_ended", **EVERY["run_ended"])
    (document,) = posted
    assert (document["event"], document["exit_code"], document["host"]) == ("run_ended", 0, "h")
    assert document["text"] == "ended with exit code 0: trained"


@pytest.mark.parametrize("target", ["exit 3", "no-such-command-anywhere", "http://127.0.0.1:9/x"])
def test_a_hook_that_fails_is_told_of_once(target: str, caplog: pytest.LogCaptureFixture) -> None:
    events = Events()
    told: list[Event] = []
    events.listen(told.append)
    with hooks([target], {}, events):
        for _ in range(3):
            events.tell("phase", phase="tune")
    assert caplog.text.count("--on-event") == 1
    failures = [one.fields for one in told if one.kind == "hook_failed"]
    assert len(failures) == 1
    assert failures[0]["reason"]


def test_a_secret_in_an_address_is_not_written(
    site: tuple[str, list[dict[str, Any]]], caplog: pytest.LogCaptureFixture
) -> None:
    events = Events()
    told: list[Event] = []
    events.listen(told.append)
    with hooks([f"{site[0]}/secret"], {}, events):
        events.tell("phase", phase="tune")
    assert [one.kind for one in told] == ["phase", "hook_failed"]
    assert "secret" not in caplog.text + json.dumps([one.to_json() for one in told])


def is_alive(pid: int) -> bool:
    """Where nobody reaps orphans, a dead one is still listed."""
    return any(
        one.pid == pid and one.status() != psutil.STATUS_ZOMBIE for one in psutil.process_iter()
    )


def test_a_hook_that_hangs_delays_nobody_and_is_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Hook, "_LAST_S", 0.5)
    pid = tmp_path / "pid"
    events = Events()
    started = time.monotonic()
    with hooks([f"echo $$ > {pid}; exec sleep 600"], {}, events):
        for _ in range(5000):
            events.tell("phase", phase="tune")
        while not pid.exists() or not pid.read_text():
            time.sleep(0.01)
    assert time.monotonic() - started < 60
    deadline = time.monotonic() + 30
    while is_alive(int(pid.read_text())):
        assert time.monotonic() < deadline, "the hook is still there"
        time.sleep(0.01)
    # However many events are left, none is told any more.
    assert not [one for one in threading.enumerate() if one.name == "on-event"]


def test_a_hook_that_is_slow_is_given_up_in_time(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(Hook, "_LIMIT_S", 1.0)
    events = Events()
    with hooks(["sleep 600"], {}, events):
        events.tell("phase", phase="tune")
    assert "no end in time" in caplog.text


def test_a_status_follows_from_events(tmp_path: Path) -> None:
    path = tmp_path / "status.json"
    with StatusFile(path) as status:
        for kind in ("run_started", "phase", "planned", "probe_started", "probe_phase", "rung"):
            status(event(kind))
        during = json.loads(path.read_text())
        for kind in ("best", "probe_ended", "waiting"):
            status(event(kind))
        after = json.loads(path.read_text())
        status(event("run_ended", exit_code=75, message="stopped by SIGTERM"))
    end = json.loads(path.read_text())
    assert (during["phase"], during["probe"]["phase"]) == ("tune", "build")
    assert during["probe"]["rungs"][0] == {
        **FORETOLD,
        "kind": "measured",
        "tokens_per_s": 120.0,
        "peak_bytes": 2**30,
    }
    assert during["default"]["tokens_per_s"] == 120.0
    assert (after["probe"], after["probes"], after["waiting_for"]) == (None, 1, ["zero3"])
    assert after["best"]["gain_over_default"] == 1.0
    assert tuning_left_s(after) == pytest.approx(330)
    assert (end["phase"], end["exit_code"], end["message"]) == (
        *("stopped", 75, "stopped by SIGTERM"),
    )
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_status_beats_also_where_nothing_happens(tmp_path: Path) -> None:
    path = tmp_path / "status.json"
    with StatusFile(path, every_s=0.05):
        first = json.loads(path.read_text())["heartbeat"]
        time.sleep(0.5)
        assert json.loads(path.read_text())["heartbeat"] > first
    assert list(tmp_path.iterdir()) == [path]


def test_a_budget_limits_what_tuning_may_still_take() -> None:
    status = fold(fresh(), event("phase"))
    assert tuning_left_s(status) is None
    status = fold(status, event("planned", budget_s=100.0))
    assert tuning_left_s(status) == pytest.approx(100, abs=1)


def test_a_run_whose_process_is_gone_is_lost() -> None:
    status = fold(fresh(), event("phase")) | {"heartbeat": module.now()}
    assert state_of(status) == "running"
    assert state_of(status | {"pid": 2**22 + 1}) == "lost"
    old = {"host": "elsewhere", "heartbeat": "2026-01-01T00:00:00+00:00"}
    assert state_of(status | old) == "lost"
    assert state_of(status | {"host": "elsewhere"}) == "running"
