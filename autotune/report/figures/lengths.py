"""Lengths of the data: what is cut off, and what is padding."""

import math
from collections.abc import Mapping

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
from autotune.report.figures.words import MOST_ROWS, left_out
from autotune.report.record import Document, RunRecord
from autotune.setting import RANDOM
from autotune.units import format_count


def lengths(record: RunRecord) -> Figure | None:
    """Draw how long the sequences are, what is cut off, and how much is padding."""
    data = record.dataset
    bars = data.get("histogram") or []
    if not bars:
        return None
    limit = record.plan.get("job", {}).get("max_seq_length")
    frame = Frame(
        Axis.powers("tokens of a sequence, up to", [float(up_to) for up_to, _ in bars]),
        Axis.linear("sequences", max(count for _, count in bars), format_count),
    )
    x, y = frame.x, frame.y
    marks: list[Mark] = [
        Box(
            x=x(up_to / math.sqrt(1.9)),
            y=y(count),
            width=x(up_to * math.sqrt(1.9)) - x(up_to / math.sqrt(1.9)),
            height=frame.floor - y(count),
            look="measured",
            note=f"up to {up_to} tokens: {count} sequences",
        )
        for up_to, count in bars
    ]
    if limit and frame.x_axis.low < limit < frame.x_axis.high:
        at = x(limit)
        note = f"the limit of {limit} tokens"
        marks.append(Line(points=((at, frame.ceiling), (at, frame.floor)), look="limit", note=note))
    says = (
        f"{data['sequences']} sequences an epoch, {data['min_length']} to {data['max_length']} "
        f"tokens, {data['mean_length']:.0f} on average."
    )
    padding = _padding(record)
    charts = [frame.chart("Lengths", says, marks)]
    if padding:
        charts.append(_padding_chart(padding))
    return Figure(
        key="lengths",
        title="Lengths of the data",
        says=f"{says} {_cut(data, limit)}",
        charts=tuple(charts),
        legend=(
            Legend(look="measured", words="sequences", shape=""),
            Legend(look="limit", words="the limit of a sequence"),
            *(
                Legend(look=look, words=f"padding, {sampling} sampling", shape=shape)
                for (look, shape), sampling in zip(_OF_SAMPLINGS, padding, strict=False)
            ),
        ),
        table=_lengths_table(data, padding),
    )


_LEAST_PADDING = 0.05
"""The scale of a chart of padding has at least so much, so that next to nothing looks like it."""

_OF_SAMPLINGS = (("measured", "circle"), ("again", "square"), ("predicted", "diamond"))


def _cut(data: Document, limit: int | None) -> str:
    longer = f"the limit of {limit} tokens" if limit else "the limit"
    if not data.get("tokens_lost"):
        return f"None is longer than {longer}, so that nothing is cut off."
    return (
        f"Of the rows, {data['rows_truncated']} are longer than {longer} and cut off, "
        f"{data.get('rows_overlong', 0)} are left out for it, and "
        f"{data['rows_without_trained_tokens']} have nothing left to train on: "
        f"{data['tokens_lost']} tokens are lost."
    )


def _padding(record: RunRecord) -> dict[str, dict[int, float]]:
    """Return the share of padding by sampling and micro-batch size, as far as the plan says."""
    found: dict[str, dict[int, float]] = {}
    for setting, entry in record.entries.items():
        if "terms" in entry:
            of_sampling = found.setdefault(setting.structure.sampling, {})
            of_sampling[setting.micro_batch_size] = entry["terms"]["padding_share"]
    order = sorted(found, key=lambda sampling: (sampling != RANDOM, sampling))
    return {sampling: dict(sorted(found[sampling].items())) for sampling in order}


def _padding_chart(padding: Mapping[str, Mapping[int, float]]) -> Chart:
    sizes = sorted({size for of_sampling in padding.values() for size in of_sampling})
    highest = max(share for of_sampling in padding.values() for share in of_sampling.values())
    frame = Frame(
        Axis.powers("micro-batch size", [float(size) for size in sizes]),
        Axis.linear("share of padding", max(highest, _LEAST_PADDING), "{:.0%}".format),
    )
    marks: list[Mark] = []
    for (look, shape), (sampling, shares) in zip(_OF_SAMPLINGS, padding.items(), strict=False):
        places = {size: (frame.x(size), frame.y(share)) for size, share in shares.items()}
        marks.append(Line(points=tuple(places.values()), look=look))
        marks += [
            Point(
                x=at,
                y=height,
                shape=shape,
                look=look,
                note=f"micro-batch {size}, {sampling} sampling: {shares[size]:.1%} padding",
            )
            for size, (at, height) in places.items()
        ]
    return frame.chart("Padding", f"Up to {highest:.0%} of what is computed is padding.", marks)


def _lengths_table(data: Document, padding: Mapping[str, Mapping[int, float]]) -> Table:
    bars = data["histogram"]
    total = sum(count for _, count in bars)
    rows = [
        (f"sequences of up to {up_to} tokens", str(count), f"{count / total:.1%}")
        for up_to, count in bars
    ]
    rows += [
        (words, str(data.get(name, 0)), f"{data.get(name, 0) / max(1, data['rows']):.1%}")
        for name, words in _CUT_OFF.items()
    ]
    lost = data.get("tokens_lost", 0)
    rows.append(("tokens lost by the limit", str(lost), f"{lost / (lost + data['tokens']):.1%}"))
    rows += [
        (f"padding at micro-batch {size}, {sampling} sampling", "", f"{share:.1%}")
        for sampling, shares in padding.items()
        for size, share in shares.items()
    ]
    return Table(
        caption="Lengths, what is cut off, and padding",
        columns=("what", "count", "share"),
        numbers=frozenset({1, 2}),
        rows=tuple(rows[:MOST_ROWS]),
        left_out=left_out(len(rows)),
    )


_CUT_OFF = {
    "rows_truncated": "rows cut off at the limit",
    "rows_overlong": "rows left out for their length",
    "rows_without_trained_tokens": "rows with nothing left to train on",
}
