"""The tuned DeepSpeed config in the forms that other tools take."""

import json
from collections.abc import Mapping
from typing import Any

AUTO = "auto"

_OF_THE_TRAINER = (
    ("train_batch_size",),
    ("train_micro_batch_size_per_gpu",),
    ("gradient_accumulation_steps",),
    ("gradient_clipping",),
    ("optimizer", "params", "lr"),
    ("optimizer", "params", "betas"),
    ("optimizer", "params", "eps"),
    ("optimizer", "params", "weight_decay"),
    ("bf16", "enabled"),
    ("fp16", "enabled"),
)
"""What transformers' Trainer fills in (HfTrainerDeepSpeedConfig.trainer_config_process)."""


def literal(config: Mapping[str, Any]) -> str:
    """Return the config as it is, for a tool that says nothing of it a second time."""
    return _text(config)


def with_autos(config: Mapping[str, Any]) -> str:
    """Return the config with "auto" for what the tool's own file says.

    A Trainer refuses a config that disagrees with its arguments; so those can be changed in one
    place. Whatever was tuned and is no argument of the Trainer stays literal.
    """
    copy = json.loads(json.dumps(config))
    # An optimizer in 8 bits is the Trainer's, and adafactor has neither betas nor eps.
    for *sections, key in _OF_THE_TRAINER:
        section = copy
        for name in sections:
            section = section.get(name, {})
        if key in section:
            section[key] = AUTO
    return _text(copy)


def with_autos_alone(config: Mapping[str, Any]) -> str:
    """Return the config with "auto", for a Trainer that has to make its optimizer itself.

    It is the one that its arguments name, also where DeepSpeed would want its own on the host.
    """
    kept = {key: value for key, value in config.items() if key != "optimizer"}
    own = {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}
    return with_autos(kept | own)


def without_optimizer(config: Mapping[str, Any]) -> str:
    """Return the literal config for a script that makes its optimizer itself.

    accelerate refuses two (Accelerator._prepare_deepspeed).
    """
    kept = {key: value for key, value in config.items() if key != "optimizer"}
    return _text(kept | {"zero_allow_untested_optimizer": True})


def _text(config: Mapping[str, Any]) -> str:
    return json.dumps(config, indent=2) + "\n"
