"""The choice of the optimizer: named, limited, emitted, held against real states, trained with."""

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import write_rows
from records import make_cluster, make_job, make_profile
from trainings import LIMIT_S, Workshop, losses, small_model, train, workshop

from autotune import emit, environment, intake
from autotune.config import Layer, Options, resolve
from autotune.engine.ops import needed_ops
from autotune.errors import ConfigError
from autotune.optimizer import OPTIMIZERS, Optimizer, limits_of, read_optimizer
from autotune.setting import Structure
from autotune.space import enumerate_space
from autotune.zero import Engine, Shards, moments


def options(**values: Any) -> Options:  # noqa: ANN401 - each option has its own type
    return resolve([Layer("command line", values)])


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("adamw", "adamw"),
        ("adamw_torch_fused", "adamw"),
        ("adamw_8bit", "adamw-8bit"),
        ("adamw_bnb_8bit", "adamw-8bit"),
        ("Adafactor", "adafactor"),
    ],
)
def test_names_of_transformers_are_known(name: str, meant: Optimizer) -> None:
    assert read_optimizer(name) == meant
    assert options(optimizer=name)["optimizer"] == meant


def test_another_name_is_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"'adafator' is none of .*nearest is adafactor"):
        options(optimizer="adafator")


def test_the_rate_follows_from_the_optimizer_unless_it_is_given() -> None:
    assert options()["learning_rate"] == options(optimizer="adamw-8bit")["learning_rate"] == 2e-5
    assert options(optimizer="adafactor")["learning_rate"] == 1e-3
    assert options(optimizer="adafactor", learning_rate=1e-2)["learning_rate"] == 1e-2


@pytest.mark.parametrize(
    ("optimizer", "stages", "offloads"),
    [
        ("adamw", {0, 1, 2, 3}, {"none", "cpu"}),
        ("adamw-8bit", {0, 1, 2, 3}, {"none"}),
        ("adafactor", {0}, {"none"}),
    ],
)
def test_what_deepspeed_cannot_do_together_is_left_out(
    optimizer: Optimizer, stages: set[int], offloads: set[str]
) -> None:
    space = enumerate_space(make_cluster(gpus=2), 8, limits=limits_of(optimizer, 10**9, 2))
    assert {one.zero_stage for one in space.structures} == stages
    assert {one.offload_optimizer for one in space.structures} == offloads


def test_a_share_that_the_8_bit_kernel_cannot_count_is_left_out() -> None:
    limits = limits_of("adamw-8bit", 7 * 10**9, 2)
    space = enumerate_space(make_cluster(gpus=2), 8, limits=limits)
    assert {one.zero_stage for one in space.structures} == {0, 3}
    assert "zero_stage" not in limits_of("adamw-8bit", 7 * 10**9, 4)


@pytest.mark.parametrize(
    ("pins", "reason"),
    [
        ({"zero_stage": (2, 3)}, r"zero_stage can be 0 here, as .* rows and columns"),
        ({"offload_optimizer": ("cpu",)}, "offload_optimizer"),
    ],
)
def test_a_pin_beyond_the_limits_is_refused_with_the_reason(
    pins: dict[str, tuple[Any, ...]], reason: str
) -> None:
    from autotune.knobs import Pins

    with pytest.raises(ConfigError, match=reason):
        enumerate_space(
            make_cluster(gpus=2), 8, pins=Pins.of(pins), limits=limits_of("adafactor", 10**9, 2)
        )


def emitted(optimizer: Optimizer, **job: Any) -> tuple[dict[str, Any], dict[str, Any]]:  # noqa: ANN401
    asked = make_job(optimizer=optimizer, **job)
    setting = Structure(zero_stage=0).with_micro_batch(1, 2, 32)
    cluster = make_cluster(gpus=2)
    spec = emit.train_spec(
        asked, setting, cluster, dataset_dir="", output_dir="", model_output_dir=""
    )
    return emit.ds_config(asked, setting, make_profile(), cluster), spec.trainer


def test_adafactor_is_named_by_the_config() -> None:
    config, trainer = emitted("adafactor", learning_rate=1e-3)
    assert config["optimizer"] == {
        "type": "Adafactor",
        "params": {"lr": 1e-3, "weight_decay": 0.01},
    }
    assert "optim" not in trainer


def test_8_bits_are_named_by_the_trainers_arguments() -> None:
    theirs = {"optimizer": {"params": {"betas": [0.8, 0.9]}}}
    config, trainer = emitted("adamw-8bit", deepspeed=theirs)
    assert "optimizer" not in config
    assert config["zero_allow_untested_optimizer"] is True
    assert (trainer["optim"], trainer["adam_beta1"]) == ("adamw_bnb_8bit", 0.8)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_no_op_is_built_for_what_is_not_offloaded(optimizer: Optimizer) -> None:
    assert needed_ops("cuda", emitted(optimizer)[0]) == ()


