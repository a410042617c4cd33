"""A run in its directory, from its first stage to its result: what every kind of run has."""

import logging
import math
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any, ClassVar, Generic, Protocol, TypeVar

from autotune.chronicle import Chronicle
from autotune.config import Options
from autotune.errors import AutotuneError, InterruptedRunError, UsageError
from autotune.events import EventLog, Events, Listener, hooks
from autotune.hardware import Cluster
from autotune.intake import require_usable
from autotune.report.page import write_report
from autotune.rundir import RunDir, read_json, write_json
from autotune.status import StatusFile

_log = logging.getLogger(__name__)

_ENVELOPE = ("schema", "fingerprint", "run_dir", "at", "exit_reason", "exit_code", "message")
"""Fields of result.json that are about the run's end; the others are figures."""


class Asked(Protocol):
    """What a question of any kind has."""

    @property
    def options(self) -> Options: ...
    @property
    def cluster(self) -> Cluster: ...
    @property
    def fingerprint(self) -> str: ...


_Question = TypeVar("_Question", bound=Asked)


class StagedRun(ABC, Generic[_Question]):
    """One run in its directory, resumed where it was left.

    Attributes:
        differing: of what a run is that may not be gone on with in the same directory, for people.
    """

    differing: ClassVar[str]

    def __init__(self, question: _Question, run_dir: RunDir) -> None:
        self.question = question
        self.dir = run_dir
        self._figures: dict[str, Any] = {}
        self._reported = -math.inf
        self._events = Events()
        self._chronicle = Chronicle(self._events)

    @abstractmethod
    def _stages(self, *, with_training: bool) -> dict[str, Any]:
        """Go through every stage that is not done yet; returns the content of result.json."""

    def finished(self, *, with_training: bool) -> dict[str, Any] | None:
        """Return the result of an earlier run of the same question, if it got as far."""
        result = self._result_before()
        reached = ("trained",) if with_training else ("trained", "tuned")
        return result if result.get("exit_reason") in reached else None

    def _result_before(self) -> dict[str, Any]:
        """Return result.json of an earlier run of the same question; empty if there is none."""
        result = read_json(self.dir.result) or {}
        return dict(result) if result.get("fingerprint") == self.question.fingerprint else {}

    def _figures_before(self) -> dict[str, Any]:
        """Return the figures of a tuning that came to its end; empty if none did."""
        before = self._result_before()
        if "setting" not in before:
            return {}
        return {name: value for name, value in before.items() if name not in _ENVELOPE}

    def execute(self, *, with_training: bool, listeners: Sequence[Listener] = ()) -> dict[str, Any]:
        """Go through every stage that is not done yet; returns the content of result.json.

        Listeners are told of events, as are the files and hooks that every run has.

        Raises:
            AutotuneError: a stage failed; result.json says why.
            InterruptedRunError: stopped from outside or out of budget; so says result.json.
        """
        require_usable(self.question.cluster)
        self.dir.create()
        with self.dir.locked():
            if (done := self.finished(with_training=with_training)) is not None:
                return done
            self._refuse_foreign()
            with self._told(listeners):
                try:
                    return self._to_the_end(with_training=with_training)
                finally:
                    self._report()

    def _refuse_foreign(self) -> None:
        before = read_json(self.dir.run)
        if before and before.get("fingerprint") != self.question.fingerprint:
            msg = f"{self.dir.root} holds a run of {self.differing}: choose another --run-dir"
            raise UsageError(msg)

    @contextmanager
    def _told(self, listeners: Sequence[Listener]) -> Iterator[None]:
        """Have listeners, files and hooks told of events for the length of a block."""
        about = {"run_dir": str(self.dir.root), "host": os.uname().nodename}
        targets = self.question.options["on_event"] or ()
        with StatusFile(self.dir.status) as status, hooks(targets, about, self._events):
            everybody: tuple[Listener, ...] = (EventLog(self.dir.events), status, *listeners)
            for listener in everybody:
                self._events.listen(listener)
            yield

    def _to_the_end(self, *, with_training: bool) -> dict[str, Any]:
        command = "run" if with_training else "tune"
        self._chronicle.started(command, self.question.fingerprint, str(self.dir.root))
        try:
            result = self._stages(with_training=with_training)
        except (AutotuneError, InterruptedRunError) as error:
            reason = type(error).__name__
            try:
                self._write_result(
                    {"exit_reason": reason, "exit_code": error.exit_code}
                    | {"message": str(error)}
                    | self._figures
                )
            finally:
                self._chronicle.ended(reason, error.exit_code, str(error))
            raise
        except Exception as error:
            self._chronicle.ended(type(error).__name__, 1, str(error))
            raise
        self._chronicle.ended(result["exit_reason"], 0, None)
        return result

    def _enter(self, phase: str) -> None:
        self._chronicle.tell("phase", phase=phase)
        self._report()

    def _report(self, *, every_s: float = 0.0) -> None:
        """Write the report of what there is so far, unless it is not that old yet."""
        if time.monotonic() - self._reported < every_s:
            return
        try:
            write_report(self.dir)
        except Exception as error:  # noqa: BLE001 - the run is worth more than its picture
            _log.warning("report.html could not be written: %s", error)
        self._reported = time.monotonic()

    def _write_result(self, fields: dict[str, Any]) -> dict[str, Any]:
        result = {
            "schema": 1,
            "fingerprint": self.question.fingerprint,
            "run_dir": str(self.dir.root),
            "at": now(),
            **fields,
        }
        write_json(self.dir.result, result)
        return result


def now() -> str:
    """Return the time as documents have it: UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")
