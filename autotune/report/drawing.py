"""What a figure is made of, in records that a template draws as they are.

Charts are marks on a canvas of fixed size. The library that would draw them has to leave text as
text and colours to the page (light, dark, high contrast), need no script, and be there in a
fraction of a second: matplotlib takes longer to import than a report to write and draws glyphs,
plotly's script alone is more than the page may have. What is needed is a scale, ticks and six kinds
of lines, so that is here.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

_CHARACTER = 6.4
"""About the width of a character of a tick's label, in units of the canvas."""

_LEFT, _RIGHT, _TOP, _BOTTOM = 58.0, 14.0, 22.0, 40.0
_MOST_TICKS, _MOST_LOG_TICKS = 5, 9


@dataclass(frozen=True, slots=True, kw_only=True)
class Box:
    """A rectangle; `look` is its class in the style sheet, `note` what it is and how much."""

    kind: ClassVar[str] = "box"
    x: float
    y: float
    width: float
    height: float
    look: str
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """A line through points."""

    kind: ClassVar[str] = "line"
    points: tuple[tuple[float, float], ...]
    look: str
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """A symbol; what it means is told by its shape too, and not by its colour alone."""

    kind: ClassVar[str] = "point"
    x: float
    y: float
    shape: str
    look: str
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Text:
    """A label at its baseline."""

    kind: ClassVar[str] = "text"
    x: float
    y: float
    text: str
    anchor: str = "middle"
    look: str = "tick"


