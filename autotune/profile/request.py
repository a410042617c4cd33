"""What is asked of a trace; standard library only, so that whoever asks needs no torch."""

from dataclasses import dataclass

from autotune.workload import Precision


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceRequest:
    """A model, and how it is to run; attention `auto` is sdpa, or eager where a model lacks it.

    Attributes:
        padded: whether rows of a batch differ in length, so that its mask is kept.
    """

    model_dir: str
    trust_remote_code: bool
    attention: str
    precision: Precision
    padded: bool = True
