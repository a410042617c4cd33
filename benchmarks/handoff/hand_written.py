"""A training loop as one would write it by hand around deepspeed.initialize, a rank of it.

Reads the emitted ds_config.json and the rows of train_args.json; writes the seconds of each step.
"""

import argparse
import json
import os
import time
from pathlib import Path

import deepspeed
import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from autotune.dataset.rows import Rows


def batch_of(rows: Rows, chosen: list[int]) -> dict[str, torch.Tensor]:
    longest = max(len(rows[row][0]) for row in chosen)
    ids = torch.zeros(len(chosen), longest, dtype=torch.int64)
    labels, mask = torch.full_like(ids, -100), torch.zeros_like(ids)
    for place, row in enumerate(chosen):
        tokens, trained = (torch.tensor(one.copy()) for one in rows[row])
        ids[place, : len(tokens)] = tokens
        labels[place, : len(tokens)] = tokens.long().where(trained, -100)
        mask[place, : len(tokens)] = 1
    return {"input_ids": ids, "labels": labels, "attention_mask": mask}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    ds_config = json.loads(Path("ds_config.json").read_text())
    spec = json.loads(Path("train_args.json").read_text())
    torch.set_num_threads(spec["threads_per_rank"])
    deepspeed.init_distributed()
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(spec["model_dir"])
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    engine, *_ = deepspeed.initialize(
        model=model, model_parameters=list(model.parameters()), config=ds_config
    )
    engine.train()
    rows = Rows.open(Path(spec["dataset_dir"]))
    order = np.random.default_rng(spec["seed"]).permutation(len(rows))
    size, accumulation = (
        ds_config["train_micro_batch_size_per_gpu"],
        ds_config["gradient_accumulation_steps"],
    )
    seconds = []
    for step in range(options.steps):
        started = time.perf_counter()
        first = step * ds_config["train_batch_size"] % len(order)
        loss = torch.zeros(())
        for turn in range(accumulation):
            at = first + (turn * ranks + rank) * size
            batch = batch_of(
                rows, [int(row) for row in np.take(order, range(at, at + size), mode="wrap")]
            )
            loss = engine(**batch).loss
            engine.backward(loss)
            engine.step()
        # A loop by hand looks at its loss, too.
        loss.item()
        seconds.append(time.perf_counter() - started)
    if rank == 0:
        options.out.write_text(json.dumps(seconds))


if __name__ == "__main__":
    main()
