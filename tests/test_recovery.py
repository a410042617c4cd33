"""Late trouble: what follows from it is decided, and a run comes through it."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from conftest import autotune, write_rows
from trainings import of_run

from autotune.dataset.rows import Rows, RowsWriter
from autotune.recovery import next_fallback, repeats_in_vain
from autotune.rundir import RunDir, read_json
from autotune.setting import Structure

LIMIT_S = 280
STEPS = 12
LADDER = [
    {"peak_bytes": 900, "tokens_per_s": 10.0},
    {"peak_bytes": 500, "tokens_per_s": 8.0},
    {"peak_bytes": 400, "tokens_per_s": 9.0},
]


def test_the_fastest_that_needs_less_is_next() -> None:
    assert next_fallback(LADDER, 1000) == 0
    assert next_fallback(LADDER, 900) == 2
    assert next_fallback(LADDER, 450) == 2
    assert next_fallback(LADDER, 400) is None


def test_starts_that_get_nowhere_are_counted() -> None:
    def entry(step: int, to: int | None) -> dict[str, Any]:
        return {"from_step": step, "to": to}

    assert repeats_in_vain([]) == 0
    assert repeats_in_vain([entry(0, None), entry(3, None), entry(3, None)]) == 2
    assert repeats_in_vain([entry(3, None), entry(3, 1)]) == 1


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pairs = [(f"What is {n}?", "It is " + f"{n} " * (1 + 7 * n % 12)) for n in range(64)]
    return write_rows(tmp_path_factory.mktemp("data") / "rows.jsonl", pairs)


def arguments(rows: Path) -> list[str]:
    return [
        *("run", "--dataset", str(rows), "--run-dir", "run", "--devices", "2"),
        *("--global-batch-size", "8", "--max-probes", "2", "--max-steps", str(STEPS)),
        *("--trainer", "save_steps=2"),
    ]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, rows: Path) -> Path:
    root = tmp_path_factory.mktemp("undisturbed")
    done = autotune(*arguments(rows), cwd=root, timeout=LIMIT_S)
    assert done.returncode == 0, done.stderr
    return root / "run"


def metrics(run: Path) -> list[dict[str, Any]]:
    path = run / "training" / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


@pytest.fixture
def tuned(undisturbed: Path, tmp_path: Path) -> Path:
    """Return a copy of the run as it was before its training."""
    copy = tmp_path / "run"
    shutil.copytree(undisturbed, copy, ignore=shutil.ignore_patterns("training", "model"))
    result = read_json(copy / "result.json")
    (copy / "result.json").write_text(json.dumps(result | {"exit_reason": "tuned"}))
    return copy


class Disturbed:
    """A training in the background whose processes are killed."""

    def __init__(self, run: Path) -> None:
        self.run = run
        self.process = self._start()

    def _start(self) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            [Path(sys.executable).parent / "autotune", "train", str(self.run)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def wait_for_step(self, step: int) -> bool:
        """Wait until a step is taken; returns whether the training still goes on then."""
        deadline = time.monotonic() + LIMIT_S
        while not any(line["step"] >= step for line in metrics(self.run)):
            if self.process.poll() is not None:
                return False
            assert time.monotonic() < deadline
            time.sleep(0.02)
        return self.process.poll() is None

    def kill(self, who: str) -> None:
        """Kill the controller, torchrun, or a rank, without warning."""
        if who == "controller":
            self.process.kill()
            return
        launchers = [
            child
            for child in psutil.Process(self.process.pid).children()
            if "torch.distributed.run" in " ".join(child.cmdline())
        ]
        victims = launchers if who == "torchrun" else launchers[0].children()[1:2]
        for victim in victims:
            victim.kill()

    def finish(self) -> str:
        """Wait for the end; the same command is given again if it was no good one."""
        said = self.process.communicate(timeout=LIMIT_S)[1]
        for _ in range(3):
            if self.process.returncode == 0:
                return said
            self.process = self._start()
            said += self.process.communicate(timeout=LIMIT_S)[1]
        assert self.process.returncode == 0, said
        return said


@pytest.fixture
def disturbed(tuned: Path) -> Iterator[Disturbed]:
    training = Disturbed(tuned)
    yield training
    if training.process.poll() is None:
        os.killpg(training.process.pid, signal.SIGKILL)


def assert_as_undisturbed(run: Path, undisturbed: Path) -> None:
    assert [line["step"] for line in metrics(run)] == list(range(1, STEPS + 1))
    mine, theirs = metrics(run)[-1]["loss"], metrics(undisturbed)[-1]["loss"]
    assert mine == pytest.approx(theirs, abs=1e-3)
    assert (run / "model" / "model.safetensors").exists()


KILLS = int(os.environ.get("AUTOTUNE_TEST_KILLS", "2"))
"""Kills of a whole check are ten."""


@pytest.mark.slow
@pytest.mark.parametrize("place", range(KILLS))
def test_a_kill_at_a_random_moment_changes_nothing(
    disturbed: Disturbed, undisturbed: Path, place: int
) -> None:
    draw = np.random.default_rng(place)
    who = ("rank", "torchrun", "controller")[place % 3]
    if disturbed.wait_for_step(int(draw.integers(1, STEPS))):
        time.sleep(draw.random() / 2)
        disturbed.kill(who)

    disturbed.finish()

    assert_as_undisturbed(disturbed.run, undisturbed)
    result = read_json(disturbed.run / "result.json")
    causes = {one["cause"] for one in result["recoveries"]}
    assert causes <= {{"rank": "rank_lost", "torchrun": "launcher_lost"}.get(who, "")}


@pytest.mark.slow
def test_sigterm_saves_a_checkpoint_and_the_same_command_goes_on(
    disturbed: Disturbed, undisturbed: Path
) -> None:
    assert disturbed.wait_for_step(3)
    disturbed.process.terminate()
    said = disturbed.process.communicate(timeout=90)[1]

    assert disturbed.process.returncode == 75, said
    last = metrics(disturbed.run)[-1]["step"]
    assert (disturbed.run / "training" / f"checkpoint-{last}" / "complete").exists()
    disturbed.finish()
    assert_as_undisturbed(disturbed.run, undisturbed)


@pytest.mark.slow
def test_a_strict_hand_off_stops_where_the_promise_is_not_held(tuned: Path, rows: Path) -> None:
    run = RunDir(tuned)
    emitted = read_json(run.fallbacks)
    emitted["chosen"]["promise"]["tokens_per_s"] *= 100
    run.fallbacks.write_text(json.dumps(emitted))
    command = [*arguments(rows), "--run-dir", str(tuned)]

    strict = autotune(*command, "--strict-handoff", cwd=tuned.parent, timeout=LIMIT_S)

    assert strict.returncode == 72, strict.stderr
    assert "slower than probed" in strict.stderr.splitlines()[-1]
    assert list((tuned / "training").glob("checkpoint-*/complete"))
    result = read_json(run.result)
    assert not result["handoff"]["within"]
    assert result["handoff"]["seen"]["speed_deviation"] < -0.9
    went_on = autotune(*command, cwd=tuned.parent, timeout=LIMIT_S)
    assert went_on.returncode == 0, went_on.stderr
    assert [line["step"] for line in metrics(tuned)] == list(range(1, STEPS + 1))


LONG_ROW, CAP_BYTES = 1500, 500 << 20
"""One row of so many tokens fits into the cap with checkpointing, and four at once do not."""


def grow_a_row(dataset: Path, step: int) -> None:
    """Make a row long that the training takes in a late step."""
    rows = Rows.open(dataset)
    grown = int(np.random.default_rng(42).permutation(len(rows))[8 * (step - 1)])
    kept = [(ids.copy(), trained.copy()) for ids, trained in (rows[i] for i in range(len(rows)))]
    ids, trained = kept[grown]
    kept[grown] = np.resize(ids, LONG_ROW), np.resize(trained, LONG_ROW)
    with RowsWriter(dataset) as writer:
        for ids, trained in kept:
            writer.append(ids, trained)
        writer.commit(rows.meta)


@pytest.mark.slow
def test_a_row_longer_than_any_probed_is_survived(tuned: Path, undisturbed: Path) -> None:
    run, shop = RunDir(tuned), of_run(tuned)
    entries = []
    heavy: dict[str, Any] = {"micro_batch_size": 4}
    light: dict[str, Any] = {"micro_batch_size": 1, "checkpointing": "full"}
    for place, knobs in enumerate((heavy, light)):
        emitted = shop.emit(tuned / f"emitted-{place}", **knobs, device_memory_bytes=CAP_BYTES)
        entry = {name: read_json(emitted / f"{name}.json") for name in ("ds_config", "train_args")}
        entry["train_args"] |= {"dataset_dir": "dataset", "probed_tokens": 400}
        peak = {"tokens_per_s": 1.0, "peak_bytes": CAP_BYTES >> place}
        setting = Structure(zero_stage=0).with_micro_batch(knobs["micro_batch_size"], 2, 8)
        entries.append(entry | peak | {"setting": setting.to_json()})
    chosen, *ladder = entries
    run.ds_config.write_text(json.dumps(chosen["ds_config"]))
    run.train_args.write_text(json.dumps(chosen["train_args"]))
    run.fallbacks.write_text(json.dumps({"schema": 1, "chosen": chosen, "settings": ladder}))
    grow_a_row(run.dataset, step=6)

    done = autotune("train", tuned, cwd=tuned, timeout=LIMIT_S)

    assert done.returncode == 0, done.stderr
    (recovery,) = read_json(run.result)["recoveries"]
    # Saved just before the step that was a risk, though a checkpoint was not due.
    assert (recovery["cause"], recovery["from_step"], recovery["to"]) == ("out_of_memory", 5, 0)
    assert "it goes on from step 5" in done.stderr
    assert [line["step"] for line in metrics(tuned)] == list(range(1, STEPS + 1))
    assert metrics(tuned)[5]["longest_row"] == LONG_ROW
    before = [line["loss"] for line in metrics(undisturbed)[:5]]
    assert [line["loss"] for line in metrics(tuned)[:5]] == pytest.approx(before, abs=1e-3)
