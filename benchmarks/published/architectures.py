"""Configurations of the measured models, from the dimensions that a row states."""

from typing import Any

_PRESETS = {
    "ChatGLM3-6B": "chatglm3-6b",
    "ChatGLM2-6B": "chatglm3-6b",
    "GLM-4-9B": "glm-4-9b",
    "phi-3-mini": "phi-3-mini-4k",
    "Llama-3.2-1B": "llama-3.2-1b",
    "Llama-3.2-3B": "llama-3.2-3b",
}
"""Models whose dimensions do not say all; ChatGLM2 has those of ChatGLM3."""

_FAMILIES = {
    "Llama": "llama",
    "Granite-7B": "llama",
    "TinyLlama": "llama",
    "Yi": "llama",
    "Baichuan-7B": "llama",
    "Baichuan2-7B": "llama",
    "Mistral": "mistral",
    "Qwen3": "qwen3",
    "Qwen": "qwen2",
    "Pythia": "gpt_neox",
    "StableLM-alpha": "gpt_neox",
    "phi-": "phi",
    "Gemma": "gemma",
    "GPT2": "gpt2",
    "gpt2": "gpt2",
    "bloom": "bloom",
    "Falcon": "falcon",
}
"""Which architecture of transformers a model is or equals; the first that its name begins with."""

DISTINCT = frozenset(
    {
        "DS-toy-6.86B",
        "DS-toy-254M",
        "MiniCPM-Llama3-V-2.5",
        "ChatGLM-6B",
        "Baichuan-13B",
        "Baichuan2-13B",
        "LLaDA-8B",
        *("MPT-7B", "MPT-13B", "MPT-30B", "MPT-70B"),
        *("T0_3B", "mt0-xxl (12.9B)"),
    }
)
"""Models of other architectures: attention of their own, vision towers, encoders and decoders."""

_FUSED_ATTENTION = {
    "gpt_neox": "query_key_value",
    "bloom": "query_key_value",
    "falcon": "query_key_value",
    "gpt2": "c_attn",
}


_POSITIONS = 131072
"""Rotary positions take no memory, so that their number does not matter."""


def config_of(row: dict[str, str]) -> dict[str, Any] | str | None:
    """Return a configuration, the name of one that is shipped, or None where neither is known."""
    model = row["model"]
    if model in _PRESETS:
        return _PRESETS[model]
    if model in DISTINCT or not row["n_layers"]:
        return None
    family = next((kind for name, kind in _FAMILIES.items() if model.startswith(name)), None)
    return None if family is None else {"model_type": family, **_dimensions(family, row)}


def _dimensions(family: str, row: dict[str, str]) -> dict[str, Any]:
    sizes = {name: int(row[name]) for name in ("n_layers", "hidden", "heads", "kv_heads", "vocab")}
    inner = int(row["intermediate"])
    common = {"vocab_size": sizes["vocab"], "tie_word_embeddings": False}
    if family == "gpt2":
        return common | {
            "n_embd": sizes["hidden"],
            "n_layer": sizes["n_layers"],
            "n_head": sizes["heads"],
            "n_inner": inner,
            "n_positions": 1024,
            "tie_word_embeddings": True,
        }
    common |= {
        "hidden_size": sizes["hidden"],
        "num_hidden_layers": sizes["n_layers"],
        "num_attention_heads": sizes["heads"],
        "max_position_embeddings": _POSITIONS,
    }
    if family == "bloom":
        return common | {"tie_word_embeddings": True}
    if family == "falcon":
        return common | {"multi_query": True, "tie_word_embeddings": True}
    common["intermediate_size"] = inner
    if family in {"gpt_neox", "phi"}:
        return common
    common["num_key_value_heads"] = sizes["kv_heads"]
    if family == "gemma":
        return common | {"head_dim": 256, "tie_word_embeddings": True}
    return common


def targets_of(row: dict[str, str]) -> list[str]:
    """Return the layers that get adapters: as the row's notes say, else those of attention."""
    notes = row["notes"]
    if any(words in notes for words in ("all-linear", "ALL linear", "all modules")):
        return ["all-linear"]
    config = config_of(row)
    family = config["model_type"] if isinstance(config, dict) else config
    if family in _FUSED_ATTENTION:
        return [_FUSED_ATTENTION[family]]
    if "k,q,v,up,down,gate" in notes:
        return ["k_proj", "q_proj", "v_proj", "up_proj", "down_proj", "gate_proj"]
    return ["q_proj", "v_proj"] if "q,v" in notes else ["q_proj", "k_proj", "v_proj"]
