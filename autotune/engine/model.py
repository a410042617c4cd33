"""Builds the model, with its weights or without, with adapters or without."""

from typing import Any, Protocol

import torch

from autotune.engine.loss import chunk_loss
from autotune.engine.quantised import how_loaded, in_4_bits, keep_as_stored, quantise
from autotune.setting import CHUNKED, checkpointing_period
from autotune.workload import ALL_LINEAR, Lora, Precision, TrainSpec

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class Recipe(Protocol):
    """How a model is built from its configuration; training and traces have more to say."""

    @property
    def precision(self) -> Precision: ...
    @property
    def attention(self) -> str: ...
    @property
    def trust_remote_code(self) -> bool: ...
    @property
    def lora(self) -> Lora | None: ...
    @property
    def loss(self) -> str: ...


def build_model(spec: TrainSpec, *, load_weights: bool) -> Any:  # noqa: ANN401 - PreTrainedModel
    """Build the causal language model in the compute type, activation checkpointing switched on.

    Adapters are drawn from the seed, the same under every setting.
    """
    from transformers import set_seed

    model = build_base(spec, load_weights=load_weights)
    # What was drawn for the weights depends on how they are sharded.
    set_seed(spec.seed)
    return _finished(model, spec, spec.checkpointing)


def build_base(spec: TrainSpec, *, load_weights: bool) -> Any:  # noqa: ANN401 - PreTrainedModel
    """Build the model as it is before anything is added to train it.

    Weights are read from safetensors only, into 4 bits where they are to be. Without
    `load_weights`, or when the model directory has none, they are random; under ZeRO 3
    (TrainingArguments made before) they are sharded as built.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, set_seed

    set_seed(spec.seed)
    if load_weights and not spec.from_scratch:
        quantised = spec.lora is not None and spec.lora.quantised
        return AutoModelForCausalLM.from_pretrained(
            spec.model_dir,
            use_safetensors=True,
            local_files_only=True,
            **_arguments(spec),
            **(how_loaded(DTYPES[spec.precision]) if quantised else {}),
        )
    config = AutoConfig.from_pretrained(
        spec.model_dir, trust_remote_code=spec.trust_remote_code, local_files_only=True
    )
    return AutoModelForCausalLM.from_config(config, **_arguments(spec))


def from_config(config: Any, recipe: Recipe, checkpointing: str = "none") -> Any:  # noqa: ANN401
    """Build the model from its configuration alone, as `build_model` does."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(config, **_arguments(recipe))
    return _finished(model, recipe, checkpointing)


def _arguments(recipe: Recipe) -> dict[str, Any]:
    return {
        "dtype": DTYPES[recipe.precision],
        "attn_implementation": recipe.attention,
        "trust_remote_code": recipe.trust_remote_code,
    }


def _finished(model: Any, recipe: Recipe, checkpointing: str) -> Any:  # noqa: ANN401 - PreTrainedModel
    """Make a model that was built one that is trained."""
    model.config.use_cache = False
    if recipe.loss == CHUNKED:
        chunk_loss(model)
    if recipe.lora is not None:
        if recipe.lora.quantised and not in_4_bits(model):
            quantise(model, DTYPES[recipe.precision])
        if in_4_bits(model):
            keep_as_stored(model)
        model = _with_adapters(model, recipe.lora, DTYPES[recipe.precision])
    if checkpointing != "none":
        # Not reentrant: gradients reach adapters in blocks whose inputs need none.
        model.activation_checkpointing_enable(
            activation_checkpointing_kwargs={"use_reentrant": False},
            every_n_layers=checkpointing_period(checkpointing),
        )
    return model


def _with_adapters(model: Any, lora: Lora, dtype: torch.dtype) -> Any:  # noqa: ANN401 - PeftModel
    """Freeze the weights and put adapters beside them, in the compute type as the weights are.

    The fp32 copy that the optimizer updates is DeepSpeed's, as it is of weights.

    Raises:
        ValueError: the model has no layer of a target's name; the text has those that it has.
    """
    from peft import LoraConfig, get_peft_model
    from transformers.modeling_utils import local_torch_dtype

    _require_targets(model, lora)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=ALL_LINEAR if lora.targets == (ALL_LINEAR,) else list(lora.targets),
    )
    with local_torch_dtype(dtype):
        return get_peft_model(model, config, autocast_adapter_dtype=False)


def _require_targets(model: Any, lora: Lora) -> None:  # noqa: ANN401 - PreTrainedModel
    from transformers.pytorch_utils import Conv1D

    layers = [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear | Conv1D)
    ]
    missing = [
        target
        for target in lora.targets
        if target != ALL_LINEAR and not any(f".{name}".endswith(f".{target}") for name in layers)
    ]
    if missing:
        names = sorted({name.rpartition(".")[2] for name in layers})
        msg = (
            f"the model has no linear layer called {' or '.join(missing)}: use {ALL_LINEAR}, or "
            f"some of {', '.join(names)}"
        )
        raise ValueError(msg)
