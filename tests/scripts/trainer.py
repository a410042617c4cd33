"""A training with transformers' Trainer and `--deepspeed ds.json`."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils.data import Dataset
from transformers import (
    HfArgumentParser,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
)


@dataclass
class Own:
    rows: int = 256


class Rows(Dataset[dict[str, torch.Tensor]]):
    def __init__(self, rows: int) -> None:
        self._ids = torch.randint(0, 512, (rows, 48), generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, place: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self._ids[place], "labels": self._ids[place]}


def main() -> None:
    own, arguments = HfArgumentParser((Own, TrainingArguments)).parse_args_into_dataclasses()
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=512,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
        )
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=Rows(own.rows))
    trainer.train()
    if arguments.process_index == 0:
        engine = trainer.model_wrapped
        Path(arguments.output_dir, "done.json").write_text(
            json.dumps(
                {
                    "steps": trainer.state.global_step,
                    "max_steps": trainer.state.max_steps,
                    "global_batch_size": engine.train_batch_size(),
                    "micro_batch_size": engine.train_micro_batch_size_per_gpu(),
                    "zero_stage": engine.zero_optimization_stage(),
                }
            )
        )


if __name__ == "__main__":
    main()
