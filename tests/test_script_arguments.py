"""What of a script's own arguments is known, mapped and replaced, and what a section becomes."""

import json
from pathlib import Path

import pytest

from autotune.errors import ConfigError, UsageError
from autotune.script.arguments import (
    ACCUMULATION,
    CONFIG,
    GLOBAL_BATCH,
    MICRO_BATCH,
    STAGE,
    find_carriers,
    parse_maps,
    replaced,
)
from autotune.script.errand import merged
from autotune.script.migrate import read_wishes
from autotune.script.site import overrides
from autotune.setting import Setting, Structure


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 2}}))
    return path


def test_common_names_are_known_in_both_spellings(tmp_path: Path) -> None:
    argv = ("--per-device-train-batch-size=4", "--gradient_accumulation_steps", "2", "--batch_size")

    carriers = find_carriers(argv, {}, {}, tmp_path)

    assert carriers.options == {
        MICRO_BATCH: "--per-device-train-batch-size",
        ACCUMULATION: "--gradient_accumulation_steps",
    }


def test_what_the_parser_knows_counts_where_the_command_does_not_say_it(tmp_path: Path) -> None:
    known = {
        "--per_device_train_batch_size": {"value": 2, "takes_value": True},
        "--zero_stage": {"value": 0, "takes_value": True},
        "--gradient_accumulation_steps": {"value": False, "takes_value": False},
    }

    carriers = find_carriers((), known, {}, tmp_path)

    assert carriers.options == {MICRO_BATCH: "--per_device_train_batch_size", STAGE: "--zero_stage"}
    assert carriers.arguments((), {MICRO_BATCH: 8, STAGE: 3, ACCUMULATION: 2}) == (
        *("--per_device_train_batch_size", "8"),
        *("--zero_stage", "3"),
    )


def test_a_name_whose_value_is_another_carries_nothing(tmp_path: Path) -> None:
    argv = ("--train_batch_size", "4", "--micro_batch_size=4", "--zero_stage", "2")
    seen = {MICRO_BATCH: 4, GLOBAL_BATCH: 32, STAGE: 2, ACCUMULATION: 4}

    carriers = find_carriers(argv, {}, {}, tmp_path, seen)

    # As in scripts where it is that of a device.
    assert carriers.options == {MICRO_BATCH: "--micro_batch_size", STAGE: "--zero_stage"}


def test_the_users_own_mapping_goes_before_names(tmp_path: Path) -> None:
    maps = parse_maps(["train_micro_batch_size_per_gpu=--batch_size"])

    carriers = find_carriers(("--micro_batch_size", "4", "--batch_size", "2"), {}, maps, tmp_path)

    assert carriers.options[MICRO_BATCH] == "--batch_size"


@pytest.mark.parametrize("wrong", ["batch=--x", "train_batch_size=x", "train_batch_size"])
def test_a_mapping_that_cannot_be_meant_is_refused(wrong: str) -> None:
    with pytest.raises(UsageError, match="KEY=--OPTION"):
        parse_maps([wrong])


@pytest.mark.parametrize("option", ["--deepspeed", "--deepspeed_config", "--anything"])
def test_the_config_is_found_by_what_is_in_it(config: Path, option: str) -> None:
    other = config.with_name("model.json")
    other.write_text(json.dumps({"hidden_size": 64}))

    carriers = find_carriers(("--model", "model.json", option, "ds.json"), {}, {}, config.parent)

    assert carriers.options == {CONFIG: option}
    assert carriers.config_file == config
    assert carriers.arguments((option, "ds.json"), {CONFIG: "/new.json"}) == (option, "/new.json")


def test_a_config_that_is_a_default_of_the_parser_is_found(config: Path) -> None:
    known = {"--ds": {"value": "ds.json", "takes_value": True}}

    carriers = find_carriers((), known, {}, config.parent)

    assert carriers.arguments((), {CONFIG: "/new.json"}) == ("--ds", "/new.json")


def test_values_are_replaced_where_they_are_and_added_where_they_are_not() -> None:
    argv = ("--a", "1", "--bs=2", "--bs", "3", "rest")

    assert replaced(argv, "--bs", "8") == ("--a", "1", "--bs=8", "--bs", "8", "rest")
    assert replaced(argv, "--new", "8") == (*argv, "--new", "8")


def test_overrides_keep_what_the_user_has_besides() -> None:
    given = {
        "train_batch_size": "auto",
        "zero_optimization": {"stage": 1, "offload_optimizer": {"device": "cpu"}},
        "autotuning": {"enabled": True},
        "gradient_clipping": 0.5,
    }
    setting = Setting(
        structure=Structure(zero_stage=3), micro_batch_size=4, gradient_accumulation_steps=2
    )

    config = merged(given, overrides(setting, 2, 2))

    assert config == {
        GLOBAL_BATCH: 16,
        MICRO_BATCH: 4,
        ACCUMULATION: 2,
        "zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}},
        "gradient_clipping": 0.5,
    }
    assert "autotuning" in given


def test_a_section_of_deepspeeds_autotuner_becomes_wishes_with_a_note_a_key() -> None:
    section = {
        "enabled": True,
        "fast": False,
        "metric": "latency",
        "max_train_batch_size": 64,
        "max_train_micro_batch_size_per_gpu": 8,
        "min_train_micro_batch_size_per_gpu": 2,
        "tuner_num_trials": 5,
        "arg_mappings": {"gradient_accumulation_steps ": "--accumulate", "other": "--x"},
        "no_such_key": 1,
    }

    wishes = read_wishes({"autotuning": section, "zero_optimization": {"stage": [3, 1]}})

    assert wishes.stages == (1, 3)
    assert wishes.sizes((1, 2, 4, 8, 16)) == (2, 4, 8)
    assert wishes.trials == 5
    assert wishes.mappings == {ACCUMULATION: "--accumulate"}
    for key in section.keys() - {"enabled"}:
        assert sum(f"autotuning.{key}:" in note for note in wishes.notes) == 1, key
    wishes.require_within(64)
    with pytest.raises(ConfigError, match="max_train_batch_size is 64"):
        wishes.require_within(65)


def test_all_stages_are_tried_unless_a_list_says_which() -> None:
    assert read_wishes({"zero_optimization": {"stage": "all"}}).stages == (0, 1, 2, 3)
    assert read_wishes({"zero_optimization": {"stage": 2}}).stages == (0, 1, 2, 3)
    assert read_wishes({}).notes == ()


@pytest.mark.parametrize(
    "wrong",
    [
        {"autotuning": True},
        {"autotuning": {"max_train_batch_size": "big"}},
        {"autotuning": {"arg_mappings": ["--x"]}},
        {"zero_optimization": {"stage": [7]}},
    ],
)
def test_what_cannot_be_meant_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        read_wishes(wrong)
