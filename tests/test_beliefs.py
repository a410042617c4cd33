"""What is believed after outcomes: they correct what they say something of, and nothing else."""

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from records import as_rung, make_cluster, make_job, make_profile, measured, plan_for

from autotune.outcome import (
    Crashed,
    Interrupted,
    Outcome,
    OutOfMemory,
    Rung,
    TimedOut,
    Unknown,
)
from autotune.partial_checkpointing import with_partial_checkpointing
from autotune.plan import Plan
from autotune.setting import Setting, Structure, recomputed_share
from autotune.throughput import Floats
from autotune.tune.beliefs import Beliefs, Hint, update
from autotune.units import GIB

PLAN = plan_for(make_cluster(gpus=4, memory_bytes=24 * GIB), job=make_job(global_batch_size=64))
OUT_OF_MEMORY = OutOfMemory(where="device", evidence="torch.OutOfMemoryError")
rows = st.integers(0, len(PLAN.space) - 1)


def row_of(stage: int, size: int, *, checkpointing: str = "none", offload: str = "none") -> int:
    structure = replace(Structure(zero_stage=stage), checkpointing=checkpointing)
    if offload == "cpu":
        structure = replace(structure, offload_optimizer="cpu")
    row = PLAN.row_of(structure.with_micro_batch(size, 4, 64))
    assert row is not None
    return row


def rung(row: int, outcome: Outcome) -> Rung:
    return as_rung(PLAN.space.setting(row), outcome)


def as_estimated(row: int, *, speed: float = 1.0, memory: float = 1.0) -> Rung:
    """Return a rung measured at these factors of its estimates."""
    peak_bytes = int(memory * PLAN.memory.device_bytes[row])
    return rung(row, measured(speed * float(PLAN.tokens_per_s[row]), peak_bytes=peak_bytes))


def after(*rungs: Rung, plan: Plan = PLAN) -> Beliefs:
    return update(plan, rungs)


def same(one: Beliefs, two: Beliefs) -> bool:
    return (
        np.array_equal(one.log_tokens_per_s, two.log_tokens_per_s)
        and np.array_equal(one.log_sd, two.log_sd)
        and np.array_equal(one.possible, two.possible)
        and np.array_equal(one.open_rows, two.open_rows)
        and one.best_tokens_per_s == two.best_tokens_per_s
    )


def corrections(beliefs: Beliefs) -> Floats:
    """Return believed over predicted speed."""
    factors: Floats = np.exp(beliefs.log_tokens_per_s) / PLAN.tokens_per_s
    return factors


def test_a_hint_is_believed_less_than_what_was_measured() -> None:
    row = row_of(2, 4)
    hinted = update(PLAN, [], hints={row: Hint(faster=-0.5, larger=None)})
    measured_so = after(as_estimated(row, speed=math.exp(-0.5)))
    assert -0.5 < math.log(corrections(hinted)[row]) < -0.4
    assert measured_so.log_sd[row] < hinted.log_sd[row] < after().log_sd[row]
    # It says something of its neighbours, and is no measured best.
    assert corrections(hinted)[row_of(2, 8)] < 0.8
    assert hinted.best_tokens_per_s == 0
    assert (hinted.possible == after().possible).all()


def test_what_was_measured_goes_before_its_hint() -> None:
    row = row_of(2, 4)
    rungs = [as_estimated(row, speed=1.2, memory=1.05)]
    hinted = update(PLAN, rungs, hints={row: Hint(faster=-2.0, larger=1.0)})
    assert same(hinted, update(PLAN, rungs))


def test_a_hint_of_memory_moves_the_wall() -> None:
    row = row_of(3, 1)
    room = math.log(PLAN.budget_bytes / PLAN.memory.device_bytes[row])
    larger = update(PLAN, [], hints={row: Hint(faster=0.0, larger=room + 0.2)})
    assert larger.fit_probability[row] < 0.1 < after().fit_probability[row]


