"""The rows that a rung is tried on: the longest for memory, real padded lengths for time."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from autotune.engine.sampling import rebalanced
from autotune.probe.plan import RungPlanner
from autotune.probe.protocol import RungPlan
from autotune.setting import REBALANCE, Structure
from autotune.throughput import DrawnRows, Ints, evaluate, padded_lengths
from autotune.workload import Polynomial

datasets = st.lists(st.integers(1, 3000), min_size=1, max_size=80).map(
    lambda lengths: np.array(lengths, dtype=np.int64)
)
sizes = st.integers(1, 16)

FLOPS = Polynomial(c0=0.0, c1=6e6, c2=1e4)


def rung_of(lengths: Ints, size: int) -> RungPlan:
    setting = Structure(zero_stage=0).with_micro_batch(size, 1, 2 * size)
    return RungPlanner(DrawnRows.draw(lengths, 0), FLOPS).plan(setting)


@given(datasets, sizes)
def test_memory_is_tried_on_the_longest_rows_there_are(lengths: Ints, size: int) -> None:
    rows = rung_of(lengths, size).memory_rows
    found = sorted((int(lengths[row]) for row in set(rows)), reverse=True)
    assert found == sorted(lengths.tolist(), reverse=True)[:size]
    assert len(rows) == size


@given(datasets, sizes)
def test_every_micro_batch_has_its_size_and_is_padded_to_its_length(
    lengths: Ints, size: int
) -> None:
    for target, rows in rung_of(lengths, size).timed_rows:
        assert len(rows) == size
        assert max(int(lengths[row]) for row in rows) == target


@given(datasets, sizes)
def test_lengths_are_timed_from_short_to_the_longest_each_once(lengths: Ints, size: int) -> None:
    timed = [target for target, _ in rung_of(lengths, size).timed_rows]
    assert timed == sorted(set(timed))
    assert timed[-1] == lengths.max()


@given(datasets, sizes)
def test_timed_lengths_span_what_training_will_draw(lengths: Ints, size: int) -> None:
    padded = padded_lengths(DrawnRows.draw(lengths, 0), size)
    timed = [target for target, _ in rung_of(lengths, size).timed_rows]
    assert timed[0] == padded.min()


@given(datasets, sizes)
def test_no_row_is_used_twice_where_there_are_enough(lengths: Ints, size: int) -> None:
    rung = rung_of(lengths, size)
    for target, rows in (*rung.timed_rows, (int(lengths.max()), rung.memory_rows)):
        enough = (lengths <= target).sum() >= size
        assert len(set(rows)) == size if enough else set(rows) <= set(range(len(lengths)))


def test_rows_of_one_length_are_timed_once() -> None:
    rung = rung_of(np.full(10, 64), 4)
    assert [target for target, _ in rung.timed_rows] == [64]


def test_a_dataset_smaller_than_the_micro_batch_repeats_its_rows() -> None:
    rung = rung_of(np.array([5, 7]), 5)
    assert rung.memory_rows == (1, 0, 1, 0, 1)


def test_three_lengths_stand_for_a_spread_dataset() -> None:
    rung = rung_of(np.arange(20, 900), 2)
    (shortest, middle, longest) = (target for target, _ in rung.timed_rows)
    assert 20 < shortest < 200 < middle < 800 < longest == 899


def test_unlike_micro_batches_are_tried_as_the_sampler_makes_them() -> None:
    lengths = np.random.default_rng(1).integers(10, 900, 320)
    split = rebalanced(lengths, global_batch_size=16, ranks=2, accumulations=[4], seed=0, epochs=3)
    setting = Structure(zero_stage=0, sampling=REBALANCE).with_micro_batch(2, 2, 16)
    rung = RungPlanner(DrawnRows.draw(lengths, 0, split), FLOPS).plan(setting)
    made = {
        tuple(batch)
        for batch in map(np.ndarray.tolist, np.split(split[4].rows, np.cumsum(split[4].sizes)[:-1]))
    }
    assert {rows for _, rows in rung.timed_rows} <= made
    assert all(max(lengths[list(rows)]) == length for length, rows in rung.timed_rows)
    work = [float(evaluate(FLOPS, len(rows), np.array(length))) for length, rows in rung.timed_rows]
    assert work == sorted(set(work))
    assert len(work) == 3
    assert rung.memory_rows == tuple(split[4].heaviest)
    heaviest = len(rung.memory_rows) * max(lengths[list(rung.memory_rows)])
    assert all(len(rows) * length <= heaviest for length, rows in rung.timed_rows)
