"""The plan: nothing gets lost, and what is rejected says by which rule and numbers."""

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from records import LENGTHS, RATES, make_cluster, make_job, make_profile, plan_for

from autotune.knobs import Pins
from autotune.plan import Plan, make_plan
from autotune.setting import Setting
from autotune.space import enumerate_space
from autotune.throughput import (
    DrawnRows,
    StepRate,
    integrate,
    predicted_communication,
    predicted_hideable,
    predicted_micro_step,
    predicted_offload_s,
    predicted_update_s,
    synchronises_every_micro_step,
)
from autotune.units import GIB, format_bytes

ENTRY = {
    "schema",
    "setting",
    "memory",
    "budget_bytes",
    "fits",
    "step_time_s",
    "tokens_per_s",
    "samples_per_s",
    "rejected_by",
}
SETTING = {
    "micro_batch_size",
    "gradient_accumulation_steps",
    "zero_stage",
    "offload_optimizer",
    "offload_param",
    "checkpointing",
    "attention",
    "sampling",
}
MEMORY = [
    "weights_bytes",
    "gradients_bytes",
    "optimizer_bytes",
    "activations_bytes",
    "logits_bytes",
    "buffers_bytes",
    "other_bytes",
    "allocated_bytes",
    "runtime_bytes",
    "device_bytes",
    "host_bytes",
]
budgets = st.integers(1, 200).map(lambda gib: gib * GIB)


ESTIMATED = plan_for(make_cluster(gpus=2))


def plan_with(budget_bytes: int, host_bytes: int = 500 * GIB) -> Plan:
    return replace(ESTIMATED, budget_bytes=budget_bytes, host_budget_bytes=host_bytes)


@given(budgets, budgets)
def test_every_setting_is_either_kept_or_rejected(budget: int, host: int) -> None:
    plan = plan_with(budget, host)
    entries = plan.listed(everything=True)
    listed = [Setting.from_json(entry["setting"]) for entry in entries]
    assert sorted(listed) == sorted(plan.space.setting(row) for row in range(len(plan.space)))
    rejected = [entry for entry in entries if entry["rejected_by"]]
    assert len(entries) - len(rejected) == plan.kept.sum()
    assert sum(plan.rejected_by_rule().values()) == len(rejected)


@given(budgets, budgets)
def test_kept_settings_come_first_the_fastest_of_them_first(budget: int, host: int) -> None:
    entries = plan_with(budget, host).listed(everything=True)
    kept = [entry["tokens_per_s"] for entry in entries if entry["rejected_by"] is None]
    assert kept == sorted(kept, reverse=True)
    assert all(entry["rejected_by"] for entry in entries[len(kept) :])


@given(budgets)
def test_rejected_settings_come_nearest_first(budget: int) -> None:
    entries = plan_with(budget).listed(everything=True)
    needs = [entry["memory"]["device_bytes"] for entry in entries if entry["rejected_by"]]
    assert needs == sorted(needs)


@given(budgets, budgets)
def test_what_fits_is_kept(budget: int, host: int) -> None:
    plan = plan_with(budget, host)
    assert (plan.kept | ~plan.fits).all()
    for row in np.flatnonzero(plan.fits):
        assert plan.memory.device_bytes[row] <= budget
        assert plan.memory.host_bytes[row] * plan.space.ranks <= host


def test_a_setting_is_kept_up_to_15_percent_over_the_budget() -> None:
    plan = plan_with(24 * GIB)
    between = plan.kept & ~plan.fits
    assert between.any()
    assert plan.memory.device_bytes[plan.kept].max() <= 1.15 * 24 * GIB
    assert plan.memory.device_bytes[~plan.kept].min() > 1.15 * 24 * GIB


def test_a_rejection_for_the_device_names_need_parts_and_budget() -> None:
    plan = plan_with(16 * GIB)
    entry = plan.listed(everything=True)[-1]
    assert entry["rejected_by"]["rule"] == "device_memory"
    detail = entry["rejected_by"]["detail"]
    assert detail.startswith("needs ")
    assert "activations" in detail
    assert detail.endswith("16.0 GiB are there")


