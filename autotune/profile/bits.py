"""What of bitsandbytes gives way in a run over fake tensors."""

from collections.abc import Callable
from typing import Any

import torch

_CODES = 256


def stand_ins(device_kind: str) -> dict[str, object]:
    """Return what replaces what, by dotted name."""
    return {
        "bitsandbytes.functional.create_dynamic_map": _table,
        "bitsandbytes.functional.optimizer_update_8bit_blockwise": _update(device_kind),
    }


def _table(*_args: object, **_kwargs: object) -> torch.Tensor:
    """Return what the codes of 8 bits mean, without the values, which are made of numbers."""
    return torch.empty(_CODES)


def _update(device_kind: str) -> Callable[..., Any]:
    """Return the update: what it allocates on a CPU is allocated inside an operator, unseen.

    A GPU's kernel allocates nothing.
    """
    if device_kind != "cpu":
        return _in_place
    import bitsandbytes.backends.cpu.ops

    update: Callable[..., Any] = bitsandbytes.backends.cpu.ops._optimizer_update_8bit_blockwise_cpu  # noqa: SLF001
    return update


def _in_place(*_args: object, **_kwargs: object) -> None:
    return None
