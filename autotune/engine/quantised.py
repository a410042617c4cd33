"""What bitsandbytes does: layers in 4 bits, optimizers in 8, and whether either works here."""

import math
import tempfile
from typing import Any

import torch

from autotune.optimizer import OF_TRANSFORMERS, Optimizer

_ELEMENTS = 1 << 16


def is_quantised(parameter: Any) -> bool:  # noqa: ANN401 - bitsandbytes' Params4bit has more
    """Tell whether a parameter is one in 4 bits, or is to be once it has a device."""
    return hasattr(parameter, "quant_state")


def elements(parameter: Any) -> int:  # noqa: ANN401 - bitsandbytes' Params4bit has more
    """Return the elements of a parameter, of which two may be in a byte."""
    state = getattr(parameter, "quant_state", None)
    return int(parameter.numel()) if state is None else math.prod(state.shape)


def in_4_bits(model: Any) -> bool:  # noqa: ANN401 - PreTrainedModel
    """Tell whether the layers of a model are in 4 bits."""
    return bool(getattr(model, "is_loaded_in_4bit", False))


def how_loaded(dtype: torch.dtype) -> dict[str, Any]:
    """Return the arguments with which `from_pretrained` reads weights into 4 bits."""
    return {"quantization_config": _config(dtype), "device_map": {"": _device()}}


def _config(dtype: torch.dtype) -> Any:  # noqa: ANN401 - BitsAndBytesConfig
    """Return what QLoRA is made of (arXiv:2305.14314, section 3): NF4 with quantised scales."""
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def _device() -> str:
    from deepspeed.accelerator import get_accelerator

    return str(get_accelerator().current_device_name())


def keep_as_stored(model: Any) -> None:  # noqa: ANN401 - PreTrainedModel
    """Have layers in 4 bits stay as they are when a training evaluates.

    On CPUs with AVX512-BF16 they would be laid out anew for inference, in which they have no
    gradient any more (Linear4bit.forward of bitsandbytes).
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def quantise(model: Any, dtype: torch.dtype) -> None:  # noqa: ANN401 - PreTrainedModel
    """Put the layers of a model that was built wide into 4 bits, those that loading would.

    One after the other on the device; without a device they are only marked.
    """
    import bitsandbytes
    from transformers.integrations import replace_with_bnb_linear
    from transformers.pytorch_utils import Conv1D
    from transformers.quantizers.base import HfQuantizer

    wide = {
        name: (module.weight.t() if isinstance(module, Conv1D) else module.weight, module.bias)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear | Conv1D)
    }
    kept = HfQuantizer.get_modules_to_not_convert(model)
    replace_with_bnb_linear(model, modules_to_not_convert=kept, quantization_config=_config(dtype))
    for name, module in model.named_modules():
        if not isinstance(module, bitsandbytes.nn.Linear4bit):
            continue
        weight, module.bias = wide.pop(name)
        weight, module.quant_state = weight.detach(), None
        if weight.device.type != "meta":
            weight, module.quant_state = bitsandbytes.functional.quantize_4bit(
                weight.contiguous().to(_device()), compress_statistics=True, quant_type="nf4"
            )
        module.weight = bitsandbytes.nn.Params4bit(
            weight,
            quant_state=module.quant_state,
            compress_statistics=True,
            quant_type="nf4",
            module=module,
            bnb_quantized=module.quant_state is not None,
        )
    model.is_loaded_in_4bit = True


def try_optimizer(optimizer: Optimizer, device_kind: str) -> None:
    """Make an optimizer as the Trainer does, and take a step of it on the device.

    Raises:
        RuntimeError: it leaves the weights where they are, or what it raises itself.
    """
    from transformers import Trainer, TrainingArguments

    with tempfile.TemporaryDirectory(prefix="autotune-optimizer-") as output:
        arguments = TrainingArguments(
            output_dir=output, optim=OF_TRANSFORMERS[optimizer], use_cpu=device_kind == "cpu"
        )
        kind, keywords = Trainer.get_optimizer_cls_and_kwargs(arguments)
    weight = torch.nn.Parameter(torch.zeros(_ELEMENTS, device=_device()))
    weight.grad = torch.ones_like(weight)
    kind([weight], **keywords).step()
    if not bool((weight != 0).all()):
        msg = "a step of the optimizer does not move the weights"
        raise RuntimeError(msg)


def try_quantised(dtype: torch.dtype) -> None:
    """Multiply by a layer in 4 bits on the device, forward and backward.

    Raises:
        RuntimeError: nothing comes of it, or what bitsandbytes raises itself.
    """
    from bitsandbytes.nn import Linear4bit

    device = _device()
    layer = Linear4bit(64, 64, bias=False, compute_dtype=dtype, quant_type="nf4").to(device)
    rows = torch.ones(16, 64, dtype=dtype, device=device, requires_grad=True)
    layer(rows).sum().backward()
    if rows.grad is None or not bool(rows.grad.isfinite().all()):
        msg = "a layer in 4 bits gives no finite gradient"
        raise RuntimeError(msg)
