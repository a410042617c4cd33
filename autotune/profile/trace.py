"""Traces a model under fake tensors: no weights, no memory, no device.

The model is built from its configuration at the depth of one and of two layers; what a layer more
costs is then known, and everything grows with the number of layers from there.
"""

import copy
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import numpy as np
import torch

from autotune.engine.model import from_config
from autotune.engine.quantised import is_quantised
from autotune.errors import ConfigError
from autotune.profile.fakery import faked, flash_attention
from autotune.profile.request import TraceRequest
from autotune.profile.timeline import (
    Layer,
    Points,
    Timeline,
    deepened,
    follow_pass,
    moments_of,
    work_of,
)
from autotune.profile.virtual_gpu import place
from autotune.setting import checkpointing_period
from autotune.workload import ModelProfile, Moment, Polynomial, Trace

_LONGEST = 4096
_NO_LIMIT = 2**20
"""Positions of a model that takes rows of any length."""

_SHARES = (0.25, 0.5, 1.0)
"""Where in a span of lengths it is traced."""

_DEPTH = 3
"""Layers that are traced of a deeper model: a first, a last and one between; periods of layers
where only every n-th is checkpointed."""


def trace_model(request: TraceRequest) -> ModelProfile:
    """Count the parameters and trace forward and backward with and without checkpointing.

    Raises:
        ConfigError: the model is an encoder and a decoder, or cannot be run without values.
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(
        request.model_dir, trust_remote_code=request.trust_remote_code, local_files_only=True
    )
    _refuse_encoder(config)
    try:
        return _profiled(config, request)
    except ConfigError:
        raise
    except Exception as error:
        logging.getLogger(__name__).exception("no trace")
        msg = (
            f"a {config.model_type} model cannot be run over tensors without values "
            f"({type(error).__name__}: {str(error).partition(chr(10))[0]}), which is how its memory"
            " is found out: use an architecture of dense attention, as Llama, Qwen or GLM are"
        )
        raise ConfigError(msg) from error


def _refuse_encoder(config: Any) -> None:  # noqa: ANN401 - PretrainedConfig
    """Refuse models of two halves, some of which transformers has as language models too."""
    if config.is_encoder_decoder:
        msg = (
            f"{config.model_type} is an encoder-decoder model: name a causal language model of "
            "transformers, as Llama, Qwen, GLM or GPT-2 are"
        )
        raise ConfigError(msg)


def _profiled(config: Any, request: TraceRequest) -> ModelProfile:  # noqa: ANN401
    text = config.get_text_config()
    with torch.device("meta"), flash_attention():
        request = _choose_attention(config, request)
        model = from_config(config, request)
        one, two = (_count(from_config(_with_depth(config, depth), request)) for depth in (1, 2))
    quantised = [parameter for parameter in model.parameters() if is_quantised(parameter)]
    sizes = [parameter.numel() for parameter in model.parameters()]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    modes = request.checkpointing if model.supports_gradient_checkpointing else ("none",)
    return ModelProfile(
        architecture=(config.architectures or [type(config).__name__])[0],
        parameters=sum(sizes),
        trainable_parameters=sum(one.numel() for one in trained),
        largest_layer_parameters=two - one,
        largest_parameter=max(sizes),
        trained_sizes=tuple(one.numel() for one in trained),
        frozen_sizes=tuple(
            parameter.numel()
            for parameter in model.parameters()
            if not (parameter.requires_grad or is_quantised(parameter))
        ),
        quantised_sizes=tuple(one.numel() for one in quantised),
        factored_elements=sum(map(_factored_elements, trained)),
        num_layers=text.num_hidden_layers,
        hidden_size=text.hidden_size,
        vocab_size=text.vocab_size,
        max_position_embeddings=_positions(config),
        attention=request.attention,
        precision=request.precision,
        traces=tuple((mode, _trace(config, request, mode)) for mode in modes),
    )


def _factored_elements(parameter: torch.nn.Parameter) -> int:
    """Return the elements of its second moment as torch's Adafactor keeps it (_adafactor.py).

    Of the last two dimensions a row and a column, and all of a vector.
    """
    if parameter.dim() == 1:
        return parameter.numel()
    return sum(parameter.numel() // parameter.shape[dim] for dim in (-1, -2))


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


def _spans(config: Any, *, padded: bool) -> list[tuple[int, int]]:  # noqa: ANN401
    """Return the shortest and longest rows between which a model keeps tensors of the same kinds.

    A mask that is not needed for padding is needed where rows outgrow a sliding window.
    """
    text = config.get_text_config()
    window = getattr(text, "sliding_window", None) or getattr(text, "attention_chunk_size", None)
    last = _positions(config)
    if padded or not window or window >= last - len(_SHARES):
        return [(1, last)]
    return [(1, window - 1), (window, last)]


def _traced_lengths(span: tuple[int, int]) -> list[int]:
    """Return three lengths within a span: bytes are polynomials of degree two in them."""
    shortest, longest = span
    furthest = min(longest, max(_LONGEST, 2 * shortest))
    return [shortest + round(share * (furthest - shortest)) for share in _SHARES]


def _with_depth(config: Any, depth: int) -> Any:  # noqa: ANN401 - PretrainedConfig
    shallow = copy.deepcopy(config)
    text = shallow.get_text_config()
    # Lists that say something of each layer, as of its kind of attention.
    for name, value in vars(text).items():
        if isinstance(value, list) and len(value) == text.num_hidden_layers:
            setattr(text, name, (value * depth)[:depth])
    text.num_hidden_layers = depth
    return shallow


def _count(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _trace(config: Any, request: TraceRequest, mode: str) -> Trace:  # noqa: ANN401
    """Trace batches of one row, which have no padding and spare torch some copies, and of more."""
    of_one = [
        _passes(config, replace(request, padded=False), mode, rows=(1,), span=span)
        for span in _spans(config, padded=False)
    ]
    of_more = [
        _passes(config, request, mode, rows=(2, 3), span=span)
        for span in _spans(config, padded=request.padded)
    ]
    longest = of_one[-1]
    return Trace(
        one_row=tuple(chain.from_iterable(one.moments for one in of_one)),
        more_rows=tuple(chain.from_iterable(one.moments for one in of_more)),
        flops=_through(
            [length for _, length in longest.points], [flops for flops, _ in longest.work]
        ),
        operators=max(operators for _, operators in longest.work),
    )


def _through(lengths: Sequence[int], values: Sequence[float]) -> Polynomial:
    c2, c1, c0 = np.polyfit(lengths, values, deg=2)
    return Polynomial(c0=float(c0), c1=float(c1), c2=float(c2))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Passes:
    """Passes at several points: their moments, and the FLOPs and operators of each."""

    points: Points
    moments: tuple[Moment, ...]
    work: list[tuple[float, float]]


def _passes(
    config: Any,  # noqa: ANN401 - PretrainedConfig
    request: TraceRequest,
    mode: str,
    *,
    rows: tuple[int, ...],
    span: tuple[int, int],
) -> _Passes:
    """Trace a few layers and go on from there, or all of them where they are few."""
    points = [(several, length) for several in rows for length in _traced_lengths(span)]
    layers, period = config.get_text_config().num_hidden_layers, checkpointing_period(mode)
    depth = _DEPTH * period + layers % period
    more = max(0, (layers - depth) // period)
    shallow = _with_depth(config, depth) if more else config
    timelines = [_run(shallow, request, mode, *point) for point in points]
    layer = None
    if more:
        smaller = _run(_with_depth(config, depth - period), request, mode, *points[0])
        layer = Layer.between(smaller, timelines[0])
    deep = timelines if layer is None else [deepened(one, layer, more) for one in timelines]
    return _Passes(
        points=points,
        moments=moments_of(points, deep, span),
        work=[work_of(one, layer, more) for one in timelines],
    )


def _run(
    config: Any,  # noqa: ANN401 - PretrainedConfig
    request: TraceRequest,
    mode: str,
    rows: int,
    length: int,
) -> Timeline:
    quantises = request.lora is not None and request.lora.quantised
    with faked(
        request.device_kind, rank=0, ranks=1, padded=request.padded, quantises=quantises
    ) as device:
        model = place(from_config(config, request, mode), device)
        model.train()
        return follow_pass(model, rows, length, device)
