"""What a run came to; of one that failed why, what shows it, and what to try."""

import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from autotune.errors import (
    CannotWriteError,
    ConfigError,
    DatasetError,
    InputMissingError,
    InterruptedRunError,
    NothingFitsError,
    NoUsableDeviceError,
    SetupFaultError,
    TrainingFailedError,
)
from autotune.outcome import (
    Crashed,
    Interrupted,
    Invalid,
    Measured,
    OutOfMemory,
    Rung,
    TimedOut,
    Unknown,
)
from autotune.remedy import in_words
from autotune.report.record import Document, RunRecord
from autotune.setting import Setting
from autotune.units import format_bytes

State = Literal["running", "tuned", "trained", "stopped", "failed"]

_MOST_EVIDENCE = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """What was left behind by something that went wrong: where, and its last lines."""

    title: str
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Diagnosis:
    """What a run came to.

    Attributes:
        headline: a few words.
        why: of a run that did not get to its end, what ended it; else empty.
        evidence: what shows it.
        advice: what to try, a sentence each.
    """

    state: State
    headline: str
    why: str = ""
    evidence: tuple[Evidence, ...] = ()
    advice: tuple[str, ...] = ()


def diagnose(record: RunRecord) -> Diagnosis:
    """Say what a run came to."""
    result, phase = record.result, record.phase
    if phase == "done" and result.get("exit_reason") == "trained":
        return Diagnosis(state="trained", headline="Tuned and trained")
    if phase == "done" and result.get("exit_reason") == "tuned":
        return Diagnosis(state="tuned", headline="Tuned; not trained yet")
    if phase != "stopped":
        return Diagnosis(
            state="running",
            headline=f"Under way: {_PHASES.get(phase, phase)}",
            why=f"The last sign of life was at {record.status.get('heartbeat', 'an unknown time')}."
            " If it runs no more, it was killed: give the same command again, and it goes on.",
        )
    code = result.get("exit_code")
    message = str(result.get("message", "it is not known why"))
    if code == InterruptedRunError.exit_code:
        return Diagnosis(
            state="stopped",
            headline="Stopped; the same command goes on",
            why=message,
            advice=(*_resumption(record),),
        )
    return Diagnosis(
        state="failed",
        headline=_HEADLINES.get(code, "Failed"),
        why=message,
        evidence=tuple(_evidence(record, code)),
        advice=tuple(_advice(record, code)),
    )


_PHASES = {
    "detect": "looking at the devices",
    "profile": "looking at model and data",
    "tune": "probing settings",
    "emit": "writing the configuration",
    "train": "training",
}

_HEADLINES: dict[Any, str] = {
    DatasetError.exit_code: "Failed: the data cannot be used",
    InputMissingError.exit_code: "Failed: something is not there",
    NoUsableDeviceError.exit_code: "Failed: no device can be used",
    SetupFaultError.exit_code: "Failed: every probe failed alike",
    NothingFitsError.exit_code: "Failed: nothing fits the devices",
    TrainingFailedError.exit_code: "Failed: the training ended badly",
    CannotWriteError.exit_code: "Failed: a file could not be written",
    ConfigError.exit_code: "Failed: the configuration cannot be used",
}


def _evidence(record: RunRecord, code: object) -> Iterator[Evidence]:
    if code == TrainingFailedError.exit_code and record.training_tail:
        yield Evidence(
            title=f"the end of {record.root / 'logs' / 'training.log'}", text=record.training_tail
        )
        return
    failures = [rung for rung in record.rungs if not isinstance(rung.outcome, Measured)]
    for rung in failures[: -_MOST_EVIDENCE - 1 : -1]:
        yield Evidence(title=f"{rung.setting.label()}: {failure(rung)}", text=_left(rung))


_IN_WORDS = {
    Measured.kind: "measured",
    Interrupted.kind: "stopped from outside",
    Invalid.kind: "a device went wrong meanwhile",
}


def failure(rung: Rung) -> str:
    """Return a few words on how a rung failed; `measured` if it did not."""
    match rung.outcome:
        case OutOfMemory(where=where):
            return f"out of {where} memory"
        case TimedOut(phase=phase, seconds=seconds):
            return f"no sign of life for {seconds:.0f} s in phase {phase}"
        case Crashed(reason=reason):
            return f"crashed: {reason.splitlines()[0]}" if reason else "crashed"
        case Unknown(exit_code=code):
            return f"ended with exit code {code} and without a word"
        case Measured() | Interrupted() | Invalid():
            return _IN_WORDS[rung.outcome.kind]


def _left(rung: Rung) -> str:
    return str(getattr(rung.outcome, "evidence", ""))


def _advice(record: RunRecord, code: object) -> Iterator[str]:
    if code == NothingFitsError.exit_code:
        yield from _remedies(record.plan)
    yield from _ADVICE.get(code, ())
    yield from _resumption(record)


def _remedies(plan: Document) -> Iterator[str]:
    """Yield what would make the settings fit that are nearest to it."""
    for miss in plan.get("near_misses", []):
        label = Setting.from_json(miss["setting"]).label()
        for remedy in miss["remedies"]:
            needs = format_bytes(remedy["device_bytes"])
            yield f"{label} would fit with {in_words(remedy)} ({needs})."


_ADVICE: dict[Any, tuple[str, ...]] = {
    DatasetError.exit_code: (
        "`autotune data FILE` shows how the data is read, and which lines are left out.",
        "`--format` names the convention of rows, `--on-bad-line skip` goes on without bad lines.",
    ),
    InputMissingError.exit_code: ("Look at the path or name in the message above.",),
    NoUsableDeviceError.exit_code: (
        "`autotune detect` shows the devices, and what of them may be used.",
        "`--devices` names others, `--device-memory` says how much of each may be taken.",
    ),
    SetupFaultError.exit_code: (
        "It is no fault of a setting: look at the evidence above, and at the ranks' logs in logs/.",
        "`autotune detect --bench` tries the devices without a model.",
    ),
    NothingFitsError.exit_code: (
        "`--method lora` or `qlora` train adapters, so that weights need no optimizer states.",
        "`--optimizer adamw-8bit` or `adafactor` hold less than AdamW's 8 bytes a parameter.",
        "`--max-seq-length` makes rows shorter; `autotune plan` shows what a change would do.",
    ),
    TrainingFailedError.exit_code: (
        "The end of the training's log is above; logs/training.log has all of it.",
    ),
    CannotWriteError.exit_code: (
        "Make room, or look at who may write there; `--run-dir` names another place.",
    ),
    ConfigError.exit_code: ("The message above names the key or file that cannot be used.",),
}


def _resumption(record: RunRecord) -> Iterator[str]:
    if record.chosen is not None:
        root = shlex.quote(str(record.root))
        yield f"`autotune train {root}` goes on with the setting that was found."
    else:
        kept = f"; the {len(record.rungs)} outcomes so far are kept" if record.rungs else ""
        yield f"The same command goes on from there{kept}."
