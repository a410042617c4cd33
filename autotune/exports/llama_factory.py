"""A configuration for `llamafactory-cli train`."""

import json
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
from autotune.setting import FLASH_ATTENTION
from autotune.workload import ALL_LINEAR

_TOKENISED = "tokenised"
_ATTENTION = {"sdpa": "sdpa", "eager": "disabled", FLASH_ATTENTION: "fa2"}
"""Values of its `flash_attn`."""

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


def export(tuned: TunedRun) -> Export:
    notes = differences(tuned, "LLaMA-Factory", every_n=False, rebalances=False, chunks=False)
    content = {
        "stage": "sft",
        "do_train": True,
        "model_name_or_path": tuned.model,
        "trust_remote_code": tuned.spec.trust_remote_code,
        "flash_attn": _ATTENTION[attention(tuned)],
        **_adapters(tuned),
        # The rows have their tokens and labels already, so no template has a say in them.
        "template": "empty",
        "dataset": "rows",
        "dataset_dir": ".",
        "tokenized_path": _TOKENISED,
        "cutoff_len": tuned.max_seq_length,
        "packing": tuned.packing or None,
        "eval_strategy": tuned.trainer.get("eval_strategy"),
        "output_dir": OUTPUT,
        **{name: tuned.trainer[name] for name in _OF_THE_TRAINER},
        **save_strategy(tuned),
        "optim": tuned.optim,
        "disable_gradient_checkpointing": not tuned.checkpoints,
        "use_reentrant_gc": False,
        "torch_compile": tuned.compiles,
        "ddp_timeout": 180_000_000,
        "deepspeed": DS_CONFIG,
    }
    dataset = {"rows": {"file_name": TRAIN_ROWS}}
    launch = f"env FORCE_TORCHRUN=1 NPROC_PER_NODE={tuned.ranks}"
    return Export(
        files={
            "llama_factory.yaml": as_yaml(tuned, notes, content),
            "dataset_info.json": json.dumps(dataset, indent=2) + "\n",
            "tokenise.py": _TOKENISE.format(
                eval_split=f', "validation": "{EVAL_ROWS}"' if tuned.evaluates else ""
            ),
            DS_CONFIG: with_autos(tuned.ds_config),
        },
        commands=(
            f"test -d {_TOKENISED} || python tokenise.py",
            f"{launch} llamafactory-cli train llama_factory.yaml",
        ),
        notes=notes,
    )


_TOKENISE = f'''\
"""Puts the tokenised rows into the form that LLaMA-Factory loads as tokenized_path."""

from datasets import DatasetDict, load_dataset

files = {{{{"train": "{TRAIN_ROWS}"{{eval_split}}}}}}
rows = load_dataset("json", data_files=files)
DatasetDict(rows).save_to_disk("{_TOKENISED}")
'''


def _adapters(tuned: TunedRun) -> dict[str, Any]:
    lora = tuned.spec.lora
    if lora is None:
        return {"finetuning_type": "full"}
    quantised = {
        "quantization_bit": 4,
        "quantization_method": "bnb",
        "quantization_type": "nf4",
        "double_quantization": True,
    }
    return {
        "finetuning_type": "lora",
        "lora_rank": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "lora_target": "all" if ALL_LINEAR in lora.targets else ",".join(lora.targets),
        **(quantised if lora.quantised else {}),
    }
