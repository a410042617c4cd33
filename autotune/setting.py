"""A structure is what takes a new process to change; a setting adds the micro-batch size."""

import json
import re
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Offload = Literal["none", "cpu", "nvme"]

NVME = "nvme"

ZERO_STAGES = (0, 1, 2, 3)
FLASH_ATTENTION = "flash_attention_2"

WHOLE, CHUNKED = "whole", "chunked"
"""Whether the loss is taken from all logits at once, or from a share of them at a time."""

RANDOM, REBALANCE = "random", "batch_rebalance"
"""How the rows of a step are split: as they were drawn, or by length (transformers' sampler)."""

BY_MODEL = -1
"""A bucket whose length follows from the model."""

DEFAULT_PERSISTENCE_THRESHOLD = 100_000
"""DeepSpeed's own stage3_param_persistence_threshold."""

THREADS_DETECTED = 0
"""As many threads a rank as the cluster says."""


def overlaps_by_default(zero_stage: int) -> bool:
    """Tell whether DeepSpeed reduces gradients beside the backward pass unless told otherwise."""
    return zero_stage == ZERO_STAGES[-1]


_EVERY = re.compile(r"every-([2-9]|[1-9][0-9]+)")


def checkpointing_period(checkpointing: str) -> int:
    """Return how many layers apart those are that are treated alike: 1 if all are, n of `every-n`.

    Of n layers in a row the first recomputes its activations, the others keep them.

    Raises:
        ValueError: it is neither `none` nor `full` nor `every-n` for an n of 2 or more.
    """
    if checkpointing in {"none", "full"}:
        return 1
    every = _EVERY.fullmatch(checkpointing)
    if every is None:
        msg = f"{checkpointing!r} is none of none, full, every-2, every-3 and so on"
        raise ValueError(msg)
    return int(every[1])


def recomputed_share(checkpointing: str) -> float:
    """Return the share of the layers that recompute their activations, of very many layers."""
    return 0.0 if checkpointing == "none" else 1 / checkpointing_period(checkpointing)


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class Structure:
    """The knobs of a process; docs/knobs.md says what each is for.

    Attributes:
        overlap_comm: whether gradients are reduced beside the backward pass; unless it is said,
            what DeepSpeed does: at stage 3 alone.
        reduce_bucket_size: elements of gradients that are reduced at once; `BY_MODEL` is
            DeepSpeed's default, or all of a smaller model.
        allgather_bucket_size: elements of weights that stages 1 and 2 gather at once, likewise.
        stage3_prefetch_bucket_size: elements that stage 3 gathers ahead; `BY_MODEL` is two layers.
        stage3_param_persistence_threshold: elements up to which stage 3 leaves a parameter whole.
        threads_per_rank: of a rank on a CPU; `THREADS_DETECTED` leaves it to the cluster.
        expandable_segments: whether torch's allocator on a GPU grows its segments.
        zero_hpz_partition_size: ranks in a row that have all weights of stage 3 among them too, so
            that most gathers stay with them; 1 leaves the weights to all ranks together.
        torch_compile: whether the model's passes are compiled by torch.
    """

    zero_stage: int
    offload_optimizer: Offload = "none"
    offload_param: Offload = "none"
    checkpointing: str = "none"
    attention: str = "sdpa"
    sampling: str = RANDOM
    overlap_comm: bool = field(default=None)  # type: ignore[assignment] # set before it is read
    reduce_bucket_size: int = BY_MODEL
    allgather_bucket_size: int = BY_MODEL
    stage3_prefetch_bucket_size: int = BY_MODEL
    stage3_param_persistence_threshold: int = DEFAULT_PERSISTENCE_THRESHOLD
    threads_per_rank: int = THREADS_DETECTED
    loss: str = WHOLE
    expandable_segments: bool = False
    zero_hpz_partition_size: int = 1
    torch_compile: bool = False

    def __post_init__(self) -> None:
        if self.overlap_comm not in {True, False}:
            object.__setattr__(self, "overlap_comm", overlaps_by_default(self.zero_stage))

    def to_json(self) -> dict[str, Any]:
        """Return the fields, of the later knobs those that are not at their defaults."""
        plain = Structure(zero_stage=self.zero_stage)
        return {
            name: value
            for name, value in asdict(self).items()
            if name not in _LATER_KNOBS or value != getattr(plain, name)
        }

    def key(self) -> str:
        """Return the canonical form: JSON of the fields, sorted."""
        return json.dumps(self.to_json(), sort_keys=True)

    def label(self) -> str:
        """Return a short name for people and file names: `zero2-checkpointing-full`."""
        parts = [f"zero{self.zero_stage}"]
        if self.offload_optimizer != "none":
            parts.append(f"offload-optimizer-{self.offload_optimizer}")
        if self.offload_param != "none":
            parts.append(f"offload-param-{self.offload_param}")
        parts.append(f"checkpointing-{self.checkpointing}")
        return "-".join([*parts, *self.other_knobs()]).replace("_", "-")

    def other_knobs(self) -> tuple[str, ...]:
        """Return a short word for each other knob that is not at its default."""
        plain = Structure(zero_stage=self.zero_stage)
        words = {
            "attention": self.attention,
            "sampling": self.sampling,
            "overlap_comm": "overlap" if self.overlap_comm else "no-overlap",
            "reduce_bucket_size": f"reduce-{self.reduce_bucket_size}",
            "allgather_bucket_size": f"allgather-{self.allgather_bucket_size}",
            "stage3_prefetch_bucket_size": f"prefetch-{self.stage3_prefetch_bucket_size}",
            "stage3_param_persistence_threshold": (
                f"persistence-{self.stage3_param_persistence_threshold}"
            ),
            "threads_per_rank": f"threads-{self.threads_per_rank}",
            "loss": f"{self.loss}-loss",
            "expandable_segments": "expandable-segments",
            "zero_hpz_partition_size": f"hpz-{self.zero_hpz_partition_size}",
            "torch_compile": "compiled",
        }
        return tuple(
            word for knob, word in words.items() if getattr(self, knob) != getattr(plain, knob)
        )

    def with_micro_batch(
        self, micro_batch_size: int, ranks: int, global_batch_size: int
    ) -> "Setting":
        """Return the setting whose accumulation keeps the global batch exactly."""
        accumulation, rest = divmod(global_batch_size, micro_batch_size * ranks)
        assert rest == 0, "micro-batch sizes are divisors of the global batch a rank"
        return Setting(
            structure=self,
            micro_batch_size=micro_batch_size,
            gradient_accumulation_steps=accumulation,
        )


