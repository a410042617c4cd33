"""A user's DeepSpeed config: kept, but for what is tuned; what gives way is told."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import autotune
from records import make_cluster, make_job, make_profile

from autotune.config import Layer, resolve
from autotune.emit import ds_config, train_spec
from autotune.errors import ConfigError
from autotune.knobs import Pins
from autotune.setting import Setting, Structure
from autotune.user_config import UserConfig, read_user_config

THEIRS: dict[str, Any] = {
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": 3,
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": 0.5,
    "optimizer": {
        "type": "AdamW",
        "params": {"lr": 1e-4, "betas": [0.8, 0.95], "eps": 1e-6, "bias_correction": True},
    },
    "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 10}},
    "bf16": {"enabled": "auto"},
    "fp16": {"enabled": False, "initial_scale_power": 12},
    "zero_optimization": {
        "stage": 2,
        "overlap_comm": True,
        "reduce_bucket_size": 2e7,
        "allgather_bucket_size": "auto",
        "round_robin_gradients": True,
        "stage3_prefetch_bucket_size": "auto",
        "stage3_max_live_parameters": 1e8,
        "offload_optimizer": {"device": "auto", "pin_memory": False},
    },
    "autotuning": {"enabled": True},
    "steps_per_print": 10,
    "flops_profiler": {"enabled": False, "detailed": True},
    "key_of_a_later_version": {"of": ["any", "kind"]},
}


def read(
    theirs: dict[str, Any], pins: dict[str, Any] | None = None, **options: object
) -> UserConfig:
    asked = resolve([Layer("command line", options)])
    return read_user_config(json.dumps(theirs), "ds.json", asked, Pins.of(pins or {}))


def emitted(user: UserConfig, setting: Setting) -> tuple[dict[str, Any], dict[str, Any]]:
    job = replace(
        make_job(),
        deepspeed=user.kept,
        max_grad_norm=user.options["max_grad_norm"],
        learning_rate=user.options["learning_rate"],
    )
    cluster = make_cluster(gpus=2)
    spec = train_spec(
        job, setting, cluster, dataset_dir="dataset", output_dir="out", model_output_dir="model"
    )
    return ds_config(job, setting, make_profile(), cluster), spec.trainer


def setting_of(**fields: Any) -> Setting:  # noqa: ANN401 - of a structure
    return Structure(**fields).with_micro_batch(4, 2, 32)


def test_everything_is_kept_but_what_is_tuned() -> None:
    user = read(THEIRS)
    setting = setting_of(zero_stage=2, overlap_comm=True, reduce_bucket_size=20_000_000)
    config, _ = emitted(user, setting)

    assert config["key_of_a_later_version"] == {"of": ["any", "kind"]}
    assert config["flops_profiler"] == {"enabled": False, "detailed": True}
    assert config["steps_per_print"] == 10
    assert config["fp16"] == {"enabled": False, "initial_scale_power": 12}
    zero = config["zero_optimization"]
    assert (zero["round_robin_gradients"], zero["stage3_max_live_parameters"]) == (True, 1e8)
    assert (zero["overlap_comm"], zero["reduce_bucket_size"]) == (True, 20_000_000)
    assert config["optimizer"]["params"]["betas"] == [0.8, 0.95]
    assert config["optimizer"]["params"]["bias_correction"] is True
    assert config["train_micro_batch_size_per_gpu"] == 4
    assert config["gradient_clipping"] == 0.5
    assert "auto" not in json.dumps(config)
    assert config.keys().isdisjoint({"autotuning", "scheduler"})


def test_what_is_offloaded_keeps_how_and_what_is_not_has_no_section() -> None:
    user = read(THEIRS)
    here, _ = emitted(user, setting_of(zero_stage=2))
    there, _ = emitted(user, setting_of(zero_stage=2, offload_optimizer="cpu"))
    assert "offload_optimizer" not in here["zero_optimization"]
    offload = there["zero_optimization"]["offload_optimizer"]
    assert offload == {"device": "cpu", "pin_memory": False}


def test_a_literal_value_of_a_knob_pins_it_and_auto_does_not() -> None:
    pins = read(THEIRS).pins
    assert pins.values == {
        "zero_stage": (2,),
        "overlap_comm": (True,),
        "reduce_bucket_size": (20_000_000,),
    }
    assert pins.where_there == {"overlap_comm", "reduce_bucket_size"}


def test_what_the_file_says_of_the_job_takes_the_place_of_defaults() -> None:
    options = read(THEIRS | {"train_batch_size": 64, "bf16": {"enabled": True}}).options
    assert options["global_batch_size"] == 64
    assert (options["max_grad_norm"], options["learning_rate"]) == (0.5, 1e-4)
    assert options["precision"] == "bf16"
    assert options.sources["global_batch_size"] == "ds.json"


def test_what_the_job_says_goes_before_the_file_and_is_told() -> None:
    user = read(
        THEIRS | {"train_batch_size": 64, "fp16": {"enabled": True}},
        {"overlap_comm": [False]},
        global_batch_size=32,
        precision="bf16",
        max_grad_norm=0.5,
    )
    assert (user.options["global_batch_size"], user.options["precision"]) == (32, "bf16")
    assert user.pins.values["overlap_comm"] == (False,)
    told = "\n".join(user.notes)
    for part in (
        "train_batch_size gives way to --global-batch-size 32",
        "fp16.enabled gives way to --precision bf16",
        "overlap_comm gives way to --set overlap_comm=false",
        "train_micro_batch_size_per_gpu are tuned",
        "scheduler gives way",
        "autotuning is left out",
    ):
        assert part in told
    assert "gradient_clipping" not in told
    assert all(note.startswith("ds.json: ") and "\n" not in note for note in user.notes)


def test_another_optimizer_gives_way_to_that_of_the_job() -> None:
    user = read({"optimizer": {"type": "Lion", "params": {"betas": [0.5, 0.6]}}})
    assert "Lion gives way to adamw" in "\n".join(user.notes)
    config, trainer = emitted(user, setting_of(zero_stage=1))
    assert config["optimizer"]["type"] == "AdamW"
    assert trainer["adam_beta1"] == config["optimizer"]["params"]["betas"][0] == 0.9


def test_an_optimizer_that_can_be_chosen_is_taken_from_the_file() -> None:
    user = read({"optimizer": {"type": "Adafactor", "params": {"lr": 1e-3, "d": 2.0}}})
    assert (user.options["optimizer"], user.options["learning_rate"]) == ("adafactor", 1e-3)
    assert read({"optimizer": {"type": "Adafactor"}}).options["learning_rate"] == 1e-3
    assert "optimizer" not in user.kept
    assert "optimizer.params d are not those of adafactor" in "\n".join(user.notes)


def test_transformers_finds_no_mismatch_with_the_arguments() -> None:
    from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig

    config, trainer = emitted(read(THEIRS), setting_of(zero_stage=2))
    arguments = SimpleNamespace(
        **trainer,
        world_size=2,
        save_on_each_node=False,
        fp16_full_eval=False,
        bf16_full_eval=False,
        get_warmup_steps=lambda steps: int(steps * trainer["warmup_steps"]),
    )
    judge = HfTrainerDeepSpeedConfig(config)
    judge.trainer_config_process(arguments)
    judge.trainer_config_finalize(arguments, None, 100)
    assert judge.mismatches == []
    assert judge.config == config


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "is not JSON"),
        ("[]", "no JSON object"),
        ('{"zero_optimization": 2}', "zero_optimization is no JSON object"),
        ('{"zero_optimization": {"stage": 5}}', "zero_stage cannot be 5"),
        ('{"zero_optimization": {"stage": [2]}}', "zero_stage cannot be"),
        ('{"zero_optimization": {"cpu_offload": true}}', "deprecated"),
        ('{"train_batch_size": "many"}', "train_batch_size"),
        ('{"train_batch_size": [8]}', "train_batch_size"),
        ('{"bf16": {"enabled": 1}}', "neither true nor false"),
        ('{"bf16": {"enabled": true}, "fp16": {"enabled": true}}', "choose one"),
        ('{"optimizer": {"params": {"betas": 0.9}}}', "betas"),
        ('{"optimizer": []}', "optimizer is no JSON object"),
    ],
)
def test_a_file_that_cannot_be_meant_is_refused(text: str, said: str) -> None:
    with pytest.raises(ConfigError) as refused:
        read_user_config(text, "ds.json", resolve([]), Pins())
    assert said in str(refused.value)
    assert "ds.json" in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_null_section_says_nothing() -> None:
    user = read({"zero_optimization": {"offload_optimizer": None, "stage": None}})
    assert user.pins.values == {}
    assert user.kept == {"zero_optimization": {}}


ESTIMATE = ("estimate", "--gpus", "2xA100-80GB", "--seq-length", 64, "--json", "--ds-config")


def test_an_estimate_shows_the_config_that_a_file_becomes(tmp_path: Path) -> None:
    (tmp_path / "ds.json").write_text(json.dumps(THEIRS | {"train_batch_size": 8}))
    done = autotune(*ESTIMATE, "ds.json", "--precision", "fp16", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    config = json.loads(done.stdout)["ds_config"]
    assert config["train_batch_size"] == 8
    assert config["zero_optimization"]["stage"] == 2
    assert config["key_of_a_later_version"] == THEIRS["key_of_a_later_version"]
    assert "scheduler gives way" in done.stderr


@pytest.mark.parametrize(("content", "code"), [(None, 66), ("{", 78), ("\xff\xfe{", 78)])
def test_a_file_that_cannot_be_read_has_its_exit_code(
    content: str | None, code: int, tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / "ds.json").write_bytes(content.encode("latin-1"))
    done = autotune(*ESTIMATE, "ds.json", cwd=tmp_path)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_run_trains_with_what_a_file_became(tmp_path: Path, short_rows: Path) -> None:
    theirs: dict[str, Any] = {
        "train_batch_size": 16,
        "zero_optimization": {
            "stage": 2,
            "overlap_comm": True,
            "reduce_bucket_size": 500_000,
            "round_robin_gradients": True,
        },
        "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": [0.9, 0.95]}},
        "key_of_a_later_version": 1,
    }
    (tmp_path / "ds.json").write_text(json.dumps(theirs))
    pins = ("--set", "micro_batch_size=4", "--set", "checkpointing=none")
    job = ("run", "--dataset", short_rows, "--devices", 2, "--max-steps", 2, "--run-dir", "run")
    done = autotune(*job, "--ds-config", "ds.json", *pins, "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["exit_reason"] == "trained"
    assert result["setting"]["micro_batch_size"] == 4
    assert result["setting"]["overlap_comm"] is True
    config = json.loads((tmp_path / "run" / "ds_config.json").read_text())
    assert config["key_of_a_later_version"] == 1
    assert config["train_batch_size"] == 16
    assert config["optimizer"]["params"]["betas"] == [0.9, 0.95]
    zero = config["zero_optimization"]
    assert theirs["zero_optimization"].items() <= zero.items()
    again = autotune("train", "run", "--json", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout)["exit_reason"] == "trained"
