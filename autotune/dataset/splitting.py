"""Rows that are held out of the training to evaluate on."""

import numpy as np
from numpy.typing import NDArray

_STREAM = 7919


def num_held_out(num_rows: int, eval_share: float) -> int:
    """Return how many rows are held out: at least one of a share above zero, never all."""
    return min(num_rows - 1, max(1, round(eval_share * num_rows))) if eval_share else 0


def split_rows(
    num_rows: int, eval_share: float, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the rows to train on and those to evaluate on, each ascending."""
    held_out = num_held_out(num_rows, eval_share)
    order = np.random.default_rng((seed, _STREAM)).permutation(num_rows)
    return np.sort(order[held_out:]), np.sort(order[:held_out])
