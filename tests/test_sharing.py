"""A study that jobs share, in a database of one file; tests/cluster has a real server and kills."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
import sqlalchemy.exc
from optuna.trial import TrialState
from records import Surface, SurfaceSite, as_rung, make_cluster, make_job, measured, perturbed
from records import plan_for as plan_on

from autotune.errors import ConfigError, InputMissingError
from autotune.outcome import Crashed, Measured, OutOfMemory, Rung
from autotune.plan import Plan
from autotune.probe.fakes import ScriptedProber
from autotune.setting import Setting, Structure
from autotune.tune.loop import Tuned, Tuner
from autotune.tune.search import Search
from autotune.tune.shared_study import (
    SharedStudy,
    Storage,
    StudyDatabase,
    open_storage,
    without_password,
)
from autotune.units import GIB

PLAN: Plan = plan_on(
    make_cluster(gpus=4, memory_bytes=32 * GIB), job=make_job(global_batch_size=64)
)
FIRST, SECOND = Structure(zero_stage=0), Structure(zero_stage=1)


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def address(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/study.db"


class Jobs:
    """Jobs of one study, each with a connection of its own, and a clock for all."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.clock = Clock()
        self._open: list[SharedStudy] = []

    def start(self, name: str, known: Sequence[Rung] = (), plan: Plan = PLAN) -> SharedStudy:
        database = StudyDatabase(
            open_storage(self.address), "study", clock=self.clock, sleep=self.clock.sleep
        )
        # Beats would be by the real clock.
        study = SharedStudy(database, name, plan, known, beat_s=1e6)
        self._open.append(study)
        return study

    def trials(self) -> list[optuna.trial.FrozenTrial]:
        return optuna.load_study(study_name="study", storage=self.address).trials

    def close(self) -> None:
        for study in self._open:
            study.close()


@pytest.fixture
def jobs(address: str) -> Iterator[Jobs]:
    jobs = Jobs(address)
    yield jobs
    jobs.close()


def rung_of(structure: Structure, size: int = 1, speed: float = 100.0, **changes: Any) -> Rung:  # noqa: ANN401
    rung = as_rung(structure.with_micro_batch(size, 4, 64), measured(speed))
    return replace(rung, at=datetime.now(UTC).isoformat(timespec="seconds"), **changes)


def test_of_two_jobs_one_gets_a_structure_and_the_other_sees_that_it_is_at_work(
    jobs: Jobs,
) -> None:
    one, other = jobs.start("one"), jobs.start("other")
    assert one.claim(FIRST)
    assert not other.claim(FIRST)
    assert other.look().at_work == {FIRST}
    assert other.claim(SECOND)
    assert one.look().at_work == {SECOND}


def test_what_one_found_is_news_to_the_other_once_it_is_through(jobs: Jobs) -> None:
    one, other = jobs.start("one"), jobs.start("other")
    rung = rung_of(FIRST)
    assert one.claim(FIRST)
    one.tell(rung)
    assert other.look().news == ()
    one.release()
    seen = other.look()
    assert seen.news == (replace(rung, cached=True, job="one"),)
    assert seen.at_work == frozenset()
    assert other.look().news == ()
    assert one.look().news == ()


def test_a_claim_is_free_again_when_nothing_came_of_it(jobs: Jobs) -> None:
    one, other = jobs.start("one"), jobs.start("other")
    assert one.claim(FIRST)
    one.release()
    assert other.claim(FIRST)


def test_deaths_are_no_news(jobs: Jobs) -> None:
    one, other = jobs.start("one"), jobs.start("other")
    assert one.claim(FIRST)
    one.tell(replace(rung_of(FIRST), outcome=Crashed(reason="no ninja", evidence="")))
    one.release()
    assert other.look().news == ()


