"""Pins: what a user may say of knobs, and what it leaves of the space."""

import json
import re
import shlex
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import REPOSITORY, autotune
from hypothesis import given
from hypothesis import strategies as st
from records import make_cluster

from autotune.config import Layer, resolve
from autotune.errors import ConfigError
from autotune.hardware import Cluster
from autotune.intake import NamedHardware, Question, flash_runs
from autotune.knobs import KNOBS, MICRO_BATCH_SIZE, Pins, Value, read_pins
from autotune.model_source import find_model
from autotune.setting import BY_MODEL, Structure
from autotune.space import Space, enumerate_space

TWO_GPUS = make_cluster(gpus=2)


def space_with(pins: dict[str, list[Value]], cluster: Cluster = TWO_GPUS) -> Space:
    return enumerate_space(cluster, 32, pins=Pins.of(pins))


def values_of(space: Space, knob: str) -> set[object]:
    return {getattr(structure, knob) for structure in space.structures}


def test_every_knob_of_a_structure_can_be_pinned_but_by_one_name() -> None:
    names = [knob.name for knob in KNOBS]
    assert len(names) == len(set(names))
    assert set(names) - {MICRO_BATCH_SIZE} <= {field.name for field in fields(Structure)}


@pytest.mark.parametrize(
    "given_pins",
    [
        ("zero_stage=3,2", "checkpointing=every-3"),
        {"zero_stage": [2, 3], "checkpointing": "every-3"},
        {"zero-stage": "2,3", "checkpointing": ["every-3"]},
        ["zero_stage=2", "zero_stage=3", "checkpointing = every-3"],
    ],
)
def test_pins_are_read_from_flags_and_from_yaml_alike(given_pins: Any) -> None:  # noqa: ANN401
    assert read_pins(given_pins) == {"checkpointing": ["every-3"], "zero_stage": [2, 3]}


def test_what_yaml_reads_as_a_truth_is_one() -> None:
    options = resolve([Layer("a.yaml", yaml.safe_load("set: {overlap_comm: yes}"))])
    assert options["set"] == {"overlap_comm": [True]}
    assert json.loads(json.dumps(options["set"])) == options["set"]


def test_a_prefetch_bucket_can_be_left_to_the_model() -> None:
    key = "stage3_prefetch_bucket_size"
    assert read_pins(f"{key}=auto,0") == {key: [BY_MODEL, 0]}


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("zero_stag=2", "zero_stage"),
        ("overlap=true", "overlap_comm"),
        ("zero_stage=4", "0, 1, 2, 3"),
        ("zero_stage=two", "0, 1, 2, 3"),
        ("checkpointing=every-1", "every-2"),
        ("attention=flash", "flash_attention_2"),
        ("reduce_bucket_size=0", "auto"),
        ("allgather_bucket_size=3", "even"),
        ("reduce_bucket_size=1e6", "whole number"),
        ("overlap_comm=maybe", "true, false"),
        ("offload_optimizer=", "none, cpu"),
        ("zero_stage", "KNOB=VALUE"),
    ],
)
def test_a_pin_that_cannot_be_is_refused_with_what_can(text: str, named: str) -> None:
    with pytest.raises(ConfigError) as refused:
        resolve([Layer("command line", {"set": [text]})])
    assert named in str(refused.value)
    assert "command line: set: " in str(refused.value)


@given(st.sets(st.sampled_from([0, 1, 2, 3]), min_size=1))
def test_the_space_has_the_pinned_values_and_no_others(stages: set[int]) -> None:
    space = space_with({"zero_stage": sorted(stages)})
    assert values_of(space, "zero_stage") == stages
    free = enumerate_space(TWO_GPUS, 32)
    assert {one for one in free.structures if one.zero_stage in stages} == set(space.structures)


def test_a_value_that_a_search_does_not_try_by_itself_can_be_pinned() -> None:
    pins: dict[str, list[Value]] = {
        "reduce_bucket_size": [12_345_678],
        "stage3_param_persistence_threshold": [0],
        "overlap_comm": [False],
        "offload_param": ["cpu"],
    }
    space = space_with(pins)
    assert space.structures
    for knob, values in pins.items():
        assert values_of(space, knob) == set(values)
    assert values_of(space, "zero_stage") == {3}


