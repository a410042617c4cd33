"""However a job is split, it learns the same: losses of all steps, and the weights in the end."""

from pathlib import Path
from typing import Any

import pytest
from conftest import write_rows
from trainings import Workshop, small_model, train, workshop

STEPS = 20
SETTINGS: list[dict[str, Any]] = [
    {"micro_batch_size": 1, "ranks": 1, "zero_stage": 0},
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
    {"micro_batch_size": 4, "ranks": 1, "zero_stage": 0, "loss": "chunked"},
    {"micro_batch_size": 2, "ranks": 2, "zero_stage": 2, "loss": "chunked"},
    {"micro_batch_size": 4, "ranks": 2, "zero_stage": 3, "loss": "chunked"},
]


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


@pytest.mark.slow
def test_every_setting_gives_the_same_losses_and_weights(shop: Workshop, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    seen = []
    for place, knobs in enumerate(SETTINGS):
        directory = shop.emit(tmp_path / str(place), trainer={"save_strategy": "no"}, **knobs)
        seen.append((knobs, train(directory, knobs["ranks"]), directory / "model"))

    _, first, first_model = seen[0]
    reference = load_file(first_model / "model.safetensors")
    assert len(first) == STEPS
    assert first[-1] < first[0]
    for knobs, losses, model in seen[1:]:
        assert losses == pytest.approx(first, abs=1e-4), knobs
        weights = load_file(model / "model.safetensors")
        assert weights.keys() == reference.keys()
        for name, weight in weights.items():
            apart = (weight - reference[name]).norm() / reference[name].norm()
            assert apart < 1e-3, (knobs, name)
