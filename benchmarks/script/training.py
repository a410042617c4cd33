r"""A training as users of DeepSpeed's autotuner have it: the micro-batch is the config's.

    torchrun --nproc-per-node 2 training.py --deepspeed --deepspeed_config ds.json --steps 60

`--report FILE` has the seconds of each update written down.
"""

import argparse
import itertools
import json
import time
from pathlib import Path

import deepspeed
import torch
from transformers import LlamaConfig, LlamaForCausalLM


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--local_rank", type=int, default=0)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rows", type=int, default=640)
    parser.add_argument("--length", type=int, default=96)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--report", type=Path)
    deepspeed.add_config_arguments(parser)
    options = parser.parse_args()
    deepspeed.init_distributed()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=options.hidden,
        intermediate_size=3 * options.hidden,
        num_hidden_layers=options.layers,
        num_attention_heads=4,
    )
    model = LlamaForCausalLM(config)
    rows = list(torch.randint(0, config.vocab_size, (options.rows, options.length)))
    engine, _, loader, _ = deepspeed.initialize(
        args=options, model=model, model_parameters=model.parameters(), training_data=rows
    )
    seconds: list[float] = []
    started = time.perf_counter()
    for batch in itertools.chain.from_iterable(itertools.repeat(loader)):
        ids = batch.to(engine.device)
        engine.backward(engine(input_ids=ids, labels=ids).loss)
        steps = engine.global_steps
        engine.step()
        if engine.global_steps > steps:
            seconds.append(time.perf_counter() - started)
            started = time.perf_counter()
        if engine.global_steps >= options.steps:
            break
    if options.report is not None and torch.distributed.get_rank() == 0:
        report = {"batch": engine.train_batch_size(), "seconds": seconds}
        options.report.write_text(json.dumps(report))


if __name__ == "__main__":
    main()
