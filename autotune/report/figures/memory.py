"""Memory of each setting that was tried: estimated by term, and measured."""

from autotune.memory import PARTS
from autotune.outcome import Interrupted, Measured, Outcome
from autotune.report.drawing import BarRow, Bars, Figure, Legend, Table, Track, stack
from autotune.report.figures.words import (
    MOST_BARS,
    MOST_ROWS,
    kind,
    left_out,
    speed,
    what_a_peak_lacks,
)
from autotune.report.record import Document, RunRecord
from autotune.setting import Setting
from autotune.units import format_bytes

_IN_SIGHT = 0.2
"""A device's limit is on the scale of the bars where they reach so much of it."""

_PARTS = tuple(name.removesuffix("_bytes") for name in (*PARTS, "runtime_bytes"))


def memory(record: RunRecord) -> Figure | None:
    """Stack the estimate of each setting that was tried, beside what was measured."""
    tried = [(one, out) for one, out in record.tried.items() if not isinstance(out, Interrupted)]
    estimated = [(one, out, record.entries[one]) for one, out in tried if one in record.entries]
    if not estimated:
        return None
    estimated.sort(key=lambda each: -speed(each[1]))
    budget = estimated[0][2]["budget_bytes"]
    highest = max(
        max(entry["memory"]["device_bytes"], _peak(out) or 0) for _, out, entry in estimated
    )
    in_sight = highest >= _IN_SIGHT * budget
    scale = 1.04 * (max(highest, budget) if in_sight else highest)
    drawn = estimated[:MOST_BARS]
    limit = f"A device has {format_bytes(budget)}"
    return Figure(
        key="memory",
        title="Memory of the settings that were tried",
        says=(
            f"Above what was estimated, by what it is for, below what was measured; the fastest "
            f"setting first. {limit}"
            + (", the line." if in_sight else ", far to the right of this scale.")
            + what_a_peak_lacks(record)
        ),
        bars=Bars(
            rows=tuple(_memory_row(one, out, entry, scale) for one, out, entry in drawn),
            limit=budget / scale if in_sight else None,
        ),
        legend=(
            *(Legend(look=part, words=part) for part in _PARTS),
            Legend(look="measured", words="measured peak"),
        ),
        table=Table(
            caption="Estimated and measured memory of a rank",
            columns=("setting", *_PARTS, "estimated", "measured", "of the device"),
            numbers=frozenset(range(1, 4 + len(_PARTS))),
            rows=tuple(_memory_cells(*each) for each in estimated[:MOST_ROWS]),
            left_out=left_out(len(estimated)),
        ),
    )


def _memory_row(setting: Setting, outcome: Outcome, entry: Document, scale: float) -> BarRow:
    terms = entry["memory"]
    parts = [
        (part, f"{part} {format_bytes(terms[f'{part}_bytes'])}", terms[f"{part}_bytes"])
        for part in _PARTS
    ]
    peak = _peak(outcome)
    measured = (
        Track(
            name="measured",
            amount=format_bytes(peak),
            segments=stack([("measured", f"measured {format_bytes(peak)}", peak)], scale),
        )
        if peak is not None
        else Track(name="tried", amount=kind(outcome), segments=())
    )
    estimated = Track(
        name="estimated",
        amount=format_bytes(terms["device_bytes"]),
        segments=stack(parts, scale),
    )
    return BarRow(label=setting.label(), tracks=(estimated, measured))


def _memory_cells(setting: Setting, outcome: Outcome, entry: Document) -> tuple[str, ...]:
    terms, peak = entry["memory"], _peak(outcome)
    needs = peak if peak is not None else terms["device_bytes"]
    return (
        setting.label(),
        *(format_bytes(terms[f"{part}_bytes"]) for part in _PARTS),
        format_bytes(terms["device_bytes"]),
        format_bytes(peak) if peak is not None else kind(outcome),
        f"{needs / entry['budget_bytes']:.0%}",
    )


def _peak(outcome: Outcome) -> int | None:
    return outcome.peak_bytes if isinstance(outcome, Measured) and outcome.peak_bytes else None
