"""Why a setting was chosen, and what the others lost by."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from run_directories import PLAN, Example, failed, fastest, plan_json, row_of, rungs_of, truth

from autotune.outcome import Crashed, Measured, Rung, TimedOut, Unknown
from autotune.report.belief import beliefs
from autotune.report.reasons import Alternative, Explanation, differences, explain
from autotune.report.record import RunRecord
from autotune.setting import Setting, Structure
from autotune.tune.beliefs import update

BATCH = {"ranks": 2, "global_batch_size": 16}


def with_knobs(micro_batch_size: int, **knobs: Any) -> Setting:  # noqa: ANN401 - fields of a Structure
    return Structure(**knobs).with_micro_batch(micro_batch_size, **BATCH)


def explained(rungs: list[Rung], root: Path, **changes: Any) -> Explanation:  # noqa: ANN401 - fields of an Example
    record = RunRecord.read(Example(rungs=rungs, **changes).write(root / "run"))
    found = explain(record)
    assert found is not None
    return found


def alternative(explanation: Explanation, setting: Setting) -> Alternative:
    (found,) = (one for one in explanation.alternatives if one.setting == setting)
    return found


CHOSEN = with_knobs(2, zero_stage=2, checkpointing="none")
RECOMPUTING = with_knobs(2, zero_stage=2, checkpointing="full")
SMALLER = with_knobs(1, zero_stage=2, checkpointing="none")


def measured(setting: Setting, *, share: float, updates: bool = False) -> Rung:
    """Return a rung that reached a share of the chosen one's speed, by micro-steps or updates."""
    base = truth(CHOSEN)
    outcome = replace(
        truth(setting),
        tokens_per_s=base.tokens_per_s * share,
        step_time_s=base.step_time_s / share,
        boundary_extra_s=base.boundary_extra_s
        + (base.step_time_s / share - base.step_time_s if updates else 0.0),
    )
    (rung,) = rungs_of([setting])
    return replace(rung, outcome=outcome)


def test_it_says_how_many_were_measured_and_that_it_is_the_fastest(tmp_path: Path) -> None:
    rungs = [measured(CHOSEN, share=1.0), measured(SMALLER, share=0.8)]
    explanation = explained(rungs, tmp_path)

    assert explanation.chosen == CHOSEN
    assert "fastest of 2 settings of 1 structures" in explanation.why[0]
    assert "1.25 x as fast" in explanation.why[1]
    total = int(PLAN.kept.sum()) + sum(PLAN.rejected_by_rule().values())
    assert any(
        sentence.startswith(f"{total} settings were estimated") for sentence in explanation.why
    )


def test_what_recomputes_lost_by_computing(tmp_path: Path) -> None:
    rungs = [measured(CHOSEN, share=1.0), measured(RECOMPUTING, share=0.75)]
    other = alternative(explained(rungs, tmp_path), RECOMPUTING)

    assert other.differs == ("checkpointing full in place of none",)
    assert (other.standing, other.term) == ("measured", "computing")
    assert "0.75 x" in other.reason
    assert "micro-steps" in other.reason
    assert "recomputing activations" in other.reason


def test_what_splits_the_batch_more_often_lost_by_communication(tmp_path: Path) -> None:
    # ZeRO 2 reduces gradients in each micro-step, of which there are twice as many.
    rungs = [measured(CHOSEN, share=1.0), measured(SMALLER, share=0.5)]
    other = alternative(explained(rungs, tmp_path), SMALLER)

    mine, theirs = map(row_of, (CHOSEN, SMALLER))
    computing, talking = (
        column[theirs] - column[mine]
        for column in (PLAN.terms.computing_s, PLAN.terms.communication_s)
    )
    assert talking > computing
    assert other.term == "communication"


def test_what_is_slow_in_its_updates_lost_there(tmp_path: Path) -> None:
    offloaded = with_knobs(2, zero_stage=2, checkpointing="none", offload_optimizer="cpu")
    rungs = [measured(CHOSEN, share=1.0), measured(offloaded, share=0.4, updates=True)]
    other = alternative(explained(rungs, tmp_path), offloaded)

    assert "synchronisation and update" in other.reason
    assert other.term in {"the optimizer's update", "copies between device and host"}


def test_what_is_as_fast_lost_nothing(tmp_path: Path) -> None:
    rungs = [measured(CHOSEN, share=1.0), measured(SMALLER, share=0.995)]
    other = alternative(explained(rungs, tmp_path), SMALLER)

    assert other.term is None
    assert "no difference" in other.reason


def test_an_out_of_memory_names_the_part_that_grew(tmp_path: Path) -> None:
    larger = with_knobs(4, zero_stage=2, checkpointing="none")
    (rung,) = rungs_of([larger])
    rungs = [measured(CHOSEN, share=1.0), failed(rung)]
    other = alternative(explained(rungs, tmp_path), larger)

    assert (other.standing, other.term, other.tokens_per_s) == ("failed", "activations", None)
    assert "ran out of device memory" in other.reason


