"""What was tried, in its order, and the best so far."""

from autotune.outcome import Measured, Rung
from autotune.report.diagnosis import failure
from autotune.report.drawing import Axis, Figure, Frame, Legend, Line, Mark, Point, Table, staircase
from autotune.report.figures.words import MOST_ROWS, kind, left_out, speed
from autotune.report.record import RunRecord
from autotune.units import format_count, format_duration


def search(record: RunRecord) -> Figure | None:
    """Draw what was found over the time that probes took, with the best so far."""
    if not record.rungs:
        return None
    walked: list[tuple[float, Rung, float]] = []
    spent_s = best = 0.0
    for rung in record.rungs:
        spent_s += 0.0 if rung.cached else rung.seconds
        best = max(best, speed(rung.outcome))
        walked.append((spent_s, rung, best))
    in_minutes = spent_s >= 300  # noqa: PLR2004 - from five minutes on
    unit, factor = ("minutes", 60.0) if in_minutes else ("seconds", 1.0)
    frame = Frame(
        Axis.linear(f"{unit} of probing", spent_s / factor),
        Axis.linear("tokens/s", best, format_count),
        width=480.0,
        height=260.0,
    )
    line = [(frame.x(at / factor), frame.y(high)) for at, _, high in walked if high]
    marks: list[Mark] = [Line(points=staircase(line), look="best")]
    marks += [_search_point(frame, at / factor, rung) for at, rung, _ in walked]
    rows = tuple(
        (
            str(number),
            rung.setting.label(),
            _purpose(rung),
            f"{speed(rung.outcome):.0f}"
            if isinstance(rung.outcome, Measured)
            else kind(rung.outcome),
            f"{high:.0f}" if high else "",
            format_duration(rung.seconds),
            rung.at,
        )
        for number, (_, rung, high) in enumerate(walked, start=1)
    )
    structures = len({rung.setting.structure for rung in record.rungs})
    return Figure(
        key="search",
        title="The search",
        says=(
            f"{len(record.rungs)} outcomes of {structures} structures, in "
            f"{format_duration(spent_s)} of probing; the line is the best so far."
        ),
        charts=(frame.chart("Tokens a second over the time of probing", _found(record), marks),),
        legend=(
            Legend(look="measured", words="measured", shape="circle"),
            Legend(look="again", words="measured again", shape="square"),
            Legend(look="predicted", words="taken over from an earlier run", shape="diamond"),
            Legend(look="failed", words="failed", shape="cross"),
            Legend(look="best", words="best so far"),
        ),
        table=Table(
            caption="What was tried, in its order",
            columns=("no.", "setting", "for", "tokens/s", "best so far", "took", "at"),
            numbers=frozenset({0, 3, 4, 5}),
            rows=rows[:MOST_ROWS],
            left_out=left_out(len(rows)),
        ),
    )


def _found(record: RunRecord) -> str:
    if not record.measured:
        return "Nothing was measured."
    setting, outcome = next(iter(record.measured.items()))
    return f"The fastest is {setting.label()} with {outcome.tokens_per_s:.0f} tokens/s."


def _search_point(frame: Frame, at: float, rung: Rung) -> Point:
    note = f"{rung.setting.label()}: {failure(rung)}"
    if not isinstance(rung.outcome, Measured):
        return Point(x=frame.x(at), y=frame.floor - 8, shape="cross", look="failed", note=note)
    shape, look = "circle", "measured"
    if rung.cached:
        shape, look = "diamond", "predicted"
    elif rung.purpose != "search":
        shape, look = "square", "again"
    speed = rung.outcome.tokens_per_s
    note = f"{rung.setting.label()}: {speed:.0f} tokens/s"
    return Point(x=frame.x(at), y=frame.y(speed), shape=shape, look=look, note=note)


def _purpose(rung: Rung) -> str:
    return "an earlier run" if rung.cached else rung.purpose
