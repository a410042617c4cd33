"""Tuning as a story: a scripted prober, a clock that is told, and a surface that is known."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import optuna
import pytest
from optuna.trial import TrialState
from records import (
    LENGTHS,
    RATES,
    Surface,
    SurfaceSite,
    exact,
    make_cluster,
    make_job,
    make_profile,
    perturbed,
    plan_for,
)

from autotune.errors import CannotWriteError, InterruptedRunError, SetupFaultError
from autotune.outcome import Crashed, Interrupted, Measured, OutOfMemory, Rung, TimedOut, Unknown
from autotune.plan import Plan
from autotune.probe.fakes import Answer, ScriptedProber
from autotune.probe.protocol import ProbeRequest, RungFailure, RungMeasurement, RungPlan
from autotune.setting import Setting, Structure
from autotune.throughput import predicted_micro_step
from autotune.tune.judge import Judge
from autotune.tune.loop import Tuned, Tuner, describe, write_study
from autotune.tune.search import OUTCOMES
from autotune.tune.site import JobSite
from autotune.units import GIB


def plan_with(memory_gib: int = 32) -> Plan:
    cluster = make_cluster(gpus=4, memory_bytes=memory_gib * GIB)
    return plan_for(cluster, job=make_job(global_batch_size=64))


PLAN = plan_with()


class Clock:
    """Stands still until it is told that time has gone by."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Story:
    """One tuning that can be run, and what came of it.

    Its training is of one step unless told otherwise, too short to tell two settings apart for.
    """

    def __init__(
        self,
        surface: Surface,
        *,
        known: Sequence[Rung] = (),
        answer: Answer | None = None,
        record: Callable[[Rung], None] | None = None,
        judge: Judge | None = None,
        steps: int | None = 1,
        thrifty: bool = False,
        sampler: str = "prior",
    ) -> None:
        self.clock = Clock()
        self.recorded: list[Rung] = []
        self.asked: list[Setting] = []
        self.surface = surface
        self._answer = answer or surface.answer
        self.prober = ScriptedProber(self._ask)
        self.tuner = Tuner(
            surface.plan,
            self.prober,
            SurfaceSite(),
            known,
            record=record or self.recorded.append,
            judge=judge,
            clock=self.clock,
            steps=steps,
            thrifty=thrifty,
            sampler=sampler,
        )

    def _ask(self, request: ProbeRequest, rung: RungPlan) -> RungMeasurement | RungFailure:
        self.asked.append(self.surface.plan.space.setting(self.surface.row(request, rung)))
        self.clock.now += 10
        return self._answer(request, rung)

    def run(self, *, max_probes: int = 12, budget_s: float | None = None) -> Tuned:
        return self.tuner.run(max_probes=max_probes, budget_s=budget_s)

    @property
    def structures(self) -> list[Structure]:
        return list(dict.fromkeys(setting.structure for setting in self.asked))


def stopped_at(surface: Surface, place: int) -> Answer:
    """Return answers of a run that is stopped from outside in so many rungs."""
    count = iter(range(1, 1000))

    def answer(request: ProbeRequest, rung: RungPlan) -> RungMeasurement | RungFailure:
        if next(count) == place:
            msg = "stopped by SIGTERM"
            raise InterruptedRunError(msg)
        return surface.answer(request, rung)

    return answer


def always(outcome: Crashed | OutOfMemory | TimedOut | Unknown) -> Answer:
    return lambda _, rung: RungFailure(
        micro_batch_size=rung.micro_batch_size, outcome=outcome, seconds=1.0
    )


CRASHED = Crashed(reason="rank 0: builtins.ImportError: no ninja", evidence="the last lines")
OUT_OF_MEMORY = OutOfMemory(where="device", evidence="torch.OutOfMemoryError")


def chosen(tuned: Tuned) -> Setting:
    assert tuned.best is not None
    return tuned.best.setting


def speed(tuned: Tuned) -> float:
    assert tuned.best is not None
    assert isinstance(tuned.best.outcome, Measured)
    return tuned.best.outcome.tokens_per_s


def test_the_default_setting_is_probed_first() -> None:
    story = Story(exact(PLAN))
    tuned = story.run()
    assert story.asked[0] == Structure(zero_stage=0).with_micro_batch(1, 4, 64)
    assert tuned.default is not None
    assert tuned.default.setting == story.asked[0]


