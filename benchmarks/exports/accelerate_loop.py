"""A loop of a user's own, for accelerate: what an export to accelerate is started with."""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from transformers import AutoModelForCausalLM


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("rows", type=Path, help="of an export, one JSON object a line")
    parser.add_argument("--micro-batch-size", type=int, default=1)
    parser.add_argument("--steps", type=int, default=2)
    options = parser.parse_args()
    accelerator = Accelerator()
    model = AutoModelForCausalLM.from_pretrained(options.model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    rows = [json.loads(line) for line in options.rows.read_text().splitlines()]
    loader: Any = torch.utils.data.DataLoader(
        rows,  # type: ignore[arg-type] # a list is a map-style dataset
        batch_size=options.micro_batch_size,
        collate_fn=_pad,
        drop_last=True,
    )
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    taken = 0
    for batch in loader:
        with accelerator.accumulate(model):
            loss = model(**batch).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients:
            taken += 1
            accelerator.print(f"step {taken}: loss {loss.item():.4f}")
        if taken == options.steps:
            break
    accelerator.end_training()


def _pad(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    fillings = {"input_ids": 0, "labels": -100, "attention_mask": 0}
    longest = max(len(row["input_ids"]) for row in rows)
    return {
        name: torch.tensor([row[name] + [filling] * (longest - len(row[name])) for row in rows])
        for name, filling in fillings.items()
    }


if __name__ == "__main__":
    main()
