"""Chooses the rows that a rung is tried on, from the lengths of the dataset."""

import numpy as np

from autotune.probe.protocol import RungPlan
from autotune.setting import Setting
from autotune.throughput import DrawnRows, Floats, Ints, Rebalanced, evaluate, padded_lengths
from autotune.workload import Polynomial


class RungPlanner:
    """Plans the rungs of one dataset, whose rows it sorts once.

    Args:
        rows: as a training draws them.
        flops: of a pass, by which micro-batches of unlike many rows are held against each other.
    """

    def __init__(self, rows: DrawnRows, flops: Polynomial) -> None:
        self._rows = rows
        self._flops = flops
        self._by_length = np.argsort(rows.lengths, kind="stable")
        self._ascending = rows.lengths[self._by_length]

    def plan(self, setting: Setting) -> RungPlan:
        """Plan a rung: memory on the largest micro-batch, time on such as training draws.

        Where each has as many rows, times are taken at the shortest, the median and the longest
        padded length of theirs; else on those of the least, the median and the most work.
        """
        steps = setting.gradient_accumulation_steps
        rebalanced = self._rows.of_sampling(setting.structure.sampling, steps)
        memory_rows, timed_rows = (
            self._alike(setting.micro_batch_size)
            if rebalanced is None
            else self._unlike(rebalanced)
        )
        return RungPlan(
            micro_batch_size=setting.micro_batch_size,
            gradient_accumulation_steps=steps,
            memory_rows=memory_rows,
            timed_rows=timed_rows,
        )

    def work(self, sizes: int | Ints, lengths: Ints) -> Floats:
        """Return what micro-batches of so many rows of these padded lengths take to compute."""
        return evaluate(self._flops, sizes, lengths)

    def _alike(self, size: int) -> tuple[tuple[int, ...], tuple[tuple[int, tuple[int, ...]], ...]]:
        """Return the rows to fill memory with and those to time, all micro-batches of one size."""
        padded = padded_lengths(self._rows, size)
        longest = int(self._ascending[-1])
        targets = (int(padded.min()), int(np.median(padded)), longest)
        timed = sorted({self._existing(target) for target in targets})
        return (
            self._rows_up_to(longest, size),
            tuple((target, self._rows_up_to(target, size)) for target in timed),
        )

    def _unlike(
        self, rebalanced: Rebalanced
    ) -> tuple[tuple[int, ...], tuple[tuple[int, tuple[int, ...]], ...]]:
        """Return the same of micro-batches as they are drawn, and not put together anew."""
        sizes = rebalanced.sizes.ravel()
        padded = self._rows.padded(rebalanced).ravel()
        work = self.work(sizes, padded)
        by_work = np.argsort(work, kind="stable")
        chosen = by_work[[0, (len(by_work) - 1) // 2, -1]]
        batches = np.split(rebalanced.rows, np.cumsum(sizes)[:-1])
        # Of several that take the same work one is enough.
        distinct = {float(work[place]): int(place) for place in chosen}
        return (
            tuple(rebalanced.heaviest.tolist()),
            tuple(
                (int(padded[place]), tuple(batches[place].tolist())) for place in distinct.values()
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
