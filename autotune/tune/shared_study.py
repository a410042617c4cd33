"""A study in a database that many jobs of one kind share: an exchange, and never the only copy.

A trial is a structure that one job probes. It is opened as running by whoever wants to probe it,
and of several that are open for one structure the first counts: the database numbers them one after
another. Outcomes are user attributes of their trial, so that those of a job that is killed are
there as well. A job that is gone is told by its trial's `beat`, which stands still by the watcher's
own clock.
"""

import logging
import math
import os
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import optuna
import psutil
import sqlalchemy.engine
import sqlalchemy.exc
from optuna.distributions import BaseDistribution, CategoricalDistribution, IntDistribution
from optuna.exceptions import DuplicatedStudyError, StorageInternalError, UpdateFinishedTrialError
from optuna.storages import RDBStorage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from autotune.errors import ConfigError, InputMissingError
from autotune.outcome import Measured, OutOfMemory, Rung
from autotune.plan import Plan
from autotune.setting import Structure
from autotune.tune.earlier import holds
from autotune.tune.others import Seen
from autotune.units import format_duration

_log = logging.getLogger(__name__)
_T = TypeVar("_T")

Storage = RDBStorage

_AWAY = (
    sqlalchemy.exc.OperationalError,
    sqlalchemy.exc.InterfaceError,
    sqlalchemy.exc.InternalError,
    sqlalchemy.exc.TimeoutError,
    StorageInternalError,
)
"""What is raised where a database cannot be reached, and may be soon."""

_BEAT_S = 5.0
_STALE_S = 60.0
_RETRY_S = 1.0
_PATIENCE_S = 600.0
"""How long a job waits for the database to come back before it goes on alone."""

_START_PATIENCE_S = _LAST_PATIENCE_S = 60.0
_MAKING_ATTEMPTS = 10

_HOLD = timedelta(days=7)
"""Outcomes that are older say little of the machines as they are."""

_RUNG, _BEAT, _JOB, _STRUCTURE, _BUDGET = "rung ", "beat", "job", "structure", "budget_bytes"

_NETWORK = ("nfs", "cifs", "smb", "lustre", "gpfs", "beegfs", "ceph", "fuse", "glusterfs", "9p")
_LARGEST = 2**62

# A server that has gone without a word is noticed within half a minute.
_POSTGRESQL = {
    # The driver gives bytes for text of a database that was made without an encoding.
    "client_encoding": "utf8",
    "connect_timeout": 10,
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 30_000,
}


def without_password(url: str) -> str:
    """Return a database's address as it may be shown and written down."""
    try:
        return str(sqlalchemy.engine.make_url(url))
    except sqlalchemy.exc.ArgumentError:
        return url


def open_storage(address: str, patience_s: float = _START_PATIENCE_S) -> Storage:
    """Open a database, and make Optuna's tables there unless another job has.

    Raises:
        ConfigError: the address is none, its driver is not installed, or it is an SQLite file on a
            network's file system.
        InputMissingError: it does not answer for so long.
    """
    try:
        url = sqlalchemy.engine.make_url(address)
    except sqlalchemy.exc.ArgumentError:
        msg = (
            f"--storage {address!r} is no address of a database: write "
            "postgresql://USER@HOST/DATABASE, or another that Optuna's RDBStorage takes"
        )
        raise ConfigError(msg) from None
    if url.drivername == "postgresql":
        url = url.set(drivername="postgresql+psycopg")
    _refuse_sqlite_on_network(url)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return _opened(url, patience_s)


