"""Tracing builds any causal language model of transformers without its weights."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from autotune import builtin
from autotune.errors import ConfigError
from autotune.profile import child
from autotune.profile.request import TraceRequest
from autotune.workload import ModelProfile

TINY: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": 2, "intermediate_size": 160},
    "qwen3": {"num_key_value_heads": 2, "intermediate_size": 160, "head_dim": 16},
    "gemma2": {"num_key_value_heads": 2, "intermediate_size": 160, "head_dim": 16},
    "gpt2": {"n_positions": 256, "n_inner": 160},
    "opt": {"ffn_dim": 160, "word_embed_proj_dim": 64},
    "gpt_neox": {"intermediate_size": 160},
}


def trace(directory: Path, attention: str = "auto", loss: str = "whole") -> ModelProfile:
    from autotune.profile.trace import trace_model

    return trace_model(
        TraceRequest(
            model_dir=str(directory),
            trust_remote_code=False,
            attention=attention,
            precision="fp32",
            device_kind="cpu",
            loss=loss,
        )
    )


def model(architecture: str, directory: Path) -> Path:
    config = {
        "model_type": architecture,
        "hidden_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "vocab_size": 512,
        "max_position_embeddings": 256,
        "pad_token_id": 500,
        "eos_token_id": 501,
        "bos_token_id": 502,
        **TINY[architecture],
    }
    (directory / "config.json").write_text(json.dumps(config))
    return directory


@pytest.mark.parametrize(
    "architecture",
    [
        pytest.param(name, marks=() if name in ("llama", "gpt2") else pytest.mark.slow)
        for name in TINY
    ],
)
def test_it_counts_what_the_built_model_has(architecture: str, tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    directory = model(architecture, tmp_path)
    built = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(directory))

    profile = trace(directory)

    assert profile.parameters == sum(one.numel() for one in built.parameters())
    assert profile.num_layers == 3
    assert profile.max_position_embeddings == 256


@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
def test_attention_is_sdpa_where_the_model_has_it(architecture: str, tmp_path: Path) -> None:
    expected = {"llama": "sdpa", "gemma2": "eager"}[architecture]
    assert trace(model(architecture, tmp_path)).attention == expected


@pytest.fixture(scope="module")
def glm_tiny() -> ModelProfile:
    return trace(builtin.directory("glm-tiny"))


def test_checkpointing_trades_memory_for_arithmetic(glm_tiny: ModelProfile) -> None:
    plain, full = glm_tiny.trace("none"), glm_tiny.trace("full")
    a_token = [max(one.rows_bytes.c1 for one in trace.more_rows) for trace in (full, plain)]
    assert a_token == sorted(a_token)
    assert full.flops.c1 > plain.flops.c1
    assert full.operators > plain.operators


def test_a_forward_and_a_backward_pass_take_six_operations_a_weight(glm_tiny: ModelProfile) -> None:
    # Two in forward, four in backward (arXiv:2001.08361, section 2.1); the embedding only looks up.
    embedding = glm_tiny.vocab_size * glm_tiny.hidden_size
    expected = 6 * (glm_tiny.parameters - embedding)
    assert glm_tiny.trace("none").flops.c1 == pytest.approx(expected, rel=0.01)


def test_a_loss_in_chunks_takes_an_eighth_of_the_logits_and_computes_as_much(
    glm_tiny: ModelProfile,
) -> None:
    chunked = trace(builtin.directory("glm-tiny"), loss="chunked")
    for mode in ("none", "full"):
        whole, part = glm_tiny.trace(mode), chunked.trace(mode)
        logits = [max(one.logits_bytes.c1 for one in way.more_rows) for way in (whole, part)]
        assert logits[1] < logits[0] / 7
        assert part.flops.c1 == pytest.approx(whole.flops.c1, rel=1e-3)


def test_a_model_that_caps_its_logits_has_no_loss_in_chunks(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="loss=whole"):
        trace(model("gemma2", tmp_path), loss="chunked")


@pytest.mark.usefixtures("server")
def test_values_that_a_model_keeps_do_not_hinder_a_named_gpu(tmp_path: Path) -> None:
    from transformers import AutoConfig

    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 16}
    # It scales its embedding by a number that is a buffer.
    AutoConfig.for_model(
        "gemma3_text", **sizes, num_key_value_heads=2, intermediate_size=128, vocab_size=500
    ).save_pretrained(tmp_path)
    request = TraceRequest(
        model_dir=str(tmp_path),
        trust_remote_code=False,
        attention="auto",
        precision="bf16",
        device_kind="cuda",
        checkpointing=("none",),
    )
    # In a process of its own: torch's autograd counts the kinds of devices when it first works.
    assert child.traced(request, tmp_path / "trace.log")["attention"] == "sdpa"


def _is_ended(_answer: str) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.usefixtures("server")
def test_a_process_that_a_signal_ended_is_said_to_be(tmp_path: Path) -> None:
    (answer,) = child._ask_each(_is_ended, [()], [tmp_path / "log"])
    assert answer["error"] == "the process ended with SIGKILL: it left no output"
