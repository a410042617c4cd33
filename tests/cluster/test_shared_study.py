"""Jobs that share one study in a real PostgreSQL."""

import json
import os
import pwd
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import pytest

from autotune.outcome import Measured, Rung
from autotune.rundir import RunDir

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1200)]

JOB = Path(__file__).parent / "tuning_job.py"
LIMIT_S = 900


class Postgres:
    """A server of Debian's package, run by a user who is not root, on a port that is free."""

    def __init__(self, directory: Path) -> None:
        programs = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
        if not programs:
            pytest.fail("PostgreSQL is missing: apt-get install --no-install-recommends postgresql")
        self._programs = programs[-1]
        self._data = directory / "data"
        self._directory = directory
        self._user = "postgres" if os.geteuid() == 0 else None
        if self._user is not None:
            shutil.chown(directory, self._user)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        how = ("-U", "autotune", "-A", "trust", "--no-sync", "-E", "UTF8")
        self._call("initdb", "-D", self._data, *how)
        self.start()

    @property
    def address(self) -> str:
        return f"postgresql://autotune@127.0.0.1:{self.port}/postgres"

    def start(self) -> None:
        options = f"-p {self.port} -k {self._directory} -c listen_addresses=127.0.0.1 -c fsync=off"
        log = self._directory / "log"
        self._call("pg_ctl", "-D", self._data, "-o", options, "-l", log, "-w", "start")

    def stop(self) -> None:
        """Stop as a server does that is shut down: clients that are connected lose it."""
        self._call("pg_ctl", "-D", self._data, "-m", "fast", "-w", "stop")

    def _call(self, program: str, *arguments: object) -> None:
        subprocess.run(
            [self._programs / program, *map(str, arguments)],
            user=self._user,
            cwd=self._directory,
            env={"PATH": os.environ["PATH"], "LC_ALL": "C"},
            stdout=subprocess.DEVNULL,
            stdin=subprocess.DEVNULL,
            check=True,
        )


@pytest.fixture(scope="module")
def server() -> Iterator[Postgres]:
    # Short, as the path of a socket has to be, and open to the server's user.
    directory = Path(tempfile.mkdtemp(prefix="pg-"))
    assert os.geteuid() != 0 or pwd.getpwnam("postgres")
    postgres = Postgres(directory)
    yield postgres
    postgres.stop()
    shutil.rmtree(directory)


@pytest.fixture
def address(server: Postgres) -> str:
    """Return a database of this test's own."""
    name = f"test_{uuid.uuid4().hex}"
    subprocess.run(
        ["psql", "-q", server.address, "-c", f"CREATE DATABASE {name}"],
        check=True,
        stdin=subprocess.DEVNULL,
    )
    return server.address.rpartition("/")[0] + f"/{name}"


class Job:
    """A tuning on a surface that is known, in a process and a run directory of its own."""

    def __init__(self, address: str, root: Path, name: str, rung_s: float = 0.3) -> None:
        self.dir = RunDir(root / name)
        self._command = [sys.executable, str(JOB), address, name, str(self.dir.root), str(rung_s)]
        self.start()

    def start(self) -> None:
        self.process = subprocess.Popen(
            self._command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )

    def finish(self) -> dict[str, Any]:
        _, said = self.process.communicate(timeout=LIMIT_S)
        assert self.process.returncode == 0, said
        best: dict[str, Any] = json.loads((self.dir.root / "best.json").read_text())
        return best

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()

    @property
    def own(self) -> list[Rung]:
        return [rung for rung in self.dir.read_rungs() if not rung.cached]


def wait_for(reached: Callable[[], bool], limit_s: float = LIMIT_S) -> None:
    deadline = time.monotonic() + limit_s
    while not reached():
        assert time.monotonic() < deadline, "it takes too long"
        time.sleep(0.05)


def assert_shared(jobs: list[Job], bests: list[dict[str, Any]]) -> None:
    """Check that each setting was measured once, and that all end with the best of all."""
    own = list(chain.from_iterable(job.own for job in jobs))
    measured = Counter(rung.setting.key() for rung in own if isinstance(rung.outcome, Measured))
    assert set(measured.values()) == {1}
    fastest = max(rung.outcome.tokens_per_s for rung in own if isinstance(rung.outcome, Measured))
    assert {best["tokens_per_s"] for best in bests} == {fastest}
    assert len({best["setting"] for best in bests}) == 1
    for job in jobs:
        known = {rung.setting.key() for rung in job.dir.read_rungs()}
        assert known >= set(measured), "probes.jsonl of each job has what all have found"