def test_where_estimates_are_right_the_best_is_found_in_three_probes() -> None:
    surface = exact(PLAN)
    assert speed(Story(surface).run(max_probes=3)) == surface.best


@pytest.mark.parametrize("memory_factor", [0.6, 1.0, 1.4])
@pytest.mark.parametrize("memory_gib", [16, 24])
def test_the_best_is_found_in_eight_probes_though_estimates_are_off(
    memory_gib: int, memory_factor: float
) -> None:
    plan = plan_with(memory_gib)
    regrets = []
    for seed in range(6):
        surface = perturbed(plan, seed, memory_factor=memory_factor)
        regrets.append(1 - speed(Story(surface).run(max_probes=8)) / surface.best)
    assert np.median(regrets) < 0.005
    assert np.mean(regrets) < 0.03


@pytest.mark.parametrize("seed", range(3))
def test_no_setting_is_asked_twice(seed: int) -> None:
    story = Story(perturbed(PLAN, seed))
    tuned = story.run()
    assert len(set(story.asked)) == len(story.asked) == len(tuned.rungs)
    assert len(story.structures) == tuned.probes
    assert story.prober.closed == len(story.prober.requests)


@pytest.mark.parametrize("seed", range(3))
def test_nothing_is_asked_that_needs_as_much_as_what_ran_out_of_memory(seed: int) -> None:
    story = Story(perturbed(plan_with(16), seed, memory_factor=1.2))
    story.run()
    plan = story.surface.plan
    needs = plan.memory.allocated_bytes
    rows = [plan.row_of(rung.setting) for rung in story.recorded]
    for place, rung in enumerate(story.recorded):
        if isinstance(rung.outcome, OutOfMemory):
            for later, row in zip(story.recorded[place + 1 :], rows[place + 1 :], strict=True):
                larger = later.setting.micro_batch_size >= rung.setting.micro_batch_size
                alike = later.setting.structure == rung.setting.structure and larger
                assert not (alike and needs[row] >= needs[rows[place]])
    assert any(isinstance(rung.outcome, OutOfMemory) for rung in story.recorded)


class SurfaceJudge:
    """Knows what a surface needs, after so many seconds."""

    def __init__(self, surface: Surface, seconds: float) -> None:
        self.asked: list[Setting] = []
        self._surface = surface
        self._seconds = seconds

    def expected_seconds(self, setting: Setting) -> float:
        del setting
        return self._seconds

    def least_device_bytes(self, setting: Setting) -> int | None:
        self.asked.append(setting)
        row = self._surface.plan.row_of(setting)
        assert row is not None
        return int(self._surface.device_bytes[row])


def started_for_nothing(story: Story) -> int:
    """Count the probes whose first rung was in doubt, and failed."""
    first = {rung.setting.structure: rung for rung in reversed(story.recorded)}
    plan = story.surface.plan
    return sum(
        isinstance(rung.outcome, OutOfMemory)
        and not plan.surely_fits[plan.space.row_of(rung.setting)]
        for rung in first.values()
    )


@pytest.mark.parametrize("seed", range(4))
def test_what_a_judge_rules_out_is_not_probed(seed: int) -> None:
    surface = perturbed(plan_with(16), seed, memory_factor=1.2)
    judge = SurfaceJudge(surface, seconds=0.0)
    judged, alone = Story(surface, judge=judge), Story(surface)
    assert chosen(judged.run()) == chosen(alone.run())
    # The first of all is probed in any case.
    assert started_for_nothing(judged) <= 1
    for setting in judge.asked:
        row = surface.plan.row_of(setting)
        assert not surface.plan.surely_fits[row]
        assert (setting in judged.asked) == surface.fits[row]


def test_a_judge_that_takes_longer_than_a_probe_is_not_asked() -> None:
    surface = perturbed(plan_with(16), 0, memory_factor=1.2)
    judge = SurfaceJudge(surface, seconds=1e9)
    Story(surface, judge=judge).run()
    assert judge.asked == []