def test_a_missing_package_is_refused_before_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    intake.require_installed(options(optimizer="adafactor"), here=True)
    intake.require_installed(options(optimizer="adamw-8bit"), here=False)
    with pytest.raises(ConfigError, match=r"--optimizer adamw-8bit needs .*bitsandbytes"):
        intake.require_installed(options(optimizer="adamw-8bit"), here=True)
    with pytest.raises(ConfigError, match=r"--method qlora needs .*bitsandbytes"):
        intake.require_installed(options(method="qlora"), here=False)


@pytest.mark.usefixtures("server")
def test_what_does_not_work_on_the_device_is_refused_in_a_sentence(tmp_path: Path) -> None:
    from autotune.profile.child import check_quantising

    with pytest.raises(ConfigError, match="qlora does not work on this device: KeyError") as told:
        check_quantising(["--method qlora"], "adamw", "fp8", "cpu", tmp_path / "check.log")
    assert "\n" not in str(told.value)
    check_quantising(["--method qlora"], "adamw-8bit", "fp32", "cpu", tmp_path / "check.log")


SHAPES = ((300, 70), (5000,), (70,), (2, 3, 50), (64, 64))


def held(optimizer: Optimizer, shapes: tuple[tuple[int, ...], ...]) -> int:
    """Return the bytes of the states that a real optimizer makes at its first step."""
    import torch
    from bitsandbytes.optim import AdamW8bit

    weights = [torch.nn.Parameter(torch.zeros(shape)) for shape in shapes]
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    kinds: dict[Optimizer, Any] = {
        "adamw": torch.optim.AdamW,
        "adamw-8bit": AdamW8bit,
        "adafactor": torch.optim.Adafactor,
    }
    inner = kinds[optimizer](weights)
    inner.step()
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for state in inner.state.values()
        for tensor in state.values()
        if torch.is_tensor(tensor) and tensor.numel() > 1
    }
    return sum(storages.values())


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("zero_stage", [0, 1])
def test_moments_are_as_large_as_real_ones(optimizer: Optimizer, zero_stage: int) -> None:
    import torch

    from autotune.profile.trace import _factored_elements

    if (optimizer, zero_stage) == ("adafactor", 1):
        pytest.skip("which it does not have")
    sizes = np.array([int(np.prod(shape)) for shape in SHAPES])
    factored = sum(_factored_elements(torch.nn.Parameter(torch.zeros(one))) for one in SHAPES)
    shards = Shards(
        trained=sizes,
        frozen=np.zeros(0, dtype=np.int64),
        ranks=2,
        bucket=1000,
        persistence=0,
        factored=factored,
    )
    engine = Engine(
        shards=shards,
        zero_stage=zero_stage,
        compute_bytes=4,
        accumulates=False,
        gloo=True,
        optimizer=optimizer,
    )
    shapes = SHAPES if zero_stage == 0 else ((shards.partition,),)
    assert moments(engine) == held(optimizer, shapes)


def test_moments_of_8_bits_come_back_from_fp32() -> None:
    import torch
    from bitsandbytes.optim import AdamW8bit

    from autotune.train import eight_bit
    from autotune.train.state import MOMENTS

    weights = [torch.nn.Parameter(torch.randn(size)) for size in (5000, 70)]
    inner = AdamW8bit(weights)
    for _ in range(3):
        for weight in weights:
            weight.grad = torch.randn_like(weight)
        inner.step()
    for weight in weights:
        state = inner.state[weight]
        held_before = set(state)
        eight_bit.widen(state, MOMENTS)
        wide = {key: state[key].clone() for key in MOMENTS}
        eight_bit.narrow(state, MOMENTS, changed=True)
        assert set(state) == held_before
        eight_bit.widen(state, MOMENTS)
        for key in MOMENTS:
            assert wide[key].any()
            largest = wide[key].abs().max() if weight.numel() > 4096 else 0.0
            # The least code is not as far from nought as the largest, so that scales may shrink.
            assert (state[key] - wide[key]).abs().max() <= 0.02 * largest


@pytest.fixture(scope="module")
def shops(tmp_path_factory: pytest.TempPathFactory) -> dict[Optimizer, Workshop]:
    directory = tmp_path_factory.mktemp("optimizers")
    rows = [("What?", "That."), ("Which one of them?", "The other one.")] * 12
    data = write_rows(directory / "data.jsonl", rows)
    model = small_model(directory / "model")
    made: dict[Optimizer, Workshop] = {}
    for optimizer in ("adamw-8bit", "adafactor"):
        rate = {"adamw-8bit": 1e-3, "adafactor": 1e-2}[optimizer]
        (directory / optimizer).mkdir()
        made[read_optimizer(optimizer)] = workshop(
            directory / optimizer, data, model, optimizer=optimizer, learning_rate=rate
        )
    return made


