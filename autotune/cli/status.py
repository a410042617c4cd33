"""`autotune status`."""

import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import click

from autotune.cli.live import (
    best_words,
    drawing_console,
    drawn,
    phase_words,
    training_words,
    tuning_words,
)
from autotune.cli.options import as_json, echo_json
from autotune.errors import InputMissingError, InterruptedRunError
from autotune.rundir import RunDir, read_json
from autotune.status import age_s, fresh, seconds_since, state_of
from autotune.units import format_duration

_LOOK_S = 1.0
_LOST = InterruptedRunError.exit_code
"""As of a run that was stopped: the same command goes on."""


@click.command(name="status")
@click.argument("run_dir", type=click.Path(path_type=Path))
@click.option(
    "--watch", is_flag=True, help="Go on until the run ends, and exit with its code (75 if lost)."
)
@as_json
def command(run_dir: Path, *, watch: bool, as_json: bool) -> None:
    """Show where a run is: phase, probes, best so far, training, and whether it lives."""
    if not watch:
        document = look(run_dir)
        if as_json:
            echo_json(document)
        else:
            click.echo(status_text(document))
        return
    last = _watch(run_dir, as_json=as_json)
    code = _LOST if last["state"] == "lost" else last["exit_code"]
    raise click.exceptions.Exit(code)


def look(run_dir: Path) -> dict[str, Any]:
    """Return status.json with what follows from it.

    Raises:
        InputMissingError: there is no run in that directory.
    """
    status = read_json(RunDir(run_dir).status)
    if not isinstance(status, dict):
        msg = f"{run_dir} holds no run: name the directory that `autotune run` has told"
        raise InputMissingError(msg)
    status = {**fresh(), **status}
    return {
        **status,
        "run_dir": str(run_dir.absolute()),
        "state": state_of(status),
        "heartbeat_age_s": round(age_s(status), 1),
    }


def _watch(run_dir: Path, *, as_json: bool) -> dict[str, Any]:
    console = None if as_json else drawing_console()
    if console is None:
        return _write_changes(_looks(run_dir), as_json=as_json)
    from rich.live import Live

    with Live(console=console, auto_refresh=False, transient=True) as live:
        for document in _looks(run_dir):
            live.update(drawn(document), refresh=True)
    click.echo(status_text(document))
    return document


def _looks(run_dir: Path) -> Iterator[dict[str, Any]]:
    """Yield the status again and again; the last is that of a run that goes on no more."""
    while True:
        document = look(run_dir)
        yield document
        if document["state"] != "running":
            return
        time.sleep(_LOOK_S)


def _write_changes(looks: Iterator[dict[str, Any]], *, as_json: bool) -> dict[str, Any]:
    """Write a line for each change; a heartbeat is none."""
    before, document = "", {}
    for document in looks:
        steady = {
            name: value for name, value in document.items() if not name.startswith("heartbeat")
        }
        line = json.dumps(document) if as_json else status_line(document)
        if (seen := json.dumps(steady) if as_json else line) != before:
            click.echo(line)
        before = seen
    return document


def status_line(document: Mapping[str, Any]) -> str:
    """Say in a line where a run is."""
    words = [document["state"]]
    if document["state"] == "running":
        words.append(str(document["phase"]))
    if document["phase"] == "tune":
        words.append(f"{document['probes']} structures probed")
        if document["probe"]:
            words.append(f"{document['probe']['label']}: {phase_words(document['probe']['phase'])}")
    if document["phase"] == "train" and document["training"]:
        words.append(f"step {document['training']['step']}/{document['training']['max_steps']}")
    if document["best"]:
        words.append(f"best {best_words(document['best'])}")
    if document["message"]:
        words.append(document["message"].splitlines()[0])
    return ", ".join(words)


def status_text(document: Mapping[str, Any]) -> str:
    """Lay out a status for people."""
    since = seconds_since(document["phase_since"])
    rows = {
        "run": document["run_dir"],
        "state": _state_words(document),
        "phase": str(document["phase"])
        + (f", for {format_duration(since)}" if since and document["state"] == "running" else ""),
    }
    if document["phase"] == "tune":
        rows["tuning"] = tuning_words(document)
    if document["probe"]:
        probe = document["probe"]
        rows["probe"] = f"{probe['label']}: {phase_words(probe['phase'])}"
    if document["best"]:
        rows["best so far"] = best_words(document["best"])
    if document["training"]:
        rows["training"] = training_words(document["training"])
    if document["exit_code"] is not None:
        rows["exit code"] = f"{document['exit_code']} ({document['exit_reason']})"
    if document["message"]:
        rows["because"] = document["message"]
    width = max(map(len, rows))
    return "\n".join(f"{name.ljust(width)}  {value}" for name, value in rows.items())


def _state_words(document: Mapping[str, Any]) -> str:
    age = document["heartbeat_age_s"]
    where = f"process {document['pid']} on {document['host']}"
    match document["state"]:
        case "running":
            return f"running, {where}, heartbeat {max(0.0, age):.0f} s ago"
        case "lost":
            return (
                f"lost: {where} is gone without a word, or has not beaten for "
                f"{format_duration(age)}; the same command goes on"
            )
        case state:
            return str(state)
