"""Structures that are in the space only where they may win."""

from dataclasses import replace

import numpy as np
import pytest
from records import LENGTHS, RATES, make_cluster, make_job, make_profile

from autotune.engine.sampling import rebalanced
from autotune.hardware import Cluster
from autotune.knobs import Pins, Value
from autotune.plan import Plan, make_plan
from autotune.prune import frugality
from autotune.setting import REBALANCE, Structure
from autotune.space import Space, enumerate_space, micro_batch_sizes
from autotune.throughput import DrawnRows, Ints
from autotune.units import GIB
from autotune.variants import (
    WORTH_TRYING,
    may_rebalance,
    with_frugal,
    with_overlap,
    with_partition,
    with_rebalancing,
)

NOTHING_PINNED = Pins()
PROFILE = make_profile(
    # A quarter of a billion elements lie between the two thresholds of persistence.
    trained_sizes=(60_000_000, *(20_000_000,) * 44, *(50_000,) * 200, 50_000_000),
)


def longer(
    cluster: Cluster, *, link: float = RATES.link_bytes_per_s, pins: Pins = NOTHING_PINNED
) -> tuple[Plan, Plan]:
    """Return the plan before and after what may win is added."""
    rates = replace(RATES, link_bytes_per_s=link)

    def estimate(space: Space) -> Plan:
        return make_plan(space, PROFILE, make_job(), cluster, rates, DrawnRows.draw(LENGTHS, 42))

    before = estimate(enumerate_space(cluster, 32, pins=pins))
    overlapping = with_overlap(before, estimate, cluster, pins)
    return before, with_frugal(overlapping, estimate, PROFILE, pins)


def added(plans: tuple[Plan, Plan]) -> set[Structure]:
    before, after = plans
    assert after.space.structures[: len(before.space.structures)] == before.space.structures
    return set(after.space.structures) - set(before.space.structures)


def test_where_links_are_slow_and_all_fits_only_overlap_is_added() -> None:
    found = added(longer(make_cluster(gpus=4, memory_bytes=900 * GIB), link=1e9))
    assert {(one.zero_stage, one.overlap_comm) for one in found} == {(1, True), (2, True)}
    assert {frugality(one) for one in found} == {0}


def test_where_links_are_fast_there_is_nothing_to_hide() -> None:
    assert added(longer(make_cluster(gpus=4, memory_bytes=900 * GIB), link=1e15)) == set()


def test_overlap_hides_no_more_than_there_is() -> None:
    before, after = longer(make_cluster(gpus=4, memory_bytes=900 * GIB), link=1e9)
    for index, structure in enumerate(after.space.structures):
        if structure not in added((before, after)):
            continue
        rows = np.flatnonzero(after.space.structure_index == index)
        plain = replace(structure, overlap_comm=False)
        settings = [after.space.setting(int(row)) for row in rows]
        found = [before.row_of(replace(one, structure=plain)) for one in settings]
        beside = np.array([row for row in found if row is not None])
        assert len(beside) == len(rows)
        saved = 1 - after.step_time_s[rows] / before.step_time_s[beside]
        assert (saved >= 0).all()
        assert saved.max() >= WORTH_TRYING
        assert saved.max() < 1


def test_where_memory_is_short_some_of_it_is_saved_by_what_is_not_outdone() -> None:
    plans = longer(make_cluster(gpus=4, memory_bytes=9 * GIB))
    found, after = added(plans), plans[1]
    assert {frugality(one) for one in found} >= {1, 2}
    assert {knob for one in found if (knob := one.offload_param) != "none"} <= {"cpu"}
    kept = {after.space.structures[index] for index in after.space.structure_index[after.kept]}
    assert {replace(one, checkpointing="none") for one in found} == {
        replace(one, checkpointing="none") for one in found & kept
    }
    assert {one.checkpointing for one in found} == {"none", "full"}
    assert len({one for one in found if one.checkpointing == "full"}) == len(found) / 2
    for row in np.flatnonzero(after.kept).tolist():
        structure = after.space.setting(row).structure
        if frugality(structure):
            needs = after.memory.device_bytes[row]
            plain = replace(
                structure,
                reduce_bucket_size=Structure(zero_stage=0).reduce_bucket_size,
                stage3_param_persistence_threshold=100_000,
                offload_param="none",
            )
            beside = after.row_of(replace(after.space.setting(row), structure=plain))
            assert beside is not None
            assert needs < after.memory.device_bytes[beside]
            assert not after.surely_fits[beside]


