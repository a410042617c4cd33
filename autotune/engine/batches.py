"""Rows of the dataset as padded batches."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from autotune.dataset.rows import Rows

IGNORED = -100
"""The label that transformers' and torch's losses leave out."""


class RowDataset(torch.utils.data.Dataset[dict[str, Any]]):
    """Some of the memory-mapped rows, all unless `chosen`, as a map-style dataset.

    Index `~i` is row i without a trained token.
    """

    def __init__(self, rows: Rows, chosen: NDArray[np.int64] | None = None) -> None:
        self.rows = rows
        self._chosen = np.arange(len(rows)) if chosen is None else chosen

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each row."""
        return self.rows.lengths[self._chosen]

    def __len__(self) -> int:
        return len(self._chosen)

    def __getitem__(self, index: int) -> dict[str, Any]:
        place = int(self._chosen[max(index, ~index)])
        input_ids, trained = self.rows[place]
        row = {"input_ids": input_ids, "trained": trained if index >= 0 else trained & False}
        if self.rows.packed:
            row["position_ids"] = self.rows.position_ids(place)
        return row


class PaddingCollator:
    """Pads the rows of a micro-batch on the right to the longest of them."""

    def __init__(self, pad_token_id: int) -> None:
        self.pad_token_id = pad_token_id

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Return input_ids, labels and attention_mask, each of shape [rows, longest row].

        Packed rows have position_ids in place of the mask: transformers' models keep apart what
        they number from 0 anew, the padding at the end of a row included, if there is no mask.
        """
        shape = (len(rows), max(len(row["input_ids"]) for row in rows))
        packed = "position_ids" in rows[0]
        input_ids = torch.full(shape, self.pad_token_id, dtype=torch.int64)
        labels = torch.full(shape, IGNORED, dtype=torch.int64)
        beside = torch.zeros(shape, dtype=torch.int64)
        for place, row in enumerate(rows):
            ids = torch.tensor(row["input_ids"], dtype=torch.int64)
            trained = torch.tensor(row["trained"], dtype=torch.bool)
            input_ids[place, : len(ids)] = ids
            labels[place, : len(ids)] = ids.where(trained, IGNORED)
            if packed:
                positions = torch.tensor(row["position_ids"], dtype=torch.int64)
                # The first token of a sequence is predicted from the one before it in the row.
                labels[place, : len(ids)].masked_fill_(positions == 0, IGNORED)
                beside[place, : len(ids)] = positions
                beside[place, len(ids) :] = torch.arange(shape[1] - len(ids))
            else:
                beside[place, : len(ids)] = 1
        name = "position_ids" if packed else "attention_mask"
        return {"input_ids": input_ids, name: beside, "labels": labels}