@pytest.mark.parametrize("seed", range(3))
def test_the_same_outcomes_give_the_same_order(seed: int) -> None:
    first, second = Story(perturbed(PLAN, seed)), Story(perturbed(PLAN, seed))
    assert chosen(first.run()) == chosen(second.run())
    assert first.asked == second.asked


@dataclass(frozen=True)
class Undisturbed:
    asked: list[Setting]
    recorded: list[Rung]
    tuned: Tuned


def undisturbed(surface: Surface, max_probes: int) -> Undisturbed:
    story = Story(surface)
    tuned = story.run(max_probes=max_probes)
    return Undisturbed(story.asked, story.recorded, tuned)


@pytest.mark.parametrize(("seed", "max_probes"), [(0, 12), (2, 3)])
def test_a_run_that_was_stopped_goes_on_where_it_was(seed: int, max_probes: int) -> None:
    surface = perturbed(PLAN, seed)
    whole = undisturbed(surface, max_probes)
    for place in range(1, len(whole.asked) + 1):
        stopped = Story(surface, answer=stopped_at(surface, place))
        with pytest.raises(InterruptedRunError):
            stopped.run(max_probes=max_probes)
        resumed = Story(surface, known=stopped.recorded)
        tuned = resumed.run(max_probes=max_probes)
        assert resumed.asked == whole.asked[place - 1 :]
        assert (chosen(tuned), tuned.probes, tuned.stopped_by) == (
            chosen(whole.tuned),
            whole.tuned.probes,
            whole.tuned.stopped_by,
        )


@pytest.mark.parametrize(("seed", "max_probes"), [(0, 12), (2, 3)])
def test_a_run_that_was_killed_goes_on_from_what_was_recorded(seed: int, max_probes: int) -> None:
    surface = perturbed(PLAN, seed)
    whole = undisturbed(surface, max_probes)
    for place in range(len(whole.recorded) + 1):
        resumed = Story(surface, known=whole.recorded[:place])
        assert chosen(resumed.run(max_probes=max_probes)) == chosen(whole.tuned)
        assert resumed.asked == whole.asked[place:]


@pytest.mark.parametrize("max_probes", [1, 2, 4])
def test_so_many_structures_are_probed_at_most(max_probes: int) -> None:
    story = Story(perturbed(PLAN, 6))
    tuned = story.run(max_probes=max_probes)
    assert len(story.structures) == tuned.probes == max_probes
    assert tuned.stopped_by == "max_probes"


def test_the_budget_ends_tuning_within_a_rung() -> None:
    story = Story(perturbed(PLAN, 6))
    tuned = story.run(budget_s=25)
    assert tuned.stopped_by == "tune_budget"
    assert len(story.asked) == 3
    assert story.prober.closed == len(story.prober.requests)


def test_a_budget_that_is_spent_probes_nothing() -> None:
    tuned = Story(exact(PLAN)).run(budget_s=0)
    assert (tuned.best, tuned.probes, tuned.stopped_by) == (None, 0, "tune_budget")


def test_each_run_has_its_budget_for_itself() -> None:
    surface = perturbed(PLAN, 6)
    whole, known = undisturbed(surface, 12), list[Rung]()
    while True:
        story = Story(surface, known=known)
        tuned = story.run(budget_s=25)
        known += story.recorded
        if tuned.stopped_by != "tune_budget":
            break
    assert chosen(tuned) == chosen(whole.tuned)
    assert [rung.setting for rung in known] == whole.asked


def test_without_limits_tuning_ends_when_nothing_is_to_be_gained() -> None:
    assert Story(exact(PLAN)).run().stopped_by == "nothing to gain"


@pytest.mark.parametrize(
    ("outcome", "words"),
    [
        (CRASHED, ["no ninja", "the last lines", "crashed"]),
        (TimedOut(phase="build", seconds=900, evidence="..."), ["900 s", "build", "timed out"]),
        (Unknown(exit_code=3, evidence="the last lines"), ["exit code 3", "the last lines"]),
    ],
)
def test_three_deaths_and_nothing_measured_are_a_fault_of_the_set_up(
    outcome: Crashed | TimedOut | Unknown, words: list[str]
) -> None:
    story = Story(exact(PLAN), answer=always(outcome))
    with pytest.raises(SetupFaultError) as fault:
        story.run()
    assert len(story.structures) == len(story.asked) == 3
    for word in ("fault of the set-up", *words):
        assert word in str(fault.value)