def _opened(url: sqlalchemy.engine.URL, patience_s: float) -> Storage:
    arguments: dict[str, Any] = {"pool_pre_ping": True}
    if url.get_backend_name() == "postgresql":
        arguments["connect_args"] = dict(_POSTGRESQL)
    text = url.render_as_string(hide_password=False)
    since, made = time.monotonic(), 0
    while True:
        try:
            return RDBStorage(text, engine_kwargs=arguments)
        except (ImportError, sqlalchemy.exc.NoSuchModuleError) as error:
            msg = (
                f"--storage {url} needs a driver that is not installed ({error}): for PostgreSQL "
                "pip install 'autotune-launcher[postgresql]'"
            )
            raise ConfigError(msg) from None
        except _AWAY as error:
            if time.monotonic() - since > patience_s:
                msg = f"the database of --storage, {url}, does not answer: {_cause(error)}"
                raise InputMissingError(msg) from None
            _log.info("waiting for the database of --storage: %s", _cause(error))
        except sqlalchemy.exc.DBAPIError as error:
            # Several jobs that make the tables at once get into each other's way.
            made += 1
            if made == _MAKING_ATTEMPTS:
                msg = f"the database of --storage, {url}, refuses: {_cause(error)}"
                raise InputMissingError(msg) from None
        time.sleep(_RETRY_S)


def _cause(error: Exception) -> str:
    """Return the first line of what the driver said."""
    inner = error.__cause__ if isinstance(error, StorageInternalError) else error
    said = str(getattr(inner, "orig", inner)).strip()
    return said.splitlines()[0] if said else type(error).__name__


def _refuse_sqlite_on_network(url: sqlalchemy.engine.URL) -> None:
    if url.get_backend_name() != "sqlite" or not url.database:
        return
    path = Path(url.database).absolute()
    mounts = [part for part in psutil.disk_partitions(all=True) if _is_below(path, part.mountpoint)]
    mount = max(mounts, key=lambda part: len(part.mountpoint), default=None)
    if mount is not None and mount.fstype.startswith(_NETWORK):
        msg = (
            f"--storage: {path} is on {mount.fstype}, and SQLite does not work on a network's file "
            "system: use PostgreSQL, or a local disk and jobs of one host"
        )
        raise ConfigError(msg)


def _is_below(path: Path, directory: str) -> bool:
    return path.is_relative_to(directory)


@dataclass(slots=True)
class _Claim:
    """A structure that this job probes, and what the database does not know of it yet.

    Attributes:
        trial_id: None where the database is to be told of it as a whole.
        told: micro-batch sizes whose outcome it knows.
    """

    structure: Structure
    trial_id: int | None
    rungs: list[Rung] = field(default_factory=list)
    told: set[int] = field(default_factory=set)
    is_over: bool = False

    @property
    def speeds(self) -> dict[int, float]:
        return {
            rung.setting.micro_batch_size: rung.outcome.tokens_per_s
            for rung in self.rungs
            if isinstance(rung.outcome, Measured)
        }


