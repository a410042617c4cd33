"""The search as Optuna sees it: a trial is a structure, its rungs are intermediate values."""

import importlib.util
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from copy import copy
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.pruners import BasePruner
from optuna.samplers import BaseSampler
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from autotune.errors import ConfigError
from autotune.outcome import SAYS_NOTHING, Measured, Rung
from autotune.plan import Plan
from autotune.setting import RANDOM, Setting, Structure
from autotune.tune.beliefs import NO_HINTS, Hint, in_one, update
from autotune.tune.finals import finals
from autotune.tune.liar import lies

if TYPE_CHECKING:
    from numpy.typing import NDArray

_WORTH_TRYING = 0.0005
"""Expected gain over the best, as a share of it, below which nothing is tried. Of 48 jobs whose
estimates were off all ended at their best; at 0.01 one of twelve was a quarter short."""

_WORTH_IN_NOISE = 0.1
"""The same as a share of the noise of a measurement, where that is more: what gains so little could
hardly be seen to."""

_WORTH_A_PROCESS = 0.005
"""The same where each setting takes a process of its own."""

_REPETITIONS = 20
"""Micro-steps that a rung takes, about: at three lengths, with warm-up and updates."""

_START_S = 4.0
_PARAMETERS_BUILT_PER_S = 5e8

PRIOR = "prior"
"""Name of the sampler that follows the plan, corrected by outcomes."""

_ATTEMPTS = 50
"""How often another sampler is asked for a structure that has something to try."""

OUTCOMES = "outcomes"
"""User attribute of a trial: what each micro-batch size ended in."""


def start_s(parameters: int) -> float:
    """Return about how long it takes to start a probe and build a model of so many parameters.

    A rough figure: only how it compares with the time of rungs matters.
    """
    return _START_S + parameters / _PARAMETERS_BUILT_PER_S


def rungs_s(plan: Plan) -> "NDArray[np.float64]":
    """Return about how long each setting takes to measure, by its estimate."""
    return _REPETITIONS * plan.step_time_s / plan.space.gradient_accumulation_steps


