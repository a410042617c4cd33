"""Chooses the rows that a rung is tried on, from the lengths of the dataset."""

import numpy as np
from numpy.typing import NDArray

from autotune.probe.protocol import RungPlan
from autotune.throughput import padded_lengths

Lengths = NDArray[np.int64]


def plan_rung(
    lengths: Lengths, order: Lengths, micro_batch_size: int, gradient_accumulation_steps: int
) -> RungPlan:
    """Plan a rung: memory on the longest rows, time on rows of the real padded lengths.

    `order` is the order in which training draws the rows. Times are taken at the shortest, the
    median and the longest padded length of the micro-batches that training will draw.
    """
    by_length = np.argsort(lengths, kind="stable")
    longest = _rows_up_to(lengths, by_length, int(lengths.max()), micro_batch_size)
    padded = padded_lengths(lengths, order, micro_batch_size)
    targets = sorted({int(padded.min()), int(np.median(padded)), int(lengths.max())})
    return RungPlan(
        micro_batch_size=micro_batch_size,
        gradient_accumulation_steps=gradient_accumulation_steps,
        memory_rows=longest,
        timed_rows=tuple(
            (target, _rows_up_to(lengths, by_length, target, micro_batch_size))
            for target in _existing(lengths, targets)
        ),
    )


def _existing(lengths: Lengths, targets: list[int]) -> list[int]:
    """Replace each target by the longest row length that does not exceed it."""
    unique = np.unique(lengths)
    places = np.maximum(np.searchsorted(unique, targets, side="right") - 1, 0)
    return sorted({int(unique[place]) for place in places})


def _rows_up_to(
    lengths: Lengths, by_length: Lengths, target: int, micro_batch_size: int
) -> tuple[int, ...]:
    """Return the longest rows that a micro-batch padded to `target` can have."""
    end = int(np.searchsorted(lengths[by_length], target, side="right"))
    rows = by_length[max(0, end - micro_batch_size) : end][::-1]
    # A dataset smaller than the micro-batch repeats its rows.
    return tuple(int(row) for row in np.resize(rows, micro_batch_size))
