"""Moments that bitsandbytes' optimizers hold in 8 bits, block by block (arXiv:2110.02861)."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

_BLOCK = 256
_PIECE = 1 << 24
"""Elements, whole blocks, that are widened at once: the device may have no room for more."""


def updates_in(optimizer: Any) -> bool:  # noqa: ANN401 - an Optimizer
    """Tell whether an optimizer is one of them."""
    return type(optimizer).__module__.startswith("bitsandbytes.")


def holds(state: Mapping[str, Any] | None) -> bool:
    """Tell whether a tensor's state has moments of theirs."""
    return bool(state) and "state1" in (state or {})


def make(optimizer: Any, flats: Sequence[torch.Tensor], step: int) -> None:  # noqa: ANN401 - an Optimizer
    """Make the moments that the optimizer would make at its first update of these tensors.

    They are of its only group, which between updates of ZeRO 3 does not hold them.
    """
    group = optimizer.param_groups[0]
    held = group["params"]
    for flat in flats:
        # As DeepSpeed does for an update.
        group["params"] = [flat]
        if not optimizer.state.get(flat):
            optimizer.init_state(group, flat, 0, 0)
        optimizer.state[flat]["step"] = step
    group["params"] = held


def widen(state: dict[str, Any], keys: Sequence[str]) -> None:
    """Put each moment into the state in fp32 too, on the host, by the names that Adam's have."""
    import bitsandbytes.functional

    for number, key in enumerate(keys, start=1):
        codes = state[f"state{number}"]
        if codes.dtype != torch.uint8:
            state[key] = codes.to("cpu", copy=True)
            continue
        state[key] = torch.empty(codes.shape, dtype=torch.float32)
        for piece, scales in _pieces(codes.numel()):
            wide = bitsandbytes.functional.dequantize_blockwise(
                codes.view(-1)[piece],
                absmax=state[f"absmax{number}"][scales],
                code=state[f"qmap{number}"],
                blocksize=_BLOCK,
            )
            state[key].view(-1)[piece] = wide.cpu()


def narrow(state: dict[str, Any], keys: Sequence[str], *, changed: bool) -> None:
    """Take what `widen` put there out again, and hold it in 8 bits anew if it has changed."""
    import bitsandbytes.functional

    for number, key in enumerate(keys, start=1):
        wide, codes = state.pop(key), state[f"state{number}"]
        if not changed:
            continue
        if codes.dtype != torch.uint8:
            codes.copy_(wide)
            continue
        for piece, scales in _pieces(codes.numel()):
            quantised, how = bitsandbytes.functional.quantize_blockwise(
                wide.view(-1)[piece].to(codes.device), code=state[f"qmap{number}"], blocksize=_BLOCK
            )
            codes.view(-1)[piece] = quantised
            state[f"absmax{number}"][scales] = how.absmax


def _pieces(elements: int) -> Iterator[tuple[slice, slice]]:
    """Yield which elements go together, and where their blocks' scales are."""
    for start in range(0, elements, _PIECE):
        end = min(start + _PIECE, elements)
        yield slice(start, end), slice(start // _BLOCK, -(-end // _BLOCK))
