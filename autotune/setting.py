"""A structure is what takes a new process to change; a setting adds the micro-batch size."""

import json
import re
from dataclasses import asdict, dataclass
from typing import Any, Literal

Offload = Literal["none", "cpu"]

ZERO_STAGES = (0, 1, 2, 3)
FLASH_ATTENTION = "flash_attention_2"

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


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class Structure:
    zero_stage: int
    offload_optimizer: Offload = "none"
    offload_param: Offload = "none"
    checkpointing: str = "none"
    attention: str = "sdpa"
    sampling: str = "random"

    def key(self) -> str:
        """Return the canonical form: JSON of the fields, sorted."""
        return json.dumps(asdict(self), sort_keys=True)

    def label(self) -> str:
        """Return a short name for people and file names: `zero2-checkpointing-full`."""
        parts = [f"zero{self.zero_stage}"]
        if self.offload_optimizer != "none":
            parts.append(f"offload-optimizer-{self.offload_optimizer}")
        if self.offload_param != "none":
            parts.append(f"offload-param-{self.offload_param}")
        parts.append(f"checkpointing-{self.checkpointing}")
        return "-".join(parts)

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


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class Setting:
    structure: Structure
    micro_batch_size: int
    gradient_accumulation_steps: int

    def to_json(self) -> dict[str, Any]:
        return {
            "micro_batch_size": self.micro_batch_size,
            "gradient_accumulation_steps": self.gradient_accumulation_steps,
            **asdict(self.structure),
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
        return (
            f"micro-batch {self.micro_batch_size} x accumulation "
            f"{self.gradient_accumulation_steps}, ZeRO {self.structure.zero_stage}, "
            f"checkpointing {self.structure.checkpointing}"
            + (
                f", optimizer on {self.structure.offload_optimizer}"
                if self.structure.offload_optimizer != "none"
                else ""
            )
        )
