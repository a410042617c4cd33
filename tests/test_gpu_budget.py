"""What a rank may allocate of a GPU: from what is free, less a headroom for others. Pure."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autotune.detect.budget import (
    IDLE_BYTES,
    LEAST_HEADROOM_BYTES,
    Budget,
    capacity,
    capped,
    gpu_budget,
    headroom,
    is_busy,
    used_by_others,
)
from autotune.units import GIB, MIB

ROOM = 24 * GIB


def test_the_borders_are_what_the_documentation_says() -> None:
    assert IDLE_BYTES == 512 * 2**20
    assert LEAST_HEADROOM_BYTES == 256 * 2**20


free_bytes = st.integers(0, ROOM)


def test_an_idle_gpu_is_all_there() -> None:
    for used in (0, 1, IDLE_BYTES):
        budget = gpu_budget(ROOM, ROOM - used)
        assert (budget.num_bytes, budget.headroom_bytes) == (ROOM, 0)
        assert "nobody else" in budget.source


def test_a_byte_more_is_someone_s() -> None:
    budget = gpu_budget(ROOM, ROOM - IDLE_BYTES - 1)

    assert budget.headroom_bytes == LEAST_HEADROOM_BYTES
    assert budget.num_bytes == ROOM - IDLE_BYTES - 1 - LEAST_HEADROOM_BYTES


def test_the_headroom_is_a_tenth_of_what_others_use_and_no_less_than_the_least() -> None:
    assert headroom(0) == 0
    assert headroom(1) == 256 * MIB
    assert headroom(2560 * MIB) == 256 * MIB
    assert headroom(2570 * MIB) == 257 * MIB
    assert headroom(20 * GIB) == 2 * GIB


def test_what_is_said_has_free_memory_headroom_and_use() -> None:
    assert gpu_budget(ROOM, 14 * GIB).source == (
        "14.0 GiB free of the GPU less a headroom of 1.00 GiB, as others use 10.0 GiB"
    )
    assert gpu_budget(ROOM, ROOM).source == "all of the GPU, which nobody else uses"


@given(free_bytes)
def test_a_budget_that_is_shared_is_free_memory_less_the_headroom(free: int) -> None:
    budget = gpu_budget(ROOM, free)

    assert 0 <= budget.num_bytes <= ROOM
    if used_by_others(ROOM, free):
        assert budget.num_bytes == max(0, free - budget.headroom_bytes)
        assert budget.headroom_bytes >= LEAST_HEADROOM_BYTES
        assert budget.num_bytes < free or free == 0


@given(free_bytes, free_bytes)
def test_more_free_memory_never_makes_a_smaller_budget(one: int, other: int) -> None:
    less, more = sorted((one, other))

    assert gpu_budget(ROOM, less).num_bytes <= gpu_budget(ROOM, more).num_bytes


def test_free_memory_above_the_capacity_is_nobody_s() -> None:
    assert used_by_others(ROOM, ROOM + GIB) == 0
    assert gpu_budget(ROOM, ROOM + GIB).num_bytes == ROOM


def test_half_of_the_memory_has_to_be_free() -> None:
    assert not is_busy(ROOM, ROOM // 2)
    assert is_busy(ROOM, ROOM // 2 - 1)


@pytest.mark.parametrize(
    ("total", "reserved", "known", "seen"),
    [
        pytest.param(100, 3, 96, 96, id="the table's, a little below the total"),
        pytest.param(100, 3, 100, 100, id="the table's is the total"),
        pytest.param(100, 3, 95, 95, id="the table's, just near enough"),
        pytest.param(100, 3, 94, 97, id="too far below: another memory of that name"),
        pytest.param(100, 3, 101, 97, id="above the total"),
        pytest.param(100, 3, None, 97, id="not in the table"),
        pytest.param(100, 0, None, 98, id="neither in the table nor told apart"),
    ],
)
def test_a_process_sees_what_the_driver_leaves(
    total: int, reserved: int, known: int | None, seen: int
) -> None:
    assert capacity(total, reserved, known) == seen


THERE = Budget(num_bytes=8 * GIB, source="free", headroom_bytes=GIB)


def test_unasked_a_budget_stays_as_it_is() -> None:
    assert capped(THERE, None, 9 * GIB) is THERE


@pytest.mark.parametrize("asked", [1, 8 * GIB])
def test_what_is_asked_for_is_a_cap(asked: int) -> None:
    assert capped(THERE, asked) == Budget(num_bytes=asked, source="--device-memory")


@pytest.mark.parametrize("asked", [8 * GIB + 1, 9 * GIB])
def test_the_headroom_can_be_given_up_with_a_word(asked: int) -> None:
    budget = capped(THERE, asked, 9 * GIB)

    assert (budget.num_bytes, budget.headroom_bytes) == (asked, 9 * GIB - asked)
    assert budget.source == "--device-memory"
    (note,) = budget.notes
    assert note.startswith("--device-memory ")
    assert note.endswith(" GiB takes of the headroom that is left to others")


@pytest.mark.parametrize(("asked", "free"), [(9 * GIB + 1, 9 * GIB), (8 * GIB + 1, None)])
def test_more_than_there_is_keeps_what_there_is(asked: int, free: int | None) -> None:
    budget = capped(THERE, asked, free)

    assert (budget.num_bytes, budget.headroom_bytes) == (8 * GIB, GIB)
    (note,) = budget.notes
    assert note.startswith("--device-memory ")
    assert note.endswith(" GiB is more than there is, so 8.00 GiB is kept (free)")
