"""A training with accelerate and a DeepSpeed plugin that the script makes itself."""

import argparse
import json
from pathlib import Path

import torch
from accelerate import Accelerator, DeepSpeedPlugin, InitProcessGroupKwargs
from torch.utils.data import DataLoader, TensorDataset
from transformers import LlamaConfig, LlamaForCausalLM


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--per_device_train_batch_size", type=int, default=2)
    parser.add_argument("--gradient_accumulation_steps", type=int, default=4)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    plugin = DeepSpeedPlugin(
        zero_stage=2, gradient_accumulation_steps=options.gradient_accumulation_steps
    )
    # Without GPUs accelerate counts one process unless it is told how they talk.
    on_cpu = [] if torch.cuda.is_available() else [InitProcessGroupKwargs(backend="gloo")]
    accelerator = Accelerator(
        gradient_accumulation_steps=options.gradient_accumulation_steps,
        deepspeed_plugin=plugin,
        kwargs_handlers=on_cpu,
    )
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
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    rows = TensorDataset(torch.randint(0, 512, (256, 48)))
    loader = DataLoader(rows, batch_size=options.per_device_train_batch_size)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    steps = 0
    while steps < options.steps:
        for (ids,) in loader:
            with accelerator.accumulate(model):
                loss = model(input_ids=ids, labels=ids).loss
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
            steps += accelerator.sync_gradients
            if steps >= options.steps:
                break
    if accelerator.is_main_process:
        options.out.write_text(
            json.dumps(
                {
                    "steps": steps,
                    "global_batch_size": model.train_batch_size(),
                    "micro_batch_size": model.train_micro_batch_size_per_gpu(),
                    "zero_stage": model.zero_optimization_stage(),
                }
            )
        )


if __name__ == "__main__":
    main()