class StudyDatabase:
    """A study in a database, which may be away for a while.

    Args:
        storage: where it is.
        name: of the study: jobs of one kind use the same.
        clock, sleep: of this host.

    Attributes:
        away_at: when it was away last, by the clock.
    """

    def __init__(
        self,
        storage: Storage,
        name: str,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.storage = storage
        self.clock = clock
        self.away_at = -math.inf
        self._sleep = sleep
        self._is_given_up = False
        self._study = self._made(name)

    def _made(self, name: str) -> int:
        study = self.patiently(lambda: _study_of(self.storage, name))
        if study is None:
            msg = "the database of --storage went away, and does not come back"
            raise InputMissingError(msg)
        return study

    def close(self) -> None:
        self.storage.engine.dispose()

    def agree(self, subject: str, mine: Any) -> Any:  # noqa: ANN401 - JSON
        """Return what the first job of the study has said of a subject; `mine` if this is it."""

        def said() -> list[Any]:
            trials = self.storage.get_all_trials(self._study, deepcopy=False)
            told = [trial for trial in trials if subject in trial.user_attrs]
            return [one.user_attrs[subject] for one in sorted(told, key=lambda one: one.number)]

        def agreed() -> Any:  # noqa: ANN401 - JSON
            if not said():
                self.create(state=TrialState.FAIL, user_attrs={subject: mine})
            return said()[0]

        answer = self.patiently(agreed)
        return mine if answer is None else answer

    def trials(self) -> list[FrozenTrial]:
        """Return the trials of structures."""
        trials = self.storage.get_all_trials(self._study, deepcopy=False)
        return [trial for trial in trials if _STRUCTURE in trial.user_attrs]

    def create(self, **fields: Any) -> int:  # noqa: ANN401 - as of create_trial
        """Make a trial, all at once; returns its id."""
        trial = optuna.trial.create_trial(**fields)
        return self.storage.create_new_trial(self._study, template_trial=trial)

    def once(self, action: Callable[[], object]) -> None:
        """Try; what does not come through is tried again with what comes next."""
        try:
            action()
        except _AWAY as error:
            self.away_at = self.clock()
            _log.info("the shared study is told later: %s", _cause(error))

    def patiently(self, action: Callable[[], _T], patience_s: float = _PATIENCE_S) -> _T | None:
        """Return what an action does once the database is there; None after long in vain."""
        since, told = self.clock(), False
        while True:
            try:
                done = action()
            except _AWAY as error:
                self.away_at = self.clock()
                if self._is_given_up or self.away_at - since > patience_s:
                    self._give_up(self.away_at - since)
                    return None
                if not told:
                    _log.info("waiting for the database of the shared study: %s", _cause(error))
                told = True
                self._sleep(_RETRY_S)
            else:
                self._is_given_up = False
                return done

    def _give_up(self, waited_s: float) -> None:
        if not self._is_given_up:
            _log.warning(
                "the database of the shared study is away for %s; this job goes on alone until it "
                "is back",
                format_duration(waited_s),
            )
        self._is_given_up = True


class SharedStudy:
    """The other jobs, seen through the database (see `Others`).

    The database may be away: what this job has to tell waits, and so does it where it has to know
    what others do. After ten minutes it goes on alone.

    Args:
        database: where the study is.
        job: this job's own name, the same when it is resumed.
        plan: what this job would probe.
        known: outcomes that this job has; its own are told where they are not known.
        beat_s, stale_s: how often a job shows that it lives, and how long one that does not is
            waited for; the same for all.
    """

    are_there = True

    def __init__(
        self,
        database: StudyDatabase,
        job: str,
        plan: Plan,
        known: Sequence[Rung],
        *,
        beat_s: float = _BEAT_S,
        stale_s: float = _STALE_S,
    ) -> None:
        self._database = database
        self._job = job
        self._plan = plan
        self._beat_s = beat_s
        self._stale_s = stale_s
        self._known = {_identity(rung) for rung in known}
        self._heard: set[int] = set()
        self._beats: dict[int, tuple[int, float]] = {}
        self._claim: _Claim | None = None
        self._unsaid: list[_Claim] = []
        self._recovered: list[Rung] = []
        self._take_up(known)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="study", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._over.set()
        self._thread.join(_BEAT_S)

    def look(self) -> Seen:
        """Return what others have found out since, and what they are at."""
        trials = self._database.patiently(self._all)
        if trials is None:
            return Seen()
        news, self._recovered = self._recovered, []
        at_work: set[Structure] = set()
        for trial in trials:
            if _job_of(trial) == self._job:
                continue
            if _is_open(trial) and not self._is_stale(trial):
                at_work.add(_structure_of(trial))
            elif trial.number not in self._heard:
                self._end_stale(trial)
                self._heard.add(trial.number)
                news += self._new_rungs(trial)
        return Seen(tuple(news), frozenset(at_work))

    def claim(self, structure: Structure) -> bool:
        trial_id = self._database.patiently(lambda: self._open(structure))
        trials = self._database.patiently(self._all)
        if trial_id is None or trials is None:
            # Alone; it is told when the database is back.
            self._claim = _Claim(structure, None)
            return True
        (mine,) = (trial for trial in trials if trial._trial_id == trial_id)  # noqa: SLF001
        self._claim = _Claim(structure, trial_id)
        before = [trial for trial in trials if trial.number < mine.number and _is_open(trial)]
        for trial in before:
            # Of an attempt whose answer was lost.
            if _job_of(trial) == self._job:
                self._database.once(partial(self._end, trial))
        if any(_job_of(one) != self._job and _structure_of(one) == structure for one in before):
            self.release()
            return False
        return True

    def tell(self, rung: Rung) -> None:
        if self._claim is not None and isinstance(rung.outcome, Measured | OutOfMemory):
            self._claim.rungs.append(rung)
            self._database.once(self._say_all)

    def release(self) -> None:
        if self._claim is not None:
            self._claim.is_over = True
            self._unsaid.append(self._claim)
            self._claim = None
            self._database.once(self._say_all)

    def finish(self) -> None:
        self._database.patiently(self._say_all, _LAST_PATIENCE_S)

    def _take_up(self, known: Sequence[Rung]) -> None:
        """End what this job had open when it was stopped, and tell what it could not tell then.

        What it told and had no time to write down is news to it.
        """
        trials = self._database.patiently(self._all) or []
        told: set[tuple[str, str]] = set()
        for trial in trials:
            if _job_of(trial) == self._job:
                told |= {_identity(rung) for rung in _rungs_of(trial)}
                self._recovered += [
                    replace(one, job="", cached=False) for one in self._new_rungs(trial)
                ]
                if _is_open(trial):
                    self._database.patiently(partial(self._end, trial))
        unsaid: dict[Structure, _Claim] = {}
        for rung in known:
            own = not rung.cached and isinstance(rung.outcome, Measured | OutOfMemory)
            if own and _identity(rung) not in told:
                structure = rung.setting.structure
                claim = unsaid.setdefault(structure, _Claim(structure, None, is_over=True))
                claim.rungs.append(rung)
        self._unsaid += unsaid.values()

    def _new_rungs(self, trial: FrozenTrial) -> list[Rung]:
        """Return the outcomes of a trial, as of another job, that hold here and are not known."""
        had = trial.user_attrs.get(_BUDGET, 0)
        oldest = datetime.now(UTC) - _HOLD
        new = []
        for rung in _rungs_of(trial):
            recent = datetime.fromisoformat(rung.at) >= oldest
            here = self._plan.row_of(rung.setting) is not None
            if recent and here and holds(rung, had, self._plan.budget_bytes):
                if _identity(rung) not in self._known:
                    new.append(replace(rung, cached=True, job=_job_of(trial)))
                self._known.add(_identity(rung))
        return new

    def _is_stale(self, trial: FrozenTrial) -> bool:
        """Whether a trial has not beaten for so long, and could have."""
        now, beat = self._database.clock(), int(trial.user_attrs.get(_BEAT, 0))
        number = trial.number
        if self._beats.get(number, (None, 0.0))[0] != beat:
            self._beats[number] = (beat, now)
        return now - max(self._beats[number][1], self._database.away_at) > self._stale_s

    def _end_stale(self, trial: FrozenTrial) -> None:
        if _is_open(trial):
            _log.info("the job on %s that probed %s is gone", *_who(trial))
            self._database.patiently(partial(self._end, trial))

    def _end(self, trial: FrozenTrial) -> None:
        try:
            self._database.storage.set_trial_state_values(trial._trial_id, TrialState.FAIL)  # noqa: SLF001
        except UpdateFinishedTrialError:
            _log.debug("another job was first to end trial %d", trial.number)

    def _all(self) -> list[FrozenTrial]:
        self._say_all()
        return self._database.trials()

    def _open(self, structure: Structure) -> int:
        self._say_all()
        return self._create(_Claim(structure, None), TrialState.RUNNING)

    def _create(self, claim: _Claim, state: TrialState) -> int:
        parameters, kinds = _parameters(claim.structure)
        speeds = claim.speeds
        return self._database.create(
            state=state,
            value=max(speeds.values()) if state == TrialState.COMPLETE else None,
            params=parameters,
            distributions=kinds,
            intermediate_values=speeds,
            user_attrs={
                _JOB: self._job,
                "host": os.uname().nodename,
                _STRUCTURE: claim.structure.to_json(),
                _BUDGET: self._plan.budget_bytes,
                _BEAT: 0,
                **{
                    f"{_RUNG}{rung.setting.micro_batch_size}": rung.to_json()
                    for rung in claim.rungs
                },
            },
        )

    def _say_all(self) -> None:
        """Tell the database what it does not know; what was said is not said again."""
        for claim in [*self._unsaid, *([self._claim] if self._claim else [])]:
            self._say(claim)
            if claim.is_over:
                self._unsaid.remove(claim)

    def _say(self, claim: _Claim) -> None:
        over = TrialState.COMPLETE if claim.speeds else TrialState.FAIL
        if claim.trial_id is None:
            if claim.is_over and claim.rungs:
                self._create(claim, over)
            return
        try:
            for rung in claim.rungs:
                self._say_rung(claim, claim.trial_id, rung)
            if claim.is_over:
                values = [max(claim.speeds.values())] if claim.speeds else None
                self._database.storage.set_trial_state_values(claim.trial_id, over, values)
        except UpdateFinishedTrialError:
            # Another job took this one for gone, or it was said before the answer was lost.
            claim.trial_id = None
            if claim.is_over and len(claim.told) < len(claim.rungs):
                self._create(claim, over)

    def _say_rung(self, claim: _Claim, trial_id: int, rung: Rung) -> None:
        size = rung.setting.micro_batch_size
        if size in claim.told:
            return
        if isinstance(rung.outcome, Measured):
            speed = rung.outcome.tokens_per_s
            self._database.storage.set_trial_intermediate_value(trial_id, size, speed)
        self._database.storage.set_trial_user_attr(trial_id, f"{_RUNG}{size}", rung.to_json())
        claim.told.add(size)

    def _beat(self) -> None:
        """Show that this job lives, and notice when the database is away, also in long probes."""
        count = 0
        while not self._over.wait(self._beat_s):
            claim = self._claim
            if claim is None or claim.trial_id is None:
                continue
            count += 1
            try:
                self._database.storage.set_trial_user_attr(claim.trial_id, _BEAT, count)
            except UpdateFinishedTrialError:
                continue
            except Exception:  # noqa: BLE001 - whatever it is, it is met and told where it matters
                self._database.away_at = self._database.clock()


def _study_of(storage: Storage, name: str) -> int:
    try:
        return storage.create_new_study([StudyDirection.MAXIMIZE], name)
    except DuplicatedStudyError:
        return storage.get_study_id_from_name(name)


def _identity(rung: Rung) -> tuple[str, str]:
    return rung.setting.key(), rung.at


def _job_of(trial: FrozenTrial) -> str:
    return str(trial.user_attrs.get(_JOB, ""))


def _structure_of(trial: FrozenTrial) -> Structure:
    return Structure(**trial.user_attrs[_STRUCTURE])


def _is_open(trial: FrozenTrial) -> bool:
    return trial.state == TrialState.RUNNING


def _rungs_of(trial: FrozenTrial) -> Iterable[Rung]:
    for name, document in trial.user_attrs.items():
        if name.startswith(_RUNG):
            yield Rung.from_json(document)


def _who(trial: FrozenTrial) -> tuple[str, str]:
    return str(trial.user_attrs.get("host", "?")), _structure_of(trial).label()


def _parameters(structure: Structure) -> tuple[dict[str, Any], dict[str, BaseDistribution]]:
    """Return what a dashboard shows of a structure, in ranges that are the same for every job.

    Optuna refuses choices that differ between trials, and what jobs alike would try may differ.
    """
    values: dict[str, Any] = {}
    kinds: dict[str, BaseDistribution] = {}
    for knob, value in asdict(structure).items():
        if isinstance(value, bool):
            values[knob], kinds[knob] = value, CategoricalDistribution((False, True))
        elif isinstance(value, int):
            values[knob], kinds[knob] = value, IntDistribution(-1, _LARGEST)
        elif value in _CHOICES.get(knob, ()):
            values[knob], kinds[knob] = value, CategoricalDistribution(_CHOICES[knob])
    return values, kinds


_CHOICES: dict[str, tuple[str, ...]] = {
    "offload_optimizer": ("none", "cpu", "nvme"),
    "offload_param": ("none", "cpu", "nvme"),
    "checkpointing": ("none", "full", "every-2", "every-4"),
    "attention": ("sdpa", "eager", "flash_attention_2"),
    "sampling": ("random", "batch_rebalance"),
    "loss": ("whole", "chunked"),
}
"""Values of knobs that are words; a value beyond them is shown in the trial's attributes alone."""
