"""Rows of a step: each once, the same however they are split, held-out ones never."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from autotune.dataset.splitting import num_held_out, split_rows
from autotune.engine.sampling import GlobalBatches, StepShape, rebalanced


def batches(  # what a rank's sampler is made from
    lengths: list[int], ranks: int, rank: int, accumulation: int, *, rebalance: bool
) -> GlobalBatches:
    return GlobalBatches(
        np.array(lengths),
        global_batch_size=8,
        ranks=ranks,
        rank=rank,
        accumulation=accumulation,
        seed=3,
        rebalance=rebalance,
    )


@given(
    lengths=st.lists(st.integers(1, 300), min_size=1, max_size=40),
    split=st.sampled_from([(1, 1), (1, 4), (1, 8), (2, 1), (2, 4), (4, 2), (8, 1)]),
    rebalance=st.booleans(),
)
def test_every_split_takes_the_rows_of_a_step_once(
    lengths: list[int], split: tuple[int, int], *, rebalance: bool
) -> None:
    ranks, accumulation = split
    samplers = [
        batches(lengths, ranks, rank, accumulation, rebalance=rebalance) for rank in range(ranks)
    ]
    for epoch in (0, 1):
        for sampler in samplers:
            sampler.set_epoch(epoch)
        whole = batches(lengths, 1, 0, 1, rebalance=False)
        steps = [whole.rows_of(epoch, step) for step in range(len(list(whole)))]
        taken = [list(sampler) for sampler in samplers]
        assert all(len(one) == len(sampler) for one, sampler in zip(taken, samplers, strict=True))
        for place, rows in enumerate(steps):
            window = slice(place * accumulation, (place + 1) * accumulation)
            parts = [part for one in taken for part in one[window]]
            assert all(parts), "no micro-batch is empty"
            assert Counter(row for part in parts for row in part if row >= 0) == Counter(rows)
            shape = samplers[0].shape_of(epoch * len(steps) + place)
            padded = [len(part) * max(lengths[max(row, ~row)] for row in part) for part in parts]
            assert shape == StepShape(
                tokens=sum(lengths[row] for row in rows),
                longest_row=max(lengths[row] for row in rows),
                largest_micro_batch=max(padded),
            )
        assert sorted(row for rows in steps for row in rows) == list(range(len(lengths)))


@given(
    lengths=st.lists(st.integers(1, 300), min_size=1, max_size=60),
    split=st.sampled_from([(1, 1), (1, 8), (2, 1), (2, 4), (4, 2)]),
)
def test_what_a_plan_knows_of_the_split_is_what_ranks_are_given(
    lengths: list[int], split: tuple[int, int]
) -> None:
    ranks, accumulation = split
    drawn = rebalanced(
        np.array(lengths),
        global_batch_size=8,
        ranks=ranks,
        accumulations=[accumulation],
        seed=3,
        epochs=2,
    )[accumulation]
    samplers = [
        batches(lengths, ranks, rank, accumulation, rebalance=True) for rank in range(ranks)
    ]
    first = [list(sampler) for sampler in samplers]
    expected = [
        [max(row, ~row) for row in first[rank][place]]
        for place in range(max(1, len(lengths) // 8) * accumulation)
        for rank in range(ranks)
    ]
    assert drawn.sizes.shape[1:] == (accumulation, ranks)
    assert drawn.sizes.ravel().tolist() == list(map(len, expected))
    assert drawn.rows.tolist() == [row for batch in expected for row in batch]
    steps = 2 * -(-len(lengths) // 8)
    largest = max(samplers[0].shape_of(step).largest_micro_batch for step in range(steps))
    assert len(drawn.heaviest) * max(lengths[row] for row in drawn.heaviest) == largest


def test_full_micro_batches_are_alike_in_size_and_epochs_differ() -> None:
    sampler = batches(list(range(1, 33)), 2, 1, 2, rebalance=False)
    first = list(sampler)
    sampler.set_epoch(1)
    assert {len(part) for part in first} == {2}
    assert list(sampler) != first


@pytest.mark.parametrize(("rows", "share", "held"), [(100, 0.1, 10), (3, 0.01, 1), (1, 0.5, 0)])
def test_rows_are_trained_on_or_held_out(rows: int, share: float, held: int) -> None:
    trained, evaluated = split_rows(rows, share, seed=1)
    assert len(evaluated) == num_held_out(rows, share) == held
    assert sorted([*trained, *evaluated]) == list(range(rows))


def test_without_a_share_every_row_is_trained_on() -> None:
    trained, evaluated = split_rows(5, 0.0, seed=1)
    assert (list(trained), list(evaluated)) == ([0, 1, 2, 3, 4], [])
