"""What happens in a run, as it happens: events, and those who are told of them."""

import json
import logging
import os
import queue
import signal
import subprocess
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType
from typing import Any

from autotune.errors import CannotWriteError
from autotune.rundir import append_line
from autotune.setting import Setting

SCHEMA = 1

IN_VIEW = {"in_view": True}
"""Marks a line of the log that says what a view of events shows already (`extra` of logging)."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of event.

    Attributes:
        says: what it tells of.
        fields: what it has besides `schema`, `event` and `at`.
        is_news: whether hooks are told of it; the others come too often.
    """

    says: str
    fields: tuple[str, ...]
    is_news: bool = True


KINDS: Mapping[str, Kind] = MappingProxyType(
    {
        "run_started": Kind(
            "a command began or goes on with this run",
            ("command", "fingerprint", "pid", "host", "run_dir"),
        ),
        "phase": Kind("detect, profile, tune, emit or train begins", ("phase",)),
        "known": Kind(
            "outcomes that were there when it began", ("rungs", "probes", "best", "default")
        ),
        "planned": Kind(
            "every setting has its estimate",
            (
                *("model", "parameters", "rows", "kept", "budget_bytes", "default"),
                *("max_probes", "budget_s"),
            ),
        ),
        "probe_started": Kind(
            "a structure is probed, from its smallest micro-batch up",
            ("structure", "label", "purpose", "rungs"),
        ),
        "probe_phase": Kind("the ranks of a probe have come so far", ("phase",), is_news=False),
        "rung": Kind(
            "a setting was measured, or why it was not",
            ("setting", "kind", "tokens_per_s", "peak_bytes", "seconds", "purpose", "cached"),
        ),
        "best": Kind(
            "a setting is faster than all before it",
            ("setting", "tokens_per_s", "gain_over_default"),
        ),
        "probe_ended": Kind("the ranks of a probe are gone", ("probes", "seconds")),
        "waiting": Kind("what other jobs of the shared study probe is waited for", ("structures",)),
        "chosen": Kind(
            "the DeepSpeed config is written",
            ("setting", "tokens_per_s", "gain_over_default", "stopped_by"),
        ),
        "step": Kind(
            "an optimizer step of the training, with all that metrics.jsonl has of it",
            ("step", "max_steps", "loss", "tokens_per_s", "peak_bytes", "left_s"),
            is_news=False,
        ),
        "checkpoint": Kind("a checkpoint is complete", ("step", "seconds")),
        "recovery": Kind(
            "the training ended early and goes on, perhaps with a lighter setting",
            ("cause", "from_step", "setting"),
        ),
        "progress": Kind(
            "how far something long has come: data, ops, model or checkpoint",
            ("what", "done", "total", "unit", "note", "left_s"),
            is_news=False,
        ),
        "hook_failed": Kind("--on-event could not be told", ("hook", "reason"), is_news=False),
        "run_ended": Kind(
            "the command is through with this run", ("exit_reason", "exit_code", "message")
        ),
    }
)
"""Every kind of event; docs/monitoring.md has them too, which a test checks."""


@dataclass(frozen=True, slots=True)
class Event:
    kind: str
    at: str
    fields: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {"schema": SCHEMA, "event": self.kind, "at": self.at, **self.fields}


Listener = Callable[[Event], None]
Tell = Callable[..., None]
"""Takes the kind of an event and its fields by name."""


class Events:
    """Hands each event to all who listen; who fails is left out from then on, and the run goes on.

    Args:
        listeners: who is told, in this order.
    """

    def __init__(self, listeners: Sequence[Listener] = ()) -> None:
        self._listeners = list(listeners)
        # Hooks tell of their failures from their own threads.
        self._lock = threading.RLock()

    def listen(self, listener: Listener) -> None:
        self._listeners.append(listener)

    def tell(self, kind: str, /, **fields: Any) -> None:  # noqa: ANN401 - JSON values
        assert kind in KINDS, f"{kind} is no kind of event"
        event = Event(kind, now(), fields)
        with self._lock:
            for listener in list(self._listeners):
                try:
                    listener(event)
                except Exception as error:  # noqa: BLE001 - to be told of a run must not end it
                    self._listeners.remove(listener)
                    _log.warning("%s is told no more events: %s", _name_of(listener), error)


def _name_of(listener: Listener) -> str:
    return type(getattr(listener, "__self__", listener)).__name__


def tell_progress(
    tell: Tell,
    what: str,
    done: float,
    total: float | None,
    *,
    unit: str,
    note: str = "",
    left_s: float | None = None,
) -> None:
    """Tell how far something has come; it is over when `done` is `total`, None where unknown."""
    tell("progress", what=what, done=done, total=total, unit=unit, note=note, left_s=left_s)


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


