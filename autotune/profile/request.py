"""What is asked of a trace; standard library only, so that whoever asks needs no torch."""

from dataclasses import dataclass

from autotune.hardware import DeviceKind
from autotune.workload import Precision


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceRequest:
    """A model, and how it is to run; attention `auto` is sdpa, or eager where a model lacks it.

    The kind of device decides which kernel attention takes, and so what is kept for backward.
    """

    model_dir: str
    trust_remote_code: bool
    attention: str
    precision: Precision
    device_kind: DeviceKind
