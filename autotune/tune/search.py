"""The search as Optuna sees it: a trial is a structure, its rungs are intermediate values."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.pruners import BasePruner
from optuna.samplers import BaseSampler
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from autotune.outcome import Interrupted, Measured, Rung
from autotune.plan import Plan
from autotune.setting import Setting, Structure
from autotune.tune.beliefs import Beliefs, update

if TYPE_CHECKING:
    from numpy.typing import NDArray

_WORTH_A_PROBE = 0.0005
"""Expected gain over the best, as a share of it, below which no probe is started. Of 48 jobs
whose estimates were off all ended at their best; at 0.01 one of twelve was a quarter short."""

_WORTH_A_RUNG = 0.0005
"""The same for a rung of a running probe."""

OUTCOMES = "outcomes"
"""User attribute of a trial: what each micro-batch size ended in."""


class Search:
    """What is known so far and what follows from it; shared by sampler and pruner."""

    def __init__(self, plan: Plan, rungs: Sequence[Rung]) -> None:
        self.plan = plan
        self.rungs = list(rungs)
        self.default = default_setting(plan)
        self._too_large: list[int] = []
        self.beliefs: Beliefs = update(plan, rungs)

    def learn(self, rung: Rung) -> None:
        self.rungs.append(rung)
        self._update()

    def rule_out(self, row: int) -> None:
        """Take a row of the plan for one that does not fit, and so all that need as much."""
        self._too_large.append(row)
        self._update()

    def _update(self) -> None:
        self.beliefs = update(self.plan, self.rungs, self._too_large)

    @property
    def probed(self) -> list[Structure]:
        """Return the structures that were begun, in order."""
        return list(dict.fromkeys(rung.setting.structure for rung in self.rungs))

    def next_structure(self) -> Structure | None:
        """Return the structure to probe next, or None when no probe is worth it any more.

        A ladder that was cut short, by a stop or a kill, is climbed to its end first. The default
        setting's structure is the first of all, so that the result can say what was gained.
        """
        if (begun := self._cut_short()) is not None:
            return begun
        if self.default.structure not in self.probed:
            return self.default.structure
        improvement = self.beliefs.expected_improvement()
        best = int(np.argmax(improvement))
        if improvement[best] < _WORTH_A_PROBE:
            return None
        return self.plan.space.setting(best).structure

    def _cut_short(self) -> Structure | None:
        """Return the last structure, if a probe of it would not have ended where it did."""
        if not self.rungs or not isinstance(self.rungs[-1].outcome, Measured | Interrupted):
            return None
        last = self.rungs[-1].setting.structure
        return last if self.should_go_on(last) else None

    def ladder(self, structure: Structure) -> list[Setting]:
        """Return the rungs to climb, ascending, as far as `should_go_on` says."""
        return [self.plan.space.setting(int(row)) for row in self.rows_ahead(structure)]

    def should_go_on(self, structure: Structure) -> bool:
        """Whether a rung further up may still win, or shows where the device's wall is.

        The default's structure is climbed past what the estimate says can fit: the device's own
        word on where its wall is corrects the estimate for every other structure.
        """
        ahead = self.rows_ahead(structure)
        if structure == self.default.structure and not self.plan.fits[ahead].all():
            return True
        improvement = self.beliefs.expected_improvement()[ahead]
        return bool(improvement.max(initial=0.0) >= _WORTH_A_RUNG)

    def speeds(self, structure: Structure) -> dict[int, float]:
        """Return tokens a second by micro-batch size, as far as measured."""
        return {
            rung.setting.micro_batch_size: rung.outcome.tokens_per_s
            for rung in self.rungs
            if rung.setting.structure == structure and isinstance(rung.outcome, Measured)
        }

    def outcomes(self, structure: Structure) -> dict[str, str]:
        """Return the kind of outcome by micro-batch size."""
        return {
            str(rung.setting.micro_batch_size): rung.outcome.kind
            for rung in self.rungs
            if rung.setting.structure == structure
        }

    def best(self) -> Rung | None:
        """Return the fastest measured rung."""
        measured = [rung for rung in self.rungs if isinstance(rung.outcome, Measured)]
        return max(measured, key=_speed, default=None)

    def rows_ahead(self, structure: Structure) -> "NDArray[np.int64]":
        """Return the rows of a structure that were not tried and are not known to be impossible."""
        space = self.plan.space
        place = space.structures.index(structure)
        return np.flatnonzero(self.beliefs.possible & (space.structure_index == place))


def _speed(rung: Rung) -> float:
    assert isinstance(rung.outcome, Measured)
    return rung.outcome.tokens_per_s


def default_setting(plan: Plan) -> Setting:
    """Return what a user would start with: one row a micro-step, no ZeRO, or the smallest kept."""
    needs = np.where(plan.kept, plan.memory.device_bytes, np.inf)
    smallest = plan.space.setting(int(np.argmin(needs)))
    attention = smallest.structure.attention
    plain = Structure(zero_stage=0, attention=attention).with_micro_batch(
        1,
        plan.space.ranks,
        smallest.micro_batch_size * smallest.gradient_accumulation_steps * plan.space.ranks,
    )
    row = plan.row_of(plain)
    return plain if row is not None and plan.kept[row] else smallest


class PriorSampler(BaseSampler):
    """Proposes the structure that the search expects most of."""

    def __init__(self, search: Search) -> None:
        self._search = search

    def infer_relative_search_space(
        self,
        study: Study,  # noqa: ARG002 - Optuna's signature
        trial: FrozenTrial,  # noqa: ARG002 - Optuna's signature
    ) -> dict[str, BaseDistribution]:
        return distributions(self._search.plan)

    def sample_relative(
        self,
        study: Study,  # noqa: ARG002 - Optuna's signature
        trial: FrozenTrial,  # noqa: ARG002 - Optuna's signature
        search_space: dict[str, BaseDistribution],  # noqa: ARG002 - Optuna's signature
    ) -> dict[str, Any]:
        structure = self._search.next_structure()
        assert structure is not None, "the loop asks only while a probe is worth it"
        return asdict(structure)

    def sample_independent(
        self,
        study: Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:  # noqa: ANN401 - Optuna's signature
        msg = f"{param_name} is no knob of the structure"
        raise NotImplementedError(msg)


class CannotWinPruner(BasePruner):
    """Stops a ladder when no rung further up may win."""

    def __init__(self, search: Search) -> None:
        self._search = search

    def prune(self, study: Study, trial: FrozenTrial) -> bool:  # noqa: ARG002 - Optuna's signature
        return not self._search.should_go_on(Structure(**trial.params))


def distributions(plan: Plan) -> dict[str, BaseDistribution]:
    """Return a categorical distribution for every knob of a structure."""
    rows = [asdict(structure) for structure in plan.space.structures]
    return {knob: CategoricalDistribution(sorted({row[knob] for row in rows})) for knob in rows[0]}


def new_study(search: Search) -> Study:
    """Make a study in memory that holds the outcomes known so far, a trial a structure."""
    # What Optuna says on the way, the tuner says better.
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(
        study_name="autotune",
        direction="maximize",
        sampler=PriorSampler(search),
        pruner=CannotWinPruner(search),
    )
    for structure in search.probed:
        study.add_trial(_as_trial(structure, search))
    return study


def _as_trial(structure: Structure, search: Search) -> FrozenTrial:
    speeds = search.speeds(structure)
    return optuna.trial.create_trial(
        params=asdict(structure),
        distributions=distributions(search.plan),
        value=max(speeds.values(), default=None),
        state=TrialState.COMPLETE if speeds else TrialState.FAIL,
        intermediate_values=speeds,
        user_attrs={OUTCOMES: search.outcomes(structure)},
    )