def test_before_any_outcome_the_plan_is_believed_but_for_work_that_is_added() -> None:
    beliefs = after()
    column = PLAN.space.column
    recomputed = np.array([recomputed_share(mode) for mode in column("checkpointing")])
    added = (
        recomputed + (column("offload_optimizer") != "none") + (column("offload_param") != "none")
    )
    factors = corrections(beliefs)
    assert factors[added == 0] == pytest.approx(1.0)
    by_work = [set(factors[added == work].round(9)) for work in np.unique(added)]
    assert by_work == sorted(by_work, key=max, reverse=True), "the more work, the slower"
    assert (beliefs.log_sd > 0.5).all()
    assert beliefs.possible.all()
    assert (beliefs.open_rows == PLAN.may_fit(PLAN.memory.device_bytes)).all()
    assert beliefs.best_tokens_per_s == 0


@given(rows, st.floats(0.2, 5.0))
def test_what_was_measured_is_believed_nearly_as_measured(row: int, speed: float) -> None:
    beliefs = after(as_estimated(row, speed=speed))
    assert corrections(beliefs)[row] == pytest.approx(speed, rel=0.01)
    assert beliefs.log_sd[row] < 0.1


@given(rows, st.floats(1.2, 5.0))
def test_a_slow_machine_is_expected_to_be_slow_for_every_setting(row: int, factor: float) -> None:
    before = corrections(after())
    slow = corrections(after(as_estimated(row, speed=before[row] / factor)))
    fast = corrections(after(as_estimated(row, speed=before[row] * factor)))
    assert (slow < before).all()
    assert (fast > before).all()


def test_a_knob_that_disappoints_is_blamed_where_it_is_turned() -> None:
    plain, full = row_of(1, 2), row_of(1, 2, checkpointing="full")
    factors = corrections(after(as_estimated(plain), as_estimated(full, speed=0.5)))
    is_full = PLAN.space.column("checkpointing") == "full"
    assert factors[is_full].max() < factors[~is_full].min()


def test_what_checkpointing_costs_beyond_its_estimate_is_halved_for_every_second_layer() -> None:
    plan = with_partial_checkpointing(PLAN, ("every-2", "every-4"), make_profile().num_layers)
    modes = ("none", "every-4", "every-2", "full")
    plain = Structure(zero_stage=1)
    structures = [replace(plain, checkpointing=mode) for mode in modes]
    settings = [structure.with_micro_batch(2, 4, 64) for structure in structures]
    at = np.array([plan.row_of(setting) for setting in settings], dtype=int)
    rungs = [
        as_rung(plan.space.setting(int(row)), measured(factor * float(plan.tokens_per_s[row])))
        for row, factor in ((at[0], 1.0), (at[3], 0.6))
    ]
    beliefs = update(plan, rungs)
    errors = (beliefs.log_tokens_per_s - np.log(plan.tokens_per_s))[at]
    assert errors[2] == pytest.approx((errors[0] + errors[3]) / 2, abs=0.05)
    assert errors[3] < errors[2] < errors[1] < errors[0]


@given(st.lists(rows, min_size=1, max_size=6, unique=True))
def test_to_know_more_never_makes_less_sure(tried: Sequence[int]) -> None:
    fewer = after(*map(as_estimated, tried[:-1]))
    more = after(*map(as_estimated, tried))
    assert (more.log_sd <= fewer.log_sd + 1e-9).all()


@given(st.lists(rows, min_size=2, max_size=6, unique=True))
def test_the_order_of_outcomes_does_not_matter(tried: Sequence[int]) -> None:
    speeds = [as_estimated(row, speed=1 + place / 10) for place, row in enumerate(tried)]
    forwards, backwards = after(*speeds), after(*reversed(speeds))
    assert forwards.log_tokens_per_s == pytest.approx(backwards.log_tokens_per_s)
    assert (forwards.open_rows == backwards.open_rows).all()


def test_over_nothing_the_improvement_is_the_expected_speed_of_what_fits() -> None:
    beliefs = after()
    believed = np.exp(beliefs.log_tokens_per_s) * beliefs.fit_probability
    expected = np.where(PLAN.may_fit(PLAN.memory.device_bytes), believed, 0.0)
    assert beliefs.expected_improvement() == pytest.approx(expected)