_LATER_KNOBS = frozenset(
    {
        "overlap_comm",
        "reduce_bucket_size",
        "allgather_bucket_size",
        "stage3_prefetch_bucket_size",
        "stage3_param_persistence_threshold",
        "threads_per_rank",
        "loss",
        "expandable_segments",
        "zero_hpz_partition_size",
        "torch_compile",
    }
)
"""What JSON has only where it says something, so that older settings keep their names."""


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class Setting:
    structure: Structure
    micro_batch_size: int
    gradient_accumulation_steps: int

    def to_json(self) -> dict[str, Any]:
        return {
            "micro_batch_size": self.micro_batch_size,
            "gradient_accumulation_steps": self.gradient_accumulation_steps,
            **self.structure.to_json(),
        }

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> "Setting":
        rest = dict(fields)
        micro_batch_size = rest.pop("micro_batch_size")
        accumulation = rest.pop("gradient_accumulation_steps")
        return cls(
            structure=Structure(**rest),
            micro_batch_size=micro_batch_size,
            gradient_accumulation_steps=accumulation,
        )

    def key(self) -> str:
        """Return the canonical form: JSON of the fields, sorted."""
        return json.dumps(self.to_json(), sort_keys=True)

    def label(self) -> str:
        """Return a line for people."""
        return (
            f"micro-batch {self.micro_batch_size} x accumulation "
            f"{self.gradient_accumulation_steps}, ZeRO {self.structure.zero_stage}, "
            f"checkpointing {self.structure.checkpointing}"
            + (
                f", optimizer on {self.structure.offload_optimizer}"
                if self.structure.offload_optimizer != "none"
                else ""
            )
            + (
                f", parameters on {self.structure.offload_param}"
                if self.structure.offload_param != "none"
                else ""
            )
            + "".join(f", {word}" for word in self.structure.other_knobs())
        )
