"""Adapters beside weights in 4 bits: built, loaded, traced, weighed, planned, trained, merged."""

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import autotune
from records import make_cluster
from test_lora import LORA, build, recipe
from test_trace import model

from autotune.config import Layer, resolve
from autotune.errors import ConfigError, UsageError
from autotune.intake import lora_of
from autotune.optimizer import limits_of
from autotune.setting import Structure
from autotune.space import enumerate_space, require_possible
from autotune.workload import ModelProfile
from autotune.zero import Engine, Shards, weights

QLORA = replace(LORA, quantised=True)
LIMIT_S = 280


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def built(llama: Path) -> Any:  # noqa: ANN401 - PeftModel
    return build(recipe(llama, lora=QLORA, precision="fp32"))


def test_the_method_decides_whether_weights_are_in_4_bits() -> None:
    def chosen(**values: Any) -> Any:  # noqa: ANN401 - a Lora or None
        return lora_of(resolve([Layer("command line", values)]))

    assert chosen(method="qlora", lora_rank=8) == QLORA
    assert chosen(method="lora", lora_rank=8) == LORA
    assert chosen(method="qlora", merge=True)
    with pytest.raises(ConfigError, match="method full has none"):
        chosen(merge=True)


def test_linear_layers_but_the_head_are_in_4_bits_and_adapters_are_trained(built: Any) -> None:  # noqa: ANN401
    import torch
    from bitsandbytes.nn import Linear4bit

    layers = {name for name, one in built.named_modules() if isinstance(one, Linear4bit)}
    # Four projections of attention and three of the feed-forward network, in three layers.
    assert len({name for name in layers if name.endswith("base_layer")}) == 7 * 3
    assert not any("lm_head" in name or "lora" in name.rpartition(".")[2] for name in layers)
    trained = {name for name, one in built.named_parameters() if one.requires_grad}
    assert len(trained) == 2 * 7 * 3
    kinds = {one.dtype for name, one in built.named_parameters() if "base_layer" not in name}
    assert kinds == {torch.float32}


@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_gradients_reach_the_adapters(llama: Path, checkpointing: str) -> None:
    import torch

    made = build(recipe(llama, lora=QLORA, precision="fp32"), checkpointing)
    ids = torch.arange(12).reshape(2, 6)
    made.train()
    made(input_ids=ids, labels=ids).loss.backward()
    moved = {
        name for name, one in made.named_parameters() if one.grad is not None and one.grad.any()
    }
    assert moved == {name for name, one in made.named_parameters() if "lora_B" in name}


def tensors(made: Any) -> Iterator[Any]:  # noqa: ANN401 - PeftModel
    """Yield the frozen weights with what quantised ones are scaled by, each tensor once."""
    for parameter in made.parameters():
        if parameter.requires_grad:
            continue
        yield parameter
        if (state := getattr(parameter, "quant_state", None)) is not None:
            yield from (state.absmax, state.code, state.offset, state.state2.absmax)


def test_weights_are_as_large_as_real_ones(built: Any) -> None:  # noqa: ANN401 - PeftModel
    frozen = [one for one in built.parameters() if not one.requires_grad]
    trained = [one.numel() for one in built.parameters() if one.requires_grad]
    quantised = [
        int(np.prod(one.quant_state.shape)) for one in frozen if hasattr(one, "quant_state")
    ]
    engine = Engine(
        shards=Shards(
            trained=np.array(trained),
            frozen=np.array([one.numel() for one in frozen if not hasattr(one, "quant_state")]),
            quantised=np.array(quantised),
            ranks=1,
            bucket=1,
            persistence=0,
        ),
        zero_stage=0,
        compute_bytes=4,
        accumulates=False,
        gloo=True,
    )
    assert weights(engine) - 4 * sum(trained) == sum(one.nbytes for one in tensors(built))
    # The 4.127 bits of the paper (arXiv:2305.14314, section 3), in layers that are not too small.
    large = replace(engine.shards, quantised=np.array([4096 * 11008]), frozen=np.zeros(0, int))
    in_bits = 8 * (weights(replace(engine, shards=large)) - 4 * sum(trained)) / (4096 * 11008)
    assert in_bits == pytest.approx(4.127, abs=0.001)


def test_loading_quantises_as_building_does(llama: Path, tmp_path: Path) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from autotune.engine.quantised import how_loaded, quantise

    torch.manual_seed(0)
    wide = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(llama), dtype=torch.float32)
    wide.save_pretrained(tmp_path / "wide")
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "wide", dtype=torch.float32, **how_loaded(torch.float32)
    )
    quantise(wide, torch.float32)

    theirs, ours = dict(loaded.named_parameters()), dict(wide.named_parameters())
    assert theirs.keys() == ours.keys()
    assert {name for name in ours if hasattr(ours[name], "quant_state")} == {
        name for name in theirs if hasattr(theirs[name], "quant_state")
    }
    assert all(torch.equal(theirs[name].data, ours[name].data) for name in ours)


