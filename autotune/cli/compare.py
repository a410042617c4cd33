"""`autotune compare`."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click

from autotune.cli.options import as_json, echo_json, table
from autotune.rundir import RunDir
from autotune.setting import Setting
from autotune.units import format_bytes, format_duration

_MOST_SETTINGS = 12


@click.command(name="compare")
@click.argument("run_a", type=click.Path(path_type=Path))
@click.argument("run_b", type=click.Path(path_type=Path))
@as_json
def command(run_a: Path, run_b: Path, *, as_json: bool) -> None:
    """Show two runs side by side: what was asked, what came out, what both have measured."""
    from autotune.report.comparison import compare
    from autotune.report.record import RunRecord

    first, second = (RunRecord.read(RunDir(path.absolute())) for path in (run_a, run_b))
    document = compare(first, second)
    if as_json:
        echo_json(document)
    else:
        click.echo("\n\n".join(_parts(document)))


def _parts(document: dict[str, Any]) -> Iterator[str]:
    runs = document["runs"]
    yield "\n".join(_named(letter, run) for letter, run in zip("AB", runs, strict=True))
    figures = list(_figure_rows(*runs))
    if figures:
        yield table(("", "A", "B", "B to A"), figures)
    if not document["same_work"]:
        yield "The work differs, so that tokens a second are not of the same work."
    if document["differences"]:
        yield "\n".join(["What differs", *map(_difference, document["differences"])])
    else:
        yield "What was asked, model, data, devices and versions are the same."
    if document["settings"]:
        yield _settings(document["settings"])


def _named(letter: str, run: dict[str, Any]) -> str:
    setting = Setting.from_json(run["setting"]).label() if run["setting"] else "no setting chosen"
    return f"{letter}  {run['run_dir']}\n   {run['state']}, {setting}"


_FIGURES: dict[str, tuple[str, Callable[[float], str]]] = {
    "tokens_per_s": ("tokens/s", "{:.0f}".format),
    "samples_per_s": ("samples/s", "{:.2f}".format),
    "step_time_s": ("step", format_duration),
    "gain_over_default": ("gain over the default", "{:.2f}".format),
    "measured_bytes": ("memory measured", format_bytes),
    "predicted_bytes": ("memory estimated", format_bytes),
    "budget_bytes": ("memory of a device", format_bytes),
    "tuning_seconds": ("tuning", format_duration),
    "probes": ("structures probed", str),
    "rungs": ("rungs measured", str),
    "training_seconds": ("training", format_duration),
    "steps": ("steps", str),
    "loss_start": ("loss at the start", "{:.4f}".format),
    "loss_end": ("loss at the end", "{:.4f}".format),
}


def _figure_rows(first: dict[str, Any], second: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    for name, (words, written) in _FIGURES.items():
        mine, theirs = first[name], second[name]
        if mine is None and theirs is None:
            continue
        ratio = f"{theirs / mine:.2f}" if mine and theirs is not None else ""
        yield (words, *("" if value is None else written(value) for value in (mine, theirs)), ratio)


def _difference(one: dict[str, Any]) -> str:
    mine, theirs = one["runs"]
    return f"  {one['of']}, {one['name']}: {mine} in A, {theirs} in B"


def _settings(settings: list[dict[str, Any]]) -> str:
    rows = [
        (
            Setting.from_json(one["setting"]).label(),
            *(f"{speed:.0f}" for speed in one["tokens_per_s"]),
            f"{one['ratio']:.2f}",
            *map(format_bytes, one["peak_bytes"]),
        )
        for one in settings[:_MOST_SETTINGS]
    ]
    columns = ("measured in both", "tokens/s A", "B", "B to A", "memory A", "B")
    more = len(settings) - _MOST_SETTINGS
    return table(columns, rows) + (f"\nand {more} more, see --json" if more > 0 else "")
