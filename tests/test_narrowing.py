"""Several nodes: what one of them shows, and what is made of it for all."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from records import LENGTHS, RATES, as_rung, make_cluster, make_job, make_profile, measured

from autotune import intake
from autotune.cli.summary import rehearsal_text
from autotune.config import Layer, resolve
from autotune.hardware import Cluster
from autotune.intake import (
    NamedHardware,
    Question,
    Workload,
    ask,
    look_into,
    on_one_node,
)
from autotune.model_source import find_model
from autotune.outcome import Measured, OutOfMemory
from autotune.pipeline import Run
from autotune.plan import Plan, make_plan
from autotune.rehearse import rehearse
from autotune.rundir import RunDir
from autotune.setting import Structure
from autotune.space import enumerate_space
from autotune.throughput import DrawnRows
from autotune.tune.beliefs import update
from autotune.tune.narrowing import hints
from autotune.units import GIB

ONE = make_cluster(gpus=4, memory_bytes=60 * GIB)
ALL = replace(ONE, num_devices=16, num_nodes=4, devices_per_node=4)


def plan_of(cluster: Cluster) -> Plan:
    """Plan a job of eight rows a rank."""
    rows = 8 * cluster.num_devices
    job, drawn = make_job(global_batch_size=rows), DrawnRows.draw(LENGTHS, 42)
    return make_plan(enumerate_space(cluster, rows), make_profile(), job, cluster, RATES, drawn)


PLAN, ON_ONE = plan_of(ALL), plan_of(ONE)


def row_in(plan: Plan, stage: int, size: int) -> int:
    ranks = plan.space.ranks
    row = plan.row_of(Structure(zero_stage=stage).with_micro_batch(size, ranks, 8 * ranks))
    assert row is not None
    return row


def test_settings_of_one_node_are_settings_of_all() -> None:
    settings = {ON_ONE.space.setting(row) for row in range(len(ON_ONE.space))}
    assert settings == {PLAN.space.setting(row) for row in range(len(PLAN.space))}


def test_a_hint_is_how_far_off_the_estimate_for_one_node_was() -> None:
    row = row_in(ON_ONE, 2, 4)
    speed, peak = 0.8 * ON_ONE.tokens_per_s[row], 1.1 * ON_ONE.memory.device_bytes[row]
    rungs = [as_rung(ON_ONE.space.setting(row), measured(speed, peak_bytes=round(peak)))]
    ((place, hint),) = hints(PLAN, ON_ONE, rungs).items()
    assert place == row_in(PLAN, 2, 4)
    assert hint.faster == pytest.approx(math.log(0.8))
    assert hint.larger == pytest.approx(math.log(1.1), abs=1e-6)


def test_what_does_not_fit_one_node_says_nothing_of_all() -> None:
    failed = OutOfMemory(where="device", evidence="torch.OutOfMemoryError")
    assert hints(PLAN, ON_ONE, [as_rung(ON_ONE.space.setting(row_in(ON_ONE, 0, 8)), failed)]) == {}


def test_what_one_node_shows_of_a_knob_is_believed_of_all_its_settings() -> None:
    rungs = [
        as_rung(
            ON_ONE.space.setting(row),
            measured((0.6 if stage == 3 else 1.0) * float(ON_ONE.tokens_per_s[row])),
        )
        for stage in (1, 3)
        for row in [row_in(ON_ONE, stage, 2)]
    ]
    beliefs = update(PLAN, [], hints=hints(PLAN, ON_ONE, rungs))
    slower = {
        stage: math.exp(beliefs.log_tokens_per_s[row_in(PLAN, stage, 8)])
        / PLAN.tokens_per_s[row_in(PLAN, stage, 8)]
        for stage in (1, 3)
    }
    assert slower[3] < 0.8 * slower[1]


def test_a_rehearsal_narrows_on_one_node_and_decides_on_all(tmp_path: Path) -> None:
    rates = replace(
        RATES,
        link_bytes_per_s=1e10,
        node_link_bytes_per_s=1e11,
        node_collective_overhead_s=RATES.collective_overhead_s,
    )
    job, drawn = make_job(global_batch_size=128), DrawnRows.draw(np.full(64, 512), 42)
    plan = make_plan(enumerate_space(ALL, 128), make_profile(), job, ALL, rates, drawn)
    question = Question(
        named=NamedHardware(gpus=()),
        options=resolve([Layer("a test", {"global_batch_size": 128})]),
        cluster=ALL,
        source=find_model("builtin:glm-tiny"),
        dataset=(),
        fingerprint="",
    )
    whole = Workload(
        question=question,
        job=job,
        profile=make_profile(),
        rates=rates,
        dataset=None,
        drawn=drawn,
        rows=1000,
        plan=plan,
    )
    node = on_one_node(whole, tmp_path)
    assert (node.question.cluster.num_devices, node.question.cluster.num_nodes) == (4, 1)
    assert node.job.global_batch_size == 32
    assert node.rates.link_bytes_per_s == rates.node_link_bytes_per_s

    document = rehearse(whole, tmp_path, noise=0.0)
    narrowed = document["on_one_node"]
    assert narrowed["rungs"] == sum(len(probe["rungs"]) for probe in narrowed["probes"]) > 0
    assert document["tuning_seconds"] > narrowed["seconds"] > 0
    best = plan.best()
    assert best is not None
    assert document["chosen"]["tokens_per_s"] == pytest.approx(plan.tokens_per_s[best], rel=5e-4)
    text = rehearsal_text(document)
    assert "16 x Example GPU in 4 nodes" in text
    assert "on one node" in text


@pytest.mark.slow
def test_a_run_probes_a_nodes_share_on_its_own_node(
    server: None, short_rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    del server
    asked = {"dataset": [str(short_rows)], "devices": "cpu:2", "max_probes": 4}
    question = ask(resolve([Layer("a test", asked)]))
    two = question.cluster
    cluster = replace(two, num_devices=4, num_nodes=2, devices_per_node=2)
    run = Run(replace(question, cluster=cluster), RunDir(tmp_path))
    run.dir.create()
    # There is no other node to measure links to.
    bench = intake.bench
    monkeypatch.setattr(intake, "bench", lambda *_, **__: bench(two))
    workload = look_into(run.question, dataset_dir=run.dir.dataset, logs=run.dir.logs)
    found = run._narrow(workload, [])
    rungs = run.dir.read_rungs()
    assert {rung.ranks for rung in rungs} == {2}
    measured_there = {rung.setting for rung in rungs if isinstance(rung.outcome, Measured)}
    assert {workload.plan.space.setting(row) for row in found} == measured_there != set()
    assert len({rung.setting.structure for rung in rungs}) <= 2
    # The same outcomes lead to the same hints, without another probe.
    again = run._narrow(workload, rungs)
    assert again == found
    assert run.dir.read_rungs() == rungs
