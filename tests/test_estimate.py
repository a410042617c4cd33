"""`autotune estimate`: the contract, and arithmetic beside the virtual run."""

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import autotune

from autotune.memory import PARTS

TWO_RANKS = ("--devices", "cpu:2", "--global-batch-size", "16", "--seq-length", "96")


def estimate(cwd: Path, *arguments: str) -> dict[str, Any]:
    done = autotune("estimate", *TWO_RANKS, *arguments, "--json", cwd=cwd)
    assert done.returncode == 0, done.stderr
    document: dict[str, Any] = json.loads(done.stdout)
    return document


@pytest.fixture(scope="module")
def by_arithmetic(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return estimate(tmp_path_factory.mktemp("estimate"), "--zero-stage", "1")


def test_it_has_the_fields_of_the_contract(by_arithmetic: dict[str, Any]) -> None:
    assert {
        *("schema", "setting", "memory", "budget_bytes", "fits", "step_time_s"),
        *("tokens_per_s", "samples_per_s", "rejected_by", "ds_config"),
    } <= set(by_arithmetic)
    memory = by_arithmetic["memory"]
    assert memory["allocated_bytes"] == sum(memory[part] for part in PARTS)
    assert memory["device_bytes"] == memory["allocated_bytes"] + memory["runtime_bytes"]


def test_it_keeps_the_global_batch(by_arithmetic: dict[str, Any]) -> None:
    config = by_arithmetic["ds_config"]
    assert config["train_batch_size"] == 16
    assert config["gradient_accumulation_steps"] == 8


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--micro-batch-size", "3"), "1, 2, 4, 8"),
        (("--offload-optimizer", "cpu"), "--zero-stage 1"),
        (("--offload-param", "cpu", "--zero-stage", "2"), "--zero-stage 3"),
    ],
    ids=["micro-batch", "offload of the optimizer", "offload of parameters"],
)
def test_a_setting_that_cannot_be_exits_2(
    tmp_path: Path, arguments: tuple[str, ...], said: str
) -> None:
    done = autotune("estimate", *TWO_RANKS, *arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert said in done.stderr


def test_exact_is_a_virtual_run_that_arithmetic_comes_near(
    tmp_path: Path, by_arithmetic: dict[str, Any]
) -> None:
    exact = estimate(tmp_path, "--zero-stage", "1", "--exact")

    assert exact["source"] == "virtual run"
    memory = exact["memory"]
    assert memory["allocated_bytes"] == sum(memory[part] for part in PARTS)
    # Stages 0 to 2 were seen within 1 %; stage 3 is 8 % off.
    assert by_arithmetic["memory"]["allocated_bytes"] == pytest.approx(
        memory["allocated_bytes"], rel=0.02
    )