def test_a_pin_leaves_out_the_stages_that_lack_its_knob() -> None:
    assert values_of(space_with({"offload_optimizer": ["cpu"]}), "zero_stage") == {1, 2, 3}
    assert values_of(space_with({"offload_optimizer": ["none"]}), "zero_stage") == {0, 1, 2, 3}
    assert values_of(space_with({"allgather_bucket_size": [10**6]}), "zero_stage") == {1, 2}


def test_a_pin_that_is_said_where_it_applies_leaves_the_other_stages() -> None:
    pins = Pins(values={"overlap_comm": (True,)}, where_there=frozenset({"overlap_comm"}))
    space = enumerate_space(TWO_GPUS, 32, pins=pins)
    overlapping = {(one.zero_stage, one.overlap_comm) for one in space.structures}
    assert overlapping == {(0, False), (1, True), (2, True), (3, True)}


def test_micro_batch_sizes_are_pinned_too() -> None:
    space = space_with({"micro_batch_size": [2, 8, 5]})
    assert set(space.micro_batch_size.tolist()) == {2, 8}
    assert set((space.micro_batch_size * space.gradient_accumulation_steps).tolist()) == {16}


@pytest.mark.parametrize(
    ("pins", "why"),
    [
        ({"micro_batch_size": [5]}, "micro_batch_size can be 1, 2, 4, 8, 16"),
        ({"offload_optimizer": ["cpu"], "zero_stage": [0]}, "offload_optimizer is of ZeRO 1, 2, 3"),
        ({"overlap_comm": [True], "zero_stage": [0]}, "overlap_comm is of ZeRO 1, 2, 3"),
        ({"checkpointing": ["every-7"]}, "of checkpointing this model has none, full here"),
        ({"zero_hpz_partition_size": [3], "zero_stage": [3]}, "has to divide the 2 ranks"),
        ({"zero_hpz_partition_size": [2], "zero_stage": [2]}, "is of ZeRO 3"),
    ],
)
def test_pins_that_leave_nothing_are_refused_with_why(
    pins: dict[str, list[Value]], why: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        space_with(pins)
    assert why in str(refused.value)
    assert "\n" not in str(refused.value)


def test_threads_are_of_ranks_on_a_cpu() -> None:
    pins: dict[str, list[Value]] = {"threads_per_rank": [1, 3]}
    space = space_with(pins, cluster=make_cluster())
    assert values_of(space, "threads_per_rank") == {1, 3}
    with pytest.raises(ConfigError, match="ranks on a CPU"):
        space_with(pins)


def question_of(
    cluster: Cluster, precision: str = "auto", *, named: bool = False, packing: bool = False
) -> Question:
    return Question(
        named=NamedHardware(gpus=()) if named else None,
        options=resolve([Layer("a test", {"precision": precision, "packing": packing})]),
        cluster=cluster,
        source=find_model("builtin:glm-tiny"),
        dataset=(),
        fingerprint="",
    )


def test_flash_attention_is_tried_only_where_its_package_runs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert not flash_runs(question_of(TWO_GPUS)), "the package is not installed here"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    assert flash_runs(question_of(TWO_GPUS))
    assert not flash_runs(question_of(TWO_GPUS, "fp32"))
    assert not flash_runs(question_of(make_cluster()))
    assert not flash_runs(question_of(TWO_GPUS, named=True))
    assert not flash_runs(question_of(TWO_GPUS, packing=True))
    assert not flash_runs(question_of(replace(TWO_GPUS, compute_capability=(7, 5))))


def test_a_plan_can_have_several_attentions(tmp_path: Path) -> None:
    pins = ("--set", "attention=sdpa,eager,flash_attention_2", "--set", "zero_stage=0")
    done = autotune("plan", "--all", *pins, *PLAN, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    bytes_of: dict[str, int] = {}
    for entry in json.loads(done.stdout)["settings"]:
        setting = entry["setting"]
        if (setting["micro_batch_size"], setting["checkpointing"]) == (4, "none"):
            bytes_of[setting["attention"]] = entry["memory"]["activations_bytes"]
    assert bytes_of.keys() == {"sdpa", "eager", "flash_attention_2"}
    # Eager attention keeps scores and probabilities of every pair of tokens.
    assert bytes_of["eager"] > bytes_of["sdpa"]
    assert bytes_of["eager"] > bytes_of["flash_attention_2"]


def test_a_cpu_has_nowhere_to_offload_to() -> None:
    with pytest.raises(ConfigError, match="needs GPUs"):
        space_with({"offload_optimizer": ["cpu"]}, cluster=make_cluster())
    space_with({"offload_optimizer": ["none"]}, cluster=make_cluster())


PLAN: tuple[object, ...] = (
    "--gpus",
    "2xA100-80GB",
    "--seq-length",
    64,
    "--global-batch-size",
    16,
    "--json",
)


def test_a_plan_keeps_to_its_pins_and_says_them(tmp_path: Path) -> None:
    (tmp_path / "autotune.yaml").write_text("set: {checkpointing: every-3, zero_stage: [2, 3]}\n")
    done = autotune("plan", "--all", *PLAN, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["pins"] == {"checkpointing": ["every-3"], "zero_stage": [2, 3]}
    settings = [entry["setting"] for entry in document["settings"]]
    assert {one["zero_stage"] for one in settings} == {2, 3}
    assert {one["checkpointing"] for one in settings} == {"every-3"}


def test_what_does_not_fit_is_told_of_pinned_checkpointing_too(tmp_path: Path) -> None:
    large = ("--gpus", "1xRTX3090-24GB", "--seq-length", 2048, "--model", "llama-3-8b", "--json")
    done = autotune("plan", "--set", "checkpointing=every-3", *large, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    misses = json.loads(done.stdout)["near_misses"]
    assert {miss["setting"]["checkpointing"] for miss in misses} == {"every-3"}


def test_an_estimate_takes_pins_for_its_setting(tmp_path: Path) -> None:
    estimate = ("estimate", *PLAN, "--zero-stage", 2)
    done = autotune(*estimate, "--set", "reduce_bucket_size=100000", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["ds_config"]["zero_optimization"]["reduce_bucket_size"] == 100_000
    assert document["setting"]["reduce_bucket_size"] == 100_000


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("plan", "--set", "zero_stag=2"), 78, "zero_stage"),
        (("plan", "--set", "offload_optimizer=cpu", "--set", "zero_stage=0"), 78, "leave no"),
        (("plan", "--set", "attention=flash_attention_2", "--precision", "fp32"), 78, "bf16"),
        (("estimate", "--set", "zero_stage=1,2"), 2, "one setting"),
        (("estimate", "--set", "overlap_comm=true"), 2, "--zero-stage"),
        (
            ("estimate", "--zero-stage", 3, "--set", "zero_hpz_partition_size=3"),
            2,
            "divide the 2 ranks",
        ),
        (("estimate", "--set", "zero_stage=1", "--zero-stage", 2), 2, "drop one"),
    ],
)
def test_a_refusal_is_one_sentence(
    arguments: tuple[object, ...], code: int, said: str, tmp_path: Path
) -> None:
    done = autotune(*arguments, *PLAN, cwd=tmp_path)
    assert done.returncode == code, done.stderr
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


DOCUMENT = (REPOSITORY / "docs" / "knobs.md").read_text()


def test_the_document_has_a_row_for_every_knob() -> None:
    rows = set(re.findall(r"^\| `(\w+)` \|", DOCUMENT, re.MULTILINE))
    assert rows == {knob.name for knob in KNOBS}


def test_the_documents_yaml_is_read() -> None:
    (block,) = re.findall(r"^```yaml\n(.*?)^```$", DOCUMENT, re.MULTILINE | re.DOTALL)
    assert resolve([Layer("knobs.md", yaml.safe_load(block))])["set"] == {
        "checkpointing": ["every-3"],
        "reduce_bucket_size": [20_000_000],
        "zero_stage": [2, 3],
    }


def test_the_documents_command_runs(tmp_path: Path) -> None:
    (line,) = re.findall(r"^    autotune (plan .*)$", DOCUMENT, re.MULTILINE)
    done = autotune(*shlex.split(line), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    table = [row for row in done.stdout.splitlines() if re.match("[0-3] ", row)]
    assert {row[0] for row in table} <= {"2", "3"}
    assert any(row.startswith("2") and "overlap" in row for row in table)
