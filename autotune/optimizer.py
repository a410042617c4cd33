"""The optimizers that can be chosen, what they are called elsewhere, and what they cannot do."""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

Optimizer = Literal["adamw", "adamw-8bit", "adafactor"]

OPTIMIZERS: tuple[Optimizer, ...] = get_args(Optimizer)
ADAMW_8BIT: Optimizer = "adamw-8bit"
ADAFACTOR: Optimizer = "adafactor"

_NAMES_OF_TRANSFORMERS: Mapping[str, Optimizer] = {
    "adamw-torch": "adamw",
    "adamw-torch-fused": "adamw",
    "adamw-bnb-8bit": "adamw-8bit",
}
"""Values of `optim` of transformers' TrainingArguments that mean the same."""

OF_TRANSFORMERS: Mapping[Optimizer, str] = {
    "adamw": "adamw_torch_fused",
    "adamw-8bit": "adamw_bnb_8bit",
    "adafactor": "adafactor",
}

_MOST_8BIT_ELEMENTS = 2**31 - 1
"""bitsandbytes' kernel counts what it updates in 32 bits (backends/cuda/ops.py)."""


def read_optimizer(value: Any) -> Optimizer:  # noqa: ANN401 - YAML or text
    """Read a name of an optimizer, ours or that of transformers.

    Raises:
        ValueError: there is none of that name; the nearest is named.
    """
    name = str(value).replace("_", "-").lower()
    for known in OPTIMIZERS:
        if name == known:
            return known
    if name in _NAMES_OF_TRANSFORMERS:
        return _NAMES_OF_TRANSFORMERS[name]
    nearest = difflib.get_close_matches(name, OPTIMIZERS, n=1, cutoff=0.0)[0]
    msg = f"{value!r} is none of {', '.join(OPTIMIZERS)}; the nearest is {nearest}"
    raise ValueError(msg)


@dataclass(frozen=True, slots=True, kw_only=True)
class Limit:
    """The values that a knob can have with what the user chose, and why it has no others."""

    values: tuple[int | str, ...]
    reason: str


def limits_of(
    optimizer: Optimizer,
    trained: int,
    ranks: int,
    *,
    in_4_bits: bool = False,
    nvme: bool = False,
) -> dict[str, Limit]:
    """Return what DeepSpeed cannot do together with an optimizer and weights in 4 bits, by knob.

    Args:
        optimizer: what updates the weights.
        trained: parameters that are trained.
        ranks: that share them from ZeRO 1 on.
        in_4_bits: whether there are weights in 4 bits.
        nvme: whether there is a place for what is offloaded to NVMe.
    """
    nowhere = Limit(values=("none", "cpu"), reason="nvme takes a directory on it (--nvme-path)")
    limits = {} if nvme else {"offload_optimizer": nowhere}
    limits |= _of_optimizer(optimizer, trained, ranks)
    if in_4_bits:
        stages = limits["zero_stage"].values if "zero_stage" in limits else (0, 1, 2)
        limits["zero_stage"] = Limit(
            values=tuple(stage for stage in stages if stage != 3),  # noqa: PLR2004 - a ZeRO stage
            reason="transformers does not shard weights in 4 bits for ZeRO 3"
            + (f", and {limits['zero_stage'].reason}" if "zero_stage" in limits else ""),
        )
    return limits


def _of_optimizer(optimizer: Optimizer, trained: int, ranks: int) -> dict[str, Limit]:
    if optimizer == "adamw":
        return {}
    limits = {
        "offload_optimizer": Limit(
            values=("none",),
            reason=f"DeepSpeed updates offloaded states by its own CPU Adam, not by {optimizer}",
        )
    }
    if optimizer == ADAFACTOR:
        limits["zero_stage"] = Limit(
            values=(0,),
            reason="ZeRO 1 to 3 make parameters flat, and adafactor needs the rows and columns of "
            "whole matrices",
        )
    elif trained > ranks * _MOST_8BIT_ELEMENTS:
        limits["zero_stage"] = Limit(
            values=(0, 3),
            reason=f"{optimizer} updates at most 2^31 - 1 elements at once, and a rank's share at "
            "ZeRO 1 and 2 has more",
        )
    return limits
