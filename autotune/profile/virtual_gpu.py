"""A device that exists in this process alone, so that device and host bytes come apart.

torch lets Python register a device of its own; under fake tensors everything runs on it, autograd
too, where a build without CUDA has no guard for a fake CUDA tensor. DeepSpeed reaches it through an
accelerator object.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

NAME = "vgpu"
DEVICE = f"{NAME}:0"

_BIAS_ALIGNMENT = 16


@functools.cache
def register() -> None:
    """Register the device with torch, which cannot be undone and holds for the process."""
    from torch.utils import backend_registration

    class Module(backend_registration._DummyBackendModule):  # noqa: SLF001 - meant to be extended
        def get_amp_supported_dtype(self) -> list[torch.dtype]:
            return [torch.bfloat16, torch.float16]

        def set_device(self, device: object) -> None: ...

        def manual_seed(self, seed: int) -> None: ...

        def get_rng_state(self, device: object = None) -> torch.Tensor:  # noqa: ARG002
            return torch.empty(0, dtype=torch.uint8)

        def set_rng_state(self, state: torch.Tensor, device: object = None) -> None: ...

    backend_registration._setup_privateuseone_for_python_backend(  # noqa: SLF001 - no other way
        rename=NAME, backend_module=Module()
    )


class VirtualAccelerator(CPU_Accelerator):  # type: ignore[misc]
    """DeepSpeed's view of the device; the rest is as on a CPU, which has no streams."""

    def __init__(self, free_bytes: Callable[[], int]) -> None:
        super().__init__()
        self._name = NAME
        self._free_bytes = free_bytes

    def available_memory(self, device_index: object = None) -> int:  # noqa: ARG002
        # ZeRO 1 and 2 build their flat buffers on the device if it has the room, else on the host.
        return self._free_bytes()

    def device_name(self, device_index: object = None) -> str:
        return NAME if device_index is None else DEVICE

    def current_device(self) -> int:
        return 0

    def current_device_name(self) -> str:
        return DEVICE

    def device_count(self) -> int:
        return 1

    def is_fp16_supported(self) -> bool:
        return True

    def on_accelerator(self, tensor: torch.Tensor) -> bool:
        return tensor.device.type == NAME

    def pin_memory(
        self,
        tensor: torch.Tensor,
        make_copy: bool = True,  # noqa: ARG002, FBT001, FBT002 - DeepSpeed's signature
        match_shape: bool = True,  # noqa: ARG002, FBT001, FBT002
    ) -> torch.Tensor:
        return tensor

    def _constructor(self, dtype: torch.dtype) -> Callable[..., torch.Tensor]:
        return functools.partial(torch.tensor, dtype=dtype, device=DEVICE)

    @property
    def ByteTensor(self) -> Callable[..., torch.Tensor]:  # noqa: N802 - DeepSpeed's name
        return self._constructor(torch.uint8)

    @property
    def FloatTensor(self) -> Callable[..., torch.Tensor]:  # noqa: N802
        return self._constructor(torch.float32)


def place(model: torch.nn.Module, device: torch.device) -> torch.nn.Module:
    """Put what is on the host onto the device; ZeRO 3 has placed its shards already."""
    if device.type == "cpu":
        return model
    placed: dict[int, torch.Tensor] = {}
    for module in model.modules():
        # Replaced in the module's own tables: a fake tensor cannot be moved in place.
        tables: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)  # noqa: SLF001
        for tensors in tables:
            for name, tensor in tensors.items():
                if (
                    tensor is not None
                    and tensor.device.type == "cpu"
                    and not hasattr(tensor, "ds_id")
                ):
                    tensors[name] = placed.setdefault(id(tensor), _on_device(tensor))
    return model


def _on_device(tensor: torch.Tensor) -> torch.Tensor:
    assert not hasattr(tensor, "quant_state"), "what is quantised is so on the device"
    empty = torch.empty_like(tensor, device=DEVICE)
    if isinstance(tensor, torch.nn.Parameter):
        return torch.nn.Parameter(empty, requires_grad=tensor.requires_grad)
    return empty


def attend(  # noqa: PLR0917 - scaled_dot_product_attention's signature
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,  # noqa: FBT001, FBT002
    scale: float | None = None,
    enable_gqa: bool = False,  # noqa: FBT001, FBT002
) -> torch.Tensor:
    """Take the kernel that CUDA takes, whose operator keeps for backward what it keeps there.

    Flash serves 16-bit types without a mask, and shares keys between queries itself; with a mask,
    or in fp32, it is the memory-efficient kernel, to which the mask goes in the type of the query
    (sdp_utils.cpp and attention.cpp of torch).
    """
    if attn_mask is None and query.dtype != torch.float32:
        flash = torch.ops.aten._scaled_dot_product_flash_attention  # noqa: SLF001 - the kernel
        attended: torch.Tensor = flash(query, key, value, dropout_p, is_causal, scale=scale)[0]
        return attended
    if enable_gqa:
        groups = query.shape[1] // key.shape[1]
        key, value = (shared.repeat_interleave(groups, dim=1) for shared in (key, value))
    bias = None if attn_mask is None else _bias(attn_mask, query, key)
    efficient = torch.ops.aten._scaled_dot_product_efficient_attention  # noqa: SLF001 - the kernel
    keeps_log_sum = True
    attended = efficient(query, key, value, bias, keeps_log_sum, dropout_p, is_causal, scale=scale)[
        0
    ]
    return attended  # noqa: RET504 - typed, where the operator is not


def _bias(mask: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """Return the mask as a bias; its rows are padded to what the kernel reads at once."""
    bias = mask
    if mask.dtype == torch.bool:
        bias = torch.zeros_like(mask, dtype=query.dtype)
        bias.masked_fill_(mask.logical_not(), float("-inf"))
    spare = -bias.shape[-1] % _BIAS_ALIGNMENT
    if spare:
        bias = torch.nn.functional.pad(bias, (0, spare))[..., : mask.shape[-1]]
    return bias.expand(*query.shape[:3], key.shape[2])