Mark = Box | Line | Point | Text


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """A canvas with marks; `title` and `says` are for who cannot see it."""

    title: str
    says: str
    width: float
    height: float
    marks: tuple[Mark, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """A part of a bar; start and length are shares of the track."""

    start: float
    length: float
    look: str
    note: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Track:
    """A bar with what it is and how much."""

    name: str
    amount: str
    segments: tuple[Segment, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class BarRow:
    label: str
    tracks: tuple[Track, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Bars:
    """Labelled bars on one scale, with the place of a limit on it, if that is on it."""

    rows: tuple[BarRow, ...]
    limit: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Legend:
    """What a look and a shape stand for; without a shape it is an area."""

    look: str
    words: str
    shape: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Cells as text; `numbers` are the columns that are aligned as such."""

    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    numbers: frozenset[int] = frozenset()
    left_out: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """A picture and the table of what it shows; `says` is what is to be seen in it."""

    key: str
    title: str
    says: str
    table: Table
    charts: tuple[Chart, ...] = ()
    bars: Bars | None = None
    legend: tuple[Legend, ...] = ()


@dataclass(frozen=True, slots=True)
class Scale:
    """From figures to places on the canvas."""

    low: float
    high: float
    start: float
    end: float
    is_log: bool = False

    def __call__(self, value: float) -> float:
        low, high, at = self.low, self.high, value
        if self.is_log:
            low, high, at = math.log(low), math.log(high), math.log(value)
        return self.start + (at - low) / (high - low) * (self.end - self.start)


@dataclass(frozen=True, slots=True, kw_only=True)
class Axis:
    """A range with labelled places.

    Attributes:
        title: what is shown, with its unit.
        ticks: where labels are.
        label: how one is written.
    """

    title: str
    low: float
    high: float
    ticks: tuple[float, ...]
    label: Callable[[float], str]
    is_log: bool = False

    @classmethod
    def linear(
        cls, title: str, highest: float, label: Callable[[float], str] = "{:.6g}".format
    ) -> "Axis":
        """Return an axis from zero up to a round figure above the highest one."""
        ticks = round_ticks(highest)
        return cls(title=title, low=0.0, high=ticks[-1], ticks=ticks, label=label)

    @classmethod
    def between(cls, title: str, values: Sequence[float]) -> "Axis":
        """Return an axis that need not begin at zero, for values whose changes matter."""
        low, high = min(values), max(values)
        step = _round_step((high - low or abs(high) or 1.0) / _MOST_TICKS)
        first, last = math.floor(low / step), math.ceil(high / step)
        last += last == first
        ticks = tuple(step * place for place in range(first, last + 1))
        return cls(title=title, low=ticks[0], high=ticks[-1], ticks=ticks, label="{:.6g}".format)

    @classmethod
    def powers(cls, title: str, values: Sequence[float]) -> "Axis":
        """Return a logarithmic axis that is labelled at these values."""
        low, high = min(values), max(values)
        return cls(
            title=title,
            low=low / math.sqrt(2),
            high=high * math.sqrt(2),
            ticks=tuple(sorted(set(values))),
            label="{:.6g}".format,
            is_log=True,
        )

    @classmethod
    def logarithmic(
        cls, title: str, values: Sequence[float], label: Callable[[float], str]
    ) -> "Axis":
        """Return a logarithmic axis over positive values, labelled at one, two and five."""
        low, high = min(values) / 1.2, max(values) * 1.2
        ticks = _within(low, high, (1, 2, 5))
        if len(ticks) > _MOST_LOG_TICKS:
            ticks = _within(low, high, (1,))
        elif len(ticks) < 2:  # noqa: PLR2004 - one label says nothing of a scale
            step = _round_step((high - low) / _MOST_TICKS)
            first, last = math.ceil(low / step), math.floor(high / step)
            ticks = tuple(step * place for place in range(first, last + 1))
        return cls(title=title, low=low, high=high, ticks=ticks, label=label, is_log=True)


def _within(low: float, high: float, leads: tuple[int, ...]) -> tuple[float, ...]:
    """Return the leads times powers of ten that are between."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    found = (lead * 10.0**decade for decade in decades for lead in leads)
    return tuple(value for value in found if low <= value <= high)


def _round_step(least: float) -> float:
    """Return the smallest of 1, 2 and 5 times a power of ten that is not below."""
    power = 10.0 ** math.floor(math.log10(least))
    return next(lead * power for lead in (1, 2, 5, 10) if lead * power >= least * (1 - 1e-9))


def round_ticks(highest: float) -> tuple[float, ...]:
    """Return round figures from zero up to the first that is not below the highest."""
    highest = highest if highest > 0 else 1.0
    step = _round_step(highest / _MOST_TICKS)
    return tuple(step * place for place in range(math.ceil(highest / step - 1e-9) + 1))


@dataclass(frozen=True, slots=True)
class Frame:
    """The axes of a chart, and where figures are between them."""

    x_axis: Axis
    y_axis: Axis
    width: float = 360.0
    height: float = 240.0

    @property
    def x(self) -> Scale:
        axis = self.x_axis
        return Scale(axis.low, axis.high, _LEFT, self.width - _RIGHT, axis.is_log)

    @property
    def y(self) -> Scale:
        axis = self.y_axis
        return Scale(axis.low, axis.high, self.height - _BOTTOM, _TOP, axis.is_log)

    @property
    def floor(self) -> float:
        return self.height - _BOTTOM

    @property
    def ceiling(self) -> float:
        return _TOP

    def chart(self, title: str, says: str, marks: Sequence[Mark]) -> Chart:
        """Return the chart of these marks, over grid and labels."""
        return Chart(
            title=title,
            says=says,
            width=self.width,
            height=self.height,
            marks=(*self._axes(), *marks),
        )

    def _axes(self) -> Iterator[Mark]:
        left, right = _LEFT, self.width - _RIGHT
        free_from = -math.inf
        for value in self.x_axis.ticks:
            at, label = self.x(value), self.x_axis.label(value)
            yield Line(points=((at, self.ceiling), (at, self.floor)), look="grid")
            half = len(label) * _CHARACTER / 2
            # A label that would run into the one before it is left out.
            if at - half >= free_from and at + half <= self.width:
                yield Text(x=at, y=self.floor + 14, text=label)
                free_from = at + half + _CHARACTER
        for value in self.y_axis.ticks:
            at = self.y(value)
            yield Line(points=((left, at), (right, at)), look="grid")
            yield Text(x=left - 5, y=at + 4, text=self.y_axis.label(value), anchor="end")
        yield Text(x=(left + right) / 2, y=self.height - 8, text=self.x_axis.title, look="axis")
        yield Text(x=left, y=_TOP - 9, text=self.y_axis.title, anchor="start", look="axis")
        yield Line(
            points=((left, self.ceiling), (left, self.floor), (right, self.floor)), look="rim"
        )


def staircase(points: Sequence[tuple[float, float]]) -> tuple[tuple[float, float], ...]:
    """Return a line that keeps each height until the next point."""
    steps = [((x, before), (x, y)) for (_, before), (x, y) in itertools.pairwise(points)]
    return (*points[:1], *itertools.chain.from_iterable(steps))


def stack(parts: Sequence[tuple[str, str, float]], scale: float) -> tuple[Segment, ...]:
    """Return the segments of parts (look, note, amount) one after the other."""
    segments: list[Segment] = []
    at = 0.0
    for look, note, amount in parts:
        length = amount / scale
        if length > 0:
            segments.append(Segment(start=at, length=length, look=look, note=note))
            at += length
    return tuple(segments)
