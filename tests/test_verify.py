"""First steps against the probe: what is said, and when a hand-off falls short."""

from typing import Any

import pytest

from autotune.verify import FIRST_STEPS, MEMORY_TOLERANCE, SPEED_TOLERANCE, Promise, verdict

PROMISE = Promise(tokens_per_s=1000.0, peak_bytes=10**9, tokens_per_step=2000.0, longest_row=500)


def steps(count: int, **changes: Any) -> list[dict[str, Any]]:  # noqa: ANN401 - fields of a line
    line = {"max_steps": 100, "tokens": 2000, "step_time_s": 2.0, "peak_bytes": 9 * 10**8}
    line |= {"longest_row": 400, **changes}
    return [line | {"step": step} for step in range(1, count + 1)]


def test_it_waits_for_the_first_steps_or_the_end() -> None:
    assert verdict(PROMISE, [], others_share=None) is None
    assert verdict(PROMISE, steps(FIRST_STEPS), others_share=None) is None
    assert verdict(PROMISE, steps(FIRST_STEPS + 1), others_share=None) is not None
    assert verdict(PROMISE, steps(3, max_steps=3), others_share=None) is not None
    assert verdict(PROMISE, steps(1, max_steps=1), others_share=None) is None


def test_what_was_promised_is_within() -> None:
    seen = verdict(PROMISE, steps(20), others_share=0.0)
    assert seen is not None
    assert seen.within
    assert (seen.speed_deviation, seen.causes) == (0.0, ())


def test_the_step_that_warms_up_does_not_count() -> None:
    lines = steps(20)
    lines[0]["step_time_s"] = 100.0
    seen = verdict(PROMISE, lines, others_share=None)
    assert seen is not None
    assert seen.within


@pytest.mark.parametrize(
    ("changes", "others_share", "says"),
    [
        ({"step_time_s": 4.0}, 0.5, "other programs took 50% of the processors"),
        ({"step_time_s": 4.0, "tokens": 4000 * 0.7}, 0.0, "longer than the average"),
        ({"step_time_s": 4.0}, 0.0, "between steps"),
        ({"step_time_s": 1.0}, 0.0, "the probe was disturbed"),
        ({"peak_bytes": 2 * 10**9}, 0.0, "fragmented"),
        ({"peak_bytes": 2 * 10**9, "longest_row": 900}, 0.0, "a row of 900 tokens is longer"),
    ],
)
def test_a_deviation_has_its_likely_cause(
    changes: dict[str, Any], others_share: float, says: str
) -> None:
    seen = verdict(PROMISE, steps(20, **changes), others_share=others_share)
    assert seen is not None
    assert not seen.within
    assert says in seen.causes[0]


@pytest.mark.parametrize(
    ("changes", "falls_short"),
    [
        ({"step_time_s": 2.0 / (1 - SPEED_TOLERANCE) * 1.01}, True),
        ({"step_time_s": 2.0 / (1 - SPEED_TOLERANCE) * 0.99}, False),
        ({"step_time_s": 1.0}, False),
        ({"peak_bytes": 1.01 * 10**9 * (1 + MEMORY_TOLERANCE)}, True),
        ({"peak_bytes": 0.99 * 10**9 * (1 + MEMORY_TOLERANCE)}, False),
    ],
)
def test_only_slower_or_larger_falls_short(changes: dict[str, Any], *, falls_short: bool) -> None:
    seen = verdict(PROMISE, steps(20, **changes), others_share=None)
    assert seen is not None
    assert seen.falls_short is falls_short