class EventLog:
    """Writes events to a file, a line each; of progress a line now and then.

    A disk that is full is the run's affair: it fails by what it cannot do without.
    """

    _EVERY_S = 10.0

    def __init__(self, path: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self._path = path
        self._clock = clock
        self._written: dict[str, float] = {}

    def __call__(self, event: Event) -> None:
        if event.kind == "progress" and not self._is_due(event.fields):
            return
        with suppress(CannotWriteError):
            append_line(self._path, event.to_json(), durably=False)

    def _is_due(self, progress: Mapping[str, Any]) -> bool:
        what, now_s = progress["what"], self._clock()
        is_over = progress["done"] == progress["total"]
        due = is_over or now_s - self._written.get(what, -self._EVERY_S) >= self._EVERY_S
        if is_over:
            self._written.pop(what, None)
        elif due:
            self._written[what] = now_s
        return due


def read_events(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the events of a file; a line that was torn by a kill is left out."""
    if not path.exists():
        return
    for line in path.read_bytes().splitlines():
        with suppress(ValueError):
            document = json.loads(line)
            if isinstance(document, dict):
                yield document


def sentence(event: Event) -> str:  # noqa: PLR0911 - one an event
    """Say an event in a line, for people who read it far from the run."""
    fields = event.fields
    match event.kind:
        case "run_started":
            return f"autotune {fields['command']} began on {fields['host']}"
        case "phase":
            return f"phase {fields['phase']}"
        case "rung" | "best" | "chosen":
            label = Setting.from_json(fields["setting"]).label()
            speed = fields.get("tokens_per_s")
            told = f"{speed:.0f} tokens/s" if speed else str(fields["kind"]).replace("_", " ")
            gain = fields.get("gain_over_default")
            words = {"rung": "measured", "best": "best so far", "chosen": "chosen"}
            return f"{words[event.kind]} {label}: {told}" + (
                f", {gain:.2f} x the default" if gain else ""
            )
        case "probe_started":
            return f"probing {fields['label']}"
        case "checkpoint":
            return f"checkpoint of step {fields['step']} is complete"
        case "recovery":
            return (
                f"the training ended because of {str(fields['cause']).replace('_', ' ')} "
                f"and goes on from step {fields['from_step']}"
            )
        case "run_ended":
            code = fields["exit_code"]
            return f"ended with exit code {code}: {fields['message'] or fields['exit_reason']}"
        case _:
            return KINDS[event.kind].says


class Hook:
    """Tells a web address or a command of events, in a thread of its own.

    A web address gets a POST of the event as JSON, a command has it on its standard input and its
    kind in $AUTOTUNE_EVENT. Each is given some time; what fails or hangs is noted and left.

    Args:
        target: an http or https address, or a command of the shell.
        context: what each is told besides the event.
        failed: told of the first failure of several in a row.
    """

    _LIMIT_S = 10.0
    _LAST_S = 5.0
    _ENDING_S = 1.0
    _WAITING = 1000

    def __init__(
        self, target: str, context: Mapping[str, Any], failed: Callable[[str], None]
    ) -> None:
        self._target = target
        self._context = context
        self._failed = failed
        self._fails = False
        self._command: subprocess.Popen[bytes] | None = None
        self._over = threading.Event()
        self._events: queue.Queue[Event | None] = queue.Queue(self._WAITING)
        self._thread = threading.Thread(target=self._work, name="on-event", daemon=True)
        self._thread.start()

    def __call__(self, event: Event) -> None:
        if KINDS[event.kind].is_news:
            # A target that is so far behind will not miss one more.
            with suppress(queue.Full):
                self._events.put_nowait(event)

    def close(self) -> None:
        """Give what is left some seconds, then end it."""
        with suppress(queue.Full):
            self._events.put_nowait(None)
        self._thread.join(self._LAST_S)
        self._over.set()
        # A command that the thread was about to start when it was told is seen the next time.
        deadline = time.monotonic() + self._ENDING_S
        while self._thread.is_alive() and time.monotonic() < deadline:
            if (command := self._command) is not None:
                _kill_group(command)
            self._thread.join(0.05)

    def _work(self) -> None:
        while (event := self._events.get()) is not None and not self._over.is_set():
            try:
                self._deliver(event)
            except Exception as error:  # noqa: BLE001 - whatever a target does, the run goes on
                if not self._fails:
                    self._failed(str(error) or type(error).__name__)
                self._fails = True
            else:
                self._fails = False

    def _deliver(self, event: Event) -> None:
        document = {**self._context, "text": sentence(event), **event.to_json()}
        body = json.dumps(document).encode()
        if is_address(self._target):
            self._post(body)
        else:
            self._run(body, event.kind)

    def _post(self, body: bytes) -> None:
        request = urllib.request.Request(  # noqa: S310 - is_address lets nothing but http through
            self._target, body, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=self._LIMIT_S) as answer:  # noqa: S310
            answer.read(1)

    def _run(self, body: bytes, kind: str) -> None:
        # Its time is limited also where this process is killed meanwhile.
        limit = ["timeout", "-s", "KILL", f"{self._LIMIT_S:.0f}"]
        self._command = command = subprocess.Popen(
            [*limit, "/bin/sh", "-c", self._target],
            env={**os.environ, "AUTOTUNE_EVENT": kind},
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            command.communicate(body)
        finally:
            _kill_group(command)
            self._command = None
        if command.returncode:
            killed = command.returncode in {-signal.SIGKILL, _KILLED}
            msg = f"no end in time, {self._LIMIT_S:.0f} s" if killed else ""
            raise RuntimeError(msg or f"exit code {command.returncode}")


_KILLED = 137
"""Exit code of a command that `timeout` has killed."""


def _kill_group(command: "subprocess.Popen[bytes]") -> None:
    with suppress(ProcessLookupError):
        os.killpg(command.pid, signal.SIGKILL)
    command.wait()


def is_address(target: str) -> bool:
    return target.startswith(("http://", "https://"))


@contextmanager
def hooks(targets: Sequence[str], context: Mapping[str, Any], events: Events) -> Iterator[None]:
    """Have targets told of events for the length of a block, and of its last ones too."""

    def failed(target: str) -> Callable[[str], None]:
        def tell(reason: str) -> None:
            # An address may hold a secret after its host.
            shown = target.partition("//")[2].partition("/")[0] if is_address(target) else target
            _log.warning("--on-event %s was not told: %s", shown, reason)
            events.tell("hook_failed", hook=shown, reason=reason)

        return tell

    started = [Hook(target, context, failed(target)) for target in targets]
    for hook in started:
        events.listen(hook)
    try:
        yield
    finally:
        for hook in started:
            hook.close()