def test_a_single_death_is_a_fault_of_the_set_up_if_nothing_else_was_probed() -> None:
    with pytest.raises(SetupFaultError, match="no ninja"):
        Story(exact(PLAN), answer=always(CRASHED)).run(max_probes=1)


def test_deaths_beside_a_measured_rung_are_of_their_settings() -> None:
    surface = exact(PLAN)

    def answer(request: ProbeRequest, rung: RungPlan) -> RungMeasurement | RungFailure:
        if PLAN.space.setting(surface.row(request, rung)).structure.zero_stage:
            return always(CRASHED)(request, rung)
        return surface.answer(request, rung)

    story = Story(surface, answer=answer)
    tuned = story.run()
    assert chosen(tuned).structure.zero_stage == 0
    assert sum(rung.outcome == CRASHED for rung in tuned.rungs) > 3


def test_a_set_up_that_was_mended_is_probed_as_if_nothing_had_been() -> None:
    surface = exact(PLAN)
    broken = Story(surface, answer=always(CRASHED))
    with pytest.raises(SetupFaultError):
        broken.run()
    mended = Story(surface, known=broken.recorded)
    whole = undisturbed(surface, 12)
    assert chosen(mended.run()) == chosen(whole.tuned)
    assert mended.asked == whole.asked
    again = Story(surface, known=broken.recorded + mended.recorded)
    assert chosen(again.run()) == chosen(whole.tuned)
    assert again.asked == []


def test_a_structure_that_died_alone_is_not_tried_again_after_a_stop() -> None:
    surface = exact(PLAN)

    def answer(request: ProbeRequest, rung: RungPlan) -> RungMeasurement | RungFailure:
        first = PLAN.space.setting(surface.row(request, rung)) == story.tuner.search.default
        return always(CRASHED)(request, rung) if first else surface.answer(request, rung)

    story = Story(surface, answer=answer)
    story.run(budget_s=25)
    assert [rung.outcome.kind for rung in story.recorded] == ["crashed", "measured", "measured"]
    resumed = Story(surface, known=story.recorded)
    resumed.run()
    assert story.structures[0] not in resumed.structures


def test_where_everything_runs_out_of_memory_there_is_no_best() -> None:
    story = Story(exact(plan_with(24)), answer=always(OUT_OF_MEMORY))
    tuned = story.run()
    assert (tuned.best, tuned.default, tuned.stopped_by) == (None, None, "nothing to gain")
    assert all(rung.outcome == OUT_OF_MEMORY for rung in tuned.rungs)


@pytest.mark.parametrize("stop", [InterruptedRunError("stopped by SIGTERM"), KeyboardInterrupt()])
def test_a_stop_in_a_ladder_is_recorded_and_closes_the_probe(stop: BaseException) -> None:
    surface = exact(PLAN)

    def answer(request: ProbeRequest, rung: RungPlan) -> RungMeasurement | RungFailure:
        if rung.micro_batch_size == 2:
            raise stop
        return surface.answer(request, rung)

    story = Story(surface, answer=answer)
    with pytest.raises(type(stop)):
        story.run()
    kinds = [(rung.setting.micro_batch_size, rung.outcome.kind) for rung in story.recorded]
    assert kinds == [(1, "measured"), (2, "interrupted")]
    assert story.prober.closed == 1
    (trial,) = story.tuner.study.trials
    assert trial.state == TrialState.COMPLETE
    assert trial.user_attrs[OUTCOMES] == {"1": "measured", "2": "interrupted"}


def test_a_stop_between_two_rungs_closes_the_probe_too() -> None:
    recorded: list[Rung] = []

    def record(rung: Rung) -> None:
        recorded.append(rung)
        if isinstance(rung.outcome, Measured):
            msg = "stopped by SIGINT"
            raise InterruptedRunError(msg)

    story = Story(exact(PLAN), record=record)
    # The traceback is held here, and with it all that was at work: only closing ends the probe.
    with pytest.raises(InterruptedRunError) as stopped:
        story.run()
    assert stopped.tb is not None
    assert story.prober.closed == 1
    assert isinstance(recorded[-1].outcome, Interrupted)


