"""Arguments for `swift sft`, in the YAML file that it takes them from."""

from typing import Any

from autotune.exports.deepspeed import with_autos_alone
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
    "per_device_eval_batch_size",
    "logging_steps",
    "report_to",
)

_OWN_TEMPLATES = (
    "ms-swift takes conversations and applies its own template of the model's type, so tokens may "
    "differ from the run's; where it cannot tell the type, add --model_type or --template"
)


def export(tuned: TunedRun) -> Export:
    notes = (
        *differences(tuned, "ms-swift", every_n=False, rebalances=False, chunks=False),
        _OWN_TEMPLATES,
    )
    if tuned.evaluates:
        notes += ("ms-swift holds out rows of its own choice, as many as the run",)
    content = {
        "model": tuned.model,
        "use_hf": True,
        "torch_dtype": DTYPES[tuned.spec.precision],
        "attn_impl": attention(tuned),
        **_adapters(tuned),
        "dataset": [TRAIN_ROWS],
        "split_dataset_ratio": tuned.spec.eval_share,
        "eval_strategy": tuned.trainer.get("eval_strategy"),
        "max_length": tuned.max_seq_length,
        "truncation_strategy": "right",
        "packing": tuned.packing,
        "output_dir": OUTPUT,
        "add_version": False,
        **{name: tuned.trainer[name] for name in _OF_THE_TRAINER},
        **save_strategy(tuned),
        "optim": tuned.optim,
        "gradient_checkpointing": tuned.checkpoints,
        "gradient_checkpointing_kwargs": {"use_reentrant": False} if tuned.checkpoints else None,
        "torch_compile": tuned.compiles,
        "deepspeed": DS_CONFIG,
        "ENV": {"NPROC_PER_NODE": tuned.ranks},
    }
    return Export(
        files={
            "swift.yaml": as_yaml(tuned, notes, content),
            # Its Trainer asks the optimizer for its groups before DeepSpeed has made one.
            DS_CONFIG: with_autos_alone(tuned.ds_config),
        },
        commands=("swift sft swift.yaml",),
        data="messages",
        all_rows=True,
        notes=notes,
    )


def _adapters(tuned: TunedRun) -> dict[str, Any]:
    lora = tuned.spec.lora
    if lora is None:
        return {"tuner_type": "full"}
    quantised = {"quant_method": "bnb", "quant_bits": 4}
    return {
        "tuner_type": "lora",
        "lora_rank": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "target_modules": [ALL_LINEAR] if ALL_LINEAR in lora.targets else list(lora.targets),
        **(quantised if lora.quantised else {}),
    }
