"""What the search wants next, and how Optuna sees it."""

from dataclasses import asdict, replace

import optuna
import pytest
from optuna.distributions import CategoricalDistribution
from optuna.trial import TrialState
from records import as_rung, exact, make_cluster, make_job, measured, plan_for

from autotune.outcome import Crashed, Interrupted, Outcome, OutOfMemory, Rung
from autotune.plan import Plan
from autotune.setting import RANDOM, REBALANCE, Setting, Structure
from autotune.tune.search import (
    OUTCOMES,
    PriorSampler,
    Search,
    default_setting,
    distributions,
    new_study,
)
from autotune.units import GIB

OUT_OF_MEMORY = OutOfMemory(where="device", evidence="torch.OutOfMemoryError")
PLAIN = Structure(zero_stage=0)


def plan_with(memory_gib: int, *, gpus: int = 4) -> Plan:
    cluster = make_cluster(gpus=gpus, memory_bytes=memory_gib * GIB)
    return plan_for(cluster, job=make_job(global_batch_size=16 * gpus))


ROOMY, TIGHT = plan_with(1000), plan_with(32)


def setting(structure: Structure, size: int) -> Setting:
    return structure.with_micro_batch(size, 4, 64)


def as_estimated(plan: Plan, structure: Structure, size: int, *, speed: float = 1.0) -> Rung:
    row = plan.row_of(setting(structure, size))
    assert row is not None
    outcome = measured(
        speed * float(plan.tokens_per_s[row]), peak_bytes=int(plan.memory.device_bytes[row])
    )
    return as_rung(setting(structure, size), outcome)


def climbed(plan: Plan, structure: Structure, *sizes: int) -> list[Rung]:
    return [as_estimated(plan, structure, size) for size in sizes]


def sizes(ladder: list[Setting]) -> list[int]:
    return [setting.micro_batch_size for setting in ladder]


def test_the_default_is_one_row_a_micro_step_without_zero() -> None:
    assert default_setting(ROOMY) == setting(PLAIN, 1)


def test_where_that_does_not_fit_the_default_is_what_needs_least() -> None:
    plan = plan_with(16)
    default = default_setting(plan)
    row = plan.row_of(default)
    assert default != setting(PLAIN, 1)
    assert plan.memory.device_bytes[row] == plan.memory.device_bytes.min()


def test_rows_of_the_default_are_taken_as_they_are_drawn() -> None:
    tight = plan_with(16)
    split = tuple(replace(one, sampling=REBALANCE) for one in tight.space.structures)
    smallest = default_setting(tight).structure
    # Split by length, the least of all settings; and where all are, one of them.
    only = replace(tight, space=replace(tight.space, structures=split))
    assert default_setting(only).structure.sampling == REBALANCE
    mixed = tuple(
        other if one == smallest else one
        for one, other in zip(tight.space.structures, split, strict=True)
    )
    some = replace(tight, space=replace(tight.space, structures=mixed))
    assert default_setting(some).structure.sampling == RANDOM


def test_the_defaults_structure_is_probed_first() -> None:
    assert Search(ROOMY, []).next_structure() == PLAIN
    others = climbed(ROOMY, Structure(zero_stage=1), 1, 2, 4, 8, 16)
    assert Search(ROOMY, others).next_structure() == PLAIN


def test_a_ladder_is_climbed_from_the_smallest_micro_batch_up() -> None:
    ladder = Search(ROOMY, []).ladder(PLAIN)
    assert sizes(ladder) == [1, 2, 4, 8, 16]
    assert {setting.structure for setting in ladder} == {PLAIN}


def test_a_ladder_leaves_out_what_was_tried() -> None:
    assert sizes(Search(ROOMY, climbed(ROOMY, PLAIN, 1, 2)).ladder(PLAIN)) == [4, 8, 16]


def test_a_ladder_leaves_out_what_cannot_fit_after_an_out_of_memory_elsewhere() -> None:
    less = Structure(zero_stage=1, offload_optimizer="cpu")
    search = Search(ROOMY, [as_rung(setting(less, 4), OUT_OF_MEMORY)])
    assert sizes(search.ladder(Structure(zero_stage=1))) == [1, 2]


def test_the_default_is_climbed_to_the_wall_of_the_device() -> None:
    search = Search(TIGHT, [])
    slower = as_estimated(TIGHT, PLAIN, 1)
    search.learn(slower)
    search.learn(as_estimated(TIGHT, PLAIN, 2, speed=0.1))
    assert search.should_go_on(PLAIN)
    search.learn(as_rung(setting(PLAIN, 4), OUT_OF_MEMORY))
    assert not search.should_go_on(PLAIN)


def test_where_all_fits_a_ladder_ends_when_what_is_above_cannot_win() -> None:
    search = Search(ROOMY, [])
    search.learn(as_estimated(ROOMY, PLAIN, 1))
    assert search.should_go_on(PLAIN)
    search.learn(as_estimated(ROOMY, PLAIN, 2, speed=0.5))
    assert not search.should_go_on(PLAIN)


