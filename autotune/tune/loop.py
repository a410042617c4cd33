"""Asks the study for a structure, has it probed, tells what came of it, until enough is known."""

import contextlib
import logging
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol

import optuna
from optuna.trial import Trial, TrialState

from autotune.errors import InterruptedRunError, SetupFaultError
from autotune.outcome import Interrupted, Measured, Outcome, OutOfMemory, Rung
from autotune.plan import Plan
from autotune.probe.protocol import Prober, ProbeRequest, RungFailure, RungMeasurement
from autotune.rundir import write_bytes
from autotune.setting import Setting, Structure
from autotune.tune.search import Search, distributions, new_study
from autotune.units import format_bytes

_ALIKE_BEFORE_GIVING_UP = 3

_log = logging.getLogger(__name__)


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
    """One tuning: a study, a prober, and where outcomes are kept."""

    def __init__(
        self,
        plan: Plan,
        prober: Prober,
        site: ProbeSite,
        known: Sequence[Rung],
        *,
        record: Callable[[Rung], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.search = Search(plan, known)
        self.study = new_study(self.search)
        self._knobs = distributions(plan)
        self._prober = prober
        self._site = site
        self._record = record
        self._clock = clock

    def run(self, *, max_probes: int, budget_s: float | None) -> Tuned:
        """Probe until nothing is to be gained or a limit is reached.

        Raises:
            SetupFaultError: probes die alike, whatever their setting.
            InterruptedRunError: stopped from outside; the outcomes so far are kept.
        """
        started = self._clock()
        probes = len({rung.setting.structure for rung in self.search.rungs})
        stopped_by = "nothing to gain"
        while self.search.next_structure() is not None:
            if probes >= max_probes:
                stopped_by = "max_probes"
                break
            if budget_s is not None and self._clock() - started >= budget_s:
                stopped_by = "tune_budget"
                break
            self._probe(self.study.ask(self._knobs))
            probes += 1
            self._stop_if_all_die_alike()
        return self._tuned(probes, stopped_by)

    def _probe(self, trial: Trial) -> None:
        structure = Structure(**trial.params)
        ladder = self.search.ladder(structure)
        _log.info(
            "probing %s at micro-batch %s", structure.label(), [s.micro_batch_size for s in ladder]
        )
        try:
            for rung in self._climb(ladder):
                self._learn(rung)
                if isinstance(rung.outcome, Measured):
                    trial.report(rung.outcome.tokens_per_s, rung.setting.micro_batch_size)
                    if trial.should_prune():
                        break
        finally:
            self._tell(trial, structure)

    def _tell(self, trial: Trial, structure: Structure) -> None:
        speeds = self._speeds(structure)
        if speeds:
            self.study.tell(trial, max(speeds))
        else:
            self.study.tell(trial, state=TrialState.FAIL)

    def _speeds(self, structure: Structure) -> list[float]:
        return [
            rung.outcome.tokens_per_s
            for rung in self.search.rungs
            if rung.setting.structure == structure and isinstance(rung.outcome, Measured)
        ]

    def _climb(self, ladder: Sequence[Setting]) -> Iterator[Rung]:
        """Yield the outcome of each rung; the one at work when a stop comes in is interrupted."""
        by_size = {setting.micro_batch_size: setting for setting in ladder}
        at_work = list(ladder)
        try:
            with contextlib.closing(self._prober.probe(self._site.request(ladder))) as answers:
                for answer in answers:
                    setting = by_size[answer.micro_batch_size]
                    at_work.remove(setting)
                    yield self._rung(setting, answer)
        except (InterruptedRunError, KeyboardInterrupt):
            if at_work:
                outcome = Interrupted(evidence="the run was stopped from outside")
                self._learn(self._as_rung(at_work[0], outcome, 0.0))
            raise

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
        self._record(rung)
        self.search.learn(rung)
        _log.info("%s: %s", rung.setting.label(), describe(rung))

    def _stop_if_all_die_alike(self) -> None:
        deaths = [
            rung.outcome
            for rung in self.search.rungs
            if not isinstance(rung.outcome, Measured | OutOfMemory | Interrupted)
        ]
        measured = any(isinstance(rung.outcome, Measured) for rung in self.search.rungs)
        kinds = {outcome.kind for outcome in deaths}
        if measured or len(deaths) < _ALIKE_BEFORE_GIVING_UP or len(kinds) > 1:
            return
        last = deaths[-1]
        msg = (
            f"{len(deaths)} probes in a row ended alike ({last.kind}), whatever their setting; "
            f"this is a fault of the set-up. The last one:\n{describe_death(last)}"
        )
        raise SetupFaultError(msg)

    def _tuned(self, probes: int, stopped_by: str) -> Tuned:
        default = next(
            (
                rung
                for rung in self.search.rungs
                if rung.setting == self.search.default and isinstance(rung.outcome, Measured)
            ),
            None,
        )
        return Tuned(
            best=self.search.best(),
            default=default,
            rungs=tuple(self.search.rungs),
            probes=probes,
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


def describe_death(outcome: object) -> str:
    """Return the reason and the last lines that a probe left."""
    reason = getattr(outcome, "reason", "")
    evidence = getattr(outcome, "evidence", "")
    return "\n".join(part for part in (reason, evidence) if part)


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
