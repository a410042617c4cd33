"""Which rows a micro-batch takes: the rows of a step are the same however the step is split."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from transformers.trainer_pt_utils import BatchRebalanceSampler

REBALANCE = "batch_rebalance"


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
