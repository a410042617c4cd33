"""What ranks answer with: it survives the file, and the worst of them counts."""

import json
from dataclasses import fields, replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autotune.probe.protocol import (
    PHASES,
    ProbeRequest,
    RungMeasurement,
    RungPlan,
    rung_phase,
    worst_of,
)
from autotune.probe.worker import Answer, answer_events
from autotune.workload import TrainSpec

seconds = st.floats(1e-6, 1e3)
timings = st.lists(
    st.tuples(st.integers(1, 4096), st.lists(seconds, min_size=2, max_size=5).map(tuple))
).map(tuple)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=2), inner),
    max_leaves=6,
)
measurements = st.builds(
    RungMeasurement,
    micro_batch_size=st.integers(1, 64),
    accumulate_s=timings,
    boundary_s=timings,
    peak_bytes=st.integers(0, 2**40),
    seconds=seconds,
)


def measurement(first: float, second: float, peak_bytes: int, took: float) -> RungMeasurement:
    return RungMeasurement(
        micro_batch_size=2,
        accumulate_s=((64, (first, second)), (128, (2 * first, 2 * second))),
        boundary_s=((64, (3 * first, 3 * second)),),
        peak_bytes=peak_bytes,
        seconds=took,
    )


@given(measurements)
def test_a_measurement_comes_back_from_json(measured: RungMeasurement) -> None:
    assert RungMeasurement.from_json(json.loads(json.dumps(measured.to_json()))) == measured


@given(measurements)
def test_the_worst_of_equal_ranks_is_each_of_them(measured: RungMeasurement) -> None:
    assert worst_of([measured]) == worst_of([measured] * 3) == measured


def test_the_slowest_ranks_times_and_the_largest_memory_count() -> None:
    ranks = [measurement(1.0, 5.5, 100, 9.0), measurement(2.0, 4.0, 200, 8.0)]
    assert worst_of(ranks) == measurement(1.0, 5.5, 200, 9.0)


@pytest.mark.parametrize(
    "timed", [((64, (1.0,)),), ((64, (1.0,)), (128, (1.0,))), ((64, (1.0, 1.0)), (99, (1.0, 1.0)))]
)
def test_ranks_that_timed_unlike_things_are_not_merged(
    timed: tuple[tuple[int, tuple[float, ...]], ...],
) -> None:
    other = replace(measurement(1.0, 1.0, 1, 1.0), accumulate_s=timed)
    with pytest.raises(ValueError, match=r"shorter|longer|unlike"):
        worst_of([other, measurement(1.0, 1.0, 1, 1.0)])


@given(st.sampled_from([field.name for field in fields(RungMeasurement)]), json_values)
def test_a_measurement_of_wrong_types_is_refused_or_right(field: str, value: object) -> None:
    garbled = json.loads(json.dumps(measurement(1.0, 2.0, 3, 4.0).to_json())) | {field: value}
    try:
        measured = RungMeasurement.from_json(garbled)
    except (KeyError, TypeError, ValueError):
        return
    assert worst_of([measured]) == measured


def test_a_request_comes_back_from_json() -> None:
    rung = RungPlan(
        micro_batch_size=4,
        gradient_accumulation_steps=1,
        memory_rows=(1, 2),
        timed_rows=((64, (0, 1)),),
    )
    spec = TrainSpec(
        model_dir="model",
        from_scratch=True,
        trust_remote_code=False,
        precision="fp32",
        attention="sdpa",
        checkpointing="none",
        dataset_dir="data",
        model_output_dir="out",
        device_kind="cpu",
        device_memory_bytes=1,
        threads_per_rank=1,
        seed=0,
        trainer={"bf16": False},
    )
    request = ProbeRequest(
        label="x", ranks=2, spec=spec, ds_config={"a": {"b": 1}}, total_steps=3, rungs=(rung, rung)
    )
    assert ProbeRequest.from_json(json.loads(json.dumps(request.to_json()))) == request


def test_the_phase_of_a_rung_is_none_of_those_before_it() -> None:
    rung = RungPlan(
        micro_batch_size=4, gradient_accumulation_steps=1, memory_rows=(), timed_rows=()
    )
    assert rung_phase(rung) == "micro-batch 4"
    assert rung_phase(rung) not in PHASES


def test_answers_are_read_once_each(tmp_path: Path) -> None:
    path = tmp_path / "rank-0.jsonl"
    answer = Answer(str(path))
    answer.write("phase", phase="build")
    events, offset = answer_events(path, 0)
    assert events == [{"event": "phase", "phase": "build"}]
    assert answer_events(path, offset) == ([], offset)
    answer.write("done")
    assert answer_events(path, offset)[0] == [{"event": "done"}]


def test_an_answer_that_is_not_there_yet_is_nothing(tmp_path: Path) -> None:
    assert answer_events(tmp_path / "none.jsonl", 0) == ([], 0)


@pytest.mark.parametrize("written", range(len('{"event": "done"}\n')))
def test_a_torn_answer_waits_for_its_end(tmp_path: Path, written: int) -> None:
    path, line = tmp_path / "rank-0.jsonl", b'{"event": "done"}\n'
    path.write_bytes(line[:written])
    events, offset = answer_events(path, 0)
    assert (events, offset) == ([], 0)
    path.write_bytes(line)
    assert answer_events(path, offset)[0] == [{"event": "done"}]


@pytest.mark.parametrize("line", [b"{", b"7", b"null", b"\xff\x00", b"[1]"])
def test_an_answer_that_is_no_object_is_passed_on_as_garbage(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "rank-0.jsonl"
    path.write_bytes(line + b'\n{"event": "done"}\n')
    events, _ = answer_events(path, 0)
    assert [set(event) for event in events] == [{"garbage"}, {"event"}]


def test_an_answer_file_is_the_users_alone(tmp_path: Path) -> None:
    path = tmp_path / "rank-0.jsonl"
    Answer(str(path)).write("done")
    assert path.stat().st_mode & 0o777 == 0o600
