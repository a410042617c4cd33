"""What a run looks like while it goes: a picture on a terminal, lines elsewhere, or nothing."""

import logging
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from autotune.cli.summary import bar
from autotune.events import Event, Listener
from autotune.setting import Setting
from autotune.status import fold, fresh, seconds_since, tuning_left_s
from autotune.units import format_bytes, format_duration

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.table import Table

PHASES = ("detect", "profile", "tune", "emit", "train")

_BAR_COLUMNS = 24
_FRAMES_A_S = 4
_WORDS = {
    "data": "tokenising the data",
    "ops": "building DeepSpeed's ops",
    "model": "loading the model",
    "checkpoint": "saving a checkpoint",
}


@contextmanager
def view(*, quiet: bool) -> Iterator[tuple[Listener, ...]]:
    """Show a run for the length of a block; gives who has to be told of its events.

    On a terminal that can draw it is a picture below the lines of the log; elsewhere the lines
    alone. `quiet` leaves only errors.
    """
    if quiet:
        logging.getLogger("autotune").setLevel(logging.ERROR)
        yield ()
        return
    console = drawing_console()
    if console is None:
        yield ()
        return
    from rich.live import Live

    picture = _Picture()
    live = Live(
        get_renderable=picture.draw,
        console=console,
        refresh_per_second=_FRAMES_A_S,
        transient=True,
        redirect_stdout=False,
    )
    with live, _log_above():
        yield (picture,)


def drawing_console() -> "Console | None":
    """Return the console of a terminal that can draw and is looked at by a person."""
    if not sys.stderr.isatty() or os.environ.get("TERM") == "dumb" or "CI" in os.environ:
        return None
    from rich.console import Console

    return Console(stderr=True)


@contextmanager
def _log_above() -> Iterator[None]:
    """Have the log written above the picture, but for what the picture says already."""
    handlers = [
        one for one in logging.getLogger().handlers if isinstance(one, logging.StreamHandler)
    ]
    before = [one.setStream(sys.stderr) for one in handlers]
    for handler in handlers:
        handler.addFilter(_is_not_in_view)
    try:
        yield
    finally:
        for handler, stream in zip(handlers, before, strict=True):
            handler.removeFilter(_is_not_in_view)
            if stream is not None:
                handler.setStream(stream)


def _is_not_in_view(record: logging.LogRecord) -> bool:
    return not getattr(record, "in_view", False)


class _Picture:
    """The status of a run, drawn anew again and again."""

    def __init__(self) -> None:
        self._status = fresh()

    def __call__(self, event: Event) -> None:
        self._status = fold(self._status, event)

    def draw(self) -> "RenderableType":
        try:
            return drawn(self._status)
        except Exception as error:  # noqa: BLE001 - a picture that cannot be drawn must not end a run
            return f"no picture: {error!r}"


def drawn(status: Mapping[str, Any]) -> "RenderableType":
    """Return a status as a picture for a terminal."""
    from rich.console import Group

    parts: list[RenderableType] = [_phases(status)]
    if status["progress"]:
        parts.append(_progress(status["progress"]))
    if status["phase"] == "tune":
        parts.append(_tuning(status))
    if status["probe"]:
        parts.append(_ladder(status))
    if status["waiting_for"]:
        parts.append(f"waiting for other jobs: {', '.join(status['waiting_for'])}")
    if status["phase"] == "train" and status["training"]:
        parts += _training(status["training"])
    if status["best"]:
        parts.append(f"best so far  {best_words(status['best'])}")
    return Group(*parts)


def _phases(status: Mapping[str, Any]) -> "RenderableType":
    from rich.text import Text

    names = [(name, "bold reverse" if name == status["phase"] else "dim") for name in PHASES]
    line = Text(" > ", style="dim").join(Text(f" {name} ", style) for name, style in names)
    spent = seconds_since(status["phase_since"])
    return line if spent is None else line.append(f"  {format_duration(max(1.0, round(spent)))}")


