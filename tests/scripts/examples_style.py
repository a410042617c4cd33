"""A training with arguments as DeepSpeed's examples have them: the config is made of them."""

import argparse
import json
from pathlib import Path

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset
from transformers import LlamaConfig, LlamaForCausalLM


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--per_device_train_batch_size", type=int, default=2)
    parser.add_argument("--gradient_accumulation_steps", type=int, default=1)
    parser.add_argument("--num_train_epochs", type=int, default=1)
    parser.add_argument("--zero_stage", type=int, default=0)
    parser.add_argument("--local_rank", type=int, default=-1)
    parser.add_argument("--output_dir", type=Path, required=True)
    deepspeed.add_config_arguments(parser)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    if args.local_rank == -1:
        msg = "start this with the deepspeed launcher"
        raise SystemExit(msg)
    get_accelerator().set_device(args.local_rank)
    deepspeed.init_distributed()
    args.global_rank = torch.distributed.get_rank()
    torch.manual_seed(0)
    config = {
        "train_batch_size": args.per_device_train_batch_size
        * torch.distributed.get_world_size()
        * args.gradient_accumulation_steps,
        "train_micro_batch_size_per_gpu": args.per_device_train_batch_size,
        "steps_per_print": 1000,
        "zero_optimization": {"stage": args.zero_stage},
        "gradient_clipping": 1.0,
    }
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=512,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
        )
    )
    rows = TensorDataset(torch.randint(0, 512, (256, 48)))
    loader = DataLoader(
        rows, sampler=DistributedSampler(rows), batch_size=args.per_device_train_batch_size
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model, optimizer, _, _ = deepspeed.initialize(
        model=model, optimizer=optimizer, args=args, config=config, dist_init_required=True
    )
    for _ in range(args.num_train_epochs):
        model.train()
        for (batch,) in loader:
            ids = batch.to(model.device)
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            model.backward(loss)
            model.step()
    if args.global_rank == 0:
        args.output_dir.mkdir(parents=True, exist_ok=True)
        (args.output_dir / "done.json").write_text(
            json.dumps(
                {
                    "steps": model.global_steps,
                    "global_batch_size": model.train_batch_size(),
                    "micro_batch_size": model.train_micro_batch_size_per_gpu(),
                    "zero_stage": model.zero_optimization_stage(),
                }
            )
        )


if __name__ == "__main__":
    main()
