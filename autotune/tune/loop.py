"""Asks the study for a structure, has it probed, tells what came of it, until enough is known."""

import contextlib
import logging
import math
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol

import optuna
from optuna.trial import Trial, TrialState

from autotune.errors import InterruptedRunError
from autotune.outcome import Interrupted, Measured, Outcome, Purpose, Rung
from autotune.plan import Plan
from autotune.probe.protocol import Prober, ProbeRequest, RungFailure, RungMeasurement
from autotune.rundir import write_bytes
from autotune.setting import Setting, Structure
from autotune.tune.beliefs import NO_HINTS, Hint
from autotune.tune.earlier import trustworthy, unverified
from autotune.tune.faults import refuse_set_up_fault, worth_knowing
from autotune.tune.finals import Finals, finals
from autotune.tune.judge import Judge
from autotune.tune.others import Nobody, Others
from autotune.tune.search import OUTCOMES, PRIOR, Search, as_trial, distributions, new_study
from autotune.units import format_bytes

_log = logging.getLogger(__name__)

_POLL_S = 1.0
"""How often it is looked whether other jobs are through."""


class Watch(Protocol):
    """Who looks on."""

    def begins(self, ladder: Sequence[Setting], purpose: Purpose) -> None:
        """Be told that a probe of these settings is started."""
        ...

    def ends(self) -> None:
        """Be told that its ranks are gone."""
        ...

    def waits(self, at_work: Sequence[Structure]) -> None:
        """Be told that nothing is left to try but what other jobs are at."""
        ...


class Blind:
    """Looks on at nothing."""

    def begins(self, ladder: Sequence[Setting], purpose: Purpose) -> None: ...

    def ends(self) -> None: ...

    def waits(self, at_work: Sequence[Structure]) -> None: ...


class ProbeSite(Protocol):
    """Knows the job and the data: turns a ladder into a request and an answer into an outcome."""

    def request(self, ladder: Sequence[Setting]) -> ProbeRequest: ...

    def outcome(self, setting: Setting, measured: RungMeasurement) -> Measured: ...

    def lengths(self, setting: Setting) -> dict[str, object]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuned:
    """What tuning ended with.

    Attributes:
        best: the fastest measured rung; None if nothing was measured.
        default: the rung of the setting that a user would start with, if it was measured.
        stopped_by: `nothing to gain`, `max_probes` or `tune_budget`.
    """

    best: Rung | None
    default: Rung | None
    rungs: tuple[Rung, ...]
    probes: int
    stopped_by: str


