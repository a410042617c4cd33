"""LocalProber with real ranks: what it measures, and what it makes of ranks that come to harm."""

import contextlib
import json
import os
import shutil
import signal
from collections.abc import Generator, Sequence
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from conftest import write_rows

from autotune import builtin, intake
from autotune.config import Layer, resolve
from autotune.outcome import Crashed, Outcome, OutOfMemory, TimedOut, Unknown
from autotune.probe.deadlines import Deadline, Deadlines
from autotune.probe.launch import ColdLauncher, Launcher
from autotune.probe.local import LocalProber
from autotune.probe.protocol import PHASES, ProbeRequest, RungFailure, RungMeasurement
from autotune.processes import temporary_dir
from autotune.setting import REBALANCE, Structure
from autotune.space import Space
from autotune.tune.site import JobSite

RANKS, GLOBAL_BATCH = 2, 16
MIB = 2**20
SLOW = pytest.mark.slow

Answers = Generator[RungMeasurement | RungFailure]


def site_of(directory: Path, pairs: Sequence[tuple[str, str]]) -> tuple[JobSite, Space]:
    """Return a job on two ranks and what can be set for it."""
    data = write_rows(directory / "data.jsonl", pairs)
    given = {"dataset": data, "devices": RANKS, "global_batch_size": GLOBAL_BATCH}
    question = intake.ask(resolve([Layer("test", {k: str(v) for k, v in given.items()})]))
    intake.start_processes(question)
    workload = intake.look_into(question, dataset_dir=directory / "dataset", logs=directory)
    site = JobSite(
        job=workload.job,
        cluster=question.cluster,
        profile=workload.profile,
        lengths_of_rows=workload.lengths,
        rebalanced=workload.drawn.rebalanced,
        dataset_dir=directory / "dataset",
        scratch_dir=directory,
        total_steps=4,
    )
    return site, workload.plan.space


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> JobSite:
    """Return a job whose rows are some 150 tokens long."""
    pairs = [
        (f"Count on from {first}.", " ".join(map(str, range(first, first + 50))))
        for first in range(100, 124)
    ]
    return site_of(tmp_path_factory.mktemp("site"), pairs)[0]


def request_of(site: JobSite, sizes: Sequence[int], zero_stage: int = 0) -> ProbeRequest:
    structure = Structure(zero_stage=zero_stage)
    return site.request([structure.with_micro_batch(m, RANKS, GLOBAL_BATCH) for m in sizes])


def climb(
    request: ProbeRequest,
    logs: Path,
    deadlines: Deadlines | None = None,
    launcher: Launcher | None = None,
) -> Answers:
    return LocalProber(logs, deadlines=deadlines, launcher=launcher).probe(request)


def silent_for(seconds: float) -> Deadlines:
    """Return limits that give a phase up after so many seconds of silence."""
    limit = Deadline(silence_s=seconds, total_s=240)
    return Deadlines(phases=dict.fromkeys(PHASES, limit), first_rung=limit)


def live_ranks() -> list[psutil.Process]:
    """Return the processes below this one that lead a session of their own, as ranks do.

    So does the shell that keeps the temporary directory.
    """
    ranks = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(ProcessLookupError, psutil.NoSuchProcess):
            leads = os.getsid(process.pid) == process.pid and process.name() != "sh"
            if leads and process.status() != psutil.STATUS_ZOMBIE:
                ranks.append(process)
    return sorted(ranks, key=lambda rank: rank.pid)


def after_the_first_rung(answers: Answers) -> list[psutil.Process]:
    """Wait until a rung is measured; returns the ranks."""
    assert isinstance(next(answers), RungMeasurement)
    ranks = live_ranks()
    assert len(ranks) == RANKS
    return ranks


def failure(answers: Answers) -> Outcome:
    """Let a probe go on to its end; returns the outcome of the rung that it ended on."""
    *_, last = answers
    assert isinstance(last, RungFailure)
    assert live_ranks() == []
    return last.outcome


def peaks(request: ProbeRequest, logs: Path, launcher: Launcher | None = None) -> dict[int, int]:
    answers = list(climb(request, logs, launcher=launcher))
    assert all(isinstance(answer, RungMeasurement) for answer in answers), answers
    return {
        answer.micro_batch_size: answer.peak_bytes
        for answer in answers
        if isinstance(answer, RungMeasurement)
    }


def test_the_memory_of_a_rung_is_not_that_of_a_larger_one_before_nor_of_what_a_rank_imports(
    site: JobSite, tmp_path: Path
) -> None:
    falling = peaks(request_of(site, [8, 1]), tmp_path / "falling")
    alone = peaks(request_of(site, [1]), tmp_path / "alone", ColdLauncher())

    assert falling[8] > falling[1] + 40 * MIB
    assert falling[1] == pytest.approx(alone[1], rel=0.25)
    assert live_ranks() == []


