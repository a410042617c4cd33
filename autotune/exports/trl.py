"""A configuration for `trl sft`."""

from typing import Any

from autotune.exports.accelerate import launch_config
from autotune.exports.deepspeed import with_autos
from autotune.exports.tuned import (
    DS_CONFIG,
    DTYPES,
    OUTPUT,
    TRAIN_ROWS,
    Export,
    TunedRun,
    as_yaml,
    attention,
    differences,
    save_strategy,
)
from autotune.workload import ALL_LINEAR

_OF_THE_TRAINER = (
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "num_train_epochs",
    "max_steps",
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "weight_decay",
    "max_grad_norm",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "bf16",
    "fp16",
    "seed",
    "data_seed",
    "train_sampling_strategy",
    "per_device_eval_batch_size",
    "logging_steps",
    "report_to",
)


def export(tuned: TunedRun) -> Export:
    notes = differences(tuned, "TRL", every_n=True, rebalances=True, chunks=True)
    if tuned.evaluates:
        notes += ("TRL holds out rows of its own choice, as many as the run",)
    content = {
        "model_name_or_path": tuned.model,
        "dtype": DTYPES[tuned.spec.precision],
        "attn_implementation": attention(tuned),
        "trust_remote_code": tuned.spec.trust_remote_code,
        **_adapters(tuned),
        "datasets": [
            {
                "path": "json",
                "data_files": TRAIN_ROWS,
                "split": "train",
                "columns": ["input_ids", "labels"],
            }
        ],
        "test_split_size": tuned.spec.eval_share or None,
        "eval_strategy": tuned.trainer.get("eval_strategy"),
        "max_length": tuned.max_seq_length,
        "packing": tuned.packing,
        "output_dir": OUTPUT,
        **{name: tuned.trainer[name] for name in _OF_THE_TRAINER},
        **save_strategy(tuned),
        "optim": tuned.optim,
        **_checkpointing(tuned),
        "use_cpu": tuned.on_cpu,
        "accelerate_config": "accelerate.yaml",
    }
    return Export(
        files={
            "trl.yaml": as_yaml(tuned, notes, content),
            "accelerate.yaml": launch_config(tuned),
            DS_CONFIG: with_autos(tuned.ds_config),
        },
        commands=("trl sft --config trl.yaml",),
        all_rows=True,
        notes=notes,
    )


def _checkpointing(tuned: TunedRun) -> dict[str, Any]:
    # TRL checkpoints unless it is told not to.
    if not tuned.checkpoints:
        return {"gradient_checkpointing": False}
    kwargs: dict[str, Any] = {"use_reentrant": False}
    if tuned.every_n_layers > 1:
        kwargs["every_n_layers"] = tuned.every_n_layers
    return {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": kwargs}


def _adapters(tuned: TunedRun) -> dict[str, Any]:
    lora = tuned.spec.lora
    if lora is None:
        return {}
    quantised = {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "use_bnb_nested_quant": True,
    }
    return {
        "use_peft": True,
        "lora_r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "lora_target_modules": [ALL_LINEAR] if ALL_LINEAR in lora.targets else list(lora.targets),
        **(quantised if lora.quantised else {}),
    }