def test_an_outcome_that_cannot_be_written_ends_tuning_and_closes_the_probe() -> None:
    def record(_: Rung) -> None:
        msg = "cannot write probes.jsonl: No space left on device"
        raise CannotWriteError(msg)

    story = Story(exact(PLAN), record=record)
    with pytest.raises(CannotWriteError):
        story.run()
    assert story.prober.closed == 1


LONG = 1_000_000


def noisy(surface: Surface, seed: int, noise: float = 0.01) -> Answer:
    """Return answers that are off the surface by so much, each time anew."""
    random = np.random.default_rng(seed)

    def answer(request: ProbeRequest, rung: RungPlan) -> RungMeasurement | RungFailure:
        exactly = surface.answer(request, rung)
        if isinstance(exactly, RungFailure):
            return exactly
        (length, (seconds,)), *_ = exactly.accumulate_s
        off = seconds * float(np.exp(random.normal(0, noise)))
        return replace(exactly, accumulate_s=((length, (off,)),))

    return answer


def with_two_alike(slower: float = 1.0) -> tuple[Surface, Setting, Setting]:
    """Return a surface whose second setting is so much slower than its first, and the two."""
    surface = exact(PLAN)
    first, second = np.argsort(-np.where(surface.fits, surface.tokens_per_s, 0))[:2]
    speeds = surface.tokens_per_s.copy()
    speeds[second] = speeds[first] * slower
    pair = PLAN.space.setting(int(first)), PLAN.space.setting(int(second))
    return replace(surface, tokens_per_s=speeds), *pair


def finalists(story: Story) -> list[Setting]:
    return [rung.setting for rung in story.recorded if rung.purpose == "final"]


@pytest.mark.parametrize("seed", range(4))
def test_the_best_are_measured_in_turn_where_they_are_alike(seed: int) -> None:
    surface, first, second = with_two_alike(0.99)
    story = Story(surface, answer=noisy(surface, seed, noise=0.001), steps=LONG)
    tuned = story.run()
    again = finalists(story)
    contenders = list(dict.fromkeys(again))
    assert {first, second} <= set(contenders)
    assert 2 <= len(contenders) <= 4
    assert again[: 2 * len(contenders)] == 2 * contenders, "two rounds at least, in turn"
    assert again[2 * len(contenders) :] == [one for one in contenders if again.count(one) == 3]
    assert chosen(tuned) == first


@pytest.mark.parametrize("seed", range(4))
def test_of_two_that_noise_does_not_tell_apart_the_smaller_is_chosen(seed: int) -> None:
    surface, first, second = with_two_alike()
    story = Story(surface, answer=noisy(surface, seed, noise=0.004), steps=LONG)
    best = chosen(story.run())
    again = finalists(story)
    assert again.count(first) == again.count(second) == 3
    assert best == min(first, second, key=lambda one: surface.device_bytes[PLAN.row_of(one)])


def test_a_training_too_short_for_it_has_no_finals() -> None:
    surface, _, _ = with_two_alike()
    story = Story(surface, answer=noisy(surface, 0), steps=1)
    story.run()
    assert finalists(story) == []


def test_a_finalist_that_fails_loses() -> None:
    surface, loser, other = with_two_alike(0.999)
    asked: list[Setting] = []

    def answer(request: ProbeRequest, rung: RungPlan) -> RungMeasurement | RungFailure:
        setting = PLAN.space.setting(surface.row(request, rung))
        asked.append(setting)
        if setting == loser and asked.count(setting) == 2:
            return always(OUT_OF_MEMORY)(request, rung)
        return surface.answer(request, rung)

    story = Story(surface, answer=answer, steps=LONG)
    assert chosen(story.run()) == other
    assert finalists(story).count(loser) == 1


@pytest.mark.parametrize("seed", range(3))
def test_finals_that_were_stopped_go_on_to_the_same_choice(seed: int) -> None:
    surface, _, _ = with_two_alike()
    whole = Story(surface, answer=noisy(surface, seed), steps=LONG)
    best = chosen(whole.run())
    for place in range(len(whole.recorded) - 5, len(whole.recorded) + 1):
        resumed = Story(surface, known=whole.recorded[:place], answer=noisy(surface, 1), steps=LONG)
        resumed.run()
        kinds = [rung.purpose for rung in (*whole.recorded[:place], *resumed.recorded)]
        assert kinds.count("final") >= 6
    assert chosen(Story(surface, known=whole.recorded, steps=LONG).run()) == best


