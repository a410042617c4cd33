"""Options: which source wins, what a value may be, and what is said to one that cannot be."""

import json
from typing import Any

import pytest
import yaml

from autotune.config import OPTIONS, Layer, Option, Options, resolve
from autotune.errors import ConfigError

NUMBERS = {
    "global_batch_size",
    "max_seq_length",
    "epochs",
    "max_steps",
    "learning_rate",
    "warmup_ratio",
    "weight_decay",
    "max_grad_norm",
    "seed",
    "device_memory",
    "tune_budget",
    "max_probes",
}


def from_yaml(text: str) -> Options:
    return resolve([Layer("autotune.yaml", yaml.safe_load(text))])


def refusal(**values: Any) -> str:  # noqa: ANN401 - whatever a file may hold
    with pytest.raises(ConfigError) as refused:
        resolve([Layer("autotune.yaml", values)])
    return str(refused.value)


def test_without_layers_every_option_has_its_default() -> None:
    options = resolve([])
    followed = {"learning_rate": 2e-5, "lora_alpha": 32, "lora_targets": ["all-linear"]}
    assert options.values == {option.name: option.default for option in OPTIONS} | followed
    assert all(options.is_default(option.name) for option in OPTIONS)


@pytest.mark.parametrize("option", OPTIONS, ids=lambda option: option.name)
def test_an_option_reads_its_own_default_as_itself(option: Option) -> None:
    if option.default is not None:
        assert option.parse(option.default) == option.default
        if option.default is not False:
            assert option.parse(str(option.default)) == option.default


def test_arguments_of_the_trainer_are_yaml_by_flag_or_mapping() -> None:
    by_flag = resolve(
        [Layer("command line", {"trainer": ("save_steps=5", "logging_first_step=true")})]
    )
    by_file = from_yaml("trainer: {save_steps: 5, logging_first_step: true}")
    assert by_flag["trainer"] == by_file["trainer"] == {"save_steps": 5, "logging_first_step": True}


@pytest.mark.parametrize(
    ("argument", "says"),
    [
        ("save_steps", "key=value"),
        ("learning_rate=1", "--learning-rate"),
        ("gradient_accumulation_steps=2", "tuned"),
        ("eval_strategy=steps", "--eval-share"),
        ("save_steps=[", "YAML"),
    ],
)
def test_an_argument_of_the_trainer_that_cannot_be_meant_is_refused(
    argument: str, says: str
) -> None:
    assert says in refusal(trainer=[argument])


def test_the_first_layer_that_names_an_option_wins() -> None:
    options = resolve(
        [
            Layer("command line", {"seed": "1"}),
            Layer("a.yaml", {"seed": 2, "epochs": 2}),
            Layer("autotune.yaml", {"seed": 3, "epochs": 3, "max_steps": 3}),
        ]
    )
    assert (options["seed"], options["epochs"], options["max_steps"]) == (1, 2.0, 3)


def test_each_value_says_where_it_came_from() -> None:
    options = resolve([Layer("command line", {"seed": "1"}), Layer("a.yaml", {"epochs": 2})])
    recorded = options.to_json()
    assert recorded["seed"] == {"value": 1, "source": "command line"}
    assert recorded["epochs"] == {"value": 2.0, "source": "a.yaml"}
    assert recorded["max_probes"]["source"] == "default"
    assert json.loads(json.dumps(recorded)) == recorded


def test_what_follows_from_the_method_follows_it() -> None:
    options = resolve([Layer("a.yaml", {"method": "lora", "lora_rank": 8})])
    assert (options["learning_rate"], options["lora_alpha"]) == (2e-4, 16)
    assert options.is_default("learning_rate")
    given = resolve([Layer("a.yaml", {"method": "lora", "learning_rate": 1e-3, "lora_alpha": 8})])
    assert (given["learning_rate"], given["lora_alpha"]) == (1e-3, 8)


@pytest.mark.parametrize(
    ("key", "value"),
    [("lora_rank", 8), ("lora_dropout", 0.1), ("lora_targets", "q_proj"), ("merge", True)],
)
def test_what_is_about_adapters_needs_them(key: str, value: object) -> None:
    assert key in refusal(**{key: value})
    resolve([Layer("a.yaml", {key: value, "method": "lora"})])


def test_all_linear_layers_and_some_are_no_choice() -> None:
    assert "alone" in refusal(method="lora", lora_targets=["all-linear", "lm_head"])


def test_a_recommendation_takes_the_place_of_a_default_only() -> None:
    options = resolve([Layer("a.yaml", {"seed": 7})])
    taken = options.recommended({"seed": 1, "learning_rate": 1e-3}, "the model")
    assert (taken["seed"], taken.sources["seed"]) == (7, "a.yaml")
    assert (taken["learning_rate"], taken.sources["learning_rate"]) == (1e-3, "the model")


