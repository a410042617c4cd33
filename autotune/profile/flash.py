"""Stands in for the flash-attn package, which needs a GPU to be installed and to run.

Its kernel keeps for backward what torch's own flash kernel keeps: query, key, value, output and a
logarithm a row. What transformers does around it to leave out padding is done here as for rows with
hardly any, which take the most.
"""

from collections.abc import Callable
from typing import Any

import torch

from autotune.setting import FLASH_ATTENTION


def stand_ins() -> dict[str, object]:
    """Return what replaces what, by dotted name."""
    from transformers import PreTrainedModel

    check = PreTrainedModel._check_and_adjust_attn_implementation  # noqa: SLF001 - what gives way
    return {
        "transformers.modeling_utils.PreTrainedModel._check_and_adjust_attn_implementation": (
            _checked_without_the_package(check)
        ),
        "transformers.integrations.flash_attention._flash_attention_forward": _attend,
    }


def _checked_without_the_package(check: Callable[..., str]) -> Callable[..., str]:
    """Ask only whether the model has it; the check of transformers wants package and device too."""

    def checked(model: Any, attention: str | None, *args: Any, **kwargs: Any) -> str:  # noqa: ANN401
        if attention != FLASH_ATTENTION:
            return check(model, attention, *args, **kwargs)
        if not model._supports_flash_attn:  # noqa: SLF001 - how a model says so
            msg = f"{type(model).__name__} does not have {FLASH_ATTENTION}: use sdpa or eager"
            raise ValueError(msg)
        return FLASH_ATTENTION

    return checked


def _attend(  # noqa: PLR0917 - the signature of transformers
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    query_length: int,  # noqa: ARG001
    is_causal: bool,  # noqa: FBT001
    dropout: float = 0.0,
    softmax_scale: float | None = None,
    **_: object,
) -> torch.Tensor:
    """Attend with tensors of shape [rows, length, heads, head size]; returns one like the query.

    With padding transformers copies query, key and value together without it, and the output back.
    """
    padded = attention_mask is not None
    copied = (tensor.clone() if padded else tensor for tensor in (query, key, value))
    kernel = torch.ops.aten._scaled_dot_product_flash_attention  # noqa: SLF001 - the kernel
    heads_first = (tensor.transpose(1, 2) for tensor in copied)
    attended: torch.Tensor = kernel(*heads_first, dropout, is_causal, scale=softmax_scale)[0]
    rows_first = attended.transpose(1, 2)
    return rows_first.clone() if padded else rows_first
