"""`autotune data`."""

import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from autotune.cli.options import as_json, config_file, echo_json, resolve_options, shared, table
from autotune.errors import UsageError
from autotune.units import format_count, format_duration

if TYPE_CHECKING:
    from autotune.dataset.making import Example
    from autotune.dataset.preparing import Progress, Watch
    from autotune.workload import DatasetProfile

_OPTIONS = (
    *("model", "max_seq_length", "format", "map", "train_on_prompt", "on_bad_line"),
    *("max_bad_lines", "overlong", "packing", "trust_remote_code"),
)
_BAR_COLUMNS = 40
_MAX_SHOWN_CHARACTERS = 1500


@click.command(name="data")
@click.argument("files", nargs=-1, metavar="FILE[@WEIGHT]...")
@shared(*_OPTIONS)
@click.option(
    "--show", type=click.IntRange(min=0), metavar="N", help="Sequences to show [1; 0 with --json]."
)
@config_file
@as_json
def command(
    files: tuple[str, ...],
    config: Path | None,
    show: int | None,
    *,
    as_json: bool,
    **flags: Any,  # noqa: ANN401
) -> None:
    """Show what data files hold, how many tokens they are, and which of them are trained on."""
    from autotune.intake import inspect_data

    options = resolve_options({**flags, "dataset": files or None}, config)
    if not options["dataset"]:
        msg = "no dataset: name a JSONL file"
        raise UsageError(msg)
    count = show if show is not None else int(not as_json)
    with tempfile.TemporaryDirectory(prefix="autotune-data-") as scratch, _progress() as watch:
        inspected = inspect_data(options, Path(scratch) / "dataset", examples=count, watch=watch)
    if as_json:
        echo_json(_document(inspected.profile, inspected.examples))
        return
    parts = [_figures(inspected.profile), _lengths(inspected.profile)]
    parts += [_example(example, inspected.decode) for example in inspected.examples]
    parts += [f"warning: {warning}" for warning in inspected.profile.warnings]
    if inspected.reported is not None:
        parts.append(f"what is left out, a line each: {inspected.reported}")
    click.echo("\n\n".join(parts))


def _document(profile: "DatasetProfile", examples: "list[Example]") -> dict[str, Any]:
    return {
        "format": profile.format,
        "rows": profile.rows,
        "rows_used": profile.rows_used,
        "rows_reported": profile.rows_reported,
        "tokens": profile.tokens,
        "trained_tokens": profile.trained_tokens,
        "lengths": {
            "min": profile.min_length,
            "mean": profile.mean_length,
            "max": profile.max_length,
            "percentiles": {str(q): length for q, length in profile.percentiles},
            "histogram": [list(bar) for bar in profile.histogram],
            "coverage": {str(limit): share for limit, share in profile.coverage},
        },
        "sequences": profile.sequences,
        "rows_bad": profile.rows_bad,
        "rows_truncated": profile.rows_truncated,
        "rows_overlong": profile.rows_overlong,
        "rows_without_trained_tokens": profile.rows_without_trained_tokens,
        "tokens_lost": profile.tokens_lost,
        "warnings": list(profile.warnings),
        "examples": [asdict(example) for example in examples],
    }


def _figures(profile: "DatasetProfile") -> str:
    share = profile.trained_tokens / profile.tokens
    rows = [
        ("data", profile.path),
        ("form", profile.format),
        ("rows", f"{profile.rows}: {profile.rows_used} used, {profile.rows_reported} left out"),
        ("sequences", f"{profile.sequences} an epoch"),
        ("tokens", f"{format_count(profile.tokens)}, {share:.0%} of them trained on"),
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name.ljust(width)}  {value}" for name, value in rows)


def _lengths(profile: "DatasetProfile") -> str:
    most = max(count for _, count in profile.histogram)
    bars = [
        (f"up to {limit}", str(count), "█" * round(_BAR_COLUMNS * count / most))
        for limit, count in profile.histogram
    ]
    width = max(len(count) for _, count, _ in bars)
    lines = [f"{name.ljust(12)}  {count.rjust(width)}  {bar}".rstrip() for name, count, bar in bars]
    percentiles = table(
        ("percentile", *(f"{q}%" for q, _ in profile.percentiles), "longest"),
        [("tokens", *(str(length) for _, length in profile.percentiles), str(profile.max_length))],
    )
    covered = ", ".join(f"{limit}: {share:.1%}" for limit, share in profile.coverage)
    return "\n".join(
        ["tokens a sequence", *lines, "", percentiles, f"whole within a limit of {covered}"]
    )


def _example(example: "Example", decode: Callable[[list[int]], str]) -> str:
    """Write a sequence out; what is trained on stands between marks, in colour on a terminal."""
    parts, start = [], 0
    for end in range(1, len(example.input_ids) + 1):
        if end == len(example.input_ids) or example.trained[end] != example.trained[start]:
            text = decode(example.input_ids[start:end])
            parts.append(_marked(text) if example.trained[start] else _shortened(text))
            start = end
    return "an example, with ⟦what is trained on⟧\n" + "".join(parts)


def _marked(text: str) -> str:
    return click.style(f"⟦{_shortened(text)}⟧", fg="green")


def _shortened(text: str) -> str:
    # Terminals obey control characters, and data may hold any.
    shown = "".join(c if c.isprintable() or c in "\n\t" else "�" for c in text)
    left_out = len(shown) - _MAX_SHOWN_CHARACTERS
    return shown if left_out <= 0 else f"{shown[:_MAX_SHOWN_CHARACTERS]}… ({left_out} characters)"


@contextmanager
def _progress() -> "Iterator[Watch | None]":
    """Draw a bar with rows a second and the time left, on a terminal only."""
    if not sys.stderr.isatty():
        yield None
        return
    with click.progressbar(length=1000, file=sys.stderr, label="tokenising", show_eta=False) as bar:

        def watch(progress: "Progress") -> None:
            done = progress.bytes_done / max(1, progress.bytes_total)
            left = progress.seconds_left
            eta = "" if left is None else f", {format_duration(left)} left"
            bar.label = f"tokenising, {progress.rows_per_s:.0f} rows/s{eta}"
            bar.update(max(0, min(1000, int(1000 * done)) - bar.pos))

        yield watch
