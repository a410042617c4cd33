"""The space: every way to split the global batch, and nothing that would change it."""

import re

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from records import make_cluster

from autotune.errors import UsageError
from autotune.space import enumerate_space, micro_batch_sizes

per_rank_batches = st.integers(1, 4096)
ranks = st.integers(1, 64)


@given(per_rank_batches, ranks)
def test_every_setting_makes_up_the_global_batch(per_rank: int, num_ranks: int) -> None:
    space = enumerate_space(make_cluster(gpus=num_ranks), per_rank * num_ranks)
    products = space.micro_batch_size * space.gradient_accumulation_steps * num_ranks
    assert set(products.tolist()) == {per_rank * num_ranks}
    assert space.ranks == num_ranks


@given(per_rank_batches, ranks)
def test_every_micro_batch_size_that_can_be_is_there_once(per_rank: int, num_ranks: int) -> None:
    expected = [size for size in range(1, per_rank + 1) if per_rank % size == 0]
    assert list(micro_batch_sizes(per_rank * num_ranks, num_ranks)) == expected


@given(st.integers(1, 4096), ranks)
def test_a_refusal_names_the_nearest_global_batches_that_work(
    global_batch: int, num_ranks: int
) -> None:
    assume(global_batch % num_ranks != 0)
    with pytest.raises(UsageError) as refused:
        micro_batch_sizes(global_batch, num_ranks)
    named = [int(size) for size in re.findall(r"\d+", str(refused.value).partition(":")[2])]
    below = max((size for size in range(1, global_batch) if size % num_ranks == 0), default=None)
    above = next(size for size in range(global_batch, 10**6) if size % num_ranks == 0)
    assert named == [size for size in (below, above) if size]
    for size in named:
        micro_batch_sizes(size, num_ranks)


def test_a_global_batch_of_millions_is_split_at_once() -> None:
    assert len(micro_batch_sizes(10**12, 1)) == 169


@given(st.integers(1, 16))
def test_no_setting_is_there_twice(num_ranks: int) -> None:
    space = enumerate_space(make_cluster(gpus=num_ranks), 16 * num_ranks)
    settings = [space.setting(row) for row in range(len(space))]
    assert len(set(settings)) == len(settings)


def test_offload_is_there_only_beside_a_separate_device() -> None:
    assert set(enumerate_space(make_cluster(gpus=2), 8).column("offload_optimizer")) == {
        "none",
        "cpu",
    }
    assert set(enumerate_space(make_cluster(), 8).column("offload_optimizer")) == {"none"}


def test_offload_needs_a_sharded_optimizer() -> None:
    structures = enumerate_space(make_cluster(gpus=2), 8).structures
    assert {one.zero_stage for one in structures if one.offload_optimizer == "cpu"} == {1, 2, 3}


def test_a_column_has_a_value_for_every_setting() -> None:
    space = enumerate_space(make_cluster(gpus=2), 8)
    stages = [space.setting(row).structure.zero_stage for row in range(len(space))]
    assert space.column("zero_stage").tolist() == stages
