"""Which settings are worth a probe for their speed, where the memory estimate leaves them.

Checkpointing every n-th layer lies between none and all of them in memory and in speed. At the same
micro-batch size what recomputes less is faster, so such a setting can only win where less does not
fit, and by no more than what is saved. So it is with knobs that do nothing but save memory.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from operator import attrgetter

import numpy as np
from numpy.typing import NDArray

from autotune.setting import BY_MODEL, DEFAULT_PERSISTENCE_THRESHOLD, Structure
from autotune.space import CHECKPOINTING_MODES, Space

Bools = NDArray[np.bool_]
Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Outdone:
    """Settings that are slower than one beside them that fits, and have nothing else to offer.

    Each is held against the settings that differ from it only in how they save memory, at any
    micro-batch size: the estimates of all of them err alike in everything else.

    Attributes:
        partial_checkpointing: of those that checkpoint every n-th layer.
        memory_saving: of those that turn a knob only to save memory (`frugality`).
        best: the best speed that fits beside each.
    """

    partial_checkpointing: Bools
    memory_saving: Bools
    best: Floats

    @classmethod
    def of(cls, space: Space, surely_fits: Bools, tokens_per_s: Floats) -> "Outdone":
        between: Bools = ~np.isin(space.column("checkpointing"), CHECKPOINTING_MODES)
        saves = saves_memory(space)
        if not (between.any() or saves.any()):
            return cls(partial_checkpointing=between, memory_saving=saves, best=tokens_per_s)
        best = best_beside(space, surely_fits, tokens_per_s)
        slower = tokens_per_s < best
        return cls(partial_checkpointing=between & slower, memory_saving=saves & slower, best=best)

    @property
    def any_rule(self) -> Bools:
        """Whether a setting is outdone by any of the rules."""
        return self.partial_checkpointing | self.memory_saving


def has_place_between(
    space: Space, surely_fits: Bools, may_fit: Bools, tokens_per_s: Floats
) -> bool:
    """Tell whether checkpointing every n-th layer may win in a space of none and all of them.

    It may where a setting without it may not fit and with it may, and the one without, which is
    faster than any in between, would be the fastest of its structure.
    """
    modes = space.column("checkpointing")
    places = np.stack([variants(space), space.micro_batch_size])
    faster = tokens_per_s > best_beside(space, surely_fits, tokens_per_s)
    wanted = places[:, (modes == "none") & ~surely_fits & faster]
    there = places[:, (modes == "full") & may_fit]
    return not set(map(tuple, wanted.T.tolist())).isdisjoint(map(tuple, there.T.tolist()))


def best_beside(space: Space, surely_fits: Bools, tokens_per_s: Floats) -> Floats:
    """Return for each setting the best speed that fits, however its structure saves memory."""
    family = _numbered(space, _FAMILY)[space.structure_index]
    best = np.zeros(int(family.max(initial=0)) + 1)
    np.maximum.at(best, family[surely_fits], tokens_per_s[surely_fits])
    return best[family]


def variants(space: Space) -> NDArray[np.int64]:
    """Return a number for each setting, the same for structures that differ in checkpointing."""
    return _numbered(space, _VARIANT)[space.structure_index]


def saves_memory(space: Space) -> Bools:
    """Tell which settings turn more knobs to save memory than others that are alike in the rest."""
    turned = np.array(list(map(frugality, space.structures)))
    family = _numbered(space, _FAMILY)
    least = np.full(int(family.max(initial=0)) + 1, turned.max(initial=0))
    np.minimum.at(least, family, turned)
    saves: Bools = turned > least[family]
    return saves[space.structure_index]


_PLAIN = {
    "reduce_bucket_size": BY_MODEL,
    "stage3_param_persistence_threshold": DEFAULT_PERSISTENCE_THRESHOLD,
    "offload_param": "none",
}
"""Knobs that do nothing but save memory, and their values that save none."""


def frugality(structure: Structure) -> int:
    """Count the knobs that are turned to save memory and cost time for it.

    Offloading the optimizer is none of them: what it saves, it saves many times over.
    """
    return sum(getattr(structure, knob) != plain for knob, plain in _PLAIN.items())


_VARIANT = attrgetter(*(one.name for one in fields(Structure) if one.name != "checkpointing"))
_FAMILY = attrgetter(
    *(one.name for one in fields(Structure) if one.name not in {"checkpointing", *_PLAIN})
)


def _numbered(space: Space, key: Callable[[Structure], object]) -> NDArray[np.int64]:
    """Return a number for each structure, the same for those of the same key."""
    numbers: dict[object, int] = {}
    found = [numbers.setdefault(key(one), len(numbers)) for one in space.structures]
    return np.array(found, dtype=np.int64)
