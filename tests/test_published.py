"""Estimates against published measurements, and arithmetic against virtual runs: a part each."""

import importlib
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def measurements(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS / "published"))
    return importlib.import_module("measurements")


@pytest.fixture
def published(measurements: ModuleType) -> ModuleType:  # noqa: ARG001 - for its place on the path
    return importlib.import_module("estimate_against_published")


@pytest.fixture
def virtual_gpu(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS / "virtual_gpu"))
    return importlib.import_module("arithmetic_against_virtual")


def row(measurements: ModuleType, **changes: str) -> Any:  # noqa: ANN401 - a Measurement
    known = measurements.read()[0].row
    base = {
        "source_repo": "example/example",
        "model": "Llama-3-8B",
        "method": "full",
        "precision": "bf16 mixed",
        "optimizer": "AdamW",
        "zero_stage": "2",
        "n_gpus": "8",
        "micro_batch": "1",
        "seq_len": "1024",
        "grad_ckpt": "yes",
        "gpu_mem_gib": "80",
        "notes": "[Q=A][mem=alloc]",
        "n_layers": "32",
        "hidden": "4096",
        "heads": "32",
        "kv_heads": "8",
        "intermediate": "14336",
        "vocab": "128256",
        "lora_rank": "",
    }
    return measurements.Measurement(row=known | base | changes)


def test_the_rows_on_record_are_those_that_the_estimate_can_express(
    measurements: ModuleType,
) -> None:
    rows = measurements.read()
    assert [one.id for one in rows if one.reason_left_out()] == []
    assert len({one.id for one in rows}) == len(rows)
    assert all(one.source_repo and one.source_path_or_issue for one in rows)
    assert {"ok", "oom"} == {one.outcome for one in rows}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        ({"method": "qlora"}, "method"),
        ({"optimizer": "AdamW8bit"}, "optimizer"),
        ({"notes": "[mem=reserved][impl=FSDP]"}, "parallelism"),
        ({"notes": "packing, liger kernel"}, "kernels"),
        ({"notes": "packing, no liger (full logits)"}, None),
        ({"seq_len": ""}, "seq_len"),
        ({"precision": "bf16 pure"}, "without fp32 weights"),
        ({"precision": "bf16 pure", "method": "lora", "lora_rank": "8"}, None),
        ({"zero_stage": "0"}, "autocast"),
        ({"model": "MPT-7B"}, "architecture"),
        ({"n_layers": "", "model": "GPT2-XL"}, "dimensions"),
    ],
    ids=str,
)
def test_a_row_is_left_out_for_a_named_reason(
    measurements: ModuleType, changes: dict[str, str], reason: str | None
) -> None:
    found = row(measurements, **changes).reason_left_out()
    assert found is None if reason is None else reason in found


def test_reserved_memory_over_unlike_rows_is_another_kind(measurements: ModuleType) -> None:
    figure = {"peak_mem_gib_per_gpu": "12"}
    alike = row(measurements, notes="[mem=reserved] packed", **figure)
    unlike = row(measurements, notes="[mem=reserved] lengths 3234+-2547", **figure)
    assert alike.kind == "reserved"
    assert unlike.kind == measurements.RESERVED_OVER_UNLIKE
    assert row(measurements, notes="[mem=smi/unknown]", **figure).kind == "nvidia-smi"


def compared(published: ModuleType, rows: list[Any], directory: Path) -> dict[str, Any]:
    found: dict[str, Any] = published.summary(
        [published.compare(one, directory) for one in rows], Counter()
    )
    return found


def test_llama_3_runs_where_it_was_seen_to_run_and_not_where_it_was_not(
    measurements: ModuleType, published: ModuleType, tmp_path: Path
) -> None:
    rows = [
        one
        for one in measurements.read()
        if one.model == "Llama-3-8B" and one.method == "full" and one.precision.startswith("bf16")
    ]
    verdicts = compared(published, rows, tmp_path)
    assert verdicts["ran"] == {"rows": 2, "said_to_fit": 2}
    assert verdicts["ran_out_of_memory"] == {"rows": 3, "said_to_fit": 0}


@pytest.mark.slow
def test_figures_of_deepspeed_are_met(
    measurements: ModuleType, published: ModuleType, tmp_path: Path
) -> None:
    rows = [
        one
        for one in measurements.read()
        if one.kind == "allocated" and one.model in {"Llama-2-7B", "StableLM-alpha-3B"}
    ]
    (figures,) = compared(published, rows, tmp_path)["figures"].values()
    assert figures["median_error_percent"] <= published.LIMITS["allocated"]


@pytest.mark.slow
@pytest.mark.parametrize("place", [(1, "cpu", "none"), (2, "none", "none"), (3, "none", "none")])
def test_arithmetic_is_what_a_virtual_run_shows(
    virtual_gpu: ModuleType, place: tuple[int, str, str], tmp_path: Path
) -> None:
    case = virtual_gpu.case("2xA100-80GB", "qwen2.5-1.5b", place, seq_length=1024)
    assert abs(virtual_gpu.compare(case, tmp_path).error_percent) < 8
