"""Every n-th layer checkpointed: between none and all, as a trace of it says."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from records import LENGTHS, RATES, make_cluster, make_job, make_profile, plan_for

from autotune import builtin
from autotune.memory import PARTS
from autotune.partial_checkpointing import with_partial_checkpointing
from autotune.plan import Plan, make_plan
from autotune.profile.request import TraceRequest
from autotune.profile.trace import trace_model
from autotune.space import enumerate_space
from autotune.throughput import DrawnRows

MODES = ("every-2", "every-4")


def extended(gpus: int, num_layers: int = 20) -> tuple[Plan, Plan]:
    plan = plan_for(make_cluster(gpus=gpus))
    return plan, with_partial_checkpointing(plan, MODES, num_layers)


@given(st.sampled_from([1, 2, 4]), st.integers(1, 40))
def test_each_setting_gets_one_in_between_for_each_mode(gpus: int, num_layers: int) -> None:
    plan, more = extended(gpus, num_layers)
    rows = len(plan.space)
    assert len(more.space) == rows + len(MODES) * rows // 2
    settings = [more.space.setting(row) for row in range(len(more.space))]
    assert len(set(settings)) == len(settings)
    assert settings[:rows] == [plan.space.setting(row) for row in range(rows)]
    for row in range(rows, len(settings)):
        structure = settings[row].structure
        ends = np.array(
            [
                more.row_of(
                    replace(settings[row], structure=replace(structure, checkpointing=mode))
                )
                for mode in ("full", "none")
            ],
            dtype=np.int64,
        )
        for column in (more.memory.device_bytes, more.samples_per_s, more.tokens_per_s):
            low, high = sorted(column[ends])
            assert low * (1 - 1e-9) <= column[row] <= high * (1 + 1e-9)
        recomputed = math.ceil(num_layers / int(structure.checkpointing[-1])) / num_layers
        expected = np.array([recomputed, 1 - recomputed]) @ more.step_time_s[ends]
        assert more.step_time_s[row] == pytest.approx(expected)
        entry = more.entry(row)
        assert sum(entry["memory"][part] for part in PARTS) == entry["memory"]["allocated_bytes"]
        assert entry["samples_per_s"] * entry["step_time_s"] == pytest.approx(32)


def test_a_model_that_cannot_checkpoint_has_nothing_in_between() -> None:
    job, profile = make_job(), make_profile(traces=make_profile().traces[:1])
    cluster = make_cluster(gpus=2)
    space = enumerate_space(cluster, job.global_batch_size, checkpointing_modes=("none",))
    plan = make_plan(space, profile, job, cluster, RATES, DrawnRows.draw(LENGTHS, 42))
    assert with_partial_checkpointing(plan, MODES, 20) is plan


def test_it_is_what_a_trace_of_every_second_layer_says() -> None:
    request = TraceRequest(
        model_dir=str(builtin.directory("glm-tiny")),
        trust_remote_code=False,
        attention="auto",
        precision="fp32",
        device_kind="cpu",
        checkpointing=("none", "full", "every-2"),
    )
    profile, job, cluster = trace_model(request), make_job(), make_cluster(gpus=2)

    def plan(*modes: str) -> Plan:
        space = enumerate_space(cluster, job.global_batch_size, checkpointing_modes=modes)
        return make_plan(space, profile, job, cluster, RATES, DrawnRows.draw(LENGTHS, 42))

    traced = plan("none", "full", "every-2")
    between = with_partial_checkpointing(plan("none", "full"), ("every-2",), profile.num_layers)
    for row in np.flatnonzero(traced.space.column("checkpointing") == "every-2").tolist():
        same = between.row_of(traced.space.setting(row))
        assert same is not None
        for by_trace, by_share in (
            (traced.memory.allocated_bytes, between.memory.allocated_bytes),
            (traced.step_time_s, between.step_time_s),
        ):
            assert by_share[same] == pytest.approx(by_trace[row], rel=0.02)
