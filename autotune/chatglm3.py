"""Original ChatGLM checkpoints as standard ones of transformers' GLM, which is the same network.

Keys of config.json and names of tensors are translated, and the fused query, key and value matrix
is split by rows. Tensors are copied as bytes, in the type they have. ChatGLM3's sentencepiece model
becomes a tokenizer.json that gives the same ids, with its form of conversations as chat template.
"""

import json
import re
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from autotune.errors import ConfigError
from autotune.rundir import write_bytes, write_json, writing

MODEL_TYPE = "chatglm"
SPECIAL_TOKENS = (
    "[MASK]",
    "[gMASK]",
    "[sMASK]",
    "sop",
    "eop",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|observation|>",
)
"""They follow the pieces of ChatGLM3's sentencepiece model, in this order."""

_CONVERTED = "converted"
_KEYS = {
    "num_layers": "num_hidden_layers",
    "padded_vocab_size": "vocab_size",
    "ffn_hidden_size": "intermediate_size",
    "kv_channels": "head_dim",
    "layernorm_epsilon": "rms_norm_eps",
    "seq_length": "max_position_embeddings",
    "add_qkv_bias": "attention_bias",
    "hidden_size": "hidden_size",
    "num_attention_heads": "num_attention_heads",
    "attention_dropout": "attention_dropout",
}
_OUTSIDE_LAYERS = {
    "transformer.embedding.word_embeddings.weight": "model.embed_tokens.weight",
    "transformer.output_layer.weight": "lm_head.weight",
    "transformer.encoder.final_layernorm.weight": "model.norm.weight",
}
_IN_LAYER = re.compile(r"transformer\.encoder\.layers\.(\d+)\.(.+)\.(weight|bias)")
_PARTS = {
    "self_attention.dense": "self_attn.o_proj",
    "mlp.dense_h_to_4h": "mlp.gate_up_proj",
    "mlp.dense_4h_to_h": "mlp.down_proj",
    "input_layernorm": "input_layernorm",
    "post_attention_layernorm": "post_attention_layernorm",
}
_FUSED = "self_attention.query_key_value"
_DROPPED = "transformer.rotary_pos_emb.inv_freq"
_COPY_BYTES = 1 << 24

