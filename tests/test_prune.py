"""Checkpointing every n-th layer is in the space only where it can win."""

from dataclasses import dataclass

import numpy as np
import pytest
from numpy.typing import NDArray
from records import make_cluster

from autotune.prune import Outdone, has_place_between
from autotune.space import CHECKPOINTING_MODES, Space, enumerate_space

RECOMPUTED = {"none": 0.0, "every-4": 0.25, "every-2": 0.5, "full": 1.0}
TOLERANCE = 1.15


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimates:
    """A space whose bytes fall and whose times rise with the share that is recomputed."""

    space: Space
    needs: NDArray[np.float64]
    tokens_per_s: NDArray[np.float64]
    budget: float

    @classmethod
    def of(cls, *modes: str, budget: float) -> "Estimates":
        space = enumerate_space(make_cluster(gpus=4), 128, checkpointing_modes=modes)
        share = np.array([RECOMPUTED[mode] for mode in space.column("checkpointing").tolist()])
        stage = space.column("zero_stage").astype(float)
        rows = space.micro_batch_size
        return cls(
            space=space,
            needs=16 / (1 + stage) + rows * (1 - 0.8 * share),
            tokens_per_s=1000 * rows / (rows * (1 + share / 3) + 2 + stage),
            budget=budget,
        )

    @property
    def surely_fits(self) -> NDArray[np.bool_]:
        return TOLERANCE * self.needs <= self.budget

    @property
    def may_fit(self) -> NDArray[np.bool_]:
        return self.needs <= TOLERANCE * self.budget

    @property
    def outdone(self) -> NDArray[np.bool_]:
        return Outdone.of(self.space, self.surely_fits, self.tokens_per_s).any_rule

    @property
    def has_place_between(self) -> bool:
        return has_place_between(self.space, self.surely_fits, self.may_fit, self.tokens_per_s)

    @property
    def between(self) -> NDArray[np.bool_]:
        return ~np.isin(self.space.column("checkpointing"), CHECKPOINTING_MODES)


@pytest.mark.parametrize("budget", [1.0, 1000.0], ids=["nothing fits", "everything fits"])
def test_there_is_no_place_between_where_there_is_no_choice(budget: float) -> None:
    assert not Estimates.of("none", "full", budget=budget).has_place_between


def test_where_everything_fits_all_between_are_outdone() -> None:
    everything = Estimates.of(*RECOMPUTED, budget=1000.0)
    assert (everything.outdone == everything.between).all()


@pytest.mark.parametrize("budget", [12.0, 20.0, 30.0])
def test_what_is_not_outdone_is_faster_than_all_of_its_structure_that_fit(budget: float) -> None:
    tight = Estimates.of(*RECOMPUTED, budget=budget)
    left = np.flatnonzero(tight.between & tight.may_fit & ~tight.outdone)

    assert Estimates.of("none", "full", budget=budget).has_place_between
    assert 0 < len(left) < (tight.between & tight.may_fit).sum() / 2
    for row in left.tolist():
        one = tight.space.setting(row).structure
        beside = [
            other
            for other in np.flatnonzero(tight.surely_fits).tolist()
            if tight.space.setting(other).structure.zero_stage == one.zero_stage
            and tight.space.setting(other).structure.offload_optimizer == one.offload_optimizer
        ]
        assert tight.tokens_per_s[row] >= tight.tokens_per_s[beside].max(initial=0.0)


@pytest.mark.parametrize("budget", [12.0, 20.0, 30.0])
def test_the_fastest_that_fits_is_never_outdone(budget: float) -> None:
    tight = Estimates.of(*RECOMPUTED, budget=budget)
    speed = np.where(tight.may_fit, tight.tokens_per_s, 0.0)
    assert not tight.outdone[np.argmax(speed)]


def test_none_and_all_layers_are_never_outdone() -> None:
    tight = Estimates.of(*RECOMPUTED, budget=20.0)
    assert not (tight.outdone & ~tight.between).any()
