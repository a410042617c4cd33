r"""A plain DeepSpeed training, as DeepSpeed's autotuner asks for: the micro-batch is the config's.

    deepspeed --num_gpus 2 plain_script.py --deepspeed --deepspeed_config ds.json \
        --model DIR --dataset DIR

The rows, the padding and the loss are those that autotune trains with.
"""

import argparse
import itertools
from pathlib import Path

import deepspeed
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from autotune.dataset.rows import Rows
from autotune.engine.batches import PaddingCollator, RowDataset


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--local_rank", type=int, default=0)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--dataset", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=60)
    deepspeed.add_config_arguments(parser)
    options = parser.parse_args()
    deepspeed.init_distributed()
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    engine, _, loader, _ = deepspeed.initialize(
        args=options,
        model=model,
        model_parameters=model.parameters(),
        training_data=RowDataset(Rows.open(options.dataset)),
        collate_fn=PaddingCollator(0),
    )
    micro_steps = options.steps * engine.gradient_accumulation_steps()
    batches = itertools.chain.from_iterable(itertools.repeat(loader))
    for batch in itertools.islice(batches, micro_steps):
        loss = engine(**{name: tensor.to(engine.device) for name, tensor in batch.items()}).loss
        engine.backward(loss)
        engine.step()


if __name__ == "__main__":
    main()