def test_a_rejection_for_the_host_names_need_ranks_and_budget() -> None:
    plan = plan_with(80 * GIB, host_bytes=8 * GIB)
    offloaded = plan.space.column("offload_optimizer") == "cpu"
    row = int(np.flatnonzero(offloaded)[0])
    rejection = plan.rejection(row)
    assert rejection is not None
    assert rejection.rule == "host_memory"
    # States of a billion parameters and gradients, over both ranks, and a pinned gradient each.
    gradients = 4 + 2 + 2 * (plan.space.gradient_accumulation_steps[row] > 1)
    need = ((12 + gradients) * 1e9 + 2 * 2 * 60e6) / GIB
    said = f"needs {need:.1f} GiB of host memory for 2 ranks, 8.00 GiB are there"
    assert rejection.detail == said
    too_large = plan.memory.device_bytes > 80 * GIB
    assert plan.rejected_by_rule()["host_memory"] == (offloaded & ~too_large).sum()


def test_an_entry_has_exactly_the_keys_of_the_contract() -> None:
    for entry in plan_with(16 * GIB).listed():
        assert entry.keys() == ENTRY
        assert entry["schema"] == 1
        assert entry["setting"].keys() == SETTING
        assert list(entry["memory"]) == MEMORY
        assert entry["rejected_by"] is None or entry["rejected_by"].keys() == {"rule", "detail"}


def test_an_entry_is_json_as_it_is() -> None:
    entries = plan_with(16 * GIB).listed()
    assert json.loads(json.dumps(entries, allow_nan=False)) == entries


def test_a_list_holds_all_kept_settings_and_the_nearest_rejected_ones() -> None:
    plan = plan_with(20 * GIB)
    entries = plan.listed()
    kept = int(plan.kept.sum())
    assert len(plan.space) > kept + 20 == len(entries)
    assert entries == plan.listed(everything=True)[: kept + 20]


@given(st.data())
def test_a_setting_is_found_by_what_it_is(data: st.DataObject) -> None:
    plan = plan_with(80 * GIB)
    row = data.draw(st.integers(0, len(plan.space) - 1))
    setting = plan.space.setting(row)
    assert plan.row_of(setting) == row
    assert plan.row_of(replace(setting, gradient_accumulation_steps=999)) is None


def test_memory_is_that_of_the_longest_row_of_the_data() -> None:
    cluster, job = make_cluster(gpus=2), make_job()
    space = enumerate_space(cluster, job.global_batch_size)
    some = make_plan(space, make_profile(), job, cluster, RATES, DrawnRows.draw(LENGTHS, 42))
    one_longer = np.append(LENGTHS, 2 * LENGTHS.max())
    more = make_plan(space, make_profile(), job, cluster, RATES, DrawnRows.draw(one_longer, 42))
    activations = some.memory.activations_bytes
    assert (more.memory.activations_bytes > activations).all()
    assert (more.memory.device_bytes >= some.memory.device_bytes).all()


def test_budgets_are_those_of_the_cluster() -> None:
    cluster = make_cluster(gpus=2, memory_bytes=24 * GIB)
    plan = plan_for(cluster)
    assert plan.budget_bytes == 24 * GIB
    assert cluster.host is not None
    assert plan.host_budget_bytes == cluster.host.available_bytes


@pytest.mark.parametrize("gpus", [1, 2, 4])
def test_samples_and_tokens_a_second_are_those_of_the_step_time(gpus: int) -> None:
    plan = plan_for(make_cluster(gpus=gpus))
    assert plan.samples_per_s * plan.step_time_s == pytest.approx(np.full(len(plan.space), 32.0))
    # All 1024 rows make whole steps of 32, so tokens a sample are the mean length.
    assert plan.tokens_per_s / plan.samples_per_s == pytest.approx(
        np.full(len(plan.space), LENGTHS.mean())
    )