@pytest.mark.parametrize("size", [1, 2, 4, 8, 16])
def test_the_more_room_is_left_the_likelier_a_setting_fits(size: int) -> None:
    alike = np.flatnonzero(PLAN.space.micro_batch_size == size)
    needs, likely = PLAN.memory.device_bytes[alike], after().fit_probability[alike]
    assert (np.diff(likely[np.argsort(needs)]) <= 1e-9).all()
    assert (likely[needs <= PLAN.budget_bytes] >= 0.5).all()
    assert (likely[needs < 0.6 * PLAN.budget_bytes] > 0.99).all()


def test_peaks_above_the_estimate_make_what_is_near_the_wall_less_likely_to_fit() -> None:
    near = np.abs(PLAN.memory.device_bytes / PLAN.budget_bytes - 0.95) < 0.05
    assert near.any()
    larger = after(as_estimated(row_of(3, 1), memory=1.2)).fit_probability
    assert (larger[near] < after().fit_probability[near]).all()


@given(st.lists(rows, min_size=1, max_size=4, unique=True))
def test_improvement_is_that_of_a_normal_belief(tried: Sequence[int]) -> None:
    beliefs = after(*map(as_estimated, tried))
    improvement = beliefs.expected_improvement()
    assert (improvement >= 0).all()
    assert (improvement[~beliefs.open_rows] == 0).all()
    points = np.linspace(-8, 8, 4001)
    weights = np.exp(-0.5 * points**2) / math.sqrt(2 * math.pi) * (points[1] - points[0])
    for row in np.flatnonzero(beliefs.open_rows)[:5]:
        speeds = beliefs.log_tokens_per_s[row] + beliefs.log_sd[row] * points
        gains = np.maximum(0.0, speeds - math.log(beliefs.best_tokens_per_s))
        expected = float(gains @ weights) * float(beliefs.fit_probability[row])
        assert improvement[row] == pytest.approx(expected, abs=1e-5)


def saves_nothing_beside(other: Setting, setting: Setting) -> bool:
    """Whether no knob of the other setting saves memory that this one does not save."""
    modes = ("none", "every-4", "every-2", "full")
    ours, theirs = setting.structure, other.structure
    return (
        other.micro_batch_size >= setting.micro_batch_size
        and theirs.zero_stage <= ours.zero_stage
        and theirs.offload_optimizer in {"none", ours.offload_optimizer}
        and theirs.offload_param in {"none", ours.offload_param}
        and modes.index(theirs.checkpointing) <= modes.index(ours.checkpointing)
    )


@given(rows)
def test_an_out_of_memory_ends_what_saves_nothing_beside_it_and_nothing_else(row: int) -> None:
    settings = [PLAN.space.setting(other) for other in range(len(PLAN.space))]
    needs = PLAN.memory.allocated_bytes
    as_much = [
        saves_nothing_beside(other, settings[row]) and bool(needs[place] >= needs[row])
        for place, other in enumerate(settings)
    ]
    assert after(rung(row, OUT_OF_MEMORY)).possible.tolist() == [not each for each in as_much]
    assert as_much[row]


def test_an_out_of_memory_ends_larger_micro_batches_and_less_offload() -> None:
    possible = after(rung(row_of(1, 4, offload="cpu"), OUT_OF_MEMORY)).possible
    assert not possible[row_of(1, 8, offload="cpu")]
    assert not possible[row_of(1, 4)]
    assert possible[row_of(1, 2, offload="cpu")]
    assert possible[row_of(1, 4, offload="cpu", checkpointing="full")]


def test_host_memory_that_ran_out_ends_only_what_needs_as_much_of_the_host() -> None:
    host = OutOfMemory(where="host", evidence="the kernel killed a rank for memory")
    possible = after(rung(row_of(1, 4, offload="cpu"), host)).possible
    assert not possible[row_of(1, 4, offload="cpu")]
    assert not possible[row_of(1, 8, offload="cpu")]
    assert possible[row_of(1, 4)]
    assert possible[row_of(1, 8)]