@pytest.mark.parametrize(
    "zero_stage", [pytest.param(1, marks=SLOW), pytest.param(2, marks=SLOW), 3]
)
def test_every_zero_stage_climbs(site: JobSite, tmp_path: Path, zero_stage: int) -> None:
    request = request_of(site, [1, 8], zero_stage)

    answers = list(climb(request, tmp_path))

    assert [answer.micro_batch_size for answer in answers] == [1, 8]
    for answer in answers:
        assert isinstance(answer, RungMeasurement)
        assert all(time > 0 for _, times in answer.accumulate_s for time in times)


def test_memory_beyond_the_cap_is_out_of_memory(site: JobSite, tmp_path: Path) -> None:
    request = request_of(site, [1, 8])
    cap = 140 * MIB
    request = replace(request, spec=replace(request.spec, device_memory_bytes=cap))

    first, last = climb(request, tmp_path)

    assert isinstance(first, RungMeasurement)
    assert first.peak_bytes < cap
    assert isinstance(last, RungFailure)
    assert isinstance(last.outcome, OutOfMemory)
    assert last.outcome.where == "device"
    assert live_ranks() == []


@SLOW
def test_memory_that_runs_out_in_one_rank_is_out_of_memory_of_both(
    site: JobSite, tmp_path: Path
) -> None:
    answers = climb(request_of(site, [1, 8]), tmp_path)
    _, victim = after_the_first_rung(answers)
    _, hard = victim.rlimit(psutil.RLIMIT_DATA)
    victim.rlimit(psutil.RLIMIT_DATA, (victim.memory_info().data + 20 * MIB, hard))

    outcome = failure(answers)

    assert isinstance(outcome, OutOfMemory)
    assert outcome.where == "device"


QUITS = """
import os

from transformers import GlmForCausalLM


class Quits(GlmForCausalLM):
    def forward(self, *args, **kwargs):
        os._exit({code})
"""


@SLOW
@pytest.mark.parametrize("code", [0, 3])
def test_a_rank_that_goes_without_a_word_is_no_known_death(
    site: JobSite, tmp_path: Path, code: int
) -> None:
    model = tmp_path / "model"
    shutil.copytree(builtin.directory("glm-tiny"), model)
    config = json.loads((model / "config.json").read_text())
    quits = {"auto_map": {"AutoModelForCausalLM": "modeling_quits.Quits"}}
    (model / "config.json").write_text(json.dumps(config | quits))
    (model / "modeling_quits.py").write_text(QUITS.format(code=code))
    request = request_of(site, [1])
    spec = replace(request.spec, model_dir=str(model), trust_remote_code=True)

    outcome = failure(climb(replace(request, spec=spec), tmp_path / "logs"))

    assert isinstance(outcome, Unknown)
    assert outcome.exit_code == code
    assert list(temporary_dir().glob("probe-*")) == []


def test_closing_the_answers_leaves_no_rank(site: JobSite, tmp_path: Path) -> None:
    answers = climb(request_of(site, [1, 8]), tmp_path)
    after_the_first_rung(answers)

    answers.close()

    assert live_ranks() == []


@pytest.mark.parametrize("victim", [pytest.param(0, marks=SLOW), 1])
def test_a_rank_killed_from_outside_is_a_crash_by_its_signal(
    site: JobSite, tmp_path: Path, victim: int
) -> None:
    answers = climb(request_of(site, [1, 2, 4, 8]), tmp_path)
    ranks = after_the_first_rung(answers)

    ranks[victim].kill()
    outcome = failure(answers)

    assert isinstance(outcome, Crashed)
    assert "SIGKILL" in outcome.reason


@pytest.mark.slow
def test_a_rank_that_stands_still_times_out(site: JobSite, tmp_path: Path) -> None:
    answers = climb(request_of(site, [1, 2, 4, 8]), tmp_path, silent_for(8))
    ranks = after_the_first_rung(answers)

    ranks[1].send_signal(signal.SIGSTOP)
    outcome = failure(answers)

    assert isinstance(outcome, TimedOut)
    assert 8 <= outcome.seconds < 20
    assert outcome.phase.startswith("micro-batch ")


SLOW_TO_BUILD = """
import time
from transformers import GlmForCausalLM

class SlowForCausalLM(GlmForCausalLM):
    def __init__(self, config):
        super().__init__(config)
        end = time.monotonic() + 15
        while time.monotonic() < end:
            {meanwhile}
"""


