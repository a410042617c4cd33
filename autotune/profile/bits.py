"""What of bitsandbytes gives way in a run over fake tensors."""

import torch

_CODES = 256


def stand_ins(device_kind: str) -> dict[str, object]:
    """Return what replaces what, by dotted name.

    What an operator of theirs allocates is unseen, so that its Python is called openly: the update
    in 8 bits on a CPU, and the product with weights in 4 bits, which dequantises them.
    """
    from bitsandbytes.backends.cpu.ops import _optimizer_update_8bit_blockwise_cpu
    from bitsandbytes.backends.default.ops import _gemm_4bit_default_impl

    return {
        "bitsandbytes.functional.create_dynamic_map": _table,
        "bitsandbytes.functional.optimizer_update_8bit_blockwise": (
            _optimizer_update_8bit_blockwise_cpu if device_kind == "cpu" else _in_place
        ),
        "torch:ops.bitsandbytes.gemm_4bit.default": _gemm_4bit_default_impl,
    }


def _table(*_args: object, **_kwargs: object) -> torch.Tensor:
    """Return what the codes of 8 bits mean, without the values, which are made of numbers."""
    return torch.empty(_CODES)


def _in_place(*_args: object, **_kwargs: object) -> None:
    """Update as a GPU's kernel does, which allocates nothing."""
