"""An original ChatGLM3 checkpoint: read in, trained on, and saved as a standard GLM."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from conftest import autotune
from trainings import train, workshop

from autotune import chatglm3
from autotune.errors import ConfigError
from autotune.model_source import ModelSource, find_model

REFERENCE = Path(os.environ.get("AUTOTUNE_CHATGLM3_TINY", "/nowhere"))
CHECKPOINT = REFERENCE / "checkpoint"
needs_reference = pytest.mark.skipif(
    not CHECKPOINT.is_dir(), reason="AUTOTUNE_CHATGLM3_TINY names no ChatGLM3 checkpoint"
)
LIMIT_S = 280

ORIGINAL: dict[str, Any] = {
    "model_type": "chatglm",
    "add_qkv_bias": True,
    "ffn_hidden_size": 13696,
    "hidden_size": 4096,
    "kv_channels": 128,
    "layernorm_epsilon": 1e-5,
    "multi_query_attention": True,
    "multi_query_group_num": 2,
    "num_attention_heads": 32,
    "num_layers": 28,
    "padded_vocab_size": 65024,
    "seq_length": 8192,
    "torch_dtype": "float16",
}


def test_the_configuration_is_that_of_the_published_model() -> None:
    preset = Path(__file__).parent.parent / "configs" / "models" / "chatglm3-6b" / "config.json"
    published = json.loads(preset.read_text())
    standard = chatglm3.standard_config(ORIGINAL)

    named = {key: standard[key] for key in published if key in standard}
    assert named == {key: published[key] for key in named}
    assert set(published) - set(standard) <= {"attention_dropout"}


def test_longer_contexts_turn_more_slowly() -> None:
    standard = chatglm3.standard_config(ORIGINAL | {"rope_ratio": 50})
    assert standard["rope_parameters"]["rope_theta"] == 500_000


@pytest.mark.parametrize(
    "change", [{"add_bias_linear": True}, {"rmsnorm": False}, {"pre_seq_len": 128}]
)
def test_another_network_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(change))):
        chatglm3.standard_config(ORIGINAL | change)


def test_the_fused_matrix_is_split_by_rows() -> None:
    config = chatglm3.standard_config(ORIGINAL)
    fused = "transformer.encoder.layers.3.self_attention.query_key_value.weight"
    assert chatglm3.standard_tensors(fused, 4096 + 2 * 256, config) == (
        ("model.layers.3.self_attn.q_proj.weight", 4096),
        ("model.layers.3.self_attn.k_proj.weight", 256),
        ("model.layers.3.self_attn.v_proj.weight", 256),
    )


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("transformer.prefix_encoder.embedding.weight", 128),
        ("transformer.encoder.layers.3.self_attention.query_key_value.weight", 4096),
    ],
)
def test_a_tensor_without_a_place_is_refused(name: str, rows: int) -> None:
    with pytest.raises(ConfigError, match="no place"):
        chatglm3.standard_tensors(name, rows, chatglm3.standard_config(ORIGINAL))


@pytest.fixture(scope="module")
def standard() -> ModelSource:
    source = find_model(str(CHECKPOINT))
    source.complete()
    return source


def apart(model_dir: Path) -> float:
    """Return how far the logits of a model are from those of the original code."""
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    expected = load_file(REFERENCE / "expected.safetensors")
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = model(input_ids=expected["input_ids"]).logits[..., :64]
    return float((logits - expected["logits"]).abs().max())


@needs_reference
def test_the_logits_are_those_of_the_original(standard: ModelSource) -> None:
    assert apart(standard.directory) < 1e-5


@needs_reference
def test_its_tokenizer_cuts_text_and_conversations_alike(standard: ModelSource) -> None:
    from sentencepiece import SentencePieceProcessor
    from transformers import AutoTokenizer

    pieces = SentencePieceProcessor(model_file=str(CHECKPOINT / "tokenizer.model"))
    tokenizer = AutoTokenizer.from_pretrained(standard.directory)
    repository = Path(__file__).parent.parent
    texts = [
        *("  a  b ", "\t x\n\n", "混合 English 和中文。", "\U0001f600\u200b", "people stop"),
        *(path.read_text() for path in repository.glob("*.md")),
    ]
    for text in texts:
        assert tokenizer.encode(text, add_special_tokens=False) == pieces.encode(text)
    expected = json.loads((REFERENCE / "tokenizer_expected.json").read_text())
    for case in expected["cases"]:
        ids = tokenizer.apply_chat_template(case["messages"], return_dict=False)
        assert [*ids, expected["eos"]] == case["input_ids"]
    for token, number in expected["special"].items():
        assert tokenizer.convert_tokens_to_ids(token) == number


@needs_reference
@pytest.mark.slow
@pytest.mark.usefixtures("standard")
def test_without_a_learning_rate_the_saved_model_is_the_same(
    short_rows: Path, tmp_path: Path
) -> None:
    shop = workshop(tmp_path, short_rows, CHECKPOINT, max_steps=2)
    directory = shop.emit(tmp_path / "run", zero_stage=2, trainer={"learning_rate": 0.0})
    config = json.loads((directory / "ds_config.json").read_text())
    config["optimizer"]["params"]["lr"] = 0.0
    (directory / "ds_config.json").write_text(json.dumps(config))

    assert len(train(directory, 2)) == 2

    saved = json.loads((directory / "model" / "config.json").read_text())
    assert (saved["model_type"], saved["architectures"]) == ("glm", ["GlmForCausalLM"])
    assert apart(directory / "model") < 1e-5


@needs_reference
@pytest.mark.slow
@pytest.mark.parametrize("method", [[], ["--method", "lora", "--merge"]], ids=["full", "lora"])
def test_a_run_is_one_command(short_rows: Path, tmp_path: Path, method: list[str]) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    done = autotune(
        *("run", "--model", CHECKPOINT, "--dataset", short_rows, "--run-dir", "run", *method),
        *("--devices", 2, "--global-batch-size", 16, "--max-probes", 1, "--max-steps", 4),
        *("--learning-rate", "1e-2"),
        cwd=tmp_path,
        timeout=LIMIT_S,
    )

    assert done.returncode == 0, done.stderr
    training = json.loads((tmp_path / "run" / "result.json").read_text())["training"]
    assert training["loss_end"] < training["loss_start"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run" / "model")
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hello"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    asked = chat["input_ids"].shape[1]
    assert model.generate(**chat, max_new_tokens=3, do_sample=False).shape[1] > asked