def _progress(progress: Mapping[str, Any]) -> "RenderableType":
    from rich.table import Table

    done, total = progress["done"], progress["total"]
    share = "" if total is None else f"{100 * done / max(1, total):.0f} %"
    left = progress.get("left_s")
    words = [share, progress["note"], f"{format_duration(left)} left" if left else ""]
    line = Table.grid(padding=(0, 1))
    line.add_row(
        _WORDS[progress["what"]], _bar(done, total), ", ".join(word for word in words if word)
    )
    return line


def _bar(done: float, total: float | None) -> "RenderableType":
    """Return a bar; one that pulses where it is not known how much there is."""
    from rich.progress_bar import ProgressBar

    return ProgressBar(
        total=total, completed=done, width=_BAR_COLUMNS, pulse=total is None or done == 0
    )


def _tuning(status: Mapping[str, Any]) -> "RenderableType":
    return tuning_words(status)


def _ladder(status: Mapping[str, Any]) -> "Table":
    from rich.table import Table

    probe, budget = status["probe"], status["budget_bytes"]
    table = Table(
        title=f"{probe['label']}: {phase_words(probe['phase'])}",
        title_justify="left",
        box=None,
        padding=(0, 2, 0, 0),
    )
    for name in ("micro-batch", "tokens/s", "memory foretold", "memory measured"):
        table.add_column(name, justify="right")
    for rung in probe["rungs"]:
        told = rung["tokens_per_s"]
        word = f"{told:.0f}" if told else (rung["kind"] or _at_work(probe, rung)).replace("_", " ")
        table.add_row(
            str(rung["micro_batch_size"]),
            word,
            _memory(rung["predicted_bytes"], budget),
            _memory(rung["peak_bytes"], budget),
        )
    return table


def _at_work(probe: Mapping[str, Any], rung: Mapping[str, Any]) -> str:
    return "at work" if probe["phase"] == f"micro-batch {rung['micro_batch_size']}" else ""


def _memory(size: float | None, budget: float | None) -> str:
    if size is None or not budget:
        return ""
    # Brackets are markup to rich.
    return f"{format_bytes(size)} {bar(size / budget)}".replace("[", r"\[")


def _training(training: Mapping[str, Any]) -> "list[RenderableType]":
    from rich.table import Table

    line = Table.grid(padding=(0, 1))
    line.add_row(
        "training", _bar(training["step"], training["max_steps"]), training_words(training)
    )
    return [line]


def tuning_words(status: Mapping[str, Any]) -> str:
    """Say how far tuning has come, in a line."""
    parts = [f"{status['probes']} structures probed"]
    if status["max_probes"] is not None:
        parts.append(f"at most {max(0, status['max_probes'] - status['probes'])} to go")
    left = tuning_left_s(status)
    if left is not None:
        parts.append(f"{format_duration(left)} at most")
    if status["budget_s"] is not None:
        parts.append(f"of a budget of {format_duration(status['budget_s'])}")
    return ", ".join(parts)


def training_words(training: Mapping[str, Any]) -> str:
    """Say how far the training has come, in a line."""
    return (
        f"step {training['step']}/{training['max_steps']}, loss {training['loss']:.4f}, "
        f"{training['tokens_per_s']:.0f} tokens/s, {format_duration(training['left_s'])} left"
    )


def best_words(best: Mapping[str, Any]) -> str:
    """Say what is best so far, in a line."""
    gain = best.get("gain_over_default")
    label = Setting.from_json(dict(best["setting"])).label()
    return f"{best['tokens_per_s']:.0f} tokens/s" + (
        f" ({gain:.2f} x the default): {label}" if gain else f": {label}"
    )


def phase_words(phase: str) -> str:
    """Say in which phase the ranks of a probe are."""
    words = {"start": "ranks start", "meet": "ranks meet", "build": "the engine is built"}
    return words.get(phase, f"{phase} is measured")
