"""Tokens a second over the micro-batch size, a panel a structure."""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TypeVar

from autotune.outcome import Measured, Outcome
from autotune.report.drawing import (
    Axis,
    Box,
    Chart,
    Figure,
    Frame,
    Legend,
    Line,
    Mark,
    Point,
    Table,
)
from autotune.report.figures.words import MOST_PANELS, MOST_ROWS, kind, left_out, speed
from autotune.report.record import Document, RunRecord
from autotune.setting import Setting, Structure
from autotune.units import format_count

_T = TypeVar("_T")


def throughput(record: RunRecord) -> Figure | None:
    """Draw tokens a second over the micro-batch size, a panel a structure that was tried."""
    sizes = _micro_batch_sizes(record)
    tried = _by_structure(record.tried)
    if not sizes or not tried:
        return None
    order = sorted(tried, key=lambda one: -max(map(speed, tried[one].values())))
    kept = _by_structure(
        {one: entry for one, entry in record.entries.items() if entry["rejected_by"] is None}
    )
    speeds = [speed(out) for outcomes in tried.values() for out in outcomes.values()]
    speeds += [entry["tokens_per_s"] for one in order for entry in kept.get(one, {}).values()]
    frame = Frame(
        Axis.powers("micro-batch size", [float(size) for size in sizes]),
        Axis.linear("tokens/s", max(speeds), format_count),
    )
    panels = [
        _panel(frame, structure, tried[structure], kept.get(structure, {}))
        for structure in order[:MOST_PANELS]
    ]
    more = len(order) - MOST_PANELS
    rows = tuple(_throughput_rows(record, order, kept, tried))
    return Figure(
        key="throughput",
        title="Speed over the micro-batch size",
        says=(
            "A panel a structure, the fastest first; all have the same scales. Shaded is what was "
            "pruned: it was estimated not to fit, or to lose."
            + (f" {more} more structures are in the table." if more > 0 else "")
        ),
        charts=tuple(panels),
        legend=(
            Legend(look="measured", words="measured", shape="circle"),
            Legend(look="predicted", words="estimated", shape="diamond"),
            Legend(look="failed", words="failed", shape="cross"),
            Legend(look="pruned", words="pruned"),
        ),
        table=Table(
            caption="Tokens a second, estimated and measured",
            columns=("structure", "micro-batch", "estimated", "measured", "of the estimate"),
            numbers=frozenset({1, 2, 3, 4}),
            rows=rows[:MOST_ROWS],
            left_out=left_out(len(rows)),
        ),
    )


def _micro_batch_sizes(record: RunRecord) -> list[int]:
    """Return the sizes that a global batch can be split into, or else those that are known."""
    batch = record.plan.get("job", {}).get("global_batch_size")
    ranks = record.plan.get("cluster", {}).get("num_devices")
    known = {one.micro_batch_size for one in (*record.tried, *record.entries)}
    if not batch or not ranks:
        return sorted(known)
    rows = batch // ranks
    return sorted(known | {size for size in range(1, rows + 1) if rows % size == 0})


def _by_structure(of_settings: Mapping[Setting, _T]) -> dict[Structure, dict[int, _T]]:
    found: dict[Structure, dict[int, _T]] = {}
    for setting, value in of_settings.items():
        found.setdefault(setting.structure, {})[setting.micro_batch_size] = value
    return found


def _panel(
    frame: Frame,
    structure: Structure,
    outcomes: Mapping[int, Outcome],
    kept: Mapping[int, Document],
) -> Chart:
    x, y = frame.x, frame.y
    marks: list[Mark] = list(_pruned(frame, {*kept, *outcomes}))
    predicted = [(size, kept[size]["tokens_per_s"]) for size in sorted(kept)]
    marks.append(
        Line(points=tuple((x(size), y(speed)) for size, speed in predicted), look="predicted")
    )
    marks += [
        Point(
            x=x(size),
            y=y(speed),
            shape="diamond",
            look="predicted",
            note=f"micro-batch {size}: {speed:.0f} tokens/s estimated",
        )
        for size, speed in predicted
    ]
    measured = {
        size: out.tokens_per_s
        for size, out in sorted(outcomes.items())
        if isinstance(out, Measured)
    }
    marks.append(
        Line(points=tuple((x(size), y(speed)) for size, speed in measured.items()), look="measured")
    )
    for size, outcome in sorted(outcomes.items()):
        marks.append(_rung_point(x(size), frame, size, outcome))
    best = max(measured.values(), default=None)
    says = (
        f"{len(measured)} micro-batch sizes measured"
        + (f", up to {best:.0f} tokens/s" if best is not None else "")
        + f", {len(kept)} kept by the plan."
    )
    return frame.chart(structure.label(), says, marks)


def _rung_point(at: float, frame: Frame, size: int, outcome: Outcome) -> Point:
    if isinstance(outcome, Measured):
        note = f"micro-batch {size}: {outcome.tokens_per_s:.0f} tokens/s measured"
        height = frame.y(outcome.tokens_per_s)
        return Point(x=at, y=height, shape="circle", look="measured", note=note)
    note = f"micro-batch {size}: {kind(outcome)}"
    return Point(x=at, y=frame.floor - 8, shape="cross", look="failed", note=note)


def _pruned(frame: Frame, known: set[int]) -> Iterator[Box]:
    """Shade the micro-batch sizes that the plan rejects."""
    x, sizes = frame.x, frame.x_axis.ticks
    edges = [frame.x_axis.low, *(math.sqrt(a * b) for a, b in itertools.pairwise(sizes))]
    edges.append(frame.x_axis.high)
    for size, (low, high) in zip(sizes, itertools.pairwise(edges), strict=True):
        if size not in known:
            yield Box(
                x=x(low),
                y=frame.ceiling,
                width=x(high) - x(low),
                height=frame.floor - frame.ceiling,
                look="pruned",
                note=f"micro-batch {size:.0f}: pruned",
            )


def _throughput_rows(
    record: RunRecord,
    order: Sequence[Structure],
    kept: Mapping[Structure, Mapping[int, Document]],
    tried: Mapping[Structure, Mapping[int, Outcome]],
) -> Iterator[tuple[str, ...]]:
    for structure in order:
        estimates, outcomes = kept.get(structure, {}), tried[structure]
        for size in _micro_batch_sizes(record):
            estimate = estimates[size]["tokens_per_s"] if size in estimates else None
            outcome = outcomes.get(size)
            speed = outcome.tokens_per_s if isinstance(outcome, Measured) else None
            yield (
                structure.label(),
                str(size),
                f"{estimate:.0f}" if estimate is not None else "pruned",
                _measured_cell(outcome, speed),
                f"{speed / estimate:.2f}" if speed is not None and estimate else "",
            )


def _measured_cell(outcome: Outcome | None, speed: float | None) -> str:
    if speed is not None:
        return f"{speed:.0f}"
    return "not tried" if outcome is None else kind(outcome)