def test_recomputation_is_predicted_to_be_slower_at_the_same_micro_batch() -> None:
    plan = plan_for(make_cluster(gpus=2))
    full = plan.space.column("checkpointing") == "full"
    assert (plan.tokens_per_s[full] < plan.tokens_per_s[~full]).all()


def test_the_terms_of_a_step_add_up_to_it() -> None:
    for gpus in (1, 2):
        plan = plan_for(make_cluster(gpus=gpus))
        columns = plan.terms.rows(np.arange(len(plan.space)))
        for row, terms in enumerate(columns):
            seconds = [value for name, value in terms.items() if name.endswith("_s")]
            assert min(seconds) >= 0
            assert sum(seconds) == pytest.approx(plan.step_time_s[row])


def test_one_rank_talks_to_nobody_and_what_offloads_copies() -> None:
    alone, together = (plan_for(make_cluster(gpus=gpus)) for gpus in (1, 2))
    assert not alone.terms.communication_s.any()
    # ZeRO 3 hides all of it behind computing here.
    shown = together.space.column("zero_stage") != 3
    assert (together.terms.communication_s[shown] > 0).all()
    offloads = together.space.column("offload_optimizer") == "cpu"
    assert ((together.terms.offload_s > 0) == offloads).all()


def test_padding_is_what_rows_are_short_of_the_longest_beside_them() -> None:
    terms, sizes = ESTIMATED.terms, ESTIMATED.space.micro_batch_size
    order = DrawnRows.draw(LENGTHS, make_job().seed)
    for size in np.unique(sizes).tolist():
        drawn = order.lengths[order.order][: 1024 // size * size].reshape(-1, size)
        padded = drawn.max(axis=1).sum() * size
        share = terms.padding_share[sizes == size]
        assert share == pytest.approx(np.full(len(share), 1 - drawn.sum() / padded))


def predicted_alone(plan: Plan, row: int) -> StepRate:
    """Predict one setting by itself."""
    job, profile, setting = make_job(), make_profile(), plan.space.setting(row)
    stage, ranks = setting.structure.zero_stage, plan.space.ranks
    computing = predicted_micro_step(profile, setting.structure.checkpointing, RATES)
    talk = predicted_communication(profile, setting.structure, ranks, RATES, job.compute_bytes)
    each_s, last_s = talk.forward_s + talk.backward_s, talk.last_backward_s + talk.update_s
    place = (profile, setting.structure, make_cluster(gpus=ranks), RATES)
    copies_each_s, copies_last_s = predicted_offload_s(*place, job.compute_bytes)
    update_s = copies_last_s + predicted_update_s(*place)
    hideable = predicted_hideable(talk, setting.structure, make_cluster(gpus=ranks))
    shown = integrate(
        DrawnRows.draw(LENGTHS, job.seed),
        micro_batch_size=setting.micro_batch_size,
        gradient_accumulation_steps=setting.gradient_accumulation_steps,
        ranks=ranks,
        micro_step_s=lambda sizes, padded: computing(sizes, padded) + each_s + copies_each_s,
        boundary_extra_s=last_s + update_s,
        synchronises_every_micro_step=synchronises_every_micro_step(stage, ranks),
    )
    micro_steps = setting.gradient_accumulation_steps
    computing_s = shown.step_time_s - last_s - update_s - micro_steps * (each_s + copies_each_s)
    a_micro_step = computing_s / micro_steps
    hidden = micro_steps * min(hideable.backward_s, 2 / 3 * a_micro_step)
    hidden += micro_steps * min(hideable.forward_s, a_micro_step / 3)
    hidden += min(hideable.last_backward_s, 2 / 3 * a_micro_step)
    factor = shown.step_time_s / (shown.step_time_s - hidden)
    return StepRate(
        step_time_s=shown.step_time_s - hidden,
        samples_per_s=factor * shown.samples_per_s,
        tokens_per_s=factor * shown.tokens_per_s,
    )


@pytest.mark.parametrize("gpus", [1, 2, 4])
def test_the_columns_are_what_each_setting_is_predicted_by_itself(gpus: int) -> None:
    plan = plan_for(make_cluster(gpus=gpus))
    for row in range(len(plan.space)):
        alone = predicted_alone(plan, row)
        assert plan.step_time_s[row] == pytest.approx(alone.step_time_s)
        assert plan.samples_per_s[row] == pytest.approx(alone.samples_per_s)
        assert plan.tokens_per_s[row] == pytest.approx(alone.tokens_per_s)


def test_a_global_batch_of_billions_is_planned_like_one_of_thousands() -> None:
    cluster = make_cluster(gpus=2)
    usual, vast = (
        plan_for(cluster, job=make_job(global_batch_size=size)) for size in (2**14, 2**32)
    )
    for row in range(len(usual.space)):
        setting = usual.space.setting(row)
        accumulation = setting.gradient_accumulation_steps * 2**18
        same = vast.row_of(replace(setting, gradient_accumulation_steps=accumulation))
        assert same is not None
        # With so many micro-steps an update is for free, and the lengths are those of all rows.
        alone = usual.samples_per_s[row]
        assert alone <= vast.samples_per_s[same] * 1.02
        assert vast.tokens_per_s[same] / vast.samples_per_s[same] == pytest.approx(
            LENGTHS.mean(), rel=0.01
        )


@given(budgets, budgets)
def test_the_best_fits_and_without_one_the_shortfall_is_what_is_lacking(
    budget: int, host: int
) -> None:
    plan = plan_with(budget, host)
    best = plan.best()
    if best is not None:
        assert plan.fits[best]
        assert plan.tokens_per_s[best] == plan.tokens_per_s[plan.fits].max()
        return
    short = plan.shortfall()
    row = plan.row_of(Setting.from_json(short["setting"]))
    assert row is not None
    assert short["may_fit"] == plan.kept[row]
    more = replace(
        plan,
        budget_bytes=budget + short["device_bytes"] + 1,
        host_budget_bytes=host + short["host_bytes"] + 1,
    )
    assert more.fits[row]


@given(budgets, budgets)
def test_a_rejected_setting_names_its_rule_and_the_numbers(budget: int, host: int) -> None:
    for entry in plan_with(budget, host).listed(everything=True):
        if entry["rejected_by"] is None:
            continue
        needed = {
            "device_memory": entry["memory"]["device_bytes"],
            "host_memory": entry["memory"]["host_bytes"] * ESTIMATED.space.ranks,
        }[entry["rejected_by"]["rule"]]
        there = {"device_memory": budget, "host_memory": host}[entry["rejected_by"]["rule"]]
        assert needed > there
        assert format_bytes(needed) in entry["rejected_by"]["detail"]
        assert format_bytes(there) in entry["rejected_by"]["detail"]


def test_a_pinned_loss_is_estimated_by_its_own_trace() -> None:
    (_, plain), (_, full) = make_profile().traces
    profile = make_profile(chunked=(("sdpa", (("none", full), ("full", plain))),))
    pins = Pins.of({"loss": ["whole", "chunked"], "zero_stage": [2]})
    cluster, job = make_cluster(gpus=2), make_job()
    space = enumerate_space(cluster, 32, pins=pins)
    plan = make_plan(space, profile, job, cluster, RATES, DrawnRows.draw(LENGTHS, job.seed))
    for row in np.flatnonzero(space.column("loss") == "chunked").tolist():
        setting = space.setting(row)
        other = {"none": "full", "full": "none"}[setting.structure.checkpointing]
        like = replace(setting.structure, loss="whole", checkpointing=other)
        beside = plan.row_of(replace(setting, structure=like))
        assert beside is not None
        assert plan.memory.device_bytes[row] == plan.memory.device_bytes[beside]
        assert plan.step_time_s[row] == plan.step_time_s[beside]
