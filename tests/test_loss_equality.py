"""However a job is split, it learns the same: losses of all steps, and the weights in the end."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from conftest import write_rows
from trainings import Workshop, small_model, train, workshop

STEPS = 20
UNSAVED = {"save_strategy": "no"}
SETTINGS: list[dict[str, Any]] = [
    {"micro_batch_size": 4, "ranks": 1, "zero_stage": 2, "checkpointing": "full"},
    {"micro_batch_size": 2, "ranks": 1, "zero_stage": 3},
    {"micro_batch_size": 4, "ranks": 1, "zero_stage": 0, "sampling": "batch_rebalance"},
    {"micro_batch_size": 1, "ranks": 2, "zero_stage": 0, "checkpointing": "full"},
    {"micro_batch_size": 4, "ranks": 2, "zero_stage": 0, "sampling": "batch_rebalance"},
    {"micro_batch_size": 1, "ranks": 2, "zero_stage": 1, "sampling": "batch_rebalance"},
    {"micro_batch_size": 4, "ranks": 2, "zero_stage": 1},
    {"micro_batch_size": 2, "ranks": 2, "zero_stage": 2, "sampling": "batch_rebalance"},
    {"micro_batch_size": 4, "ranks": 2, "zero_stage": 2, "checkpointing": "every-2"},
    {"micro_batch_size": 1, "ranks": 2, "zero_stage": 3},
    {"micro_batch_size": 4, "ranks": 2, "zero_stage": 3, "checkpointing": "full"},
    {"micro_batch_size": 1, "ranks": 4, "zero_stage": 3, "zero_hpz_partition_size": 2},
    {"micro_batch_size": 4, "ranks": 1, "zero_stage": 0, "loss": "chunked"},
    {"micro_batch_size": 2, "ranks": 2, "zero_stage": 2, "loss": "chunked"},
    {"micro_batch_size": 4, "ranks": 2, "zero_stage": 3, "loss": "chunked"},
]
COMPILED = {"micro_batch_size": 4, "ranks": 1, "zero_stage": 2, "torch_compile": True}
REPEATED = [*SETTINGS[1::2], COMPILED]


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    """Return a job of 45 unlike rows, so that an epoch ends on five of eight."""
    directory = tmp_path_factory.mktemp("equality")
    pairs = [
        (f"What is {number}?", "It is " + f"{number} " * (1 + 7 * number % 40))
        for number in range(45)
    ]
    data = write_rows(directory / "data.jsonl", pairs)
    return workshop(directory, data, small_model(directory / "model"), max_steps=STEPS)


@dataclass(frozen=True)
class Trained:
    losses: list[float]
    weights: dict[str, Any]


def trained(directory: Path, ranks: int) -> Trained:
    from safetensors.torch import load_file

    losses = train(directory, ranks)
    return Trained(losses, load_file(directory / "model" / "model.safetensors"))


@pytest.fixture(scope="module")
def first(shop: Workshop, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Train as all others have to: a row a micro-step, on one rank."""
    directory = tmp_path_factory.mktemp("first") / "emitted"
    shop.emit(directory, micro_batch_size=1, ranks=1, zero_stage=0, trainer=UNSAVED)
    return trained(directory, 1)


@pytest.mark.slow
@pytest.mark.parametrize(
    "knobs",
    [*SETTINGS[::2], *(pytest.param(one, marks=pytest.mark.long) for one in REPEATED)],
    ids=lambda knobs: "-".join(map(str, knobs.values())),
)
def test_every_setting_gives_the_same_losses_and_weights(
    shop: Workshop, first: Trained, tmp_path: Path, knobs: dict[str, Any]
) -> None:
    assert len(first.losses) == STEPS
    assert first.losses[-1] < first.losses[0]

    again = trained(shop.emit(tmp_path / "emitted", trainer=UNSAVED, **knobs), knobs["ranks"])

    assert again.losses == pytest.approx(first.losses, abs=1e-4)
    assert again.weights.keys() == first.weights.keys()
    for name, weight in again.weights.items():
        apart = (weight - first.weights[name]).norm() / first.weights[name].norm()
        assert apart < (1e-2 if "torch_compile" in knobs else 1e-3), name
