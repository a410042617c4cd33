"""A training with deepspeed.initialize alone: batches are as large as the DeepSpeed config says."""

import argparse
import json
import sys
from pathlib import Path

import deepspeed
import torch
from transformers import LlamaConfig, LlamaForCausalLM


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--ds-config", default="ds.json")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    config = json.loads(Path(options.ds_config).read_text())
    deepspeed.init_distributed()
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
    rows = torch.randint(0, 512, (256, 48))
    engine, _, loader, _ = deepspeed.initialize(
        model=model, model_parameters=model.parameters(), training_data=list(rows), config=config
    )
    while engine.global_steps < options.steps:
        for batch in loader:
            ids = batch.to(engine.device)
            loss = engine(input_ids=ids, labels=ids).loss
            engine.backward(loss)
            engine.step()
            if engine.global_steps >= options.steps:
                break
    if torch.distributed.get_rank() == 0:
        options.out.write_text(
            json.dumps(
                {
                    "steps": engine.global_steps,
                    "samples": engine.global_samples,
                    "global_batch_size": engine.train_batch_size(),
                    "micro_batch_size": engine.train_micro_batch_size_per_gpu(),
                    "zero_stage": engine.zero_optimization_stage(),
                }
            )
        )
        sys.stdout.write("trained to the end\n")


if __name__ == "__main__":
    main()
