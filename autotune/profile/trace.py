"""Traces a model under fake tensors: no weights, no memory, no device.

The model is built from its configuration at the depth of one and of two layers; what a layer more
costs is then known, and everything grows with the number of layers from there.
"""

import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from autotune.engine.model import DTYPES, enable_checkpointing
from autotune.profile.live_bytes import FixedScalars, LiveBytes
from autotune.profile.request import TraceRequest
from autotune.workload import ModelProfile, Polynomial, Trace

CHECKPOINTING_MODES = ("none", "full")
_LENGTHS = (128, 512, 1024)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Pass:
    """One traced forward and backward pass over a single row."""

    activations_bytes: int
    flops: int
    operators: int


def trace_model(request: TraceRequest) -> ModelProfile:
    """Count the parameters and trace forward and backward with and without checkpointing."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(
        request.model_dir, trust_remote_code=request.trust_remote_code, local_files_only=True
    )
    text = config.get_text_config()
    with torch.device("meta"):
        sizes = [parameter.numel() for parameter in _build(config, request).parameters()]
        one, two = (_count(_build(_with_depth(config, depth), request)) for depth in (1, 2))
    return ModelProfile(
        architecture=(config.architectures or [type(config).__name__])[0],
        parameters=sum(sizes),
        trainable_parameters=sum(sizes),
        largest_layer_parameters=two - one,
        largest_parameter=max(sizes),
        num_layers=text.num_hidden_layers,
        hidden_size=text.hidden_size,
        vocab_size=text.vocab_size,
        max_position_embeddings=text.max_position_embeddings,
        attention=request.attention,
        precision=request.precision,
        traces=tuple((mode, _trace(config, request, mode)) for mode in CHECKPOINTING_MODES),
    )


def _with_depth(config: Any, depth: int) -> Any:  # noqa: ANN401 - PretrainedConfig
    shallow = copy.deepcopy(config)
    text = shallow.get_text_config()
    text.num_hidden_layers = depth
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:depth]
    return shallow


def _build(config: Any, request: TraceRequest) -> Any:  # noqa: ANN401 - PreTrainedModel
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_config(
        config,
        dtype=DTYPES[request.precision],
        attn_implementation=request.attention,
        trust_remote_code=request.trust_remote_code,
    )


def _count(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _trace(config: Any, request: TraceRequest, mode: str) -> Trace:  # noqa: ANN401
    layers = config.get_text_config().num_hidden_layers
    shallow = [_run(_with_depth(config, 1), request, mode, length) for length in _LENGTHS]
    deeper = [_run(_with_depth(config, 2), request, mode, length) for length in _LENGTHS]

    def at_full_depth(figure: str) -> list[float]:
        return [
            getattr(one, figure) + (layers - 1) * (getattr(two, figure) - getattr(one, figure))
            for one, two in zip(shallow, deeper, strict=True)
        ]

    return Trace(
        activations_bytes=_through(_LENGTHS, at_full_depth("activations_bytes")),
        logits_bytes=_logits(config, request, mode),
        flops=_through(_LENGTHS, at_full_depth("flops")),
        operators=max(at_full_depth("operators")),
    )


def _logits(config: Any, request: TraceRequest, mode: str) -> Polynomial:  # noqa: ANN401
    """Return what of the peak grows with the vocabulary, by tracing half of it."""
    half = _with_depth(config, 1)
    vocab_size = half.get_text_config().vocab_size
    half.get_text_config().vocab_size = vocab_size // 2
    length = _LENGTHS[1]
    whole_bytes = _run(_with_depth(config, 1), request, mode, length).activations_bytes
    half_bytes = _run(half, request, mode, length).activations_bytes
    growth = (whole_bytes - half_bytes) * vocab_size / (vocab_size - vocab_size // 2)
    return Polynomial(c0=0.0, c1=growth / length, c2=0.0)


def _through(lengths: tuple[int, ...], values: list[float]) -> Polynomial:
    c2, c1, c0 = np.polyfit(lengths, values, deg=2)
    return Polynomial(c0=float(c0), c1=float(c1), c2=float(c2))


def _run(config: Any, request: TraceRequest, mode: str, length: int) -> _Pass:  # noqa: ANN401
    """Trace one pass over a row that has padding, gradients of earlier micro-steps in place."""
    with FakeTensorMode(allow_non_fake_inputs=True), FixedScalars():
        model = _build(config, request)
        model.config.use_cache = False
        enable_checkpointing(model, mode)
        model.train()
        for parameter in model.parameters():
            parameter.grad = torch.empty_like(parameter)
        known = [*model.parameters(), *(parameter.grad for parameter in model.parameters())]
        ids = torch.zeros((1, length), dtype=torch.int64)
        mask = torch.ones_like(ids)
        with LiveBytes(known) as live:
            model(input_ids=ids, attention_mask=mask, labels=ids).loss.backward()
    return _Pass(
        activations_bytes=live.peak["cpu"],
        flops=live.flops,
        operators=live.operators,
    )
