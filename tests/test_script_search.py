"""A search where every setting takes a process: no ladders, memory prunes, limits hold."""

from collections.abc import Generator
from dataclasses import replace
from pathlib import Path

import pytest
from records import as_rung, make_cluster, make_job, measured, plan_for

from autotune.outcome import Measured, OutOfMemory, Rung
from autotune.probe.protocol import ProbeRequest, RungFailure, RungMeasurement, RungPlan
from autotune.script.facts import ScriptFacts, facts_of
from autotune.script.launch import in_words
from autotune.script.profile import learned_profile
from autotune.script.site import ScriptSite, job_of
from autotune.setting import Setting, Structure
from autotune.tune.loop import Tuned, Tuner
from autotune.tune.search import OneByOne

CLUSTER = make_cluster(cpu_ranks=2)
PLAN = plan_for(CLUSTER, job=make_job(global_batch_size=32))
FACTS = ScriptFacts(
    given={"bf16": {"enabled": True}},
    micro_batch_size=2,
    accumulation=8,
    ranks=2,
    zero_stage=1,
    trained=(1000, 24),
    lengths=(10, 20, 30),
    model_config={},
)
SITE = ScriptSite(FACTS, job_of(FACTS, "script"), CLUSTER)


class Processes:
    """Each rung in a process of its own, as fast as the plan says; more than `wall` rows die."""

    def __init__(self, wall: int = 1000) -> None:
        self.wall = wall
        self.ladders: list[tuple[int, ...]] = []

    def probe(self, request: ProbeRequest) -> Generator[RungMeasurement | RungFailure]:
        (rung,) = request.rungs
        self.ladders.append((rung.micro_batch_size,))
        if rung.micro_batch_size > self.wall:
            yield RungFailure(
                micro_batch_size=rung.micro_batch_size,
                outcome=OutOfMemory(where="device", evidence="full"),
                seconds=1.0,
            )
            return
        yield _measurement(rung, (1.0 + 0.1 * rung.micro_batch_size,) * 4)


def _measurement(rung: RungPlan, times: tuple[float, ...]) -> RungMeasurement:
    return RungMeasurement(
        micro_batch_size=rung.micro_batch_size,
        accumulate_s=((10, times),),
        boundary_s=(),
        peak_bytes=1,
        seconds=1.0,
    )


def tune(processes: Processes, *, max_probes: int = 100) -> Tuned:
    own = Structure(zero_stage=1).with_micro_batch(2, 2, 32)
    tuner = Tuner(
        PLAN,
        processes,
        SITE,
        [as_rung(own, SITE.outcome(own, _measurement(_rung(2), (1.2,) * 4)))],
        record=lambda _: None,
        search=OneByOne,
        default=own,
    )
    return tuner.run(max_probes=max_probes, budget_s=None, tell_apart=False)


def _rung(size: int) -> RungPlan:
    return RungPlan(
        micro_batch_size=size, gradient_accumulation_steps=1, memory_rows=(), timed_rows=()
    )


def test_the_fastest_is_found_without_trying_all() -> None:
    processes = Processes()

    tuned = tune(processes)

    assert tuned.best is not None
    assert tuned.best.setting.micro_batch_size == 16
    assert tuned.default is not None
    assert tuned.default.setting.micro_batch_size == 2
    assert len(processes.ladders) < len(PLAN.space) / 3


def test_no_more_processes_are_started_than_were_asked_for() -> None:
    processes = Processes()

    tuned = tune(processes, max_probes=3)

    # The script as it is was one of them.
    assert len(processes.ladders) == 2
    assert tuned.stopped_by == "max_probes"


def test_what_runs_out_of_memory_rules_out_what_needs_as_much() -> None:
    processes = Processes(wall=4)

    tuned = tune(processes)

    assert tuned.best is not None
    assert tuned.best.setting.micro_batch_size == 4
    died = [rung for rung in tuned.rungs if isinstance(rung.outcome, OutOfMemory)]
    beyond = int((PLAN.space.micro_batch_size > 4).sum())
    assert 0 < len(died) < beyond / 2