class Search:
    """What is known so far and what follows from it; shared by sampler and pruner.

    It depends on the plan and the outcomes alone, so that the same outcomes lead to the same
    choices.

    Args:
        plan: every setting with its estimate.
        rungs: what is known.
        parameters: of the model; starting a probe of a larger one takes longer.
        steps: optimizer steps of the training; None leaves its length open.
        thrifty: whether a probe has to be expected to save more of the training than it takes.
        hints: what one node has shown of rows of the plan.
        default: what the user starts with, where that is known.
    """

    def __init__(
        self,
        plan: Plan,
        rungs: Sequence[Rung],
        *,
        parameters: int = 0,
        steps: int | None = None,
        thrifty: bool = False,
        hints: Mapping[int, Hint] = NO_HINTS,
        default: Setting | None = None,
    ) -> None:
        self.plan = plan
        self._hints = hints
        self.rungs = list(rungs)
        self.default = default or default_setting(plan)
        self._start_s = start_s(parameters)
        self._steps = steps
        self._thrifty = thrifty
        self._too_large: list[int] = []
        self._at_work: frozenset[Structure] = frozenset()
        self._update()

    def hear(self, rungs: Sequence[Rung], at_work: frozenset[Structure]) -> None:
        """Take in what other jobs have found out, and what they are at just now."""
        if rungs or at_work != self._at_work:
            self.rungs.extend(rungs)
            self._at_work = at_work
            self._update()

    def learn(self, rung: Rung) -> None:
        self.rungs.append(rung)
        self._update()

    def replace(self, rungs: Sequence[Rung]) -> None:
        """Take other outcomes for what is known."""
        self.rungs = list(rungs)
        self._update()

    def rule_out(self, row: int) -> None:
        """Take a row of the plan for one that does not fit, and so all that need as much."""
        self._too_large.append(row)
        self._update()

    def _update(self) -> None:
        self.beliefs = update(self.plan, self.rungs, self._too_large, self._hints)
        if assumed := lies(self.plan, self.beliefs, self._at_work):
            self.beliefs = update(self.plan, [*self.rungs, *assumed], self._too_large, self._hints)
        self._improvement = self.beliefs.expected_improvement()
        corrected = self.plan.tokens_per_s / np.exp(self.beliefs.log_tokens_per_s)
        self._rung_s = rungs_s(self.plan) * corrected

    def is_spent(
        self, structure: Structure, begun: AbstractSet[Structure], max_probes: int
    ) -> bool:
        """Whether a probe of the structure would be one too many, where these were begun."""
        return structure not in begun and len(begun) >= max_probes

    @property
    def probed(self) -> list[Structure]:
        """Return the structures that were begun, in order; what was cached was begun by others."""
        begun = (rung.setting.structure for rung in self.rungs if not rung.cached)
        return list(dict.fromkeys(begun))

    def next_structure(self) -> Structure | None:
        """Return the structure to probe next, or None when no probe is worth it any more.

        A ladder that was cut short, by a stop or a kill, is climbed to its end first. The default
        setting's structure is the first of all, so that the result can say what was gained. From
        then on it is what is expected to improve most on the best in a second of probing. Where
        finals have begun the search is over, whatever they say of what was not probed.
        """
        if any(rung.purpose == "final" and not rung.cached for rung in self.rungs):
            return None
        if (begun := self._cut_short()) is not None:
            return begun
        if not self._has_begun():
            return self.default.structure
        cost_s = self._probe_s()
        worth = self._gains(cost_s)
        if not worth.any():
            return None
        # Over nothing there is no best, and what is fastest is wanted, not what is tried soonest.
        rate = self._improvement / (cost_s if self.beliefs.best_tokens_per_s else 1.0)
        return self.plan.space.setting(int(np.argmax(np.where(worth, rate, 0.0)))).structure

    def has_choice(self) -> bool:
        """Whether another structure than that of `next_structure` may be probed as well."""
        return self._has_begun() and self._cut_short() is None

    def _has_begun(self) -> bool:
        """Whether the default's structure was probed, or is just now by another job."""
        default = self.default.structure
        probed = any(rung.setting.structure == default for rung in self.rungs)
        return probed or default in self._at_work

    def open_structures(self) -> set[Structure]:
        """Return the structures that have something to try which may fit."""
        places = np.unique(self.plan.space.structure_index[self.beliefs.open_rows])
        return {self.plan.space.structures[place] for place in places.tolist()}

    @property
    def _worth(self) -> float:
        """Return the expected gain below which nothing is tried."""
        return max(_WORTH_TRYING, _WORTH_IN_NOISE * self.beliefs.noise)

    def _gains(self, cost_s: "NDArray[np.float64]") -> "NDArray[np.bool_]":
        """Tell which settings promise enough of an improvement on the best for their cost."""
        gains = self._improvement >= self._worth
        if self._thrifty:
            gains &= self._improvement * self.training_s() >= cost_s
        return gains

    def training_s(self) -> float:
        """Return the seconds of the training with the best setting so far.

        Without a number of steps it is as long as need be for any gain to pay.
        """
        if self._steps is None or not self.beliefs.best_tokens_per_s:
            return np.inf
        tokens = float((self.plan.tokens_per_s * self.plan.step_time_s).mean())
        return self._steps * tokens / self.beliefs.best_tokens_per_s

    def _probe_s(self) -> "NDArray[np.float64]":
        """Return for each setting the seconds of a probe of its structure, on all that may win."""
        space = self.plan.space
        climbed = np.where(self._improvement >= self._worth, self._rung_s, 0.0)
        rungs_s = np.bincount(space.structure_index, climbed, minlength=len(space.structures))
        return self._start_s + np.maximum(rungs_s[space.structure_index], self._rung_s)

    def seconds_of(self, setting: Setting) -> float:
        """Return about how long a probe of one setting takes."""
        row = self.plan.row_of(setting)
        assert row is not None, "what is probed is of the plan"
        return self._start_s + float(self._rung_s[row])

    def _cut_short(self) -> Structure | None:
        """Return the last structure, if a probe of it would not have ended where it did."""
        searched = [rung for rung in self.rungs if rung.purpose == "search" and not rung.cached]
        if not searched or not isinstance(searched[-1].outcome, (Measured, *SAYS_NOTHING)):
            return None
        last = searched[-1].setting.structure
        return last if self.should_go_on(last) else None

    def ladder(self, structure: Structure) -> list[Setting]:
        """Return the rungs to climb, ascending, as far as `should_go_on` says.

        Those are left out that could not win when the climb began; but what is in doubt to fit is
        not the first. The default's structure is climbed whole.
        """
        return [self.plan.space.setting(int(row)) for row in self.rows_ahead(structure)]

    def should_go_on(self, structure: Structure) -> bool:
        """Whether a rung further up may still win, or shows where the device's wall is.

        The default's structure is climbed past what the estimate says can fit: the device's own
        word on where its wall is corrects the estimate for every other structure.
        """
        ahead = self._ahead(structure)
        if structure == self.default.structure and not self.plan.fits[ahead].all():
            return True
        return bool(self._gains(self._rung_s)[ahead].any())

    def rows_ahead(self, structure: Structure) -> "NDArray[np.int64]":
        """Return the rows that a probe of the structure would try, ascending.

        They are what is left of a climb that was cut short, or else those of a new one.
        """
        ahead = self._ahead(structure)
        return ahead if len(ahead) else self.chosen(structure)

    def _ahead(self, structure: Structure) -> "NDArray[np.int64]":
        """Return the rows of the last climb of a structure, or the first, that were not tried."""
        begun = self._climb_began(structure)
        rows = self._as_of(begun).chosen(structure)
        return rows[self.beliefs.possible[rows]]

    def _climb_began(self, structure: Structure) -> int:
        """Return how many outcomes there were when the last climb of this structure began."""
        count = len(self.rungs)
        while count and _is_searched(self.rungs[count - 1], structure):
            count -= 1
        return count

    def _as_of(self, count: int) -> "Search":
        """Return what was known after so many outcomes."""
        if count == len(self.rungs):
            return self
        past = copy(self)
        past.rungs = self.rungs[:count]
        past._update()  # noqa: SLF001 - its own class
        return past

    def chosen(self, structure: Structure) -> "NDArray[np.int64]":
        """Return the rows of a structure that a climb takes which begins now."""
        space = self.plan.space
        place = space.structures.index(structure)
        rows = np.flatnonzero(self.beliefs.possible & (space.structure_index == place))
        if structure == self.default.structure or not self.beliefs.best_tokens_per_s:
            return rows
        winners = self._improvement[rows] >= self._worth
        if not winners.any():
            return rows
        surely = np.flatnonzero(self.plan.surely_fits[rows[: int(np.argmax(winners)) + 1]])
        start = surely[-1] if len(surely) else 0
        taken: NDArray[np.int64] = rows[(np.arange(len(rows)) == start) | winners]
        return taken

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
        """Return the fastest measured setting, which the finals may have chosen of some alike."""
        measured = [rung for rung in self.rungs if isinstance(rung.outcome, Measured)]
        if not measured:
            return None
        close = finals(self.rungs)
        if close is not None and close.is_over:
            return self.of(close.winner(self.rungs))
        together = {rung.setting: self.of(rung.setting) for rung in measured}
        return max(together.values(), key=_speed)

    def of(self, setting: Setting) -> Rung:
        """Return one rung of a measured setting, with what its outcomes say together."""
        rungs = [rung for rung in self.rungs if rung.setting == setting]
        outcome = in_one([rung.outcome for rung in rungs])
        return replace(rungs[-1], outcome=outcome)


