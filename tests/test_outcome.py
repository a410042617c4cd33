"""The line of probes.jsonl: what it holds, and that it reads back as what was written."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from records import as_rung, measured, settings

from autotune.outcome import (
    Crashed,
    Interrupted,
    Measured,
    Outcome,
    OutOfMemory,
    Rung,
    TimedOut,
    Unknown,
)
from autotune.setting import Structure

SETTING = Structure(zero_stage=2).with_micro_batch(4, ranks=2, global_batch_size=16)
CONTRACT = {
    "schema",
    "structure",
    "micro_batch_size",
    "gradient_accumulation_steps",
    "ranks",
    "lengths",
    "outcome",
    "at",
}
ONE_OF_EACH: tuple[Outcome, ...] = (
    measured(1000.0),
    OutOfMemory(where="device", evidence="rank 0: torch.OutOfMemoryError"),
    OutOfMemory(where="host", evidence="the kernel killed a rank for memory"),
    TimedOut(phase="build", seconds=900.0, evidence="last line"),
    Crashed(reason="rank 1: ValueError: no", evidence="traceback"),
    Interrupted(evidence="stopped"),
    Unknown(exit_code=None, evidence=""),
)
seconds = st.floats(0, 1e6)
outcomes: st.SearchStrategy[Outcome] = st.one_of(
    st.builds(
        Measured,
        step_time_s=seconds,
        samples_per_s=seconds,
        tokens_per_s=seconds,
        accumulate_s=st.lists(st.tuples(st.integers(1, 10**6), seconds)).map(tuple),
        boundary_extra_s=seconds,
        spread=seconds,
        peak_bytes=st.integers(0, 2**45),
    ),
    st.builds(OutOfMemory, where=st.sampled_from(["device", "host"]), evidence=st.text()),
    st.builds(TimedOut, phase=st.text(), seconds=seconds, evidence=st.text()),
    st.builds(Crashed, reason=st.text(), evidence=st.text()),
    st.builds(Interrupted, evidence=st.text()),
    st.builds(Unknown, exit_code=st.none() | st.integers(-64, 255), evidence=st.text()),
)
rungs = st.builds(
    Rung,
    setting=settings(),
    ranks=st.integers(1, 64),
    lengths=st.just({"longest": 880, "timed": [22, 880]}),
    outcome=outcomes,
    at=st.just("2026-01-01T00:00:00+00:00"),
    seconds=seconds,
)


@given(rungs)
def test_a_rung_comes_back_from_its_line(rung: Rung) -> None:
    assert Rung.from_json(json.loads(json.dumps(rung.to_json()))) == rung


@given(rungs)
def test_a_rung_is_one_line_of_text(rung: Rung) -> None:
    assert len(json.dumps(rung.to_json()).splitlines()) == 1


@pytest.mark.parametrize("outcome", ONE_OF_EACH, ids=lambda outcome: str(outcome.kind))
def test_the_line_has_exactly_the_keys_of_the_contract(outcome: Outcome) -> None:
    line = as_rung(SETTING, outcome).to_json()
    assert line.keys() == CONTRACT
    assert line["schema"] == 1
    assert line["outcome"]["kind"] == outcome.kind
    assert "where" in line["outcome"]


@pytest.mark.parametrize("outcome", ONE_OF_EACH, ids=lambda outcome: str(outcome.kind))
def test_only_an_out_of_memory_has_a_place(outcome: Outcome) -> None:
    where = as_rung(SETTING, outcome).to_json()["outcome"]["where"]
    assert where == (outcome.where if isinstance(outcome, OutOfMemory) else None)


def test_the_line_holds_the_structure_apart_from_the_micro_batch() -> None:
    line = as_rung(SETTING, ONE_OF_EACH[0]).to_json()
    assert line["structure"]["zero_stage"] == 2
    assert "micro_batch_size" not in line["structure"]
    assert (line["micro_batch_size"], line["gradient_accumulation_steps"]) == (4, 2)


def test_an_unknown_kind_of_outcome_is_no_rung() -> None:
    line = as_rung(SETTING, ONE_OF_EACH[0]).to_json()
    line["outcome"] = {"kind": "out_of_luck", "where": None}
    with pytest.raises(KeyError):
        Rung.from_json(line)