@pytest.mark.parametrize(
    ("outcome", "says"),
    [
        (Crashed(reason="ValueError: odd\nmore", evidence=""), "crashed: ValueError: odd."),
        (TimedOut(phase="step", seconds=90.0, evidence=""), "1 min 30 s in phase step"),
        (Unknown(exit_code=3, evidence=""), "exit code 3"),
    ],
)
def test_a_death_says_how(tmp_path: Path, outcome: Any, says: str) -> None:  # noqa: ANN401 - outcomes
    (rung,) = rungs_of([SMALLER])
    rungs = [measured(CHOSEN, share=1.0), replace(rung, outcome=outcome)]
    other = alternative(explained(rungs, tmp_path), SMALLER)

    assert other.standing == "failed"
    assert says in other.reason


def test_what_was_rejected_says_the_rule_and_its_numbers(tmp_path: Path) -> None:
    explanation = explained([measured(CHOSEN, share=1.0)], tmp_path)
    rejected = [one for one in explanation.alternatives if one.standing == "rejected"]
    record = RunRecord.read(Example(rungs=[measured(CHOSEN, share=1.0)]).write(tmp_path / "again"))

    near = [
        setting
        for setting, entry in record.entries.items()
        if entry["rejected_by"] and setting.structure == CHOSEN.structure
    ]
    assert near
    assert {one.setting for one in rejected} >= set(near[:1])
    for one in rejected:
        assert "rejected by device_memory" in one.reason
        assert one.term is not None


def test_what_was_not_tried_says_what_is_expected_of_it(tmp_path: Path) -> None:
    rungs = [measured(CHOSEN, share=1.0)]
    explanation = explained(rungs, tmp_path)
    left = [one for one in explanation.alternatives if one.standing == "not measured"]

    assert left
    for one in left:
        assert one.tokens_per_s is None or f"{one.tokens_per_s:.0f} tokens/s" in one.reason


def test_beliefs_are_those_that_the_search_had(tmp_path: Path) -> None:
    rungs = rungs_of(fastest(4))
    record = RunRecord.read(Example(rungs=rungs).write(tmp_path / "run"))
    found, expected = beliefs(record), update(PLAN, rungs)

    assert len(found) == len(record.entries)
    for setting, belief in found.items():
        row = row_of(setting)
        speed = float(np.exp(expected.log_tokens_per_s[row]))
        assert belief.tokens_per_s == pytest.approx(speed)
        assert belief.error == pytest.approx(float(expected.log_sd[row]))
        # Bytes are whole in plan.json.
        assert belief.fit_probability == pytest.approx(
            float(expected.fit_probability[row]), abs=1e-6
        )


def test_the_nearest_differ_in_one_step(tmp_path: Path) -> None:
    explanation = explained(rungs_of([CHOSEN, SMALLER]), tmp_path)

    assert 4 <= len(explanation.alternatives) <= 8
    assert all(len(one.differs) == 1 for one in explanation.alternatives)
    assert CHOSEN not in {one.setting for one in explanation.alternatives}


def test_what_follows_from_a_stage_is_no_difference_of_its_own() -> None:
    # DeepSpeed overlaps communication at stage 3 unless told otherwise.
    other = with_knobs(2, zero_stage=3, checkpointing="none")

    assert differences(CHOSEN, other) == ("ZeRO 3 in place of 2",)
    apart = replace(other, structure=replace(other.structure, overlap_comm=False))
    assert len(differences(CHOSEN, apart)) == 2


def test_a_plan_of_before_has_no_terms_and_no_beliefs(tmp_path: Path) -> None:
    plan = plan_json()
    for entry in plan["settings"]:
        del entry["terms"]
    rungs = [measured(CHOSEN, share=1.0), measured(RECOMPUTING, share=0.75)]
    explanation = explained(rungs, tmp_path, plan=plan)

    other = alternative(explanation, RECOMPUTING)
    assert other.term is None
    assert "0.75 x" in other.reason
    left = [one for one in explanation.alternatives if one.standing == "not measured"]
    assert {one.reason for one in left} <= {"it was not tried."}


def test_a_chosen_setting_that_seemed_slower_says_why_it_was_taken(tmp_path: Path) -> None:
    run_dir = Example(rungs=[measured(CHOSEN, share=1.0), measured(SMALLER, share=0.999)]).write(
        tmp_path / "run"
    )
    record = RunRecord.read(run_dir)
    result = record.result | {"setting": SMALLER.to_json()}
    explanation = explain(replace(record, result=result))

    assert explanation is not None
    assert "measuring them again" in explanation.why[0]
    assert isinstance(record.measured[SMALLER], Measured)


def test_nothing_chosen_is_nothing_to_explain(tmp_path: Path) -> None:
    record = RunRecord.read(Example(is_tuned=False, steps=()).write(tmp_path / "run"))

    assert explain(record) is None
