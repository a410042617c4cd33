"""Where a run is: a document that follows from its events, and what may be read off it."""

import os
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, Self

import psutil

from autotune.errors import CannotWriteError
from autotune.events import KINDS, Event, now
from autotune.rundir import write_json

SCHEMA = 1
HEARTBEAT_S = 5.0

DONE, STOPPED = "done", "stopped"
"""The last phase of a run: to the end of what was asked for, or before it."""

State = Literal["running", "done", "stopped", "lost"]

_OFTEN_S = 0.5
"""What comes more often is written with the next beat."""

_LOST_AFTER_S = 60.0
_NO_TIME = "1970-01-01T00:00:00+00:00"

Status = dict[str, Any]


def fresh() -> Status:
    """Return the status of a run of which nothing has happened yet."""
    return {
        "schema": SCHEMA,
        "pid": os.getpid(),
        "host": os.uname().nodename,
        "started": now(),
        "phase": None,
        "phase_since": None,
        "heartbeat": None,
        "best": None,
        "default": None,
        "probes": 0,
        "max_probes": None,
        "budget_s": None,
        "tuning_since": None,
        "probe_seconds": [],
        "budget_bytes": None,
        "probe": None,
        "waiting_for": [],
        "progress": None,
        "training": None,
        "exit_code": None,
        "exit_reason": None,
        "message": None,
    }


def fold(status: Status, event: Event) -> Status:
    """Return the status after an event."""
    change = _CHANGES.get(event.kind)
    return {**status, **change(status, event)} if change else status


def _enter(phase: str, at: str) -> Status:
    changes: Status = {"phase": phase, "phase_since": at, "probe": None, "progress": None}
    changes["waiting_for"] = []
    return {**changes, "tuning_since": at} if phase == "tune" else changes


def _takes(*names: str) -> Callable[[Status, Event], Status]:
    """Return a change that takes these fields of an event over."""
    return lambda _, event: {name: event.fields[name] for name in names}


def _probe_started(_: Status, event: Event) -> Status:
    return {"probe": {**event.fields, "phase": "start"}, "waiting_for": [], "progress": None}


def _probe_phase(status: Status, event: Event) -> Status:
    probe = status["probe"]
    return {"probe": probe and {**probe, "phase": event.fields["phase"]}}


def _rung(status: Status, event: Event) -> Status:
    """Put an outcome beside what was foretold of it."""
    rung, probe, default = event.fields, status["probe"], status["default"]
    changes: Status = {}
    if default and rung["setting"] == default["setting"] and rung["tokens_per_s"]:
        changes["default"] = {**default, "tokens_per_s": rung["tokens_per_s"]}
    if probe and not rung["cached"]:
        size = rung["setting"]["micro_batch_size"]
        outcome = {name: rung[name] for name in ("kind", "tokens_per_s", "peak_bytes")}
        rungs = [
            {**one, **outcome} if one["micro_batch_size"] == size else one for one in probe["rungs"]
        ]
        changes["probe"] = {**probe, "rungs": rungs}
    return changes


def _best(_: Status, event: Event) -> Status:
    names = ("setting", "tokens_per_s", "gain_over_default")
    return {"best": {name: event.fields[name] for name in names}}


def _probe_ended(status: Status, event: Event) -> Status:
    seconds = [*status["probe_seconds"], event.fields["seconds"]]
    return {"probe": None, "probes": event.fields["probes"], "probe_seconds": seconds}


def _progress(_: Status, event: Event) -> Status:
    is_over = event.fields["done"] == event.fields["total"]
    return {"progress": None if is_over else {**event.fields, "at": event.at}}


def _run_ended(_: Status, event: Event) -> Status:
    phase = DONE if event.fields["exit_code"] == 0 else STOPPED
    return {**_enter(phase, event.at), **event.fields}


_CHANGES: dict[str, Callable[[Status, Event], Status]] = {
    "phase": lambda _, event: _enter(event.fields["phase"], event.at),
    "known": _takes("probes", "best", "default"),
    "planned": _takes("max_probes", "budget_s", "budget_bytes", "default"),
    "probe_started": _probe_started,
    "probe_phase": _probe_phase,
    "rung": _rung,
    "best": _best,
    "chosen": _best,
    "probe_ended": _probe_ended,
    "waiting": lambda _, event: {"waiting_for": event.fields["structures"]},
    "progress": _progress,
    "step": lambda _, event: {"training": dict(event.fields), "progress": None},
    "checkpoint": lambda *_: {"progress": None},
    "run_ended": _run_ended,
}


class StatusFile:
    """Keeps status.json as events say, and beats in it from a thread, also where nothing happens.

    A disk that is full is the run's affair: it fails by what it cannot do without.
    """

    def __init__(self, path: Path, every_s: float = HEARTBEAT_S) -> None:
        self._path = path
        self._every_s = every_s
        self._status = fresh()
        self._lock = threading.Lock()
        self._written_s = 0.0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)

    def __enter__(self) -> Self:
        self._write()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def __call__(self, event: Event) -> None:
        with self._lock:
            self._status = fold(self._status, event)
        if KINDS[event.kind].is_news or time.monotonic() - self._written_s >= _OFTEN_S:
            self._write()

    def _beat(self) -> None:
        while not self._over.wait(self._every_s):
            self._write()

    def _write(self) -> None:
        with self._lock, suppress(CannotWriteError):
            self._status["heartbeat"] = now()
            self._written_s = time.monotonic()
            write_json(self._path, self._status)


def age_s(status: Mapping[str, Any]) -> float:
    """Return the seconds since the last heartbeat, by this machine's clock."""
    beat = datetime.fromisoformat(status.get("heartbeat") or _NO_TIME)
    return (datetime.now(UTC) - beat).total_seconds()


def seconds_since(at: str | None) -> float | None:
    if at is None:
        return None
    return (datetime.now(UTC) - datetime.fromisoformat(at)).total_seconds()


def state_of(status: Mapping[str, Any]) -> State:
    """Tell whether a run goes on, has ended, or was lost: killed, or its machine with it."""
    if status["phase"] == DONE:
        return "done"
    if status["phase"] == STOPPED:
        return "stopped"
    here = status.get("host") == os.uname().nodename
    if here and not psutil.pid_exists(status["pid"]):
        return "lost"
    return "running" if age_s(status) <= _LOST_AFTER_S else "lost"


def tuning_left_s(status: Mapping[str, Any]) -> float | None:
    """Return the most that tuning may still take, by what a probe took so far and the budget.

    None where that is not known yet. It may well end before, when nothing is to be gained.
    """
    limits = []
    seconds, limit = status["probe_seconds"], status["max_probes"]
    if seconds and limit is not None:
        left = max(0, limit - status["probes"])
        limits.append(left * sum(seconds) / len(seconds))
    spent = seconds_since(status["tuning_since"])
    if status["budget_s"] is not None and spent is not None:
        limits.append(max(0.0, status["budget_s"] - spent))
    return min(limits, default=None)
