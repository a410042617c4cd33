"""The time limit of the Slurm job that a run is in: when it comes, and what is done before it."""

import math
import os
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime

_SHARE_OF_TRAINING = 1.1
"""Of the estimated time, what is left to a training that the job has room for."""
_MOST_OF_TUNING = 0.25
"""Of a job that has no room for the whole training, what tuning may take; it is gone on with in the
next."""
_ASK_S = 20.0

Ask = Callable[..., str | None]


def warning_s(left_s: float) -> float:
    """Return how long before its end a job that lasts `left_s` seconds from now stops. Pure.

    In that time ranks take their step to its end and save a checkpoint.
    """
    return min(300.0, max(15.0, 0.05 * left_s))


def tuning_limit_s(left_s: float | None, training_s: float) -> float | None:
    """Return the seconds that tuning may take; None where the job has no end. Pure.

    Args:
        left_s: until the job's end.
        training_s: what the training is estimated to take.
    """
    if left_s is None:
        return None
    usable_s = max(0.0, left_s - warning_s(left_s))
    after_training_s = usable_s - _SHARE_OF_TRAINING * training_s
    return max(after_training_s, _MOST_OF_TUNING * usable_s)


def least(*limits_s: float | None) -> float | None:
    """Return the lowest limit, None where there is none."""
    known = [limit_s for limit_s in limits_s if limit_s is not None]
    return min(known) if known else None


def job_end_s(environment: Mapping[str, str], ask: Ask) -> float | None:
    """Return when the job ends, in seconds since the epoch; None where it is not known to.

    `ask` runs a program of Slurm and returns what it writes, None if it fails.
    """
    if "SLURM_JOB_ID" not in environment:
        return None
    told = environment.get("SLURM_JOB_END_TIME", "")
    if told.isdecimal():
        return float(told)
    answer = ask("squeue", "--noheader", "--format=%e", "--jobs", environment["SLURM_JOB_ID"])
    try:
        return datetime.fromisoformat((answer or "").strip()).timestamp()
    except ValueError:
        return None


def starts_again(fields: str) -> bool:
    """Tell whether Slurm may start a job again, by what `scontrol show job` says of it. Pure.

    It runs a script, and that, or the site, asks for it.
    """
    words = fields.split()
    return "Requeue=1" in words and "BatchFlag=1" in words


def requeue(environment: Mapping[str, str], ask: Ask) -> bool:
    """Have Slurm start this job's script again; returns whether it will."""
    job = environment.get("SLURM_JOB_ID")
    if job is None or not starts_again(ask("scontrol", "show", "job", "--oneliner", job) or ""):
        return False
    return ask("scontrol", "requeue", job) is not None


def ask_slurm(*command: str) -> str | None:
    """Run a program of Slurm; returns what it writes, None where it fails or is not there."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_ASK_S)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def seconds_left(now_s: float) -> float | None:
    """Return the seconds until the job ends, None where it does not."""
    end_s = job_end_s(os.environ, ask_slurm)
    return None if end_s is None else max(0.0, end_s - now_s)


@contextmanager
def stopping_in_time(left_s: float | None) -> Iterator[None]:
    """Have this process told, as by the scheduler, in time before the job ends.

    Where the scheduler tells it earlier, as it was asked to, that counts.
    """
    if left_s is None or not math.isfinite(left_s):
        yield
        return
    own = os.getpid()
    timer = threading.Timer(
        max(0.0, left_s - warning_s(left_s)), lambda: os.kill(own, signal.SIGUSR1)
    )
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
