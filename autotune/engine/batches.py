"""Rows of the dataset as padded batches."""

from collections.abc import Sequence
from typing import Any

import torch

from autotune.dataset.rows import Rows

IGNORED = -100
"""The label that transformers' and torch's losses leave out."""


class RowDataset(torch.utils.data.Dataset[dict[str, Any]]):
    """The memory-mapped rows as a map-style dataset."""

    def __init__(self, rows: Rows) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        input_ids, trained = self.rows[index]
        return {"input_ids": input_ids, "trained": trained}


class PaddingCollator:
    """Pads the rows of a micro-batch on the right to the longest of them."""

    def __init__(self, pad_token_id: int) -> None:
        self.pad_token_id = pad_token_id

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Return input_ids, attention_mask and labels, each of shape [rows, longest row]."""
        shape = (len(rows), max(len(row["input_ids"]) for row in rows))
        input_ids = torch.full(shape, self.pad_token_id, dtype=torch.int64)
        attention_mask = torch.zeros(shape, dtype=torch.int64)
        labels = torch.full(shape, IGNORED, dtype=torch.int64)
        for place, row in enumerate(rows):
            ids = torch.tensor(row["input_ids"], dtype=torch.int64)
            trained = torch.tensor(row["trained"], dtype=torch.bool)
            input_ids[place, : len(ids)] = ids
            attention_mask[place, : len(ids)] = 1
            labels[place, : len(ids)] = ids.where(trained, IGNORED)
        return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