def test_ranks_are_forked_before_bitsandbytes_has_asked_the_device() -> None:
    program = """
import sys
import autotune.engine.preload
assert "bitsandbytes" not in sys.modules
from peft.import_utils import is_bnb_4bit_available
from transformers.utils import is_bitsandbytes_available
assert is_bnb_4bit_available() and is_bitsandbytes_available()
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def profiles(llama: Path) -> tuple[ModelProfile, ModelProfile]:
    from autotune.profile.trace import trace_model

    lora, qlora = (
        trace_model(recipe(llama, lora=one, precision="fp32", checkpointing=("none",)))
        for one in (LORA, QLORA)
    )
    return lora, qlora


def test_the_profile_tells_weights_in_4_bits_apart(
    profiles: tuple[ModelProfile, ModelProfile],
) -> None:
    lora, qlora = profiles
    assert qlora.parameters == lora.parameters
    assert qlora.trained_sizes == lora.trained_sizes
    assert sum(qlora.quantised_sizes) + sum(qlora.frozen_sizes) == sum(lora.frozen_sizes)
    assert len(qlora.quantised_sizes) == 7 * 3
    # It multiplies as much, and dequantises besides.
    flops, wide = qlora.trace("none").flops, lora.trace("none").flops
    assert flops.c1 == pytest.approx(wide.c1, rel=1e-3)
    assert qlora.trace("none").operators > lora.trace("none").operators


def test_stage_3_is_left_out_and_refused_with_the_reason() -> None:
    limits = limits_of("adamw", 10**6, 2, in_4_bits=True)
    space = enumerate_space(make_cluster(gpus=2), 8, limits=limits)
    assert {one.zero_stage for one in space.structures} == {0, 1, 2}
    assert "cpu" in {one.offload_optimizer for one in space.structures}
    with pytest.raises(UsageError, match="zero_stage can be 0 or 1 or 2 here, as transformers"):
        require_possible(Structure(zero_stage=3), limits)
    assert limits_of("adafactor", 10**6, 2, in_4_bits=True)["zero_stage"].values == (0,)


@pytest.mark.slow
@pytest.mark.long
def test_seven_billion_parameters_are_planned_for_24_gb(tmp_path: Path) -> None:
    def planned(method: str) -> dict[str, Any]:
        done = autotune(
            *("plan", "--method", method, "--model", "llama-2-7b", "--gpus", "1xRTX3090-24GB"),
            *("--seq-length", "2048", "--json"),
            cwd=tmp_path,
            timeout=LIMIT_S,
        )
        assert done.returncode == 0, done.stderr
        document: dict[str, Any] = json.loads(done.stdout)
        return document

    qlora, lora = planned("qlora"), planned("lora")
    memory = qlora["settings"][0]["memory"]
    # 6.48e9 elements in layers of 4.127 bits, embedding and head in 16, and 40e6 of adapters.
    assert memory["weights_bytes"] == pytest.approx(
        6.476e9 * 4.127 / 8 + 2 * (2 * 32000 * 4096 + 40e6), rel=0.01
    )
    assert qlora["settings"][0]["fits"]
    widest = max(one["setting"]["micro_batch_size"] for one in qlora["settings"] if one["fits"])
    assert widest > max(
        one["setting"]["micro_batch_size"] for one in lora["settings"] if one["fits"]
    )


@pytest.mark.slow
def test_a_run_is_one_command_and_merges_what_was_learned(short_rows: Path, tmp_path: Path) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from autotune.engine.quantised import how_loaded

    done = autotune(
        *("run", "--dataset", short_rows, "--run-dir", "run", "--devices", "cpu:2"),
        *("--method", "qlora", "--lora-rank", "8", "--learning-rate", "1e-2", "--merge"),
        *("--global-batch-size", "16", "--max-probes", "1", "--max-steps", "6"),
        cwd=tmp_path,
        timeout=LIMIT_S,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["job"]["lora"]["quantised"] is True
    assert result["training"]["loss_end"] < result["training"]["loss_start"]

    saved = tmp_path / "run" / "model"
    merged = AutoModelForCausalLM.from_pretrained(saved).eval()
    base = AutoModelForCausalLM.from_pretrained(
        saved / "adapter" / "base", dtype=torch.float32, **how_loaded(torch.float32)
    )
    # Not for inference, for which some CPUs compute in bf16; there is nothing that is dropped.
    apart = PeftModel.from_pretrained(base, saved / "adapter").train()
    ids = torch.arange(3, 40).reshape(1, -1)
    with torch.no_grad():
        difference = merged(input_ids=ids).logits - apart(input_ids=ids).logits
    assert difference.abs().max() < 1e-3
