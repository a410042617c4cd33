"""The end of a job: when it is, and what is planned until then."""

import signal
import time
from datetime import datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autotune.time_limit import (
    job_end_s,
    least,
    requeue,
    starts_again,
    stopping_in_time,
    tuning_limit_s,
    warning_s,
)

JOB = {"SLURM_JOB_ID": "7"}
SHOWN = "JobId=7 JobName=x Requeue=1 Restarts=0 BatchFlag=1 Reboot=0"


def never(*command: str) -> str | None:
    raise AssertionError(command)


def test_the_end_is_what_slurm_told_the_job() -> None:
    assert job_end_s({}, never) is None
    assert job_end_s(JOB | {"SLURM_JOB_END_TIME": "1790000000"}, never) == 1790000000


@pytest.mark.parametrize("answer", [None, "", "N/A\n", "NONE\n"])
def test_a_job_without_an_end_has_none(answer: str | None) -> None:
    assert job_end_s(JOB, lambda *_: answer) is None


def test_else_it_is_asked_for_as_squeue_writes_it() -> None:
    asked: list[tuple[str, ...]] = []

    def ask(*command: str) -> str:
        asked.append(command)
        return "2026-11-27T20:30:00\n"

    assert job_end_s(JOB, ask) == datetime(2026, 11, 27, 20, 30).timestamp()  # noqa: DTZ001 - local
    assert asked == [("squeue", "--noheader", "--format=%e", "--jobs", "7")]


hours = st.floats(0, 200_000)


@given(left_s=hours, training_s=hours)
def test_tuning_leaves_room_for_a_training_that_has_some(left_s: float, training_s: float) -> None:
    limit_s = tuning_limit_s(left_s, training_s)
    assert limit_s is not None
    usable_s = max(0.0, left_s - warning_s(left_s))

    assert 0 <= limit_s <= usable_s
    # A training that does not fit is gone on with in the next job, so that this one is for most of
    # its time the training's.
    fits = 1.1 * training_s <= 0.75 * usable_s
    assert limit_s == pytest.approx(usable_s - 1.1 * training_s if fits else 0.25 * usable_s)


def test_without_an_end_there_is_no_limit() -> None:
    assert tuning_limit_s(None, 100) is None
    assert least(None, None) is None
    assert least(None, 7, 5) == 5


def test_the_warning_is_longer_for_longer_jobs_within_bounds() -> None:
    assert [warning_s(left_s) for left_s in (60, 3600, 86400)] == [15, 180, 300]


def test_only_a_script_that_asks_for_it_is_started_again() -> None:
    assert starts_again(SHOWN)
    assert not starts_again(SHOWN.replace("Requeue=1", "Requeue=0"))
    # A shell of salloc.
    assert not starts_again(SHOWN.replace("BatchFlag=1", "BatchFlag=0"))


def test_a_job_is_requeued_once_it_is_known_to_ask_for_it() -> None:
    asked: list[tuple[str, ...]] = []

    def ask(*command: str) -> str | None:
        asked.append(command)
        return SHOWN if command[1] == "show" else ""

    assert requeue(JOB, ask)
    assert asked[-1] == ("scontrol", "requeue", "7")
    assert not requeue({}, never)
    assert not requeue(JOB, lambda *_: None)


def test_a_process_is_told_before_its_job_ends() -> None:
    told: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, _: told.append(number))
    try:
        with stopping_in_time(warning_s(0) + 0.1):
            time.sleep(0.5)
        with stopping_in_time(None), stopping_in_time(1000.0):
            pass
        time.sleep(0.2)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert told == [signal.SIGUSR1]
