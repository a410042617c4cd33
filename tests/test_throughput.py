"""Step times over real lengths, held against plain loops."""

from collections.abc import Callable
from dataclasses import astuple, replace
from functools import partial

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from records import RATES, make_cluster, make_profile

from autotune.engine.sampling import GlobalBatches, rebalanced
from autotune.setting import RANDOM, REBALANCE, Structure
from autotune.throughput import (
    Communication,
    DrawnRows,
    DrawnSteps,
    Floats,
    Ints,
    MicroStepTime,
    StepRate,
    evaluate,
    hidden_s,
    integrate,
    padded_lengths,
    predicted_communication,
    predicted_micro_step,
    predicted_offload_s,
    predicted_update_s,
    synchronises_every_micro_step,
)
from autotune.workload import ModelProfile, Polynomial

lengths_of_rows = st.lists(st.integers(1, 2000), min_size=1, max_size=60).map(
    lambda lengths: np.array(lengths, dtype=np.int64)
)
sizes = st.integers(1, 4)


def micro_step_s(sizes: Ints, padded: Ints) -> Floats:
    seconds: Floats = 0.001 + sizes * (1e-5 * padded + 1e-8 * padded.astype(float) ** 2)
    return seconds


def naive_rate(
    lengths: Ints, order: Ints, size: int, accumulation: int, ranks: int, *, each: bool
) -> StepRate:
    """Go through the training step by step, as an engine does; rows repeat to fill one step."""
    rows_a_step = size * accumulation * ranks
    drawn = [int(row) for row in order]
    while len(drawn) < rows_a_step:
        drawn += [int(row) for row in order]
    step_times, tokens = [], 0
    for step in range(max(1, len(order) // rows_a_step)):
        rank_seconds = [0.0] * ranks
        for place in range(accumulation):
            seconds = []
            for rank in range(ranks):
                start = step * rows_a_step + (place * ranks + rank) * size
                rows = drawn[start : start + size]
                tokens += sum(int(lengths[row]) for row in rows)
                longest = max(int(lengths[row]) for row in rows)
                seconds.append(float(micro_step_s(np.array([size]), np.array([longest]))[0]))
            for rank in range(ranks):
                rank_seconds[rank] += max(seconds) if each else seconds[rank]
        step_times.append(max(rank_seconds) + 0.05)
    mean = sum(step_times) / len(step_times)
    return StepRate(
        step_time_s=mean,
        samples_per_s=rows_a_step / mean,
        tokens_per_s=tokens / len(step_times) / mean,
    )


def rate(
    lengths: Ints, size: int, accumulation: int, ranks: int, *, each: bool, seed: int = 0
) -> StepRate:
    return integrate(
        DrawnRows.draw(lengths, seed),
        micro_batch_size=size,
        gradient_accumulation_steps=accumulation,
        ranks=ranks,
        micro_step_s=micro_step_s,
        boundary_extra_s=0.05,
        synchronises_every_micro_step=each,
    )


@given(lengths=lengths_of_rows, size=sizes, accumulation=sizes, ranks=sizes, each=st.booleans())
def test_integration_is_the_loop_over_steps_ranks_and_rows(
    *, lengths: Ints, size: int, accumulation: int, ranks: int, each: bool
) -> None:
    order = DrawnRows.draw(lengths, 0).order
    naive = naive_rate(lengths, order, size, accumulation, ranks, each=each)
    found = rate(lengths, size, accumulation, ranks, each=each)
    assert found.step_time_s == pytest.approx(naive.step_time_s)
    assert found.samples_per_s == pytest.approx(naive.samples_per_s)
    assert found.tokens_per_s == pytest.approx(naive.tokens_per_s)


rising = st.builds(
    MicroStepTime,
    start_s=st.floats(0, 1),
    a_row_s=st.builds(
        Polynomial, c0=st.floats(-1, 1), c1=st.floats(1e-5, 1), c2=st.floats(0, 1e-3)
    ),
)


@given(lengths_of_rows, sizes, sizes, sizes, st.lists(rising, min_size=1, max_size=3))
def test_many_polynomials_at_once_are_each_by_itself(
    lengths: Ints, size: int, accumulation: int, ranks: int, kinds: list[MicroStepTime]
) -> None:
    steps = DrawnSteps.draw(DrawnRows.draw(lengths, 0), size, accumulation, ranks)
    at_once = steps.mean_s_of(kinds)
    for kind, pair in zip(kinds, at_once, strict=True):
        alone = [steps.mean_s(kind, synchronises_every_micro_step=each) for each in (False, True)]
        assert pair == pytest.approx(alone, abs=1e-9)


RANKS, MICRO_STEPS, BATCH = 2, 4, 16


def split_by_length(rows: int) -> tuple[DrawnRows, GlobalBatches]:
    """Return rows with what the sampler makes of them, and a training's own sampler."""
    lengths = np.random.default_rng(rows).integers(10, 900, rows)
    split = {"global_batch_size": BATCH, "ranks": RANKS, "seed": 5}
    drawn = rebalanced(lengths, accumulations=[MICRO_STEPS], epochs=1, **split)
    sampler = GlobalBatches(lengths, rank=0, accumulation=MICRO_STEPS, rebalance=True, **split)
    return DrawnRows.draw(lengths, 5, drawn), sampler


@pytest.mark.parametrize("each", [False, True])
def test_steps_split_by_length_take_what_the_sampler_makes_of_them(*, each: bool) -> None:
    rows, sampler = split_by_length(64)
    step_times, tokens = [], 0
    by_rank = []
    for rank in range(RANKS):
        sampler.rank = rank
        by_rank.append(list(sampler))
    for step in range(64 // BATCH):
        seconds = np.zeros((MICRO_STEPS, RANKS))
        for place, rank in np.ndindex(seconds.shape):
            batch = rows.lengths[by_rank[rank][step * MICRO_STEPS + place]]
            tokens += int(batch.sum())
            seconds[place, rank] = micro_step_s(np.array(len(batch)), batch.max())
        slowest = seconds.max(axis=1).sum() if each else seconds.sum(axis=0).max()
        step_times.append(slowest + 0.05)
    found = integrate(
        rows,
        micro_batch_size=BATCH // RANKS // MICRO_STEPS,
        gradient_accumulation_steps=MICRO_STEPS,
        ranks=RANKS,
        micro_step_s=micro_step_s,
        boundary_extra_s=0.05,
        synchronises_every_micro_step=each,
        sampling=REBALANCE,
    )
    assert found.step_time_s == pytest.approx(np.mean(step_times))
    assert found.tokens_per_s == pytest.approx(tokens / len(step_times) / np.mean(step_times))


def test_many_kinds_of_unlike_micro_batches_are_nearly_each_by_itself() -> None:
    rows, _ = split_by_length(320)
    steps = DrawnSteps.draw(rows, 2, MICRO_STEPS, RANKS, REBALANCE)
    kind = MicroStepTime(start_s=1e-3, a_row_s=Polynomial(c0=0.0, c1=1e-5, c2=1e-9))
    alone = [steps.mean_s(kind, synchronises_every_micro_step=each) for each in (False, True)]
    assert steps.mean_s_of([kind])[0] == pytest.approx(alone, rel=0.01)


def test_rows_split_by_length_are_faster_where_they_are_unlike() -> None:
    rows, _ = split_by_length(320)
    by_sampling = {
        sampling: integrate(
            rows,
            micro_batch_size=2,
            gradient_accumulation_steps=MICRO_STEPS,
            ranks=RANKS,
            micro_step_s=micro_step_s,
            boundary_extra_s=0.0,
            synchronises_every_micro_step=True,
            sampling=sampling,
        ).tokens_per_s
        for sampling in (RANDOM, REBALANCE)
    }
    assert by_sampling[REBALANCE] > 1.1 * by_sampling[RANDOM]


def test_rows_of_one_length_are_split_alike_by_any_sampling() -> None:
    rows = DrawnRows.draw(np.full(64, 100), 0)
    random, rebalance = (DrawnSteps.draw(rows, 2, 4, 2, one) for one in (RANDOM, REBALANCE))
    assert random.padded.tolist() == rebalance.padded.tolist()
    assert rows.heaviest(REBALANCE, 2, 4) == (2, 100)


@given(lengths_of_rows, sizes, sizes, sizes)
def test_to_wait_for_each_other_in_every_micro_step_is_never_faster(
    lengths: Ints, size: int, accumulation: int, ranks: int
) -> None:
    waiting = rate(lengths, size, accumulation, ranks, each=True)
    free = rate(lengths, size, accumulation, ranks, each=False)
    assert waiting.step_time_s >= free.step_time_s * (1 - 1e-12)


@given(lengths_of_rows, st.integers(1, 9), st.integers(0, 99))
def test_padded_lengths_are_the_longest_of_each_micro_batch(
    lengths: Ints, size: int, seed: int
) -> None:
    rows = DrawnRows.draw(lengths, seed)
    order = rows.order.tolist()
    batches = [order[start : start + size] for start in range(0, len(order), size)]
    expected = [max(int(lengths[row]) for row in batch) for batch in batches]
    assert padded_lengths(rows, size).tolist() == expected


@given(st.integers(1, 500), st.integers(0, 2**32 - 1))
def test_the_order_draws_every_row_once_and_is_that_of_the_seed(rows: int, seed: int) -> None:
    lengths = np.ones(rows, dtype=np.int64)
    order = DrawnRows.draw(lengths, seed).order.tolist()
    assert sorted(order) == list(range(rows))
    assert order == DrawnRows.draw(lengths, seed).order.tolist()


@given(st.integers(1, 64), st.integers(1, 5000))
def test_a_polynomial_is_linear_in_rows_and_quadratic_in_length(rows: int, length: int) -> None:
    polynomial = Polynomial(c0=3.0, c1=2.0, c2=0.5)
    expected = rows * (3.0 + 2.0 * length + 0.5 * length * length)
    assert evaluate(polynomial, rows, np.array([length]))[0] == pytest.approx(expected)


def test_the_square_of_a_very_long_row_does_not_overflow() -> None:
    square = evaluate(Polynomial(c0=0.0, c1=0.0, c2=1.0), 1, np.array([2**33]))
    assert square[0] == 2.0**66


def test_only_zero_2_and_3_synchronise_every_micro_step_and_only_among_ranks() -> None:
    assert [synchronises_every_micro_step(stage, 2) for stage in range(4)] == [
        False,
        False,
        True,
        True,
    ]
    assert not any(synchronises_every_micro_step(stage, 1) for stage in range(4))


def predicted(checkpointing: str, size: int) -> Callable[[Ints], Floats]:
    return partial(predicted_micro_step(make_profile(), checkpointing, RATES), np.array([size]))


def test_a_micro_step_costs_its_operations_and_the_start_of_its_operators() -> None:
    # 2 rows x (6e9 x 1000 + 1e5 x 1000^2) operations at 1e14 a second, 2000 starts of 10 us.
    assert predicted("none", 2)(np.array([1000]))[0] == pytest.approx(2 * 6.1e12 / 1e14 + 0.02)


def test_recomputation_costs_time() -> None:
    length = np.array([500])
    assert predicted("full", 2)(length)[0] > predicted("none", 2)(length)[0]


def test_more_rows_a_micro_step_never_cost_a_row_more() -> None:
    a_row = [predicted("none", size)(np.array([500]))[0] / size for size in (1, 2, 4, 8)]
    assert a_row == sorted(a_row, reverse=True)


@pytest.mark.parametrize("stage", range(4))
def test_one_rank_has_nobody_to_talk_to(stage: int) -> None:
    structure = Structure(zero_stage=stage)
    alone = predicted_communication(make_profile(), structure, 1, RATES, 2)
    assert alone == Communication()


def test_only_stages_2_and_3_talk_in_every_micro_step() -> None:
    talk = [astuple(talk_of(Structure(zero_stage=stage))) for stage in range(4)]
    # Three quarters of 2 GB of gradients and as much of weights over 100 GB/s; two buckets.
    once, start = 0.015, 2 * RATES.collective_overhead_s
    assert talk[0] == pytest.approx((0.0, 0.0, 0.0, 0.0, 2 * once + start))
    assert talk[1] == pytest.approx((0.0, 0.0, 0.0, 2 * once + start, once + start))
    assert talk[2] == pytest.approx((0.0, 2 * once + start, 0.0, 0.0, once + start))
    gathering = once + make_profile().longer_than(100_000) * RATES.collective_overhead_s
    assert talk[3] == pytest.approx((gathering, gathering + once + start, 0.0, 0.0, 0.0))


FAST_INSIDE = replace(
    RATES,
    link_bytes_per_s=1e10,
    collective_overhead_s=1e-3,
    node_link_bytes_per_s=1e11,
    node_collective_overhead_s=1e-5,
)


def hpz_of(group: int, profile: ModelProfile | None = None) -> Communication:
    """Return what eight ranks in nodes of four say to each other."""
    structure = Structure(zero_stage=3, zero_hpz_partition_size=group)
    return predicted_communication(profile or make_profile(), structure, 8, FAST_INSIDE, 2, 4)


def test_weights_that_a_node_has_are_gathered_between_nodes_once_an_update() -> None:
    gathers = make_profile().longer_than(100_000)
    near = 3 / 4 * 2e9 / 1e11 + gathers * 1e-5
    far = 7 / 8 * 2e9 / 1e10 + gathers * 1e-3
    scattering = 7 / 8 * 2e9 / 1e10 + 2 * 1e-3
    assert astuple(hpz_of(1)) == pytest.approx((far, far + scattering, 0.0, 0.0, 0.0))
    assert astuple(hpz_of(4)) == pytest.approx((near, near + scattering, far - near, 0.0, 0.0))
    # Two of a node's four have half of the way.
    assert hpz_of(2).forward_s == pytest.approx(1 / 2 * 2e9 / 1e11 + gathers * 1e-5)


def test_a_group_that_leaves_its_node_goes_at_the_rate_between_nodes() -> None:
    assert hpz_of(8).forward_s == pytest.approx(hpz_of(1).forward_s)
    assert hpz_of(8).first_forward_s == pytest.approx(0.0)
    # Four ranks in a row are not in a node of six.
    structure = Structure(zero_stage=3, zero_hpz_partition_size=4)
    talk = predicted_communication(make_profile(), structure, 12, FAST_INSIDE, 2, 6)
    assert talk.forward_s > 3 / 4 * 2e9 / 1e10


def test_weights_that_never_change_are_not_gathered_again() -> None:
    adapters = replace(make_profile(), trainable_parameters=1_000_000)
    far = hpz_of(1, adapters).forward_s
    near = hpz_of(4, adapters).forward_s
    assert hpz_of(4, adapters).first_forward_s == pytest.approx((far - near) / 1000)


def test_the_first_forward_pass_hides_no_more_than_it_computes() -> None:
    computing, steps = np.array([3.0]), np.array([1])
    columns = [np.array([seconds]) for seconds in (0.4, 0.0, 5.0, 0.0, 0.0)]
    # A third of the pass is the forward one: 0.4 s of it were hidden already.
    assert hidden_s(columns, computing, steps) == pytest.approx([0.4 + 0.6])


def talk_of(structure: Structure, profile: ModelProfile | None = None) -> Communication:
    return predicted_communication(profile or make_profile(), structure, 4, RATES, 2)


def test_short_buckets_and_parameters_that_are_parted_start_more_collectives() -> None:
    sizes = (50_000,) * 30 + (10_000_000,) * 97
    profile = replace(make_profile(), trained_sizes=sizes)
    plain, start = Structure(zero_stage=3), RATES.collective_overhead_s
    short = replace(plain, reduce_bucket_size=100_000_000)
    more = talk_of(short, profile).backward_s - talk_of(plain, profile).backward_s
    assert more == pytest.approx((10 - 2) * start)
    parted = replace(plain, stage3_param_persistence_threshold=10_000)
    more = talk_of(parted, profile).forward_s - talk_of(plain, profile).forward_s
    assert more == pytest.approx(30 * start)


def test_a_sharded_update_takes_its_share_of_the_time() -> None:
    cluster = make_cluster(gpus=4)
    plain, sharded = Structure(zero_stage=0), Structure(zero_stage=1)
    whole = predicted_update_s(make_profile(), plain, cluster, RATES)
    assert whole == pytest.approx(28e9 / 1e12)
    assert predicted_update_s(make_profile(), sharded, cluster, RATES) == pytest.approx(whole / 4)
    frozen = replace(make_profile(), trainable_parameters=0)
    assert predicted_update_s(frozen, plain, cluster, RATES) == 0.0


def test_an_offloaded_update_takes_the_time_of_the_host() -> None:
    cluster = make_cluster(gpus=4)
    offloaded = Structure(zero_stage=2, offload_optimizer="cpu")
    place = make_profile(), offloaded, cluster, RATES
    # A quarter of a billion parameters: 28 bytes each in memory, 2 down and 2 up the link.
    assert predicted_update_s(*place) == pytest.approx(0.25e9 * 28 / RATES.host_memory_bytes_per_s)
    crossing = 0.25e9 * 2 / RATES.host_link_bytes_per_s
    assert predicted_offload_s(*place, 2) == pytest.approx((crossing, crossing))
    earlier = replace(offloaded, zero_stage=1)
    late = predicted_offload_s(make_profile(), earlier, cluster, RATES, 2)
    assert late == pytest.approx((0.0, 2 * crossing))


def test_offloaded_weights_come_twice_a_micro_step() -> None:
    cluster = make_cluster(gpus=4)
    structure = Structure(zero_stage=3, offload_param="cpu")
    copies = predicted_offload_s(make_profile(), structure, cluster, RATES, 2)
    assert copies == pytest.approx((2 * 0.5e9 / RATES.host_link_bytes_per_s, 0.0))


def test_adapters_alone_are_gathered_before_stage_3() -> None:
    adapters = replace(make_profile(), trainable_parameters=1_000_000)
    talk = [
        sum(astuple(predicted_communication(adapters, Structure(zero_stage=stage), 4, RATES, 2)))
        for stage in range(4)
    ]
    once, start = 0.75 * 2e6 / 1e11, RATES.collective_overhead_s
    assert talk[0] == pytest.approx(2 * once + start)
    assert talk[1] == talk[2] == pytest.approx(3 * once + 2 * start)
    assert talk[3] > 100 * talk[0]