def test_four_jobs_measure_each_setting_once_and_end_with_the_best_of_all(
    address: str, tmp_path: Path
) -> None:
    jobs = [Job(address, tmp_path, f"job-{number}") for number in range(4)]
    bests = [job.finish() for job in jobs]
    assert_shared(jobs, bests)
    assert sum(bool(job.own) for job in jobs) > 1
    structures = {rung.setting.structure for job in jobs for rung in job.own}
    assert len(structures) <= 12


def test_a_job_that_comes_later_measures_only_what_is_left(address: str, tmp_path: Path) -> None:
    first = Job(address, tmp_path, "first", rung_s=0)
    best = first.finish()
    second = Job(address, tmp_path, "second", rung_s=0)
    assert second.finish()["tokens_per_s"] == best["tokens_per_s"]
    assert not second.own


def test_killing_one_leaves_the_other_whole_and_it_goes_on_when_started_again(
    address: str, tmp_path: Path
) -> None:
    jobs = [Job(address, tmp_path, name, rung_s=0.6) for name in ("killed", "whole")]
    killed, whole = jobs
    wait_for(lambda: len(killed.own) >= 2 and len(whole.own) >= 1)
    killed.kill()
    best = whole.finish()
    found = {rung.setting.key() for rung in killed.own}
    assert found <= {rung.setting.key() for rung in whole.dir.read_rungs()}
    killed.start()
    assert_shared(jobs, [best, killed.finish()])


def test_a_job_that_is_started_again_at_once_takes_its_own_claim_up(
    address: str, tmp_path: Path
) -> None:
    job = Job(address, tmp_path, "job", rung_s=0.5)
    wait_for(lambda: len(job.own) >= 2)
    job.kill()
    job.start()
    assert_shared([job], [job.finish()])


def test_the_database_away_for_20_seconds_delays_and_fails_nobody(
    server: Postgres, address: str, tmp_path: Path
) -> None:
    jobs = [Job(address, tmp_path, f"job-{number}", rung_s=0.5) for number in range(2)]
    wait_for(lambda: all(job.own for job in jobs))
    server.stop()
    time.sleep(20)
    assert all(job.process.poll() is None for job in jobs)
    server.start()
    assert_shared(jobs, [job.finish() for job in jobs])


def test_a_job_waits_for_a_database_that_is_not_there_yet(
    server: Postgres, address: str, tmp_path: Path
) -> None:
    server.stop()
    job = Job(address, tmp_path, "job", rung_s=0)
    time.sleep(5)
    assert job.process.poll() is None
    server.start()
    job.finish()


COMMAND = ("--devices", "2", "--global-batch-size", "16", "--max-probes", "5", "--no-cache")


class Run:
    """The command itself, with real probes."""

    def __init__(self, address: str, root: Path, name: str, dataset: Path) -> None:
        self.dir = RunDir(root / name)
        self._log = root / f"{name}.log"
        program = str(Path(sys.executable).parent / "autotune")
        self._command = [program, "tune", "--dataset", str(dataset), *COMMAND]
        self._command += ["--run-dir", str(self.dir.root), "--storage", address]
        self.start()

    def start(self) -> None:
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(
                self._command, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )

    def finish(self) -> dict[str, Any]:
        self.process.wait(LIMIT_S)
        assert self.process.returncode == 0, self._log.read_text()
        result: dict[str, Any] = json.loads(self.dir.result.read_text())
        return result

    @property
    def own(self) -> list[Rung]:
        return [rung for rung in self.dir.read_rungs() if not rung.cached]


def test_two_runs_with_real_probes_of_which_one_is_killed(
    address: str, short_rows: Path, tmp_path: Path
) -> None:
    runs = [Run(address, tmp_path, name, short_rows) for name in ("whole", "killed")]
    whole, killed = runs
    wait_for(lambda: bool(killed.own))
    killed.process.kill()
    killed.process.wait()
    first = whole.finish()
    killed.start()
    second = killed.finish()

    measured = Counter(
        rung.setting.key() for run in runs for rung in run.own if isinstance(rung.outcome, Measured)
    )
    assert set(measured.values()) == {1}
    assert first["tokens_per_s"] == second["tokens_per_s"]
    assert first["setting"] == second["setting"]
    assert "autotune@" in json.loads(whole.dir.run.read_text())["options"]["storage"]["value"]