@pytest.mark.parametrize("last", [None, Interrupted(evidence="stopped")])
def test_a_ladder_that_was_cut_short_is_climbed_to_its_end_first(last: Outcome | None) -> None:
    structure = Structure(zero_stage=1)
    rungs = climbed(ROOMY, PLAIN, 1, 2, 4, 8, 16) + climbed(ROOMY, structure, 1)
    if last is not None:
        rungs.append(as_rung(setting(structure, 2), last))
    search = Search(ROOMY, rungs)
    assert search.next_structure() == structure
    assert sizes(search.ladder(structure)) == [2, 4, 8, 16]


@pytest.mark.parametrize("end", [OUT_OF_MEMORY, Crashed(reason="no", evidence="")])
def test_a_ladder_that_ended_is_not_climbed_again(end: Outcome) -> None:
    structure = Structure(zero_stage=1)
    rungs = climbed(ROOMY, PLAIN, 1, 2, 4, 8, 16) + climbed(ROOMY, structure, 1)
    search = Search(ROOMY, [*rungs, as_rung(setting(structure, 2), end)])
    assert search.next_structure() != structure


def test_with_nothing_measured_the_fastest_that_may_fit_is_next() -> None:
    search = Search(TIGHT, [as_rung(setting(PLAIN, 1), OUT_OF_MEMORY)])
    beliefs = search.beliefs
    structure = search.next_structure()
    assert structure is not None
    speeds = [
        beliefs.log_tokens_per_s[row]
        for row in range(len(TIGHT.space))
        if beliefs.open_rows[row] and TIGHT.space.setting(row).structure == structure
    ]
    assert max(speeds) == beliefs.log_tokens_per_s[beliefs.open_rows].max()


def test_nothing_is_next_when_everything_was_tried() -> None:
    surface = exact(TIGHT)
    rungs = []
    for row in range(len(TIGHT.space)):
        speed = measured(float(surface.tokens_per_s[row]))
        rungs.append(as_rung(TIGHT.space.setting(row), speed if TIGHT.fits[row] else OUT_OF_MEMORY))
    assert Search(TIGHT, rungs).next_structure() is None


def test_the_best_is_the_fastest_measured_rung() -> None:
    rungs = [as_rung(setting(PLAIN, size), measured(100.0 * size)) for size in (1, 4, 2)]
    search = Search(ROOMY, [*rungs, as_rung(setting(PLAIN, 8), OUT_OF_MEMORY)])
    assert search.best() == rungs[1]
    assert Search(ROOMY, []).best() is None


def test_a_knob_is_a_choice_among_the_values_that_structures_have() -> None:
    knobs = distributions(ROOMY)
    assert knobs.keys() == asdict(PLAIN).keys()
    assert knobs["zero_stage"] == CategoricalDistribution([0, 1, 2, 3])
    assert knobs["offload_optimizer"] == CategoricalDistribution(["cpu", "none"])
    assert knobs["attention"] == CategoricalDistribution(["sdpa"])


def test_optuna_is_proposed_what_the_search_wants() -> None:
    search = Search(ROOMY, [])
    trial = new_study(search).ask(distributions(ROOMY))
    assert Structure(**trial.params) == search.next_structure()


def test_a_knob_of_no_structure_is_refused() -> None:
    search = Search(ROOMY, [])
    study = new_study(search)
    with pytest.raises(NotImplementedError, match="learning_rate"):
        PriorSampler(search).sample_independent(
            study,
            study.ask(distributions(ROOMY))._cached_frozen_trial,
            "learning_rate",
            CategoricalDistribution([1]),
        )


def test_the_pruner_stops_a_ladder_where_the_search_would() -> None:
    search = Search(ROOMY, [])
    trial = new_study(search).ask(distributions(ROOMY))
    search.learn(as_estimated(ROOMY, PLAIN, 1))
    assert not trial.should_prune()
    search.learn(as_estimated(ROOMY, PLAIN, 2, speed=0.5))
    assert trial.should_prune()


def test_known_outcomes_are_trials_a_structure_with_rungs_as_intermediate_values() -> None:
    other = Structure(zero_stage=1)
    rungs = [
        *climbed(ROOMY, PLAIN, 1, 2),
        as_rung(setting(PLAIN, 4), OUT_OF_MEMORY),
        as_rung(setting(other, 1), Crashed(reason="no", evidence="")),
    ]
    first, second = new_study(Search(ROOMY, rungs)).trials
    assert (Structure(**first.params), Structure(**second.params)) == (PLAIN, other)
    assert (first.state, second.state) == (TrialState.COMPLETE, TrialState.FAIL)
    assert set(first.intermediate_values) == {1, 2}
    assert first.value == max(first.intermediate_values.values())
    assert first.user_attrs[OUTCOMES] == {"1": "measured", "2": "measured", "4": "out_of_memory"}
    assert second.user_attrs[OUTCOMES] == {"1": "crashed"}


def test_the_study_wants_the_most_tokens_a_second() -> None:
    study = new_study(Search(ROOMY, []))
    assert study.direction == optuna.study.StudyDirection.MAXIMIZE
    assert study.study_name == "autotune"
