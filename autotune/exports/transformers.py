"""A script for torchrun that needs transformers, DeepSpeed and the exported files alone."""

import pprint
from typing import Any

from autotune.exports.deepspeed import literal
from autotune.exports.tuned import (
    DS_CONFIG,
    DTYPES,
    EVAL_ROWS,
    OUTPUT,
    TRAIN_ROWS,
    Export,
    TunedRun,
    attention,
    differences,
    header,
    save_strategy,
)
from autotune.workload import ALL_LINEAR, Lora

_WIDTH = 96


def export(tuned: TunedRun) -> Export:
    # The rows of a run that packs are exported as they were packed.
    notes = tuple(
        note
        for note in differences(tuned, "transformers", every_n=True, rebalances=True, chunks=False)
        if "packs" not in note
    )
    return Export(
        files={
            "train.py": header(tuned, notes) + _script(tuned),
            DS_CONFIG: literal(tuned.ds_config),
        },
        keeps_packs=True,
        commands=(f"torchrun --standalone --nproc-per-node={tuned.ranks} train.py",),
        notes=notes,
    )


def _script(tuned: TunedRun) -> str:
    evaluation = f'Rows("{EVAL_ROWS}")' if tuned.evaluates else "None"
    return _SCRIPT.format(
        model=repr(tuned.model),
        dtype=DTYPES[tuned.spec.precision],
        attention=repr(attention(tuned)),
        trust_remote_code=tuned.spec.trust_remote_code,
        arguments=pprint.pformat(_arguments(tuned), width=_WIDTH, sort_dicts=False),
        train_rows=TRAIN_ROWS,
        evaluation=evaluation,
        ds_config=DS_CONFIG,
        quantisation=_quantisation(tuned.spec.lora, DTYPES[tuned.spec.precision]),
        quantised=" **QUANTISED," if tuned.spec.lora and tuned.spec.lora.quantised else "",
        adapters=_adapters(tuned.spec.lora),
    )


def _arguments(tuned: TunedRun) -> dict[str, Any]:
    checkpointing: dict[str, Any] = {}
    if tuned.checkpoints:
        kwargs: dict[str, Any] = {"use_reentrant": False}
        if tuned.every_n_layers > 1:
            kwargs["every_n_layers"] = tuned.every_n_layers
        checkpointing = {
            "activation_checkpointing": True,
            "activation_checkpointing_kwargs": kwargs,
        }
    return {
        **tuned.trainer,
        "output_dir": OUTPUT,
        **save_strategy(tuned),
        **checkpointing,
        "disable_tqdm": False,
        **({"use_cpu": True} if tuned.on_cpu else {}),
    }


def _quantisation(lora: Lora | None, dtype: str) -> str:
    if lora is None or not lora.quantised:
        return ""
    return f"""
from deepspeed.accelerator import get_accelerator
from transformers import BitsAndBytesConfig

QUANTISED = {{
    "quantization_config": BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.{dtype},
    ),
    "device_map": {{"": get_accelerator().current_device_name()}},
}}
"""


def _adapters(lora: Lora | None) -> str:
    if lora is None:
        return ""
    targets = ALL_LINEAR if ALL_LINEAR in lora.targets else list(lora.targets)
    return f"""    from peft import LoraConfig, get_peft_model

    model = get_peft_model(
        model,
        LoraConfig(
            task_type="CAUSAL_LM",
            r={lora.rank},
            lora_alpha={lora.alpha},
            lora_dropout={lora.dropout},
            target_modules={targets!r},
        ),
        autocast_adapter_dtype=False,
    )
"""


_SCRIPT = '''"""Fine-tunes a model with transformers' Trainer; run.sh starts it on every device."""

import json

import deepspeed
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments, set_seed
{quantisation}
MODEL = {model}
TRUST = {trust_remote_code}

ARGUMENTS = {arguments}


class Rows(torch.utils.data.Dataset):
    """Tokenised rows, one JSON object a line; only where the lines start is kept in memory."""

    def __init__(self, path):
        self.path = path
        self.starts = []
        with open(path, "rb") as file:
            while line := file.readline():
                self.starts.append(file.tell() - len(line))

    def __len__(self):
        return len(self.starts)

    def __getitem__(self, index):
        with open(self.path, "rb") as file:
            file.seek(self.starts[index])
            return json.loads(file.readline())


PADDING = {{"input_ids": 0, "labels": -100, "attention_mask": 0}}


def pad(rows):
    """Pad the rows of a micro-batch on the right to the longest of them.

    Packed rows have positions in place of a mask: what is numbered anew is kept apart, the padding
    too.
    """
    longest = max(len(row["input_ids"]) for row in rows)
    batch = {{}}
    for name in rows[0]:
        padded = []
        for row in rows:
            missing = longest - len(row[name])
            filling = list(range(missing)) if name == "position_ids" else [PADDING[name]] * missing
            padded.append(row[name] + filling)
        batch[name] = torch.tensor(padded)
    return batch


def main():
    # Under ZeRO 3 the model is sharded as it is built, if ranks and arguments exist before it.
    deepspeed.init_distributed()
    arguments = TrainingArguments(deepspeed="{ds_config}", **ARGUMENTS)
    set_seed(arguments.seed)
    model = AutoModelForCausalLM.from_pretrained(
        MODEL,
        dtype=torch.{dtype},
        attn_implementation={attention},
        trust_remote_code=TRUST,{quantised}
    )
    model.config.use_cache = False
{adapters}    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=Rows("{train_rows}"),
        eval_dataset={evaluation},
        data_collator=pad,
    )
    trainer.train()
    trainer.save_model()
    if trainer.is_world_process_zero():
        tokenizer = AutoTokenizer.from_pretrained(MODEL, trust_remote_code=TRUST)
        tokenizer.save_pretrained(arguments.output_dir)


if __name__ == "__main__":
    main()
'''
