"""What earlier runs have measured, for the next run of such a job."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from records import as_rung, make_cluster, make_job, make_profile, measured, plan_for

from autotune.config import Layer, resolve
from autotune.intake import Question, Workload
from autotune.model_source import find_model
from autotune.outcome import Crashed, OutOfMemory, Rung
from autotune.outcome_cache import OutcomeCache
from autotune.setting import Structure
from autotune.throughput import DrawnRows, Ints
from autotune.units import GIB

LENGTHS = np.arange(100, 1124, dtype=np.int64)
OUT_OF_MEMORY = OutOfMemory(where="device", evidence="torch.OutOfMemoryError")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AUTOTUNE_CACHE", str(tmp_path / "cache"))


def workload(lengths: Ints = LENGTHS, *, memory_gib: int = 24, **job: Any) -> Workload:  # noqa: ANN401 - fields of a Job
    cluster = make_cluster(gpus=4, memory_bytes=memory_gib * GIB)
    asked = make_job(global_batch_size=64, **job)
    question = Question(
        named=None,
        options=resolve([Layer("test", {})]),
        cluster=cluster,
        source=find_model("builtin:glm-tiny"),
        dataset=(),
        fingerprint="0" * 32,
    )
    plan = plan_for(cluster, job=asked)
    return Workload(
        question=question,
        job=asked,
        profile=make_profile(),
        rates=None,  # type: ignore[arg-type] # of no matter here
        dataset=None,
        drawn=DrawnRows.draw(lengths, 0),
        rows=len(lengths),
        plan=plan,
    )


def rung(size: int, *, peak_gib: int = 10) -> Rung:
    setting = Structure(zero_stage=1).with_micro_batch(size, 4, 64)
    return as_rung(setting, measured(100.0 * size, peak_bytes=peak_gib * GIB))


def keep(*rungs: Rung, of: Workload) -> None:
    OutcomeCache.of(of).keep(rungs, of)


def read(of: Workload) -> list[Rung]:
    return OutcomeCache.of(of).read(of)


def test_what_was_kept_comes_back_marked() -> None:
    keep(rung(1), rung(2), of=workload())
    assert read(workload()) == [replace(rung(size), cached=True) for size in (1, 2)]


def test_nothing_comes_of_nothing() -> None:
    assert read(workload()) == []


@pytest.mark.parametrize(
    "job",
    [
        {"precision": "fp32"},
        {"method": "lora"},
        {"optimizer": "adafactor"},
        {"max_seq_length": 512},
        {"seed": 1},
    ],
)
def test_another_job_knows_nothing_of_it(job: dict[str, Any]) -> None:
    keep(rung(1), of=workload())
    assert read(workload(**job)) == []


@pytest.mark.parametrize("job", [{"learning_rate": 1e-3}, {"epochs": 3.0}, {"weight_decay": 0.1}])
def test_what_does_not_change_the_speed_does_not_matter(job: dict[str, Any]) -> None:
    keep(rung(1), of=workload())
    assert len(read(workload(**job))) == 1


def test_rows_about_as_long_are_alike_and_longer_ones_not() -> None:
    keep(rung(1), of=workload())
    assert len(read(workload(np.random.default_rng(0).permutation(LENGTHS)))) == 1
    assert read(workload(2 * LENGTHS)) == []


def test_a_peak_beyond_what_is_there_now_is_left_out() -> None:
    keep(rung(1, peak_gib=10), rung(2, peak_gib=20), of=workload(memory_gib=24))
    sizes = [one.setting.micro_batch_size for one in read(workload(memory_gib=16))]
    assert sizes == [1]


def test_out_of_memory_holds_only_where_there_is_no_more() -> None:
    full = as_rung(rung(4).setting, OUT_OF_MEMORY)
    keep(rung(1), full, of=workload(memory_gib=24))
    assert len(read(workload(memory_gib=24))) == 2
    assert len(read(workload(memory_gib=40))) == 1


def test_crashes_are_not_kept_and_without_a_measured_one_nothing_is_taken_over() -> None:
    crashed = as_rung(rung(2).setting, Crashed(reason="no", evidence=""))
    keep(rung(1), crashed, of=workload())
    assert len(read(workload())) == 1
    keep(as_rung(rung(4).setting, OUT_OF_MEMORY), of=workload())
    assert read(workload()) == []


def test_a_verification_of_what_is_kept_is_not_kept_beside_it() -> None:
    again = [replace(rung(size), purpose="verification") for size in (1, 2)]
    keep(rung(1), *again, of=workload())
    kept = [(one.setting.micro_batch_size, one.purpose) for one in read(workload())]
    assert kept == [(1, "search"), (2, "verification")]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"outcomes": 3}', '{"outcomes": [{"rung": {}}]}'])
def test_a_file_that_is_torn_or_foreign_is_as_none(text: str) -> None:
    cache = OutcomeCache.of(workload())
    cache.path.parent.mkdir(parents=True)
    cache.path.write_text(text)
    assert cache.read(workload()) == []


def test_the_file_is_the_users_alone() -> None:
    keep(rung(1), of=workload())
    path = OutcomeCache.of(workload()).path
    assert path.stat().st_mode & 0o777 == 0o600
    assert json.loads(path.read_text())["schema"] == 1