def test_host_memory_that_ran_out_on_a_cpu_is_the_devices() -> None:
    plan = plan_for(make_cluster(memory_bytes=64 * GIB))
    setting = Structure(zero_stage=1).with_micro_batch(4, 2, 32)
    host = OutOfMemory(where="host", evidence="the kernel killed a rank for memory")
    on_host, on_device = (
        update(plan, [as_rung(setting, outcome)]).possible for outcome in (host, OUT_OF_MEMORY)
    )
    assert (on_host == on_device).all()
    assert not on_host.all()


@pytest.mark.parametrize(
    "outcome",
    [
        Crashed(reason="no", evidence=""),
        TimedOut(phase="build", seconds=900.0, evidence=""),
        Unknown(exit_code=0, evidence=""),
    ],
    ids=lambda outcome: str(outcome.kind),
)
@given(row=rows)
def test_a_death_ends_its_structure_and_nothing_else(outcome: Outcome, row: int) -> None:
    beliefs = after(rung(row, outcome))
    other = PLAN.space.structure_index != PLAN.space.structure_index[row]
    assert (beliefs.possible == other).all()
    assert (beliefs.open_rows == (other & PLAN.kept)).all()


def test_an_interruption_says_nothing() -> None:
    before = as_estimated(row_of(0, 1))
    stopped = rung(row_of(1, 1), Interrupted(evidence="stopped"))
    assert same(after(before, stopped), after(before))
    assert same(after(stopped), after())


def test_of_a_setting_tried_twice_the_last_outcome_counts() -> None:
    row = row_of(2, 2)
    crashed = rung(row, Crashed(reason="no", evidence=""))
    assert same(after(crashed, as_estimated(row)), after(as_estimated(row)))


def test_a_setting_that_is_not_of_the_plan_says_nothing() -> None:
    foreign = Structure(zero_stage=1).with_micro_batch(32, 4, 128)
    assert PLAN.row_of(foreign) is None
    assert same(after(as_rung(foreign, OUT_OF_MEMORY)), after())


def test_a_setting_that_was_tried_is_not_open_again() -> None:
    row = row_of(3, 1)
    assert after().open_rows[row]
    assert not after(as_estimated(row)).open_rows[row]


def test_peaks_as_estimated_leave_open_what_the_plan_keeps() -> None:
    row = row_of(3, 1)
    beliefs = after(as_estimated(row))
    assert (beliefs.open_rows == (PLAN.kept & beliefs.possible)).all()


def test_peaks_above_the_estimate_close_what_would_be_too_large() -> None:
    beliefs = after(as_estimated(row_of(3, 1), memory=1.4))
    closed = PLAN.kept & beliefs.possible & ~beliefs.open_rows
    assert closed.any()
    smallest = PLAN.memory.device_bytes[closed].min()
    assert 1.3 * smallest > PLAN.budget_bytes


def test_peaks_below_the_estimate_open_what_the_plan_rejects() -> None:
    beliefs = after(as_estimated(row_of(3, 1), memory=0.6))
    opened = ~PLAN.kept & beliefs.open_rows
    assert opened.any()
    assert 0.5 * PLAN.memory.device_bytes[opened].max() < PLAN.budget_bytes


def test_a_peak_that_could_not_be_read_corrects_nothing() -> None:
    row = row_of(3, 1)
    beliefs = after(rung(row, measured(float(PLAN.tokens_per_s[row]), peak_bytes=0)))
    assert (beliefs.open_rows == (PLAN.kept & beliefs.possible)).all()


def test_an_out_of_memory_where_much_was_left_closes_others_that_need_about_as_much() -> None:
    row = row_of(3, 1, offload="cpu")
    need = PLAN.memory.device_bytes
    assert need[row] < 0.6 * PLAN.budget_bytes
    beliefs = after(rung(row, OUT_OF_MEMORY))
    assert not beliefs.open_rows[need > PLAN.budget_bytes].any()
    assert beliefs.open_rows.sum() < (PLAN.kept & beliefs.possible).sum()


def test_an_out_of_memory_that_was_expected_corrects_nothing() -> None:
    row = row_of(0, 16)
    assert PLAN.memory.device_bytes[row] > 1.15 * PLAN.budget_bytes
    beliefs = after(rung(row, OUT_OF_MEMORY))
    assert (beliefs.open_rows == (PLAN.kept & beliefs.possible)).all()