_CHAT_TEMPLATE = (
    "{{ '[gMASK]sop' }}"
    "{% if tools %}{{ '<|system|>\\n Answer the following questions as best as you can. You have "
    "access to the following tools:\\n' + (tools | tojson(indent=4)) }}{% endif %}"
    "{% for message in messages %}"
    "{% set role = {'developer': 'system', 'tool': 'observation'}.get(message['role'], "
    "message['role']) %}"
    "{{ '<|' + role + '|>' + (' ' + message['metadata'] if message['metadata'] else '') + '\\n' }}"
    "{% if message['content'] %}{{ ' ' + message['content'] }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def is_original(config: Mapping[str, Any]) -> bool:
    """Tell whether a config.json is that of an original ChatGLM checkpoint."""
    return config.get("model_type") == MODEL_TYPE


def standard_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the configuration as transformers' GlmForCausalLM takes it.

    Raises:
        ConfigError: a key is missing, or the network is another one than GLM.
    """
    missing = [key for key in _KEYS if key not in config and key != "attention_dropout"]
    if missing:
        msg = f"the configuration of this ChatGLM model has no {missing[0]}: get it again"
        raise ConfigError(msg)
    unlike = [
        key
        for key, expected in (
            ("rmsnorm", True),
            ("post_layer_norm", True),
            ("add_bias_linear", False),
            ("apply_residual_connection_post_layernorm", False),
        )
        if config.get(key, expected) is not expected
    ]
    if unlike or config.get("pre_seq_len"):
        key = (unlike or ["pre_seq_len"])[0]
        msg = f"this ChatGLM model is another network than GLM, as its {key} says: convert it first"
        raise ConfigError(msg)
    heads = config["num_attention_heads"]
    groups = config["multi_query_group_num"] if config.get("multi_query_attention") else heads
    eos = config.get("eos_token_id", 2)
    return {
        "architectures": ["GlmForCausalLM"],
        "model_type": "glm",
        "dtype": config.get("torch_dtype", "float16"),
        "hidden_act": "silu",
        "num_key_value_heads": groups,
        "tie_word_embeddings": False,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0 * config.get("rope_ratio", 1),
            "partial_rotary_factor": 0.5,
        },
        "bos_token_id": None,
        "eos_token_id": eos,
        "pad_token_id": config.get("pad_token_id", 0),
        **{ours: config[theirs] for theirs, ours in _KEYS.items() if theirs in config},
    }


def standard_tensors(
    name: str, rows: int, config: Mapping[str, Any]
) -> tuple[tuple[str, int], ...]:
    """Return the tensors that one becomes, by name, each with how many of its rows it takes.

    Raises:
        ConfigError: the network has no tensor of this name.
    """
    if name == _DROPPED:
        return ()
    if name in _OUTSIDE_LAYERS:
        return ((_OUTSIDE_LAYERS[name], rows),)
    found = _IN_LAYER.fullmatch(name)
    if found and found[2] in _PARTS:
        return ((f"model.layers.{found[1]}.{_PARTS[found[2]]}.{found[3]}", rows),)
    if found and found[2] == _FUSED:
        head = config["head_dim"]
        queries = config["num_attention_heads"] * head
        shared = config["num_key_value_heads"] * head
        if rows == queries + 2 * shared:
            layer = f"model.layers.{found[1]}.self_attn"
            sizes = {"q_proj": queries, "k_proj": shared, "v_proj": shared}
            return tuple((f"{layer}.{part}.{found[3]}", size) for part, size in sizes.items())
    msg = f"the ChatGLM checkpoint has a tensor {name} of {rows} rows, which GLM has no place for"
    raise ConfigError(msg)


def convert(original: Path, directory: Path) -> None:
    """Write weights and tokenizer beside the config.json of `directory`, unless they are there.

    Raises:
        ConfigError: a tensor has no place.
        CannotWriteError: there is no room, for instance.
    """
    if (directory / _CONVERTED).exists():
        return
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    with writing(directory):
        files = {}
        for path in sorted(original.glob("*.safetensors")):
            files[path.name] = _convert_file(path, directory / path.name, config)
    if len(files) > 1:
        names = {name: file for file, tensors in files.items() for name in tensors}
        total = sum(size for tensors in files.values() for size in tensors.values())
        write_json(
            directory / "model.safetensors.index.json",
            {"metadata": {"total_size": total}, "weight_map": names},
        )
    _convert_tokenizer(original, directory)
    write_bytes(directory / _CONVERTED, b"")


def _convert_file(source: Path, target: Path, config: Mapping[str, Any]) -> dict[str, int]:
    """Write one file of tensors; returns the bytes of each by name."""
    draft = target.with_suffix(".draft")
    with source.open("rb") as old, draft.open("wb") as new:
        (length,) = struct.unpack("<Q", old.read(8))
        header = json.loads(old.read(length))
        data = 8 + length
        pieces = list(_pieces(header, config))
        place, entries = 0, {}
        for name, entry, _, size in pieces:
            entries[name] = entry | {"data_offsets": [place, place + size]}
            place += size
        text = json.dumps({"__metadata__": {"format": "pt"}} | entries).encode()
        text += b" " * (-len(text) % 8)
        new.write(struct.pack("<Q", len(text)) + text)
        for _, _, start, size in pieces:
            old.seek(data + start)
            _copy(old, new, size)
    draft.replace(target)
    return {name: size for name, _, _, size in pieces}


def _pieces(
    header: Mapping[str, Any], config: Mapping[str, Any]
) -> Iterator[tuple[str, dict[str, Any], int, int]]:
    """Yield name, type and shape, first byte and bytes of each tensor of the new file."""
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        start, end = entry["data_offsets"]
        rows = entry["shape"][0]
        for new_name, taken in standard_tensors(name, rows, config):
            size = (end - entry["data_offsets"][0]) // rows * taken
            shape = [taken, *entry["shape"][1:]]
            yield new_name, {"dtype": entry["dtype"], "shape": shape}, start, size
            start += size


def _copy(source: BinaryIO, target: BinaryIO, size: int) -> None:
    while size:
        chunk = source.read(min(size, _COPY_BYTES))
        target.write(chunk)
        size -= len(chunk)


def _convert_tokenizer(original: Path, directory: Path) -> None:
    """Write tokenizer.json and its configuration, or copy what is no sentencepiece model."""
    config = original / "tokenizer_config.json"
    named = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}
    if named.get("tokenizer_class") != "ChatGLMTokenizer":
        for path in original.glob("tokenizer*"):
            write_bytes(directory / path.name, path.read_bytes())
        return
    write_bytes(
        directory / "tokenizer.json", _fast_tokenizer(original / "tokenizer.model").encode()
    )
    write_json(
        directory / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_input_names": ["input_ids", "attention_mask"],
            "padding_side": "left",
            "eos_token": "</s>",
            "pad_token": "<unk>",
            "unk_token": "<unk>",
            "extra_special_tokens": list(SPECIAL_TOKENS),
            "clean_up_tokenization_spaces": False,
            "chat_template": _CHAT_TEMPLATE,
        },
    )


def _fast_tokenizer(model_file: Path) -> str:
    """Return a tokenizer.json that cuts text as the sentencepiece model does."""
    from sentencepiece import SentencePieceProcessor
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

    model = SentencePieceProcessor(model_file=str(model_file))
    pieces = [model.id_to_piece(number) for number in range(model.vocab_size())]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocabulary,
            merges=_merges(model, vocabulary),
            unk_token=pieces[model.unk_id()],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    controls = [piece for number, piece in enumerate(pieces) if model.is_control(number)]
    tokenizer.add_special_tokens(
        [AddedToken(token, normalized=False) for token in (pieces[model.unk_id()], *controls)]
    )
    # Those of letters alone are none inside a word: "people" has no end of a piece in it.
    tokenizer.add_special_tokens(
        [
            AddedToken(token, normalized=False, single_word=token.isalpha())
            for token in SPECIAL_TOKENS
        ]
    )
    text: str = tokenizer.to_str()
    return text


def _merges(model: Any, vocabulary: Mapping[str, int]) -> list[tuple[str, str]]:  # noqa: ANN401
    """Return the pairs that make a piece, those of the best piece first."""
    ranked = []
    for piece, number in vocabulary.items():
        if model.is_control(number) or model.is_unknown(number) or model.is_byte(number):
            continue
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in vocabulary and right in vocabulary:
                order = (-model.get_score(number), vocabulary[left], vocabulary[right])
                ranked.append((order, (left, right)))
    return [pair for _, pair in sorted(ranked)]