def with_a_build_of_15_s(request: ProbeRequest, model: Path, meanwhile: str) -> ProbeRequest:
    """Return the request with a model that does something for 15 s before it is built."""
    shutil.copytree(builtin.directory("glm-tiny"), model)
    (model / "modeling_slow.py").write_text(SLOW_TO_BUILD.format(meanwhile=meanwhile))
    config = json.loads((model / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_slow.SlowForCausalLM"}
    (model / "config.json").write_text(json.dumps(config))
    spec = replace(request.spec, model_dir=str(model), trust_remote_code=True)
    return replace(request, spec=spec)


@pytest.mark.slow
def test_a_build_that_works_for_long_is_no_hang(site: JobSite, tmp_path: Path) -> None:
    request = with_a_build_of_15_s(request_of(site, [1]), tmp_path / "busy", "sum(range(1000))")

    (answer,) = climb(request, tmp_path / "logs", silent_for(7))

    assert isinstance(answer, RungMeasurement), answer


@pytest.mark.slow
def test_a_build_that_does_nothing_is_a_hang(site: JobSite, tmp_path: Path) -> None:
    request = with_a_build_of_15_s(request_of(site, [1]), tmp_path / "idle", "time.sleep(1)")

    outcome = failure(climb(request, tmp_path / "logs", silent_for(7)))

    assert isinstance(outcome, TimedOut)
    assert outcome.phase == "build"


@pytest.mark.slow
def test_a_phase_that_works_beyond_its_limit_times_out(site: JobSite, tmp_path: Path) -> None:
    request = with_a_build_of_15_s(request_of(site, [1]), tmp_path / "slow", "sum(range(1000))")
    limit = Deadline(silence_s=240, total_s=240)
    build = Deadline(silence_s=240, total_s=3)
    deadlines = Deadlines(phases={**dict.fromkeys(PHASES, limit), "build": build})

    outcome = failure(climb(request, tmp_path / "logs", deadlines))

    assert isinstance(outcome, TimedOut)
    assert (outcome.phase, round(outcome.seconds)) == ("build", 3)


def test_an_exception_of_the_model_is_a_crash_with_its_words(site: JobSite, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(builtin.directory("glm-tiny"), model)
    config = json.loads((model / "config.json").read_text())
    # The rows have ids that such an embedding lacks.
    (model / "config.json").write_text(json.dumps(config | {"vocab_size": 64}))
    request = request_of(site, [1])
    request = replace(request, spec=replace(request.spec, model_dir=str(model)))

    outcome = failure(climb(request, tmp_path / "logs"))

    assert isinstance(outcome, Crashed)
    assert "IndexError" in outcome.reason
    assert "in forward" in outcome.evidence


@pytest.mark.parametrize(
    "line",
    [
        pytest.param(b"\xff\xfe\x00\n", id="no text", marks=SLOW),
        pytest.param(b'{"event": "rung", "micro_batch_size": 2}\n', id="a rung without figures"),
        pytest.param(b"[1, 2]\n", id="no object", marks=SLOW),
    ],
)
def test_a_garbled_answer_is_a_crash_that_says_so(
    site: JobSite, tmp_path: Path, line: bytes
) -> None:
    answers = climb(request_of(site, [1, 2, 4, 8]), tmp_path / "logs")
    after_the_first_rung(answers)

    (answer_file,) = temporary_dir().glob("probe-*/rank-0.jsonl")
    with answer_file.open("ab") as file:
        file.write(line)
    outcome = failure(answers)

    assert isinstance(outcome, Crashed)
    assert "garbage" in outcome.reason
    assert list(temporary_dir().glob("probe-*")) == []


@SLOW
def test_micro_batches_of_unlike_many_rows_are_measured_as_the_sampler_makes_them(
    tmp_path: Path,
) -> None:
    pairs = [
        (f"Count on from {first}.", " ".join(map(str, range(first, first + first % 90))))
        for first in range(100, 180)
    ]
    site, space = site_of(tmp_path, pairs)
    split = Structure(zero_stage=2, sampling=REBALANCE)
    assert split in space.structures
    ladder = [split.with_micro_batch(size, RANKS, GLOBAL_BATCH) for size in (2, 4)]
    request = site.request(ladder)
    sizes = {len(rows) for rung in request.rungs for _, rows in rung.timed_rows}
    assert len(sizes) > 2

    answers = list(climb(request, tmp_path))

    for setting, answer in zip(ladder, answers, strict=True):
        assert isinstance(answer, RungMeasurement), answer
        outcome = site.outcome(setting, answer)
        slowest = max(seconds for _, seconds in outcome.accumulate_s)
        fastest = min(seconds for _, seconds in outcome.accumulate_s)
        steps = setting.gradient_accumulation_steps
        assert fastest * steps <= outcome.step_time_s - outcome.boundary_extra_s <= slowest * steps
