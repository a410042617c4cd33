"""Loss and speed of the training."""

import statistics
from collections.abc import Iterator, Sequence

from autotune.report.drawing import Axis, Figure, Frame, Legend, Line, Mark, Point, Table
from autotune.report.figures.words import MOST_POINTS, MOST_ROWS
from autotune.report.record import Document, RunRecord
from autotune.units import format_bytes, format_count


def training(record: RunRecord) -> Figure | None:
    """Draw loss and speed of the training over its steps."""
    steps = [line for line in record.steps if "loss" in line and "tokens_per_s" in line]
    if not steps:
        return None
    thinned = _thinned(steps)
    promised = record.result.get("tokens_per_s")
    x_axis = Axis.between("step", [float(steps[0]["step"]), float(steps[-1]["step"])])
    evaluations = [line for line in record.evaluations if "eval_loss" in line]
    losses = [*(line["loss"] for line in thinned), *(line["eval_loss"] for line in evaluations)]
    loss = Frame(x_axis, Axis.between("loss", losses))
    speeds = [line["tokens_per_s"] for line in thinned]
    speed = Frame(x_axis, Axis.linear("tokens/s", max([*speeds, promised or 0.0]), format_count))
    shown = "" if len(thinned) == len(steps) else " Points are means of neighbouring steps."
    says = (
        f"{steps[-1]['step']} of {steps[-1].get('max_steps', steps[-1]['step'])} steps, loss "
        f"{steps[0]['loss']:.4f} to {steps[-1]['loss']:.4f}, "
        f"{statistics.median(speeds):.0f} tokens/s in the median.{shown}"
    )
    return Figure(
        key="training",
        title="The training",
        says=says,
        charts=(
            loss.chart("Loss", says, list(_loss_marks(loss, thinned, evaluations))),
            speed.chart("Tokens a second", says, list(_speed_marks(speed, thinned, promised))),
        ),
        legend=(
            Legend(look="measured", words="a step", shape="circle"),
            *([Legend(look="again", words="evaluation", shape="square")] if evaluations else []),
            *([Legend(look="limit", words="as probed")] if promised else []),
        ),
        table=Table(
            caption="Steps of the training",
            columns=("step", "loss", "tokens/s", "peak memory", "learning rate"),
            numbers=frozenset(range(5)),
            rows=tuple(_step_cells(line) for line in _evenly(steps, MOST_ROWS)),
            left_out=(
                f"{MOST_ROWS} of {len(steps)} steps; training/metrics.jsonl has all."
                if len(steps) > MOST_ROWS
                else ""
            ),
        ),
    )


def _thinned(steps: Sequence[Document]) -> list[Document]:
    """Return the steps, or means of so many neighbours that a line stays a line."""
    width = -(-len(steps) // MOST_POINTS)
    groups = [steps[start : start + width] for start in range(0, len(steps), width)]
    return [
        {
            "step": group[-1]["step"],
            **{
                name: statistics.fmean(line[name] for line in group)
                for name in ("loss", "tokens_per_s")
            },
        }
        for group in groups
    ]


def _evenly(lines: Sequence[Document], most: int) -> list[Document]:
    """Return at most so many of them, evenly apart, the first and the last among them."""
    if len(lines) <= most:
        return list(lines)
    return [lines[round(place * (len(lines) - 1) / (most - 1))] for place in range(most)]


def _loss_marks(
    frame: Frame, steps: Sequence[Document], evaluations: Sequence[Document]
) -> Iterator[Mark]:
    yield from _curve(frame, steps, "loss", "{:.4f}")
    for line in evaluations:
        step, loss = line["step"], line["eval_loss"]
        note = f"step {step}: evaluation loss {loss:.4f}"
        place = frame.x(step), frame.y(loss)
        yield Point(x=place[0], y=place[1], shape="square", look="again", note=note)


def _speed_marks(frame: Frame, steps: Sequence[Document], promised: float | None) -> Iterator[Mark]:
    if promised:
        x, at = frame.x, frame.y(promised)
        ends = ((x(frame.x_axis.low), at), (x(frame.x_axis.high), at))
        yield Line(points=ends, look="limit", note=f"{promised:.0f} tokens/s were probed")
    yield from _curve(frame, steps, "tokens_per_s", "{:.0f} tokens/s")


def _curve(frame: Frame, steps: Sequence[Document], name: str, written: str) -> Iterator[Mark]:
    places = [(frame.x(line["step"]), frame.y(line[name])) for line in steps]
    yield Line(points=tuple(places), look="measured")
    for line, (x, y) in zip(steps, places, strict=True):
        note = f"step {line['step']}: {written.format(line[name])}"
        yield Point(x=x, y=y, shape="circle", look="measured small", note=note)


def _step_cells(line: Document) -> tuple[str, ...]:
    rate, peak = line.get("learning_rate"), line.get("peak_bytes")
    return (
        str(line["step"]),
        f"{line['loss']:.4f}",
        f"{line['tokens_per_s']:.0f}",
        format_bytes(peak) if peak else "",
        f"{rate:.3g}" if rate is not None else "",
    )