@pytest.mark.parametrize("seed", range(3))
def test_the_same_outcomes_give_the_same_choice(seed: int) -> None:
    surface = perturbed(PLAN, seed)
    whole = Story(surface, answer=noisy(surface, seed), steps=LONG)
    tuned = whole.run()
    replayed = Story(surface, known=whole.recorded, steps=LONG)
    again = replayed.run()
    assert replayed.asked == []
    assert (again.best, again.default) == (tuned.best, tuned.default)


@pytest.mark.parametrize("seed", range(3))
def test_what_an_earlier_run_found_is_verified_by_one_probe(seed: int) -> None:
    surface = perturbed(PLAN, seed)
    whole = undisturbed(surface, 12)
    cached = [replace(rung, cached=True) for rung in whole.recorded]
    story = Story(surface, known=cached)
    tuned = story.run()
    assert story.asked == [chosen(whole.tuned)]
    assert [rung.purpose for rung in story.recorded] == ["verification"]
    assert (chosen(tuned), tuned.probes) == (chosen(whole.tuned), 1)
    again = Story(surface, known=cached + story.recorded)
    assert chosen(again.run()) == chosen(tuned)
    assert again.asked == []


def test_what_does_not_hold_any_more_is_searched_anew() -> None:
    before, now = perturbed(PLAN, 0), perturbed(PLAN, 1)
    cached = [replace(rung, cached=True) for rung in undisturbed(before, 12).recorded]
    best = max(float(before.tokens_per_s[row]) for row in np.flatnonzero(before.fits))
    assert not 0.9 < now.tokens_per_s[before.tokens_per_s == best] / best < 1.1
    story = Story(now, known=cached)
    tuned = story.run()
    assert chosen(tuned) == chosen(undisturbed(now, 12).tuned)
    assert not any(rung.cached for rung in tuned.rungs)
    again = Story(now, known=cached + story.recorded)
    assert chosen(again.run()) == chosen(tuned)
    assert again.asked == []


def test_a_verification_that_fails_says_that_nothing_holds() -> None:
    surface = perturbed(PLAN, 0)
    cached = [replace(rung, cached=True) for rung in undisturbed(surface, 12).recorded]
    story = Story(surface, known=cached, answer=always(CRASHED))
    with pytest.raises(SetupFaultError, match="no ninja"):
        story.run()


@pytest.mark.parametrize("seed", range(3))
def test_a_thrifty_search_probes_the_less_the_shorter_the_training(seed: int) -> None:
    surface = perturbed(PLAN, seed)
    probes = [
        Story(surface, steps=steps, thrifty=True).run().probes for steps in (1, 300, 10_000_000)
    ]
    assert probes[0] == 1
    assert probes[0] <= probes[1] <= probes[2] == Story(surface).run().probes


@pytest.mark.parametrize("sampler", ["tpe", "random"])
def test_other_samplers_propose_only_what_there_is_to_try(sampler: str) -> None:
    surface = perturbed(plan_with(16), 0)
    story = Story(surface, sampler=sampler)
    tuned = story.run(max_probes=6)
    assert story.asked[0] == story.tuner.search.default
    assert len(set(story.asked)) == len(story.asked)
    assert tuned.probes <= 6
    assert tuned.best is not None


def test_the_study_has_a_trial_a_structure_with_rungs_as_intermediate_values() -> None:
    story = Story(perturbed(PLAN, 6))
    tuned = story.run()
    assert story.tuner.study.best_value == speed(tuned)
    trials = story.tuner.study.trials
    assert [Structure(**trial.params) for trial in trials] == story.structures
    for trial in trials:
        speeds = {
            rung.setting.micro_batch_size: rung.outcome.tokens_per_s
            for rung in story.recorded
            if rung.setting.structure == Structure(**trial.params)
            and isinstance(rung.outcome, Measured)
        }
        assert trial.intermediate_values == speeds
        assert trial.value == max(speeds.values(), default=None)


