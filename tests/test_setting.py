"""A setting names itself in one way, whatever it was made from."""

import json
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from records import settings, structures

from autotune.setting import Setting, Structure


@given(settings())
def test_a_setting_comes_back_from_json(setting: Setting) -> None:
    assert Setting.from_json(json.loads(json.dumps(setting.to_json()))) == setting


@given(settings(), st.randoms(use_true_random=False))
def test_the_key_does_not_depend_on_the_order_of_fields(setting: Setting, order: Random) -> None:
    fields = list(setting.to_json().items())
    order.shuffle(fields)
    assert Setting.from_json(dict(fields)).key() == setting.key()


@given(settings(), settings())
def test_two_settings_have_one_key_only_if_they_are_the_same(one: Setting, two: Setting) -> None:
    assert (one.key() == two.key()) == (one == two)


@given(structures(), structures())
def test_two_structures_have_one_key_only_if_they_are_the_same(
    one: Structure, two: Structure
) -> None:
    assert (one.key() == two.key()) == (one == two)


@given(settings())
def test_a_key_is_sorted_json_of_the_fields(setting: Setting) -> None:
    fields = json.loads(setting.key())
    assert fields == setting.to_json()
    assert list(fields) == sorted(fields)


def test_accumulation_makes_up_the_global_batch() -> None:
    setting = Structure(zero_stage=1).with_micro_batch(4, ranks=2, global_batch_size=32)
    assert (setting.micro_batch_size, setting.gradient_accumulation_steps) == (4, 4)


def test_a_micro_batch_that_would_change_the_global_batch_is_a_bug() -> None:
    with pytest.raises(AssertionError, match="divisors"):
        Structure(zero_stage=1).with_micro_batch(5, ranks=2, global_batch_size=32)


@given(structures())
def test_the_label_of_a_structure_can_be_a_file_name(structure: Structure) -> None:
    assert structure.label().replace("-", "").isalnum()


def test_a_label_tells_what_a_person_would_ask() -> None:
    structure = Structure(zero_stage=2, offload_optimizer="cpu", checkpointing="full")
    assert structure.label() == "zero2-offload-optimizer-cpu-checkpointing-full"
    assert structure.with_micro_batch(2, 2, 16).label() == (
        "micro-batch 2 x accumulation 4, ZeRO 2, checkpointing full, optimizer on cpu"
    )