class OneByOne(Search):
    """The search where every setting takes a process of its own, so that there are no ladders."""

    def is_spent(
        self,
        structure: Structure,  # noqa: ARG002 - each of its settings is a probe
        begun: AbstractSet[Structure],  # noqa: ARG002 - as above
        max_probes: int,
    ) -> bool:
        tried = [rung for rung in self.rungs if rung.purpose == "search" and not rung.cached]
        return len(tried) >= max_probes

    def should_go_on(self, structure: Structure) -> bool:  # noqa: ARG002 - whatever it is
        return False

    def rows_ahead(self, structure: Structure) -> "NDArray[np.int64]":
        """Return the row of the structure that promises most for what it takes to measure."""
        place = self.plan.space.structures.index(structure)
        rows = np.flatnonzero(self.beliefs.possible & (self.plan.space.structure_index == place))
        # Over nothing there is no best, and what is fastest is wanted, not what is tried soonest.
        knows_best = bool(self.beliefs.best_tokens_per_s)
        cost_s = self._probe_s() if knows_best else np.ones(len(self.plan.space))
        best: NDArray[np.int64] = rows[[int(np.argmax((self._improvement / cost_s)[rows]))]]
        return best

    @property
    def _worth(self) -> float:
        return max(_WORTH_A_PROCESS, super()._worth)

    def _probe_s(self) -> "NDArray[np.float64]":
        cost: NDArray[np.float64] = self._start_s + self._rung_s
        return cost