class Tuner:
    """One tuning: a study, a prober, and where outcomes are kept.

    Args:
        plan: every setting with its estimate.
        prober: what tries a structure.
        site: what turns a ladder into a request, and an answer into an outcome.
        known: outcomes of earlier runs, in their order.
        record: told of each outcome before anything follows from it.
        judge: asked about what is in doubt to fit.
        others: jobs that share the study.
        watch: told of each probe before it is started, and when it is over.
        parameters, steps, thrifty, hints: as of `Search`.
        search: what follows from outcomes: ladders, or a setting at a time.
        default: what the user starts with, where that is known.
        sampler: what proposes structures, by name (see `SAMPLERS`).
        seed: of samplers that draw.
    """

    def __init__(  # noqa: PLR0913 - by keyword
        self,
        plan: Plan,
        prober: Prober,
        site: ProbeSite,
        known: Sequence[Rung],
        *,
        record: Callable[[Rung], None],
        judge: Judge | None = None,
        others: Others | None = None,
        watch: Watch | None = None,
        clock: Callable[[], float] = time.monotonic,
        parameters: int = 0,
        steps: int | None = None,
        thrifty: bool = False,
        hints: Mapping[int, Hint] = NO_HINTS,
        search: type[Search] = Search,
        default: Setting | None = None,
        sampler: str = PRIOR,
        seed: int = 0,
    ) -> None:
        trusted = trustworthy(worth_knowing(known))
        self.search = search(
            plan,
            trusted,
            parameters=parameters,
            steps=steps,
            thrifty=thrifty,
            hints=hints,
            default=default,
        )
        self.study = new_study(self.search, sampler, seed)
        self._draws = sampler != PRIOR
        self._knobs = distributions(plan)
        self._prober = prober
        self._site = site
        self._record = record
        self._judge = judge
        self._others: Others = others or Nobody()
        self._watch: Watch = watch or Blind()
        self._clock = clock
        self._deadline = math.inf
        self._starts_s: list[float] = []

    def run(self, *, max_probes: int, budget_s: float | None, tell_apart: bool = True) -> Tuned:
        """Probe until nothing is to be gained or a limit is reached.

        At last the best are measured again where they are too close to be told apart, if that is
        of interest.

        Raises:
            SetupFaultError: probes die, whatever their setting, and none is measured.
            InterruptedRunError: stopped from outside; the outcomes so far are kept.
        """
        self._deadline = self._clock() + (math.inf if budget_s is None else budget_s)
        if not self._out_of_time() and not self._others.are_there:
            self._verify()
        stopped_by = None
        while stopped_by is None:
            at_work = self._hear()
            structure = self.search.next_structure()
            stopped_by = self._reason_to_stop(structure, max_probes, at_work)
            if stopped_by is not None and at_work and not self._out_of_time():
                self._wait_for(at_work)
                stopped_by = None
                continue
            if structure is None or stopped_by is not None or self._is_ruled_out(structure):
                continue
            self._probe(self.study.ask(self._knobs))
            refuse_set_up_fault([rung for rung in self.search.rungs if not rung.job])
        refuse_set_up_fault(self.search.rungs, at_least=1)
        if tell_apart and not self._others.are_there:
            self._tell_finalists_apart()
        self._others.finish()
        return self._tuned(stopped_by)

    def _hear(self) -> frozenset[Structure]:
        """Learn what other jobs have found out; returns what they are at."""
        seen = self._others.look()
        for rung in seen.news:
            self._record(rung)
            where = "on another job" if rung.job else "before the stop"
            _log.info("%s, %s: %s", rung.setting.label(), where, describe(rung))
        self.search.hear(seen.news, seen.at_work)
        for structure in dict.fromkeys(rung.setting.structure for rung in seen.news):
            self.study.add_trial(as_trial(structure, self.search))
        return seen.at_work

    def _wait_for(self, at_work: frozenset[Structure]) -> None:
        """Give others a moment: what they probe may be better, or leave more to try."""
        self._watch.waits(sorted(at_work))
        time.sleep(_POLL_S)

    def _verify(self) -> None:
        """Measure what an earlier run found best; if it is not so here, its outcomes are left."""
        setting = unverified(self.search.rungs)
        if setting is None:
            return
        _log.info("verifying what an earlier run found best: %s", setting.label())
        self._measure_again(setting, "verification")
        trusted = trustworthy(self.search.rungs)
        if len(trusted) < len(self.search.rungs):
            _log.info("it is not as it was: outcomes of earlier runs are left out")
            self.search.replace(trusted)

    def _tell_finalists_apart(self) -> None:
        """Measure the fastest in turn, as often as it takes, if their difference is worth it."""
        while (close := finals(self.search.rungs)) is not None and not close.is_over:
            if self._out_of_time() or not self._is_worth_telling(close):
                return
            setting = close.next()
            _log.info("measuring again, as others are about as fast: %s", setting.label())
            self._measure_again(setting, "final")

    def _is_worth_telling(self, close: Finals) -> bool:
        """Whether telling settings apart may save more of the training than it costs."""
        rungs = [rung for rung in self.search.rungs if rung.setting in close.contenders]
        if all(rung.cached for rung in rungs):
            return False
        if any(rung.purpose == "final" for rung in rungs):
            return True
        round_s = sum(map(self.search.seconds_of, close.contenders))
        return close.noise * self.search.training_s() >= round_s

    def _measure_again(self, setting: Setting, purpose: Purpose) -> None:
        request = self._site.request([setting])
        self._watch.begins([setting], purpose)
        try:
            with contextlib.closing(self._prober.probe(request)) as answers:
                for answer in answers:
                    self._learn(replace(self._rung(setting, answer), purpose=purpose))
        except (InterruptedRunError, KeyboardInterrupt):
            outcome = Interrupted(evidence="the run was stopped from outside")
            self._learn(replace(self._as_rung(setting, outcome, 0.0), purpose=purpose))
            raise
        finally:
            self._watch.ends()

    def _reason_to_stop(
        self, structure: Structure | None, max_probes: int, at_work: frozenset[Structure]
    ) -> str | None:
        by_others = {rung.setting.structure for rung in self.search.rungs if rung.job}
        probed = at_work | by_others | set(self.search.probed)
        if structure is None:
            return "nothing to gain"
        if self.search.is_spent(structure, probed, max_probes):
            return "max_probes"
        return "tune_budget" if self._out_of_time() else None

    def _out_of_time(self) -> bool:
        return self._clock() >= self._deadline

    def _is_ruled_out(self, structure: Structure) -> bool:
        """Ask the judge about a structure's smallest rung where that is in doubt.

        A probe of it would be started for nothing. Rungs above cost little once it runs.
        """
        plan, row = self.search.plan, int(self.search.rows_ahead(structure)[0])
        first = plan.space.setting(row)
        if self._judge is None or plan.surely_fits[row]:
            return False
        if not self._starts_s or self._judge.expected_seconds(first) > min(self._starts_s):
            return False
        needs = self._judge.least_device_bytes(first)
        if needs is None or needs <= plan.budget_bytes:
            return False
        _log.info(
            "not probed, as a virtual run of %s needs %s and %s are there",
            first.label(),
            format_bytes(needs),
            format_bytes(plan.budget_bytes),
        )
        self.search.rule_out(row)
        return True

    def _probe(self, trial: Trial) -> None:
        structure = Structure(**trial.params)
        if not self._others.claim(structure):
            self.study.tell(trial, state=TrialState.FAIL)
            return
        try:
            self._hear()
            if self._is_still_wanted(structure):
                ladder = self.search.ladder(structure)
                first = ladder[0].micro_batch_size
                _log.info("probing %s from micro-batch %d up", structure.label(), first)
                self._climb(trial, ladder)
        finally:
            self._tell(trial, structure)
            self._others.release()

    def _is_still_wanted(self, structure: Structure) -> bool:
        """Whether a structure is worth a probe after what was heard since it was claimed.

        Others end when nothing is to be gained by all that is known, so that nobody must go on by
        less.
        """
        wanted = self.search.next_structure()
        if wanted is None or wanted == structure:
            return wanted is not None
        return self._draws and structure in self.search.open_structures()

    def _climb(self, trial: Trial, ladder: Sequence[Setting]) -> None:
        """Learn from rung after rung; the one at work when a stop comes in is interrupted."""
        at_work = {setting.micro_batch_size: setting for setting in ladder}
        started = self._clock()
        self._watch.begins(ladder, "search")
        try:
            with contextlib.closing(self._prober.probe(self._site.request(ladder))) as answers:
                for answer in answers:
                    if len(at_work) == len(ladder):
                        self._starts_s.append(self._clock() - started)
                    self._learn(self._rung(at_work.pop(answer.micro_batch_size), answer))
                    if self._is_enough(trial, answer):
                        return
        except (InterruptedRunError, KeyboardInterrupt):
            outcome = Interrupted(evidence="the run was stopped from outside")
            for setting in list(at_work.values())[:1]:
                self._learn(self._as_rung(setting, outcome, 0.0))
            raise
        finally:
            self._watch.ends()

    def _is_enough(self, trial: Trial, answer: RungMeasurement | RungFailure) -> bool:
        speeds = self.search.speeds(Structure(**trial.params))
        if isinstance(answer, RungMeasurement):
            trial.report(speeds[answer.micro_batch_size], answer.micro_batch_size)
        return trial.should_prune() or self._out_of_time()

    def _tell(self, trial: Trial, structure: Structure) -> None:
        speeds = self.search.speeds(structure)
        trial.set_user_attr(OUTCOMES, self.search.outcomes(structure))
        if speeds:
            self.study.tell(trial, max(speeds.values()))
        else:
            self.study.tell(trial, state=TrialState.FAIL)

    def _rung(self, setting: Setting, answer: RungMeasurement | RungFailure) -> Rung:
        if isinstance(answer, RungFailure):
            return self._as_rung(setting, answer.outcome, answer.seconds)
        return self._as_rung(setting, self._site.outcome(setting, answer), answer.seconds)

    def _as_rung(self, setting: Setting, outcome: Outcome, seconds: float) -> Rung:
        return Rung(
            setting=setting,
            ranks=self.search.plan.space.ranks,
            lengths=self._site.lengths(setting),
            outcome=outcome,
            at=datetime.now(UTC).isoformat(timespec="seconds"),
            seconds=seconds,
        )

    def _learn(self, rung: Rung) -> None:
        # Others first: what this job alone knew when it is killed they would measure once more.
        self._others.tell(rung)
        self._record(rung)
        self.search.learn(rung)
        _log.info("%s: %s", rung.setting.label(), describe(rung))

    def _tuned(self, stopped_by: str) -> Tuned:
        search = self.search
        measured = [rung for rung in search.rungs if isinstance(rung.outcome, Measured)]
        is_default = any(rung.setting == search.default for rung in measured)
        return Tuned(
            best=search.best(),
            default=search.of(search.default) if is_default else None,
            rungs=tuple(search.rungs),
            probes=len(search.probed),
            stopped_by=stopped_by,
        )


def describe(rung: Rung) -> str:
    """Return a line for people."""
    outcome = rung.outcome
    if isinstance(outcome, Measured):
        return (
            f"{outcome.tokens_per_s:.0f} tokens/s, {outcome.samples_per_s:.2f} samples/s, "
            f"peak {format_bytes(outcome.peak_bytes)}, measured in {rung.seconds:.1f} s"
        )
    return outcome.kind.replace("_", " ")


def write_study(study: optuna.Study, path: Path) -> None:
    """Write the study as an SQLite file for Optuna's dashboard.

    The file is made on a local disk, as SQLite does not work on network file systems.
    """
    with tempfile.TemporaryDirectory(prefix="autotune-study-") as local:
        draft = Path(local) / path.name
        optuna.copy_study(
            from_study_name=study.study_name,
            from_storage=study._storage,  # noqa: SLF001 - copy_study wants the storage
            to_storage=f"sqlite:///{draft}",
            to_study_name=study.study_name,
        )
        write_bytes(path, draft.read_bytes())
