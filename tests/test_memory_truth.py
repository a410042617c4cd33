"""Arithmetic and virtual run against real ranks, byte by byte: a smaller grid of the benchmark."""

import statistics
from pathlib import Path

import pytest
from memory_truth import MODELS, SIZES, Bench, Case, Truth, drawn_cases, write_model

SMALL, WIDE, DEEP = SIZES[1], SIZES[2], SIZES[3]

CASES = (
    Case(
        model="llama",
        size=WIDE,
        zero_stage=0,
        ranks=1,
        checkpointing="none",
        micro_batch_size=4,
        seq_length=128,
    ),
    Case(
        model="gpt2",
        size=SMALL,
        zero_stage=1,
        ranks=2,
        checkpointing="full",
        micro_batch_size=2,
        seq_length=500,
        padded=True,
    ),
    Case(
        model="qwen2",
        size=DEEP,
        zero_stage=2,
        ranks=2,
        checkpointing="none",
        micro_batch_size=1,
        seq_length=100,
        accumulation=3,
    ),
    Case(
        model="gemma",
        size=SMALL,
        zero_stage=3,
        ranks=2,
        checkpointing="full",
        micro_batch_size=8,
        seq_length=50,
        accumulation=1,
    ),
    Case(
        model="glm",
        size=SMALL,
        zero_stage=3,
        ranks=1,
        checkpointing="none",
        micro_batch_size=2,
        seq_length=100,
        precision="bf16",
    ),
    Case(
        model="phi",
        size=SMALL,
        zero_stage=2,
        ranks=2,
        checkpointing="full",
        micro_batch_size=2,
        seq_length=100,
        lora=True,
    ),
    Case(
        model="llama",
        size=WIDE,
        zero_stage=1,
        ranks=2,
        checkpointing="none",
        micro_batch_size=2,
        seq_length=64,
        knobs=(("overlap_comm", True), ("reduce_bucket_size", 2_000_000)),
    ),
    Case(
        model="llama",
        size=SMALL,
        zero_stage=3,
        ranks=2,
        checkpointing="none",
        micro_batch_size=2,
        seq_length=64,
        knobs=(("stage3_param_persistence_threshold", 0), ("stage3_prefetch_bucket_size", 0)),
    ),
    Case(
        model="llama",
        size=WIDE,
        zero_stage=3,
        ranks=4,
        checkpointing="none",
        micro_batch_size=1,
        seq_length=64,
        knobs=(("zero_hpz_partition_size", 2),),
    ),
    Case(
        model="llama",
        size=WIDE,
        zero_stage=1,
        ranks=2,
        checkpointing="none",
        micro_batch_size=2,
        seq_length=64,
        optimizer="adamw-8bit",
    ),
    Case(
        model="llama",
        size=SMALL,
        zero_stage=0,
        ranks=2,
        checkpointing="none",
        micro_batch_size=2,
        seq_length=64,
        precision="bf16",
        optimizer="adafactor",
    ),
    Case(
        model="llama",
        size=DEEP,
        zero_stage=2,
        ranks=2,
        checkpointing="full",
        micro_batch_size=2,
        seq_length=64,
        lora=True,
        quantised=True,
    ),
)


@pytest.fixture(
    scope="module", params=[CASES[::2], pytest.param(CASES[1::2], marks=pytest.mark.long)]
)
def truths(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Truth]:
    bench = Bench(tmp_path_factory.mktemp("bench"))
    return [bench.truth(case) for case in request.param]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_virtual_run_is_exact(truths: list[Truth]) -> None:
    assert {str(truth): truth.exact for truth in truths if abs(truth.exact_error) > 0.005} == {}


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_arithmetic_comes_near(truths: list[Truth]) -> None:
    errors = [abs(truth.predicted_error) for truth in truths]
    assert max(errors) <= 0.08, "\n".join(map(str, truths))
    assert statistics.median(errors) <= 0.02


def test_cases_are_drawn_from_the_whole_grid() -> None:
    cases = drawn_cases(200, 0, list(MODELS))
    assert {case.model for case in cases} == set(MODELS)
    assert {case.zero_stage for case in cases} == {0, 1, 2, 3}
    assert {case.ranks for case in cases} == {1, 2}
    for knob in ("checkpointing", "padded", "precision", "lora"):
        assert len({getattr(case, knob) for case in cases}) == 2
    assert drawn_cases(200, 0, list(MODELS)) == cases


def test_a_model_is_written_once(tmp_path: Path) -> None:
    first = write_model("llama", SMALL, tmp_path)
    assert write_model("llama", SMALL, tmp_path) == first
    assert len(list(tmp_path.iterdir())) == 1
