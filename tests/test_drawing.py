"""Scales and ticks: figures are where they belong, and labels can be read."""

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autotune.report.drawing import Axis, Frame, Scale, Text, round_ticks, stack, staircase

amounts = st.floats(1e-9, 1e12, allow_nan=False)
plain = "{:.6g}".format


@given(amounts)
def test_ticks_are_round_from_zero_to_the_first_that_covers(highest: float) -> None:
    ticks = round_ticks(highest)

    assert ticks[0] == 0
    assert ticks[-1] >= highest * (1 - 1e-6)
    assert ticks[-2] < highest
    assert 2 <= len(ticks) <= 7
    step = ticks[1]
    lead = step / 10 ** math.floor(math.log10(step) + 1e-9)
    assert round(lead) in {1, 2, 5, 10}
    assert lead == pytest.approx(round(lead))


def test_nothing_has_ticks_too() -> None:
    assert round_ticks(0.0)[-1] == 1.0


@given(st.lists(amounts, min_size=1, max_size=8))
def test_a_logarithmic_axis_covers_its_values_and_has_labels(values: list[float]) -> None:
    axis = Axis.logarithmic("bytes", values, plain)

    assert axis.low < min(values) <= max(values) < axis.high
    assert 2 <= len(axis.ticks) <= 26
    assert all(axis.low <= tick <= axis.high for tick in axis.ticks)


@given(st.lists(st.floats(-1e6, 1e6, allow_nan=False), min_size=1, max_size=8))
def test_an_axis_between_values_covers_them(values: list[float]) -> None:
    axis = Axis.between("loss", values)
    slack = 1e-6 * (axis.high - axis.low)

    assert axis.low - slack <= min(values)
    assert axis.high + slack >= max(values)
    assert axis.low < axis.high


def test_a_scale_maps_its_ends_and_what_is_between() -> None:
    assert Scale(0, 10, 100, 200)(5) == 150
    assert Scale(1, 100, 0, 10, is_log=True)(10) == pytest.approx(5)
    assert Scale(0, 10, 200, 100)(10) == 100


@given(st.lists(st.integers(1, 2**20), min_size=1, max_size=30, unique=True))
def test_labels_below_a_chart_do_not_run_into_each_other(sizes: list[int]) -> None:
    frame = Frame(
        Axis.powers("micro-batch size", [float(size) for size in sizes]),
        Axis.linear("tokens/s", 1000.0),
    )
    labels = [
        mark
        for mark in frame.chart("a structure", "", ()).marks
        if isinstance(mark, Text) and mark.look == "tick" and mark.anchor == "middle"
    ]

    for left, right in itertools.pairwise(labels):
        # 6.2 is the width of a digit of the 11 pixels font, about.
        assert left.x + 3.1 * len(left.text) <= right.x - 3.1 * len(right.text)


def test_a_staircase_keeps_its_height_until_the_next_point() -> None:
    assert staircase([(0, 1), (2, 5)]) == ((0, 1), (2, 1), (2, 5))
    assert staircase([(3, 4)]) == ((3, 4),)
    assert staircase([]) == ()


@given(st.lists(st.floats(0, 100), max_size=8))
def test_a_stack_is_as_long_as_its_parts(sizes: list[float]) -> None:
    segments = stack([("look", "note", size) for size in sizes], 400.0)

    assert sum(part.length for part in segments) == pytest.approx(sum(sizes) / 400)
    assert all(part.length > 0 for part in segments)
