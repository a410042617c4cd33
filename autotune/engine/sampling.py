"""Which rows a micro-batch takes: the rows of a step are the same however the step is split."""

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray
from transformers.trainer_pt_utils import BatchRebalanceSampler

REBALANCE = "batch_rebalance"


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

    def __iter__(self) -> Iterator[list[int]]:
        for rows in self.steps(self.epoch):
            yield from self._split(rows)[self.rank]

    def steps(self, epoch: int) -> Iterator[list[int]]:
        """Yield the rows of each optimizer step of an epoch."""
        # The order that the predicted times of a plan are integrated over, in the first epoch.
        order = np.random.default_rng(self.seed + epoch).permutation(len(self.lengths))
        for first in range(0, len(order), self.effective_batch_size):
            yield order[first : first + self.effective_batch_size].tolist()

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
