"""Which rows a micro-batch takes: the rows of a step are the same however the step is split."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from transformers.trainer_pt_utils import BatchRebalanceSampler

from autotune.throughput import Ints, Rebalanced

_MOST_ROWS_DRAWN = 2**15
"""The sampler takes 0.1 ms for a step of 32 rows, and up to 15 ms for one of 1024."""

_HEAVIEST_STEPS = 32
_MOST_ROWS_LOOKED_AT = 2**24


@dataclass(frozen=True, slots=True, kw_only=True)
class StepShape:
    """What a step takes, all ranks together.

    Attributes:
        tokens: of its rows, without padding.
        longest_row: in tokens.
        largest_micro_batch: in padded tokens.
    """

    tokens: int
    longest_row: int
    largest_micro_batch: int


class GlobalBatches(BatchRebalanceSampler):
    """Yields the micro-batches of one rank; each optimizer step has `accumulation` of them.

    The order of the rows follows from seed and epoch alone, a step takes the next global batch of
    it, and only then is that split over ranks and micro-batches: evenly in the drawn order, or with
    `rebalance` as transformers' sampler does, by length. So neither changes what a step learns. The
    last batch of an epoch may have fewer rows; where it has too few for every micro-batch, one row
    is repeated as `~row`, which the dataset gives without a trained token.

    It is that sampler's subclass because the Trainer takes this kind as aware of its rank.
    """

    def __init__(
        self,
        lengths: NDArray[np.int64],
        *,
        global_batch_size: int,
        ranks: int,
        rank: int,
        accumulation: int,
        seed: int,
        rebalance: bool,
    ) -> None:
        super().__init__(
            lengths=lengths.tolist(),
            effective_batch_size=global_batch_size,
            dp_size=ranks,
            grad_accum=accumulation,
            seed=seed,
            rank=rank,
            drop_last=False,
        )
        self._rebalance = rebalance
        self._ordered: tuple[int, NDArray[np.int64]] | None = None

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self._steps_per_epoch):
            yield from self._split(self.rows_of(self.epoch, step))[self.rank]

    def rows_of(self, epoch: int, step: int) -> list[int]:
        """Return the rows of an optimizer step of an epoch, both counted from 0."""
        first = step * self.effective_batch_size
        rows: list[int] = self._order(epoch)[first : first + self.effective_batch_size].tolist()
        return rows

    def shape_of(self, step: int) -> StepShape:
        """Return the shape of a step, counted from the start of the training.

        Every rank knows it of all of them, without asking.
        """
        rows = self.rows_of(*divmod(step, self._steps_per_epoch))
        lengths = [self.lengths[row] for row in rows]
        micro_batches = [batch for rank in self._split(rows) for batch in rank]
        return StepShape(
            tokens=sum(lengths),
            longest_row=max(lengths),
            largest_micro_batch=max(
                len(batch) * max(self.lengths[max(row, ~row)] for row in batch)
                for batch in micro_batches
            ),
        )

    def drawn(self, epochs: int) -> Rebalanced:
        """Return the steps that are drawn first, and the heaviest micro-batch of so many epochs.

        That is looked for in these steps and in those of the longest rows, as micro-batches of a
        step are about as heavy.
        """
        rows, whole = len(self.lengths), max(1, self.num_full_batches)
        steps = range(min(whole, max(1, _MOST_ROWS_DRAWN // self.effective_batch_size)))
        first = [self._micro_batches(0, step) for step in steps]
        epochs = min(epochs, max(1, _MOST_ROWS_LOOKED_AT // rows))
        heavy = (
            batch
            for epoch in range(epochs)
            for step in self._heaviest_steps(epoch)
            for batch in self._micro_batches(epoch, step)
        )
        drawn = [batch for batches in first for batch in batches]
        return Rebalanced(
            rows=np.concatenate(drawn),
            sizes=np.array(list(map(len, drawn))).reshape(-1, self.grad_accum, self.dp_size),
            heaviest=max((*drawn, *heavy), key=self._padded_tokens),
        )

    def _heaviest_steps(self, epoch: int) -> list[int]:
        """Return the steps of an epoch whose rows would cost most, each by itself."""
        lengths = np.array(self.lengths)[self._order(epoch)]
        costs = self._cost(1, lengths)
        of_steps = np.add.reduceat(costs, np.arange(0, len(costs), self.effective_batch_size))
        heaviest: list[int] = np.argsort(-of_steps)[:_HEAVIEST_STEPS].tolist()
        return heaviest

    def _micro_batches(self, epoch: int, step: int) -> list[Ints]:
        """Return the micro-batches of a step, those of all ranks of a micro-step side by side."""
        by_rank = self._split(self.rows_of(epoch, step))
        return [
            np.array([max(row, ~row) for row in batch])
            for micro_step in zip(*by_rank, strict=True)
            for batch in micro_step
        ]

    def _padded_tokens(self, batch: Ints) -> int:
        longest: int = max(self.lengths[row] for row in batch)
        return len(batch) * longest

    @property
    def _steps_per_epoch(self) -> int:
        return -(-len(self.lengths) // int(self.effective_batch_size))

    def _order(self, epoch: int) -> NDArray[np.int64]:
        if self._ordered is None or self._ordered[0] != epoch:
            # The order that a plan's predicted times are integrated over, in the first epoch.
            order = np.random.default_rng(self.seed + epoch).permutation(len(self.lengths))
            self._ordered = epoch, order
        return self._ordered[1]

    def _split(self, rows: list[int]) -> Sequence[Sequence[list[int]]]:
        """Return the micro-batches of each rank."""
        groups = self.dp_size * self.grad_accum
        rows = rows + [~rows[0]] * max(0, groups - len(rows))
        if self._rebalance:
            balanced: list[list[list[int]]] = self._assign(
                rows, [self.lengths[max(row, ~row)] for row in rows]
            )
            return balanced
        parts = [part.tolist() for part in np.array_split(rows, groups)]
        # Ranks take micro-batches in turn.
        return [parts[rank :: self.dp_size] for rank in range(self.dp_size)]


def rebalanced(
    lengths: Ints,
    *,
    global_batch_size: int,
    ranks: int,
    accumulations: Iterable[int],
    seed: int,
    epochs: int,
) -> dict[int, Rebalanced]:
    """Return what `batch_rebalance` makes of the rows, for each number of micro-steps."""
    return {
        accumulation: GlobalBatches(
            lengths,
            global_batch_size=global_batch_size,
            ranks=ranks,
            rank=0,
            accumulation=accumulation,
            seed=seed,
            rebalance=True,
        ).drawn(epochs)
        for accumulation in accumulations
    }