@pytest.mark.slow
def test_8_bits_learn_the_same_at_any_stage_and_go_on_at_another(
    shops: dict[Optimizer, Workshop], tmp_path: Path
) -> None:
    shop = shops["adamw-8bit"]
    curves = {
        stage: train(shop.emit(tmp_path / f"zero{stage}", zero_stage=stage), 2)
        for stage in (0, 2, 3)
    }
    first = curves[2]
    assert first[-1] < first[0]
    # Moments are rounded in other blocks at each stage, so that it is not to the last digit.
    for curve in curves.values():
        assert curve == pytest.approx(first, rel=2e-3)

    for stage in (2, 3):
        last = tmp_path / f"zero{stage}" / "training" / f"checkpoint-{len(first)}" / "complete"
        last.unlink()
    shop.emit(tmp_path / "zero2", zero_stage=3)
    assert train(tmp_path / "zero2", 2, "--resume") == pytest.approx(first, rel=2e-3)
    again = train(tmp_path / "zero3", 2, "--resume")
    assert again == pytest.approx(curves[3], abs=1e-3)


@pytest.mark.slow
@pytest.mark.long
def test_adafactor_learns_the_same_however_it_is_split_and_goes_on(
    shops: dict[Optimizer, Workshop], tmp_path: Path
) -> None:
    shop = shops["adafactor"]
    through = train(shop.emit(tmp_path / "two", micro_batch_size=1), 2)
    other = train(shop.emit(tmp_path / "one", micro_batch_size=4, ranks=1), 1)
    assert through[-1] < through[0]
    assert other == pytest.approx(through, abs=1e-4)
    (tmp_path / "two" / "training" / f"checkpoint-{len(through)}" / "complete").unlink()
    assert train(tmp_path / "two", 2, "--resume") == pytest.approx(through, abs=1e-6)
    assert losses(tmp_path / "two") == pytest.approx(through, abs=1e-6)


PLAIN = {
    "adafactor": """
engine, *_ = deepspeed.initialize(
    model=model, model_parameters=model.parameters(), config=ds_config)
""",
    "adamw-8bit": """
from bitsandbytes.optim import AdamW8bit
engine, *_ = deepspeed.initialize(
    model=model, optimizer=AdamW8bit(model.parameters(), lr=1e-3), config=ds_config)
""",
    "trainer": """
arguments = TrainingArguments(
    output_dir="out", deepspeed=ds_config, use_cpu=True, max_steps=3, logging_steps=1,
    per_device_train_batch_size=2, gradient_accumulation_steps=2, learning_rate=1e-3,
    optim="adamw_bnb_8bit", save_strategy="no", report_to="none", disable_tqdm=True)
ids = torch.arange(3, 19)
trainer = Trainer(
    model=model, args=arguments, train_dataset=[{"input_ids": ids, "labels": ids}] * 32)
trainer.train()
losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
assert "AdamW" in type(trainer.optimizer.optimizer.optimizer).__name__
""",
}
BEGINNING = """
import sys, deepspeed, torch
from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainingArguments
model_dir, ds_config = sys.argv[1:3]
deepspeed.init_distributed()
torch.manual_seed(0)
model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model_dir))
"""
STEPS = """
ids = torch.arange(3, 19).repeat(2, 1)
losses = []
for _ in range(6):
    loss = engine(input_ids=ids, labels=ids).loss
    engine.backward(loss)
    engine.step()
    losses.append(float(loss))
"""
END = "assert losses[-1] < losses[0], losses\n"


@pytest.mark.slow
@pytest.mark.parametrize("program", list(PLAIN))
def test_a_plain_script_trains_with_the_emitted_config(
    shops: dict[Optimizer, Workshop], tmp_path: Path, program: str
) -> None:
    shop = shops["adafactor" if program == "adafactor" else "adamw-8bit"]
    stage = 0 if program == "adafactor" else 2
    # The rate of a Trainer's script is that of the config.
    shop = replace(shop, job=replace(shop.job, learning_rate=1e-3))
    directory = shop.emit(tmp_path / "emitted", zero_stage=stage)
    written = (directory / "ds_config.json").read_bytes()
    steps = STEPS if "engine" in PLAIN[program] else ""
    (directory / "script.py").write_text(BEGINNING + PLAIN[program] + steps + END)
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--nnodes=1", "--nproc-per-node=2"),
            *("--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"),
            *("script.py", shop.job.model_dir, "ds_config.json"),
        ],
        cwd=directory,
        env={**os.environ, **environment.rank_environment("cpu", ())},
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert (directory / "ds_config.json").read_bytes() == written
    assert json.loads(written)["train_batch_size"] == 8
