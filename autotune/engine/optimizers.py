"""Whether an optimizer works here, told by a step of it."""

import tempfile

import torch

from autotune.optimizer import OF_TRANSFORMERS, Optimizer

_ELEMENTS = 1 << 16


def try_optimizer(optimizer: Optimizer, device_kind: str) -> None:
    """Make an optimizer as the Trainer does, and take a step of it on the device.

    Raises:
        RuntimeError: it leaves the weights where they are, or what it raises itself.
    """
    from deepspeed.accelerator import get_accelerator
    from transformers import Trainer, TrainingArguments

    with tempfile.TemporaryDirectory(prefix="autotune-optimizer-") as output:
        arguments = TrainingArguments(
            output_dir=output, optim=OF_TRANSFORMERS[optimizer], use_cpu=device_kind == "cpu"
        )
        kind, keywords = Trainer.get_optimizer_cls_and_kwargs(arguments)
    device = get_accelerator().current_device_name()
    weight = torch.nn.Parameter(torch.zeros(_ELEMENTS, device=device))
    weight.grad = torch.ones_like(weight)
    kind([weight], **keywords).step()
    if not bool((weight != 0).all()):
        msg = "a step of it does not move the weights"
        raise RuntimeError(msg)
