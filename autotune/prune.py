"""Which settings are worth a probe for their speed, where the memory estimate leaves them.

Checkpointing every n-th layer lies between none and all of them in memory and in speed. At the same
micro-batch size what recomputes less is faster, so such a setting can only win where less does not
fit, and by no more than what is saved.
"""

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from autotune.space import CHECKPOINTING_MODES, Space

Bools = NDArray[np.bool_]
Floats = NDArray[np.float64]


def outdone(space: Space, surely_fits: Bools, tokens_per_s: Floats) -> Bools:
    """Tell which settings checkpoint every n-th layer only to be slower than one that fits.

    Such a setting is held against those of the same structure with other checkpointing, at any
    micro-batch size: the estimates of all of them err alike in everything else.
    """
    between: Bools = ~np.isin(space.column("checkpointing"), CHECKPOINTING_MODES)
    if not between.any():
        return between
    slower: Bools = tokens_per_s < best_beside(space, surely_fits, tokens_per_s)
    return between & slower


def has_place_between(
    space: Space, surely_fits: Bools, may_fit: Bools, tokens_per_s: Floats
) -> bool:
    """Tell whether checkpointing every n-th layer may win in a space of none and all of them.

    It may where a setting without it may not fit and with it may, and the one without, which is
    faster than any in between, would be the fastest of its structure.
    """
    modes = space.column("checkpointing")
    places = np.stack([_variants(space), space.micro_batch_size])
    faster = tokens_per_s > best_beside(space, surely_fits, tokens_per_s)
    wanted = places[:, (modes == "none") & ~surely_fits & faster]
    there = places[:, (modes == "full") & may_fit]
    return not set(map(tuple, wanted.T.tolist())).isdisjoint(map(tuple, there.T.tolist()))


def best_beside(space: Space, surely_fits: Bools, tokens_per_s: Floats) -> Floats:
    """Return for each setting the best speed that fits, its structure checkpointed in any way."""
    variants = _variants(space)
    best = np.zeros(int(variants.max(initial=0)) + 1)
    np.maximum.at(best, variants[surely_fits], tokens_per_s[surely_fits])
    return best[variants]


def _variants(space: Space) -> NDArray[np.int64]:
    """Return a number for each setting, the same for structures that differ in checkpointing."""
    keys = [replace(structure, checkpointing="none").key() for structure in space.structures]
    numbers: NDArray[np.int64] = np.unique(keys, return_inverse=True)[1]
    return numbers[space.structure_index]