def test_an_out_of_memory_holds_where_there_is_no_more(jobs: Jobs) -> None:
    smaller = replace(PLAN, budget_bytes=PLAN.budget_bytes // 2)
    larger = replace(PLAN, budget_bytes=PLAN.budget_bytes * 2)
    one = jobs.start("one")
    assert one.claim(FIRST)
    gone = replace(rung_of(FIRST), outcome=OutOfMemory(where="device", evidence="x"))
    one.tell(gone)
    one.release()
    assert len(jobs.start("smaller", plan=smaller).look().news) == 1
    assert jobs.start("larger", plan=larger).look().news == ()


def test_what_is_older_than_a_week_is_no_news(jobs: Jobs) -> None:
    one = jobs.start("one")
    assert one.claim(FIRST)
    for size, age in ((1, timedelta(days=8)), (2, timedelta(days=6))):
        at = (datetime.now(UTC) - age).isoformat(timespec="seconds")
        one.tell(replace(rung_of(FIRST, size), at=at))
    one.release()
    (news,) = jobs.start("other").look().news
    assert news.setting.micro_batch_size == 2


def test_a_job_that_beats_no_more_is_ended_and_what_it_found_is_kept(jobs: Jobs) -> None:
    gone, other = jobs.start("gone"), jobs.start("other")
    rung = rung_of(FIRST)
    assert gone.claim(FIRST)
    gone.tell(rung)
    for _ in range(6):
        jobs.clock.sleep(10)
        assert other.look().at_work == {FIRST}
    jobs.clock.sleep(11)
    seen = other.look()
    assert seen.at_work == frozenset()
    assert [news.setting for news in seen.news] == [rung.setting]
    assert other.claim(FIRST)
    assert TrialState.FAIL in {trial.state for trial in jobs.trials()}


def test_a_job_that_was_taken_for_gone_tells_all_the_same(jobs: Jobs) -> None:
    slow, other = jobs.start("slow"), jobs.start("other")
    assert slow.claim(FIRST)
    other.look()
    jobs.clock.sleep(100)
    other.look()
    slow.tell(rung_of(FIRST))
    slow.release()
    assert [news.setting.structure for news in other.look().news] == [FIRST]


def test_a_job_that_is_started_again_ends_its_claim_and_tells_what_it_could_not(
    jobs: Jobs,
) -> None:
    before = jobs.start("job")
    assert before.claim(FIRST)
    told, untold = rung_of(FIRST), rung_of(FIRST, size=2)
    before.tell(told)
    again = jobs.start("job", known=[told, untold])
    other = jobs.start("other")
    assert again.look().at_work == frozenset()
    found = {news.setting for news in other.look().news}
    assert found == {told.setting, untold.setting}
    assert other.claim(FIRST)


def test_what_a_resumed_job_knows_of_others_is_no_news(jobs: Jobs) -> None:
    one = jobs.start("one")
    assert one.claim(FIRST)
    one.tell(rung_of(FIRST))
    one.release()
    (known,) = jobs.start("other").look().news
    assert jobs.start("other", known=[known]).look().news == ()


def test_all_agree_on_what_the_first_has_said(jobs: Jobs) -> None:
    jobs.start("one")
    databases = [StudyDatabase(open_storage(jobs.address), "study") for _ in range(2)]
    first, second = databases
    assert first.agree("rates", {"x": 1.5}) == {"x": 1.5}
    assert second.agree("rates", {"x": 2.5}) == {"x": 1.5}
    assert first.agree("rates", {"x": 3.5}) == {"x": 1.5}
    assert first.trials() == [], "it is no structure"
    for database in databases:
        database.close()


class Outage:
    """Has a storage's answers fail as those of a server do that is away."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
        self.until_s = -1.0
        for name in ("get_all_trials", "create_new_trial", "set_trial_user_attr"):
            monkeypatch.setattr(Storage, name, self._failing(getattr(Storage, name), clock))

    def _failing(self, method: Any, clock: Clock) -> Any:  # noqa: ANN401 - a method
        def call(*arguments: Any, **named: Any) -> Any:  # noqa: ANN401 - as of the method
            if clock.now < self.until_s:
                msg = "SELECT"
                raise sqlalchemy.exc.OperationalError(msg, {}, Exception("server is away"))
            return method(*arguments, **named)

        return call


def test_while_the_database_is_away_nothing_is_lost_and_claims_wait(
    jobs: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = jobs.start("one"), jobs.start("other")
    outage = Outage(monkeypatch, jobs.clock)
    assert one.claim(FIRST)
    outage.until_s = 20
    one.tell(rung_of(FIRST))
    one.release()
    assert jobs.clock.now == 0, "what is told does not wait"
    assert one.claim(SECOND)
    assert jobs.clock.now >= 20
    assert [news.setting.structure for news in other.look().news] == [FIRST]
    assert other.look().at_work == {SECOND}


def test_an_outage_makes_nobody_stale(jobs: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = jobs.start("one"), jobs.start("other")
    outage = Outage(monkeypatch, jobs.clock)
    assert one.claim(FIRST)
    other.look()
    outage.until_s = jobs.clock.now + 100
    assert other.look().at_work == {FIRST}
    assert jobs.clock.now >= 100


def test_after_long_in_vain_a_job_goes_on_alone_and_tells_later(
    jobs: Jobs, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    one, other = jobs.start("one"), jobs.start("other")
    outage = Outage(monkeypatch, jobs.clock)
    outage.until_s = 10_000
    assert one.claim(FIRST)
    assert "goes on alone" in caplog.text
    waited = jobs.clock.now
    one.tell(rung_of(FIRST))
    one.release()
    assert one.claim(SECOND)
    assert jobs.clock.now == waited, "it has waited once"
    outage.until_s = 0
    one.release()
    assert [news.setting.structure for news in other.look().news] == [FIRST]


def tuner_of(study: SharedStudy, surface: Surface, recorded: list[Rung], **changes: Any) -> Tuner:  # noqa: ANN401
    return Tuner(
        surface.plan,
        ScriptedProber(surface.answer),
        SurfaceSite(),
        [],
        record=recorded.append,
        steps=1_000_000,
        others=study,
        **changes,
    )


def test_a_job_alone_in_a_study_finds_what_it_finds_without(jobs: Jobs) -> None:
    surface, recorded = perturbed(PLAN, 0), list[Rung]()
    tuned: Tuned = tuner_of(jobs.start("one"), surface, recorded).run(max_probes=12, budget_s=None)
    assert tuned.best is not None
    assert isinstance(tuned.best.outcome, Measured)
    assert tuned.best.outcome.tokens_per_s > 0.95 * surface.best
    settings = [rung.setting for rung in recorded]
    assert len(settings) == len(set(settings)), "nothing is measured again"
    assert {trial.state for trial in jobs.trials()} <= {TrialState.COMPLETE, TrialState.FAIL}


@pytest.mark.parametrize("sampler", ["prior", "tpe"])
def test_what_one_job_has_measured_no_other_does(jobs: Jobs, sampler: str) -> None:
    surface = perturbed(PLAN, 1)
    first, second = list[Rung](), list[Rung]()
    tuner_of(jobs.start("one"), surface, first, sampler=sampler).run(max_probes=4, budget_s=None)
    tuner_of(jobs.start("other"), surface, second, sampler=sampler).run(max_probes=8, budget_s=None)
    own = [rung.setting for rung in second if not rung.cached]
    assert own
    assert not set(own) & {rung.setting for rung in first}
    taken = [rung.setting for rung in second if rung.cached]
    assert set(taken) == {rung.setting for rung in first}, "it is recorded here too"


def test_a_job_that_comes_when_all_is_done_ends_with_the_same(jobs: Jobs) -> None:
    surface = perturbed(PLAN, 1)
    one = tuner_of(jobs.start("one"), surface, [])
    end = one.run(max_probes=12, budget_s=None)
    again = tuner_of(jobs.start("other"), surface, [])
    last = again.run(max_probes=12, budget_s=None)
    assert last.best is not None
    assert end.best is not None
    assert last.best.setting == end.best.setting
    assert last.probes == 0


def test_structures_at_work_are_not_proposed_and_their_kin_less(jobs: Jobs) -> None:
    del jobs
    search = Search(PLAN, [])
    wanted = search.next_structure()
    assert wanted == search.default.structure
    search.hear([], frozenset({wanted}))
    another = search.next_structure()
    assert another is not None
    assert another != wanted
    search.hear([], frozenset(PLAN.space.structures))
    assert search.next_structure() is None
    search.hear([], frozenset())
    assert search.next_structure() == wanted


def test_a_lie_is_no_better_than_the_best() -> None:
    best = PLAN.space.setting(int(np.argmax(np.where(PLAN.kept, PLAN.tokens_per_s, 0))))
    slow = as_rung(search_default(), measured(1.0))
    search = Search(PLAN, [slow])
    search.hear([], frozenset({best.structure}))
    assert search.beliefs.best_tokens_per_s < 2.0
    assert search.best() is not None
    assert [rung.setting for rung in search.rungs] == [slow.setting], "lies are no outcomes"


def search_default() -> Setting:
    return Search(PLAN, []).default


@pytest.mark.parametrize(
    ("address", "told"),
    [
        ("not an address", "no address of a database"),
        ("oracle+cx_oracle://host/db", "driver that is not installed"),
        ("nonsense://host/db", "driver that is not installed"),
    ],
)
def test_an_address_that_cannot_be_is_refused(address: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        open_storage(address)


def test_a_server_that_does_not_answer_is_told_without_its_password() -> None:
    with pytest.raises(InputMissingError) as refused:
        open_storage("postgresql://me:secret@127.0.0.1:9/db", patience_s=0)
    assert "does not answer" in str(refused.value)
    assert "secret" not in str(refused.value)
    assert without_password("postgresql://me:secret@h/db") == "postgresql://me:***@h/db"


def test_sqlite_on_a_network_file_system_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Mount:
        mountpoint = str(tmp_path)
        fstype = "nfs4"

    monkeypatch.setattr("psutil.disk_partitions", lambda **_: [Mount])
    with pytest.raises(ConfigError, match="network's file system"):
        open_storage(f"sqlite:///{tmp_path}/study.db")
