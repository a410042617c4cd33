"""What was estimated against what was measured."""

import math
import statistics
from collections.abc import Sequence

from autotune.report.drawing import Axis, Chart, Figure, Frame, Legend, Line, Mark, Point, Table
from autotune.report.figures.words import MOST_ROWS, left_out, what_a_peak_lacks
from autotune.report.record import RunRecord
from autotune.setting import Setting
from autotune.units import GIB, MIB, format_bytes, format_duration


def accuracy(record: RunRecord) -> Figure | None:
    """Set what was measured against what was estimated: seconds of a step, and memory."""
    pairs = [
        (setting, outcome, record.entries[setting])
        for setting, outcome in record.measured.items()
        if setting in record.entries
    ]
    if not pairs:
        return None
    times = [(one, entry["step_time_s"], out.step_time_s) for one, out, entry in pairs]
    sizes = [
        (one, float(entry["memory"]["device_bytes"]), float(out.peak_bytes))
        for one, out, entry in pairs
        if out.peak_bytes
    ]
    charts = [_scatter("Seconds of a step", ("s", 1.0), times)]
    if sizes:
        largest = max(seen for _, _, seen in sizes)
        unit = ("GiB", float(GIB)) if largest >= GIB else ("MiB", float(MIB))
        charts.append(_scatter("Memory of a rank", unit, sizes))
    rows = tuple(
        (
            setting.label(),
            format_duration(entry["step_time_s"]),
            format_duration(out.step_time_s),
            f"{out.step_time_s / entry['step_time_s']:.2f}",
            format_bytes(entry["memory"]["device_bytes"]),
            format_bytes(out.peak_bytes),
            f"{out.peak_bytes / entry['memory']['device_bytes']:.2f}",
        )
        for setting, out, entry in pairs
    )
    return Figure(
        key="accuracy",
        title="Estimated against measured",
        says=" ".join(
            (_off("Steps", times), _off("Memory", sizes), "On the line both are the same.")
        )
        + what_a_peak_lacks(record),
        charts=tuple(charts),
        legend=(
            Legend(look="measured", words="a setting", shape="circle"),
            Legend(look="limit", words="as estimated"),
        ),
        table=Table(
            caption="Estimated and measured",
            columns=(
                *("setting", "step estimated", "measured", "ratio"),
                *("memory estimated", "measured", "ratio"),
            ),
            numbers=frozenset(range(1, 7)),
            rows=rows[:MOST_ROWS],
            left_out=left_out(len(rows)),
        ),
    )


def _off(what: str, pairs: Sequence[tuple[Setting, float, float]]) -> str:
    """Say by how much all are off alike, and how far each is from that."""
    if not pairs:
        return ""
    logs = [math.log(seen / estimated) for _, estimated, seen in pairs]
    middle = statistics.median(logs)
    apart = statistics.median(abs(one - middle) for one in logs)
    return (
        f"{what}: {math.exp(middle):.2f} x the estimate in the median, from which a setting is off "
        f"by {math.expm1(apart):.1%} in the median."
    )


def _scatter(
    title: str, unit: tuple[str, float], pairs: Sequence[tuple[Setting, float, float]]
) -> Chart:
    """Draw pairs, in a unit that is so many of the one they are in."""
    name, size = unit
    values = [value / size for _, estimated, seen in pairs for value in (estimated, seen)]
    frame = Frame(
        Axis.logarithmic(f"estimated, {name}", values, "{:.6g}".format),
        Axis.logarithmic(f"measured, {name}", values, "{:.6g}".format),
        height=300.0,
    )
    x, y = frame.x, frame.y
    low, high = frame.x_axis.low, frame.x_axis.high
    marks: list[Mark] = [Line(points=((x(low), y(low)), (x(high), y(high))), look="limit")]
    marks += [
        Point(
            x=x(estimated / size),
            y=y(seen / size),
            shape="circle",
            look="measured",
            note=(
                f"{setting.label()}: {estimated / size:.4g} {name} estimated, "
                f"{seen / size:.4g} {name} measured"
            ),
        )
        for setting, estimated, seen in pairs
    ]
    return frame.chart(title, f"{len(pairs)} settings.", marks)
