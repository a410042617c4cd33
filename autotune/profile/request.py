"""What is asked of a trace; standard library only, so that whoever asks needs no torch."""

from dataclasses import dataclass

from autotune.hardware import DeviceKind
from autotune.setting import WHOLE
from autotune.workload import Lora, Precision


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceRequest:
    """A model, and how it is to run; attention `auto` is sdpa, or eager where a model lacks it.

    The kind of device decides which kernel attention takes, and so what is kept for backward.

    Attributes:
        padded: whether rows of a batch differ in length, so that its mask is kept.
        checkpointing: the modes to trace; `none` alone is traced of a model that has no other.
    """

    model_dir: str
    trust_remote_code: bool
    attention: str
    precision: Precision
    device_kind: DeviceKind
    padded: bool = True
    lora: Lora | None = None
    loss: str = WHOLE
    checkpointing: tuple[str, ...] = ("none", "full")