def test_a_key_without_a_value_says_nothing() -> None:
    options = resolve([Layer("a.yaml", {"seed": None}), Layer("autotune.yaml", {"seed": 7})])
    assert (options["seed"], options.sources["seed"]) == (7, "autotune.yaml")
    assert resolve([Layer("a.yaml", {"global_batch_size": None})])["global_batch_size"] == 32


def test_keys_may_be_written_with_dashes() -> None:
    assert from_yaml("max-seq-length: 512")["max_seq_length"] == 512


@pytest.mark.parametrize(
    ("key", "nearest"),
    [("learning_rat", "learning_rate"), ("global-batch", "global_batch_size"), ("sed", "seed")],
)
def test_an_unknown_key_is_refused_with_the_nearest_one(key: str, nearest: str) -> None:
    message = refusal(**{key: 1})
    assert key in message
    assert nearest in message
    assert "autotune.yaml" in message


def test_a_key_that_is_no_text_is_refused_too() -> None:
    with pytest.raises(ConfigError, match="unknown key 5"):
        from_yaml("5: 1")


def test_an_exponent_that_yaml_reads_as_text_is_a_number() -> None:
    assert yaml.safe_load("1e-4") == "1e-4"
    assert from_yaml("learning_rate: 1e-4")["learning_rate"] == 1e-4
    assert from_yaml("max_steps: 1e3")["max_steps"] == 1000


@pytest.mark.parametrize("name", sorted(NUMBERS))
@pytest.mark.parametrize("value", [True, False, "many", [1], {"a": 1}, float("nan"), "-1"])
def test_a_number_is_not_read_from_anything_else(name: str, value: object) -> None:
    message = refusal(**{name: value})
    assert message.startswith(f"autotune.yaml: {name}: ")
    assert repr(value).strip("'") in message


@pytest.mark.parametrize("name", sorted(NUMBERS - {"warmup_ratio"}))
@pytest.mark.parametrize("value", ["inf", "1e999", "1e999999999", "9" * 400])
def test_a_number_beyond_all_measure_is_refused(name: str, value: str) -> None:
    assert f"autotune.yaml: {name}: " in refusal(**{name: value})


@pytest.mark.parametrize("name", ["global_batch_size", "max_steps", "max_probes", "seed"])
def test_a_whole_number_has_no_fraction(name: str) -> None:
    assert "whole number" in refusal(**{name: 1.5})
    assert resolve([Layer("autotune.yaml", {name: 2.0})])[name] == 2


def test_a_large_whole_number_is_kept_to_the_last_digit() -> None:
    assert from_yaml("max_steps: 9007199254740993")["max_steps"] == 9007199254740993


def test_a_seed_is_what_random_generators_take() -> None:
    assert from_yaml("seed: 4294967295")["seed"] == 4294967295
    assert "4294967295 or less" in refusal(seed=4294967296)


def test_a_share_is_below_one() -> None:
    assert from_yaml("warmup_ratio: 0")["warmup_ratio"] == 0.0
    assert "share" in refusal(warmup_ratio=1)


def test_clipping_and_decay_may_be_zero_but_a_rate_may_not() -> None:
    assert from_yaml("max_grad_norm: 0")["max_grad_norm"] == 0.0
    assert from_yaml("weight_decay: 0")["weight_decay"] == 0.0
    assert "above zero" in refusal(learning_rate=0)


def test_a_choice_names_all_that_can_be_chosen() -> None:
    assert "auto, bf16, fp16, fp32" in refusal(precision="int8")


@pytest.mark.parametrize("value", [True, ["a"], 1.5, "", "  "])
def test_a_name_is_a_text_that_says_something(value: object) -> None:
    assert "is not a text" in refusal(model=value)


def test_a_name_of_digits_is_a_text() -> None:
    assert from_yaml("devices: 2")["devices"] == "2"


@pytest.mark.parametrize("value", ["yes please", 1, 0])
def test_a_flag_is_true_or_false_only(value: object) -> None:
    assert "neither true nor false" in refusal(trust_remote_code=value)
    assert from_yaml("trust_remote_code: yes")["trust_remote_code"] is True


def test_sizes_and_durations_are_read_with_units() -> None:
    options = from_yaml("{device_memory: 2GiB, tune_budget: 20m}")
    assert (options["device_memory"], options["tune_budget"]) == (2 * 1024**3, 1200.0)


def test_the_flag_of_an_option_is_its_key_with_dashes() -> None:
    assert {option.flag for option in OPTIONS} >= {"--global-batch-size", "--tune-budget"}
