"""Traces a model under fake tensors: no weights, no memory, no device.

The model is built from its configuration at the depth of one and of two layers; what a layer more
costs is then known, and everything grows with the number of layers from there.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from autotune.engine.model import from_config
from autotune.profile.fakery import fake_tensors, flash_attention
from autotune.profile.live_bytes import FixedScalars, LiveBytes
from autotune.profile.request import TraceRequest
from autotune.setting import checkpointing_period
from autotune.workload import ModelProfile, Peak, Polynomial, Trace

_LONGEST = 4096
_NO_LIMIT = 2**20
"""Positions of a model that takes rows of any length."""


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
    with torch.device("meta"), flash_attention():
        request = _choose_attention(config, request)
        model = from_config(config, request)
        one, two = (_count(from_config(_with_depth(config, depth), request)) for depth in (1, 2))
    sizes = [parameter.numel() for parameter in model.parameters()]
    trained = [parameter.numel() for parameter in model.parameters() if parameter.requires_grad]
    modes = request.checkpointing if model.supports_gradient_checkpointing else ("none",)
    return ModelProfile(
        architecture=(config.architectures or [type(config).__name__])[0],
        parameters=sum(sizes),
        trainable_parameters=sum(trained),
        largest_layer_parameters=two - one,
        largest_parameter=max(sizes),
        num_layers=text.num_hidden_layers,
        hidden_size=text.hidden_size,
        vocab_size=text.vocab_size,
        max_position_embeddings=_positions(config),
        attention=request.attention,
        precision=request.precision,
        traces=tuple((mode, _trace(config, request, mode)) for mode in modes),
    )


def _choose_attention(config: Any, request: TraceRequest) -> TraceRequest:  # noqa: ANN401
    if request.attention != "auto":
        return request
    sdpa = replace(request, attention="sdpa")
    try:
        from_config(_with_depth(config, 1), sdpa)
    except ValueError:
        # This is how transformers says that an architecture does not have it.
        return replace(request, attention="eager")
    return sdpa


def _positions(config: Any) -> int:  # noqa: ANN401 - PretrainedConfig
    return getattr(config.get_text_config(), "max_position_embeddings", None) or _NO_LIMIT


def _traced_lengths(config: Any) -> tuple[int, ...]:  # noqa: ANN401 - PretrainedConfig
    """Return lengths that the model takes, ascending; the last three give a polynomial."""
    longest = min(_LONGEST, _positions(config))
    return tuple(longest // share for share in (64, 32, 16, 8, 4, 2, 1))


def _with_depth(config: Any, depth: int) -> Any:  # noqa: ANN401 - PretrainedConfig
    shallow = copy.deepcopy(config)
    text = shallow.get_text_config()
    text.num_hidden_layers = depth
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:depth]
    return shallow


def _count(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _trace(config: Any, request: TraceRequest, mode: str) -> Trace:  # noqa: ANN401
    lengths = _traced_lengths(config)
    passes = [_at_full_depth(config, request, mode, length) for length in lengths]
    bytes_ = [float(one.activations_bytes) for one in passes]
    return Trace(
        activations_bytes=Peak(
            lengths=lengths, values=tuple(bytes_), tail=_through(lengths[-3:], bytes_[-3:])
        ),
        logits_bytes=_logits(config, request, mode),
        flops=_through(lengths[-3:], [float(one.flops) for one in passes[-3:]]),
        operators=max(one.operators for one in passes),
    )


def _through(lengths: Sequence[int], values: Sequence[float]) -> Polynomial:
    c2, c1, c0 = np.polyfit(lengths, values, deg=2)
    return Polynomial(c0=float(c0), c1=float(c1), c2=float(c2))


def _at_full_depth(config: Any, request: TraceRequest, mode: str, length: int) -> _Pass:  # noqa: ANN401
    """Trace few layers and a period more, and go on from there: each further one adds the same."""
    period = checkpointing_period(mode)
    more, rest = divmod(config.get_text_config().num_hidden_layers - 1, period)
    depths = (rest + 1, rest + 1 + period)
    one, two = (_run(_with_depth(config, depth), request, mode, length) for depth in depths)
    return _Pass(
        activations_bytes=one.activations_bytes
        + more * (two.activations_bytes - one.activations_bytes),
        flops=one.flops + more * (two.flops - one.flops),
        operators=one.operators + more * (two.operators - one.operators),
    )


def _logits(config: Any, request: TraceRequest, mode: str) -> Polynomial:  # noqa: ANN401
    """Return what of the peak grows with the vocabulary, by tracing half of it."""
    half = _with_depth(config, 1)
    vocab_size = half.get_text_config().vocab_size
    half.get_text_config().vocab_size = vocab_size // 2
    # It may lie in the half that is gone.
    half.get_text_config().pad_token_id = None
    length = _traced_lengths(config)[-2]
    whole_bytes = _run(_with_depth(config, 1), request, mode, length).activations_bytes
    half_bytes = _run(half, request, mode, length).activations_bytes
    growth = (whole_bytes - half_bytes) * vocab_size / (vocab_size - vocab_size // 2)
    return Polynomial(c0=0.0, c1=growth / length, c2=0.0)


def _run(config: Any, request: TraceRequest, mode: str, length: int) -> _Pass:  # noqa: ANN401
    """Trace one pass over a row that has padding, gradients of earlier micro-steps in place."""
    with fake_tensors(), FixedScalars():
        model = from_config(config, request, mode)
        model.train()
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        for parameter in trained:
            parameter.grad = torch.empty_like(parameter)
        known = [*model.parameters(), *(parameter.grad for parameter in trained)]
        ids = torch.zeros((1, length), dtype=torch.int64)
        mask = torch.ones_like(ids)
        with LiveBytes(known) as live:
            model(input_ids=ids, attention_mask=mask, labels=ids).loss.backward()
    return _Pass(
        activations_bytes=live.peak["cpu"],
        flops=live.flops,
        operators=live.operators,
    )
