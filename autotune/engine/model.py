"""Builds the model, with its weights or without."""

from typing import Any

import torch

from autotune.workload import TrainSpec

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def build_model(spec: TrainSpec, *, load_weights: bool) -> Any:  # noqa: ANN401 - PreTrainedModel
    """Build the causal language model in the compute type, activation checkpointing switched on.

    Weights are read from safetensors only. Without `load_weights`, or when the model directory has
    none, they are random; under ZeRO 3 (TrainingArguments made before) they are sharded as built.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, set_seed

    set_seed(spec.seed)
    common = {
        "dtype": DTYPES[spec.precision],
        "attn_implementation": spec.attention,
        "trust_remote_code": spec.trust_remote_code,
    }
    if load_weights and not spec.from_scratch:
        model = AutoModelForCausalLM.from_pretrained(
            spec.model_dir, use_safetensors=True, local_files_only=True, **common
        )
    else:
        config = AutoConfig.from_pretrained(
            spec.model_dir, trust_remote_code=spec.trust_remote_code, local_files_only=True
        )
        model = AutoModelForCausalLM.from_config(config, **common)
    model.config.use_cache = False
    enable_checkpointing(model, spec.checkpointing)
    return model


def enable_checkpointing(model: Any, checkpointing: str) -> None:  # noqa: ANN401 - PreTrainedModel
    """Recompute activations in backward: of every block (`full`), of none, or of every n-th."""
    if checkpointing == "none":
        return
    every_n_layers = 1 if checkpointing == "full" else int(checkpointing.removeprefix("every-"))
    model.activation_checkpointing_enable(
        activation_checkpointing_kwargs={"use_reentrant": False}, every_n_layers=every_n_layers
    )
