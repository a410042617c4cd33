"""Chooses the rows that a rung is tried on, from the lengths of the dataset."""

import numpy as np

from autotune.probe.protocol import RungPlan
from autotune.throughput import DrawnRows, padded_lengths


class RungPlanner:
    """Plans the rungs of one dataset, whose rows it sorts once."""

    def __init__(self, rows: DrawnRows) -> None:
        self._rows = rows
        self._by_length = np.argsort(rows.lengths, kind="stable")
        self._ascending = rows.lengths[self._by_length]

    def plan(self, micro_batch_size: int, gradient_accumulation_steps: int) -> RungPlan:
        """Plan a rung: memory on the longest rows, time on rows of the real padded lengths.

        Times are taken at the shortest, the median and the longest padded length of the
        micro-batches that training will draw.
        """
        padded = padded_lengths(self._rows, micro_batch_size)
        longest = int(self._ascending[-1])
        targets = (int(padded.min()), int(np.median(padded)), longest)
        timed = sorted({self._existing(target) for target in targets})
        return RungPlan(
            micro_batch_size=micro_batch_size,
            gradient_accumulation_steps=gradient_accumulation_steps,
            memory_rows=self._rows_up_to(longest, micro_batch_size),
            timed_rows=tuple(
                (target, self._rows_up_to(target, micro_batch_size)) for target in timed
            ),
        )

    def _existing(self, target: int) -> int:
        """Return the longest row length that does not exceed the target."""
        return int(self._ascending[max(0, self._end(target) - 1)])

    def _rows_up_to(self, target: int, micro_batch_size: int) -> tuple[int, ...]:
        """Return the longest rows that a micro-batch padded to `target` can have."""
        end = self._end(target)
        rows = self._by_length[max(0, end - micro_batch_size) : end][::-1]
        # A dataset smaller than the micro-batch repeats its rows.
        return tuple(int(row) for row in np.resize(rows, micro_batch_size))

    def _end(self, target: int) -> int:
        return int(np.searchsorted(self._ascending, target, side="right"))
