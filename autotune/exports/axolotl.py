"""A configuration for `axolotl train`."""

from typing import Any

from autotune.exports.deepspeed import with_autos
from autotune.exports.tuned import (
    DS_CONFIG,
    EVAL_ROWS,
    OUTPUT,
    TRAIN_ROWS,
    Export,
    TunedRun,
    as_yaml,
    attention,
    differences,
    save_strategy,
)
from autotune.setting import CHUNKED
from autotune.workload import ALL_LINEAR

_AS_THE_TRAINER = (
    "gradient_accumulation_steps",
    "learning_rate",
    "weight_decay",
    "max_grad_norm",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "bf16",
    "fp16",
    "seed",
    "logging_steps",
)


_OWN_KERNELS = (
    "lora_mlp_kernel",
    "lora_qkv_kernel",
    "lora_o_kernel",
    "lora_embedding_kernel",
)


def export(tuned: TunedRun) -> Export:
    trainer = tuned.trainer
    notes = differences(tuned, "Axolotl", every_n=False, rebalances=False, chunks=True)
    content = {
        "base_model": tuned.model,
        "trust_remote_code": tuned.spec.trust_remote_code or None,
        "attn_implementation": attention(tuned),
        **_adapters(tuned),
        "datasets": [_rows(TRAIN_ROWS)],
        "test_datasets": [_rows(EVAL_ROWS)] if tuned.evaluates else None,
        "eval_strategy": trainer.get("eval_strategy"),
        "dataset_prepared_path": "prepared",
        "val_set_size": 0.0,
        "sequence_len": tuned.max_seq_length,
        "sample_packing": tuned.packing,
        "pad_to_sequence_len": False,
        "output_dir": OUTPUT,
        "micro_batch_size": trainer["per_device_train_batch_size"],
        "eval_batch_size": trainer["per_device_eval_batch_size"],
        "num_epochs": trainer["num_train_epochs"],
        "max_steps": trainer["max_steps"] if trainer["max_steps"] > 0 else None,
        "optimizer": tuned.optim,
        "lr_scheduler": trainer["lr_scheduler_type"],
        "warmup_ratio": trainer["warmup_steps"],
        **{name: trainer[name] for name in _AS_THE_TRAINER},
        "tf32": False,
        "gradient_checkpointing": tuned.checkpoints,
        "gradient_checkpointing_kwargs": {"use_reentrant": False} if tuned.checkpoints else None,
        "chunked_cross_entropy": True if tuned.setting.structure.loss == CHUNKED else None,
        **save_strategy(tuned),
        "torch_compile": tuned.compiles,
        "deepspeed": DS_CONFIG,
    }
    ranks = f"--standalone --nproc-per-node={tuned.ranks}"
    return Export(
        files={
            "axolotl.yaml": as_yaml(tuned, notes, content),
            DS_CONFIG: with_autos(tuned.ds_config),
        },
        commands=(f"axolotl train axolotl.yaml --launcher torchrun -- {ranks}",),
        notes=notes,
    )


def _rows(name: str) -> dict[str, Any]:
    # Without a type, as the rows have their tokens and labels already.
    return {"path": name, "ds_type": "json", "split": "train", "type": None}


def _adapters(tuned: TunedRun) -> dict[str, Any]:
    lora = tuned.spec.lora
    if lora is None:
        return {}
    targets = (
        {"lora_target_linear": True}
        if ALL_LINEAR in lora.targets
        else {"lora_target_modules": list(lora.targets)}
    )
    return {
        "adapter": "qlora" if lora.quantised else "lora",
        "load_in_4bit": lora.quantised,
        # Kernels of its own, which it would switch on by itself and which were not measured.
        **dict.fromkeys(_OWN_KERNELS, False),
        "lora_r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        **targets,
    }
