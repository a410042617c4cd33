"""A checkpoint is complete or not there; any ZeRO stage on any number of ranks goes on from it."""

import json
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import write_rows
from trainings import LIMIT_S, Workshop, losses, metrics, small_model, start, train, workshop

STEPS = 8
KNOBS: dict[str, Any] = {"zero_stage": 1, "micro_batch_size": 2, "ranks": 2}


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    directory = tmp_path_factory.mktemp("checkpoints")
    pairs = [(f"What is {n}?", "It is " + f"{n} " * (1 + 7 * n % 40)) for n in range(24)]
    data = write_rows(directory / "data.jsonl", pairs)
    return workshop(directory, data, small_model(directory / "model"), max_steps=STEPS)


@pytest.fixture(scope="module")
def undisturbed(shop: Workshop, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a training that went through and has kept its checkpoint of half the way."""
    directory = shop.emit(tmp_path_factory.mktemp("undisturbed") / "run", **KNOBS)
    assert len(train(directory, 2)) == STEPS
    return directory


def resumed(shop: Workshop, undisturbed: Path, directory: Path, **knobs: Any) -> list[float]:  # noqa: ANN401
    """Go on from the checkpoint before the last under other knobs."""
    shop.emit(directory, **knobs)
    kept = min((undisturbed / "training").glob("checkpoint-*"))
    shutil.copytree(kept, directory / "training" / kept.name)
    shutil.copy(undisturbed / "training" / "metrics.jsonl", directory / "training")
    return train(directory, knobs["ranks"], "--resume")


@pytest.mark.slow
@pytest.mark.parametrize(
    "knobs",
    [
        {"zero_stage": 0, "micro_batch_size": 1, "ranks": 2},
        {"zero_stage": 2, "micro_batch_size": 4, "ranks": 1},
        {"zero_stage": 3, "micro_batch_size": 4, "ranks": 2, "checkpointing": "full"},
    ],
    ids=lambda knobs: f"zero{knobs['zero_stage']}-ranks{knobs['ranks']}",
)
def test_another_stage_on_other_ranks_goes_on_alike(
    shop: Workshop, undisturbed: Path, tmp_path: Path, knobs: dict[str, Any]
) -> None:
    went_on = resumed(shop, undisturbed, tmp_path / "other", **knobs)

    assert went_on == pytest.approx(losses(undisturbed), abs=1e-4)
    assert [line["step"] for line in metrics(tmp_path / "other")] == list(range(1, STEPS + 1))


@pytest.mark.slow
def test_from_zero_3_in_bf16_to_zero_0(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path, shop: Workshop
) -> None:
    directory = tmp_path_factory.mktemp("bf16")
    data = Path(shop.dataset).parent / "data.jsonl"
    half = workshop(
        directory, data, small_model(directory / "model"), max_steps=STEPS, precision="bf16"
    )
    sharded = half.emit(tmp_path / "sharded", zero_stage=3)
    through = train(sharded, 2)

    went_on = resumed(half, sharded, tmp_path / "whole", zero_stage=0, micro_batch_size=4, ranks=2)

    # Gradients are summed up in bf16, in an order that the stage decides.
    assert went_on == pytest.approx(through, abs=2e-2)


@pytest.mark.slow
def test_a_rank_that_is_signalled_has_all_save_and_end(
    shop: Workshop, undisturbed: Path, tmp_path: Path
) -> None:
    directory = shop.emit(tmp_path / "run", **KNOBS, trainer={"save_strategy": "no"})
    process = start(directory, 2)
    path = directory / "training" / "metrics.jsonl"
    deadline = time.monotonic() + LIMIT_S
    while not path.exists() or not path.read_text().count("\n") >= 2:
        assert process.poll() is None, process.communicate()[0][-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.01)
    psutil.Process(process.pid).children()[1].send_signal(signal.SIGUSR2)
    process.communicate(timeout=60)

    assert process.returncode != 0
    assert (directory / "training" / "stopped").exists()
    (saved,) = (directory / "training").glob("checkpoint-*/complete")
    step = int(saved.parent.name.rpartition("-")[2])
    assert 2 <= step < STEPS
    assert [line["step"] for line in metrics(directory)] == list(range(1, step + 1))
    assert train(directory, 2, "--resume") == pytest.approx(losses(undisturbed), abs=1e-4)


@pytest.mark.slow
def test_a_checkpoint_is_saved_by_the_clock_and_before_a_step_larger_than_any_probed(
    shop: Workshop, tmp_path: Path
) -> None:
    by_clock = shop.emit(
        tmp_path / "clock",
        **KNOBS,
        trainer={"save_strategy": "no", "save_total_limit": None},
        save_every_s=0.0,
    )
    train(by_clock, 2)
    # The last step is followed by the model itself, and by a checkpoint as any other.
    assert len(list((by_clock / "training").glob("checkpoint-*/complete"))) == STEPS

    careful = shop.emit(
        tmp_path / "careful",
        **KNOBS,
        trainer={"save_strategy": "no", "save_total_limit": None},
        probed_tokens=40,
    )
    train(careful, 2)
    saved = list((careful / "training").glob("checkpoint-*/complete"))
    longest = [line["longest_row"] for line in metrics(careful)]
    records = [step for step, one in enumerate(longest) if one > max([20, *longest[:step]])]
    assert {int(path.parent.name.rpartition("-")[2]) for path in saved} >= set(records[:1])
    assert 1 <= len(saved) < STEPS


def evaluations(directory: Path) -> list[float]:
    lines = (directory / "training" / "evaluations.jsonl").read_text().splitlines()
    return [json.loads(line)["eval_loss"] for line in lines]


@pytest.mark.slow
def test_rows_held_out_are_judged_alike_and_the_best_model_is_kept(
    shop: Workshop, tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    trainer = {"eval_strategy": "steps", "eval_steps": 2, "save_steps": 2}
    # So fast that it gets worse.
    trainer |= {"load_best_model_at_end": True, "learning_rate": 0.3}
    ones: dict[str, Any] = {"micro_batch_size": 1, "ranks": 1, "zero_stage": 0}
    seen, directories = [], []
    for place, knobs in enumerate((KNOBS, ones)):
        directory = shop.emit(tmp_path / str(place), **knobs, eval_share=0.2, trainer=trainer)
        config = json.loads((directory / "ds_config.json").read_text())
        config["optimizer"]["params"]["lr"] = 0.3
        (directory / "ds_config.json").write_text(json.dumps(config))
        train(directory, knobs["ranks"])
        seen.append(evaluations(directory))
        directories.append(directory)

    assert len(seen[0]) == STEPS // 2
    assert seen[0][0] == pytest.approx(seen[1][0], rel=1e-3)
    best = 2 * (1 + min(range(len(seen[0])), key=lambda place: seen[0][place]))
    training = directories[0] / "training"
    kept = load_file(training / f"checkpoint-{best}" / "model.safetensors")
    final = load_file(directories[0] / "model" / "model.safetensors")
    assert all(final[name].equal(weight) for name, weight in kept.items())