def test_a_structure_that_was_never_measured_is_a_failed_trial() -> None:
    story = Story(exact(PLAN), answer=always(OUT_OF_MEMORY))
    story.run()
    assert {trial.state for trial in story.tuner.study.trials} == {TrialState.FAIL}


def test_the_study_file_is_one_that_optuna_loads(tmp_path: Path) -> None:
    story = Story(perturbed(PLAN, 0))
    story.run(max_probes=3)
    path = tmp_path / "study.db"
    path.write_text("of an earlier run")
    write_study(story.tuner.study, path)
    loaded = optuna.load_study(study_name="autotune", storage=f"sqlite:///{path}")
    assert [(t.params, t.intermediate_values, t.state) for t in loaded.trials] == [
        (t.params, t.intermediate_values, t.state) for t in story.tuner.study.trials
    ]
    assert path.stat().st_mode & 0o777 == 0o600
    assert list(tmp_path.iterdir()) == [path]


def test_a_rung_is_described_in_a_line() -> None:
    story = Story(exact(PLAN))
    story.run(max_probes=1)
    first, last = story.recorded[0], story.recorded[-1]
    assert "tokens/s" in describe(first)
    assert "GiB" in describe(first)
    assert describe(replace(last, outcome=OUT_OF_MEMORY)) == "out of memory"


def make_site(gpus: int = 2) -> JobSite:
    return JobSite(
        job=make_job(),
        cluster=make_cluster(gpus=gpus),
        profile=make_profile(),
        lengths_of_rows=LENGTHS,
        dataset_dir=Path("dataset"),
        scratch_dir=Path("logs"),
        total_steps=10,
    )


def test_a_request_climbs_one_structure_with_one_config_and_saves_nothing() -> None:
    structure = Structure(zero_stage=2, checkpointing="full")
    ladder = [structure.with_micro_batch(size, 2, 32) for size in (1, 2, 4)]
    request = make_site().request(ladder)
    assert [rung.micro_batch_size for rung in request.rungs] == [1, 2, 4]
    assert [rung.gradient_accumulation_steps for rung in request.rungs] == [16, 8, 4]
    assert request.ds_config["zero_optimization"]["stage"] == 2
    assert request.spec.checkpointing == "full"
    assert request.spec.trainer["save_strategy"] == "no"
    assert request.ranks == 2


def test_micro_steps_as_predicted_compose_to_the_step_time_as_predicted() -> None:
    site = make_site(gpus=1)
    plan = plan_for(site.cluster)
    setting = Structure(zero_stage=0).with_micro_batch(4, 1, 32)
    micro_step = predicted_micro_step(site.profile, "none", RATES)
    lengths = np.linspace(100, LENGTHS.max(), 50, dtype=np.int64)
    seconds = micro_step(np.array(4), lengths)
    update_s = 28e9 / 1e12
    outcome = site.outcome(
        setting,
        RungMeasurement(
            micro_batch_size=4,
            accumulate_s=tuple(
                (int(length), (float(time), float(time)))
                for length, time in zip(lengths, seconds, strict=True)
            ),
            boundary_s=((int(lengths[25]), (float(seconds[25]) + update_s,)),),
            peak_bytes=7,
            seconds=1.0,
        ),
    )
    row = plan.row_of(setting)
    assert row is not None
    assert outcome.step_time_s == pytest.approx(plan.step_time_s[row], rel=1e-3)
    assert outcome.tokens_per_s == pytest.approx(plan.tokens_per_s[row], rel=1e-3)
    assert outcome.boundary_extra_s == pytest.approx(update_s)
    assert (outcome.peak_bytes, outcome.spread) == (7, 0.0)


def test_a_boundary_faster_than_a_micro_step_is_noise_and_adds_nothing() -> None:
    outcome = make_site().outcome(
        Structure(zero_stage=0).with_micro_batch(1, 2, 32),
        RungMeasurement(
            micro_batch_size=1,
            accumulate_s=((100, (1.0, 1.2)), (1123, (2.0, 2.0))),
            boundary_s=((100, (0.5, 0.5)),),
            peak_bytes=1,
            seconds=1.0,
        ),
    )
    assert outcome.boundary_extra_s == 0.0
    assert outcome.spread == pytest.approx(0.1 / 1.1)
