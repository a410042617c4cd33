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
        "bitsandbytes.nn.modules.Params4bit": _Quantised,
        "bitsandbytes.nn.Params4bit": _Quantised,
        "bitsandbytes.functional.create_dynamic_map": _table,
        "bitsandbytes.functional.optimizer_update_8bit_blockwise": (
            _optimizer_update_8bit_blockwise_cpu if device_kind == "cpu" else _in_place
        ),
        "torch:ops.bitsandbytes.gemm_4bit.default": _gemm_4bit_default_impl,
    }


class _KnownByItsState(type):
    def __instancecheck__(cls, instance: object) -> bool:
        return hasattr(instance, "quant_state")


class _Quantised(metaclass=_KnownByItsState):
    """A parameter in 4 bits: a fake tensor can be of no other class, and has what marks one."""

    def __new__(  # type: ignore[misc] # as Parameter does for tensors of other classes
        cls,
        data: torch.Tensor,
        requires_grad: bool = False,  # noqa: FBT001, FBT002 - as a parameter's
        quant_state: object = None,
        **others: object,
    ) -> torch.Tensor:
        tensor = data.detach().requires_grad_(requires_grad)
        tensor._is_param = True  # noqa: SLF001 - torch's own mark
        for name, value in {"quant_state": quant_state, **others}.items():
            setattr(tensor, name, value)
        return tensor


def _table(*_args: object, **_kwargs: object) -> torch.Tensor:
    """Return what the codes of 8 bits mean, without the values, which are made of numbers."""
    return torch.empty(_CODES)


def _in_place(*_args: object, **_kwargs: object) -> None:
    """Update as a GPU's kernel does, which allocates nothing."""
