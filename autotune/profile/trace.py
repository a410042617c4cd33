"""Traces a model under fake tensors: no weights, no memory, no device.

The model is built from its configuration at the depth of one and of two layers; what a layer more
costs is then known, and everything grows with the number of layers from there.
"""

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from autotune.engine.model import from_config
from autotune.profile.fakery import faked
from autotune.profile.request import TraceRequest
from autotune.profile.timeline import Timeline, at_depth, follow_pass, moments_of
from autotune.profile.virtual_gpu import place
from autotune.setting import checkpointing_period
from autotune.workload import ModelProfile, Polynomial, Trace

_LONGEST = 4096
_NO_LIMIT = 2**20
"""Positions of a model that takes rows of any length."""

_ROWS = (2, 3)
"""Of a batch; of a single row some views need no copy, so that its operators are others."""

_FEWEST_LAYERS = 2


def trace_model(request: TraceRequest) -> ModelProfile:
    """Count the parameters and trace forward and backward with and without checkpointing."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(
        request.model_dir, trust_remote_code=request.trust_remote_code, local_files_only=True
    )
    text = config.get_text_config()
    with torch.device("meta"):
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
        trained_sizes=tuple(trained),
        frozen_sizes=tuple(
            parameter.numel() for parameter in model.parameters() if not parameter.requires_grad
        ),
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
    """Return three lengths that the model takes: bytes are polynomials of degree two in them."""
    longest = min(_LONGEST, _positions(config))
    return (longest // 4, longest // 2, longest)


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
    points = [(rows, length) for rows in _ROWS for length in _traced_lengths(config)]
    timelines = [_at_full_depth(config, request, mode, *point) for point in points]
    of_one_row = timelines[: len(points) // len(_ROWS)]
    return Trace(
        moments=moments_of(points, timelines),
        flops=_through(_traced_lengths(config), [float(one.flops) for one in of_one_row]),
        operators=max(one.allocations for one in of_one_row),
    )


def _through(lengths: Sequence[int], values: Sequence[float]) -> Polynomial:
    c2, c1, c0 = np.polyfit(lengths, values, deg=2)
    return Polynomial(c0=float(c0), c1=float(c1), c2=float(c2))


def _at_full_depth(
    config: Any,  # noqa: ANN401 - PretrainedConfig
    request: TraceRequest,
    mode: str,
    rows: int,
    length: int,
) -> Timeline:
    """Trace a few layers and a period more, and go on from there; or all where they are few."""
    layers, period = config.get_text_config().num_hidden_layers, checkpointing_period(mode)
    fewest = _FEWEST_LAYERS + (layers - _FEWEST_LAYERS) % period
    depths = (fewest, fewest + period)
    if layers <= depths[-1]:
        return _run(config, request, mode, rows, length)
    smaller, larger = (
        _run(_with_depth(config, depth), request, mode, rows, length) for depth in depths
    )
    return at_depth(layers, smaller, larger, depths)


def _run(
    config: Any,  # noqa: ANN401 - PretrainedConfig
    request: TraceRequest,
    mode: str,
    rows: int,
    length: int,
) -> Timeline:
    with faked(request.device_kind, rank=0, ranks=1) as device:
        model = place(from_config(config, request, mode), device)
        model.train()
        return follow_pass(model, rows, length, device)
