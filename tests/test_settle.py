"""Which repetitions of a micro-step count."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autotune.probe.settle import settled


def sample(times: list[float]) -> tuple[list[float], tuple[float, ...]]:
    """Feed times one by one until they have settled; returns those used and those that count."""
    for used in range(1, len(times) + 1):
        if (counted := settled(times[:used])) is not None:
            return times[:used], counted
    pytest.fail("it never settles")


def test_a_steady_sample_is_four_repetitions() -> None:
    assert sample([0.01] * 20) == ([0.01] * 4, (0.01,) * 4)


def test_what_came_before_the_sample_settled_does_not_count() -> None:
    used, counted = sample([0.09, 0.05, 0.02, 0.01, 0.01, 0.01, 0.01, 0.01])
    assert counted == (0.01, 0.01, 0.01, 0.01)
    assert len(used) == 7


def test_long_steps_are_taken_twice() -> None:
    assert sample([30.0, 30.5, 30.0])[1] == (30.0, 30.5)


def test_one_slow_repetition_after_the_warm_up_does_not_go_on_for_long() -> None:
    used, counted = sample([0.01, 0.01, 0.01, 0.03, 0.01, 0.01, 0.01, 0.01])
    assert len(used) <= 8
    assert sorted(counted)[1] == 0.01


@given(st.lists(st.floats(0.001, 50), min_size=40, max_size=40))
def test_every_sample_comes_to_an_end(times: list[float]) -> None:
    used, counted = sample(times)
    assert len(used) <= 16
    assert len(counted) >= 2
    assert used[-len(counted) :] == list(counted)


@given(st.lists(st.floats(0.001, 0.01), min_size=16, max_size=16))
def test_a_noisy_sample_counts_its_later_half_or_a_window(times: list[float]) -> None:
    used, counted = sample(times)
    assert len(counted) in (4, len(used) // 2)