def test_a_step_is_composed_of_micro_steps_that_accumulate_and_one_that_updates() -> None:
    setting = Structure(zero_stage=1).with_micro_batch(2, 2, 32)
    seen = replace(_measurement(_rung(2), (1.0, 1.2, 1.1)), boundary_s=((10, (2.0, 2.2, 2.1)),))

    outcome = SITE.outcome(setting, seen)

    assert outcome.step_time_s == pytest.approx(7 * 1.1 + 2.1)
    assert outcome.samples_per_s == pytest.approx(32 / 9.8)
    assert outcome.tokens_per_s == pytest.approx(20 * 32 / 9.8)


def test_rows_of_other_lengths_count_by_their_mean() -> None:
    setting = Structure(zero_stage=1).with_micro_batch(16, 2, 32)
    seen = replace(_measurement(_rung(16), ()), accumulate_s=((0, (1.0, 1.0, 4.0)),))

    assert SITE.outcome(setting, seen).step_time_s == pytest.approx(2.0)


def test_a_model_that_cannot_be_traced_is_learned_from_two_probes() -> None:
    def rung(size: int, seconds: float, peak_bytes: int) -> Rung:
        outcome = replace(measured(1.0, peak_bytes=peak_bytes), accumulate_s=((0, seconds),))
        assert isinstance(outcome, Measured)
        return as_rung(Structure(zero_stage=1).with_micro_batch(size, 2, 32), outcome)

    from records import RATES

    profile = learned_profile(FACTS, [rung(2, 1.2, 3000), rung(4, 1.4, 5000)], RATES)

    trace = profile.trace("none")
    assert trace.more_rows[0].rows_bytes.c0 == pytest.approx(1000)
    assert trace.flops.c0 / RATES.matmul_flops_per_s == pytest.approx(0.1)
    assert trace.operators * RATES.operator_overhead_s == pytest.approx(1.0)
    assert profile.parameters == profile.trainable_parameters == 1024


def test_offload_that_the_user_has_stays() -> None:
    gpus = make_cluster(gpus=2)
    zero = {"stage": 2, "offload_optimizer": {"device": "cpu"}}
    offloading = replace(FACTS, given={"zero_optimization": zero})

    assert {one.offload_optimizer for one in offloading.structures((0, 1, 2, 3), gpus)} == {"cpu"}
    assert {one.zero_stage for one in offloading.structures((0, 1, 2, 3), gpus)} == {1, 2, 3}
    assert {one.offload_optimizer for one in FACTS.structures((0, 1), gpus)} == {"none", "cpu"}
    assert {one.offload_optimizer for one in FACTS.structures((0, 1), CLUSTER)} == {"none"}


def test_the_global_batch_follows_from_the_config_where_no_engine_was_made() -> None:
    config = {"train_batch_size": 32, "gradient_accumulation_steps": 2}

    facts = facts_of({"given": config, "merged": config}, ranks=2)

    assert facts is not None
    assert (facts.micro_batch_size, facts.accumulation) == (8, 2)
    assert facts.own_setting(CLUSTER) == Setting(
        structure=Structure(zero_stage=0), micro_batch_size=8, gradient_accumulation_steps=2
    )
    assert facts_of({"options": {}}, ranks=2) is None


def test_a_script_that_ends_well_with_nothing_measured_is_said_to_be_so() -> None:
    from autotune.outcome import Crashed, Unknown

    failure = RungFailure(
        micro_batch_size=0, outcome=Unknown(exit_code=0, evidence=""), seconds=1.0, phase="start"
    )

    said = in_words(failure).outcome
    assert isinstance(said, Crashed)
    assert "never called deepspeed.initialize" in said.reason
    other = replace(failure, outcome=Unknown(exit_code=3, evidence=""))
    assert in_words(other) is other


def test_the_path_of_the_shim_has_one_file() -> None:
    from autotune.script.errand import SHIM

    assert [path.name for path in Path(SHIM).glob("*.py")] == ["sitecustomize.py"]