def _is_searched(rung: Rung, structure: Structure) -> bool:
    return rung.setting.structure == structure and rung.purpose == "search" and not rung.cached


def _speed(rung: Rung) -> float:
    assert isinstance(rung.outcome, Measured)
    return rung.outcome.tokens_per_s


def default_setting(plan: Plan) -> Setting:
    """Return what a user would start with: one row a micro-step, no ZeRO, or the smallest kept.

    Rows are taken as they are drawn, unless all of the plan is split by length.
    """
    as_drawn = plan.kept & (plan.space.column("sampling") == RANDOM)
    usual = as_drawn if as_drawn.any() else plan.kept
    needs = np.where(usual, plan.memory.device_bytes, np.inf)
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


class FeasibleSampler(PriorSampler):
    """Asks one of Optuna's samplers until it proposes a structure that has something to try.

    Optuna's samplers know nothing of which combinations there are, and learn nothing from trials
    that failed. The default's structure, and a ladder that was cut short, come first as ever.
    """

    def __init__(self, search: Search, sampler: BaseSampler) -> None:
        super().__init__(search)
        self._sampler = sampler

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        wanted = super().sample_relative(study, trial, search_space)
        if not self._search.has_choice():
            return wanted
        open_structures = self._search.open_structures()
        for _ in range(_ATTEMPTS):
            params = self._sample(study, trial, search_space)
            if Structure(**params) in open_structures:
                return params
        return wanted

    def _sample(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        sampler = self._sampler
        relative = sampler.infer_relative_search_space(study, trial)
        params = sampler.sample_relative(study, trial, relative) if relative else {}
        independent = {
            name: sampler.sample_independent(study, trial, name, knob)
            for name, knob in search_space.items()
            if name not in params
        }
        return params | independent


def _sampler(name: str, search: Search, seed: int) -> BaseSampler:
    """Return a sampler by its name, which is one of `config.SAMPLERS`.

    Raises:
        ConfigError: it needs a library that is not installed.
    """
    match name:
        case "tpe":
            return FeasibleSampler(search, optuna.samplers.TPESampler(seed=seed))
        case "gp":
            if importlib.util.find_spec("scipy") is None:
                msg = "--sampler gp needs SciPy: pip install scipy, or choose another sampler"
                raise ConfigError(msg)
            return FeasibleSampler(search, optuna.samplers.GPSampler(seed=seed))
        case "random":
            return FeasibleSampler(search, optuna.samplers.RandomSampler(seed=seed))
        case _:
            return PriorSampler(search)


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


def new_study(search: Search, sampler: str = PRIOR, seed: int = 0) -> Study:
    """Make a study in memory that holds the outcomes known so far, a trial a structure."""
    # What Optuna says on the way, the tuner says better.
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(
        study_name="autotune",
        direction="maximize",
        sampler=_sampler(sampler, search, seed),
        pruner=CannotWinPruner(search),
    )
    for structure in dict.fromkeys(rung.setting.structure for rung in search.rungs):
        study.add_trial(as_trial(structure, search))
    return study


def as_trial(structure: Structure, search: Search) -> FrozenTrial:
    speeds = search.speeds(structure)
    return optuna.trial.create_trial(
        params=asdict(structure),
        distributions=distributions(search.plan),
        value=max(speeds.values(), default=None),
        state=TrialState.COMPLETE if speeds else TrialState.FAIL,
        intermediate_values=speeds,
        user_attrs={OUTCOMES: search.outcomes(structure)},
    )
