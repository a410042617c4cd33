"""What a rank of a user's script is told, in a file that its environment names. Pure."""

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from autotune.hardware import DeviceKind

ERRAND, OWNER = "AUTOTUNE_SCRIPT_ERRAND", "AUTOTUNE_SCRIPT_RANK_PID"
"""Variables: the errand's file, and the process that it is for. Others below inherit both."""

SHIM = Path(__file__).parent / "shim"

AS_IT_IS = 0
"""Micro-batch size of a script's own, where that is not known yet."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScriptErrand:
    """What is done to a script from within.

    Attributes:
        overrides: what of its DeepSpeed config is replaced, section by section.
        answers: directory in which each rank answers; None lets the script train to its end.
        facts: file to write what the script is like to; None if that is not asked for.
        micro_batch_size: rows that its batches have to have; `AS_IT_IS` takes any.
        device_memory_bytes: what a rank may allocate.
    """

    device_kind: DeviceKind
    overrides: dict[str, Any] = field(default_factory=dict)
    answers: str | None = None
    facts: str | None = None
    micro_batch_size: int = AS_IT_IS
    device_memory_bytes: int = 0

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> "ScriptErrand":
        return cls(**fields)


def shimmed(environment: Mapping[str, str], errand: Path) -> dict[str, str]:
    """Return the variables by which a process and those below it come to run an errand."""
    path = [str(SHIM), environment.get("PYTHONPATH", os.environ.get("PYTHONPATH", ""))]
    return {"PYTHONPATH": os.pathsep.join(filter(None, path)), ERRAND: str(errand)}


def merged(config: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Return a DeepSpeed config with the overrides in it, section by section.

    A section `autotuning` is left out: DeepSpeed ends a training that has one. None takes a key
    away.
    """
    result = {key: value for key, value in config.items() if key != "autotuning"}
    for key, value in overrides.items():
        if value is None:
            result.pop(key, None)
        elif isinstance(value, Mapping):
            own = result.get(key)
            result[key] = merged(own if isinstance(own, Mapping) else {}, value)
        else:
            result[key] = value
    return result