def partitioned(
    *, nodes: int = 2, link: float = 1e9, pins: Pins = NOTHING_PINNED
) -> set[Structure]:
    """Return what is added for eight GPUs in so many nodes, with fast links inside."""
    cluster = replace(
        make_cluster(gpus=8, memory_bytes=900 * GIB), num_nodes=nodes, devices_per_node=8 // nodes
    )
    rates = replace(
        RATES, link_bytes_per_s=link, node_link_bytes_per_s=1e11, node_collective_overhead_s=5e-5
    )

    def estimate(space: Space) -> Plan:
        return make_plan(space, PROFILE, make_job(), cluster, rates, DrawnRows.draw(LENGTHS, 42))

    before = estimate(enumerate_space(cluster, 32, pins=pins))
    return added((before, with_partition(before, estimate, cluster, pins)))


def test_where_nodes_are_far_apart_each_has_the_weights_of_stage_3() -> None:
    found = partitioned()
    assert found
    assert {(one.zero_stage, one.zero_hpz_partition_size) for one in found} == {(3, 4)}


def test_where_nothing_is_gained_by_it_weights_are_shared_out_among_all() -> None:
    assert partitioned(link=1e11) == set()
    assert partitioned(nodes=1) == set()
    # A rank by itself in its node has nobody to share with.
    assert partitioned(nodes=8) == set()
    assert partitioned(pins=Pins.of({"zero_hpz_partition_size": [1]})) == set()


def test_a_pinned_knob_is_left_as_it_is() -> None:
    pins = Pins.of({"overlap_comm": [False], "reduce_bucket_size": [-1], "offload_param": ["none"]})
    found = added(longer(make_cluster(gpus=4, memory_bytes=9 * GIB), link=1e9, pins=pins))
    assert {one.overlap_comm for one in found} <= {False}
    assert {one.reduce_bucket_size for one in found} <= {-1}
    assert {one.offload_param for one in found} <= {"none"}


def test_a_cpu_has_none_of_it_where_all_fits() -> None:
    assert added(longer(make_cluster(cpu_ranks=2, memory_bytes=900 * GIB))) == set()


def with_split_rows(lengths: Ints, pins: Pins = NOTHING_PINNED) -> tuple[Plan, Plan]:
    """Return the plan before and after splitting by length is added where it may win."""
    cluster, job = make_cluster(gpus=2, memory_bytes=80 * GIB), make_job()
    split = rebalanced(
        lengths,
        global_batch_size=32,
        ranks=2,
        accumulations=micro_batch_sizes(32, 2),
        seed=job.seed,
        epochs=1,
    )
    rows = DrawnRows.draw(lengths, job.seed, split)

    def estimate(space: Space) -> Plan:
        return make_plan(space, PROFILE, job, cluster, RATES, rows)

    before = estimate(enumerate_space(cluster, 32, pins=pins))
    return before, with_rebalancing(before, estimate, pins)


def test_unlike_rows_are_also_split_by_length_and_take_less_memory_and_time_for_it() -> None:
    plans = with_split_rows(LENGTHS)
    found, after = added(plans), plans[1]
    assert found
    assert {one.sampling for one in found} == {REBALANCE}
    for size in (4, 8):
        plain = Structure(zero_stage=2).with_micro_batch(size, 2, 32)
        split = replace(plain, structure=replace(plain.structure, sampling=REBALANCE))
        row, beside = after.row_of(split), after.row_of(plain)
        assert row is not None
        assert beside is not None
        assert after.tokens_per_s[row] > 1.1 * after.tokens_per_s[beside]
        assert after.memory.device_bytes[row] < after.memory.device_bytes[beside]


def test_rows_that_hardly_differ_are_taken_as_they_are_drawn() -> None:
    assert added(with_split_rows(np.array([1000, 1001] * 100))) == set()


def test_a_pinned_sampling_is_left_as_it_is() -> None:
    pins = Pins.of({"sampling": [REBALANCE]})
    before, after = with_split_rows(LENGTHS, pins)
    assert before is after
    assert {one.sampling for one in after.space.structures} == {REBALANCE}


@pytest.mark.parametrize(
    ("lengths", "batch", "pins", "may"),
    [
        ([5, 9], 32, {}, True),
        ([9, 9], 32, {}, False),
        ([5, 9], 1, {}, False),
        ([5, 9], 4096, {}, False),
        ([5, 9], 4096, {"sampling": [REBALANCE]}, True),
        ([9, 9], 32, {"sampling": [REBALANCE]}, False),
        ([5, 9], 32, {"sampling": ["random"]}, False),
    ],
)
def test_splitting_by_length_is_looked_at_where_it_may_win_or_is_asked_for(
    lengths: list[int], batch: int, pins: dict[str, list[Value]], *, may: bool
) -> None:
    assert may_rebalance(np.array(lengths), batch, Pins.of(pins)) == may
