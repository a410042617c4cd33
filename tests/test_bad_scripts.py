"""Scripts that cannot be tuned: each ends in a sentence and an exit code, and leaves nothing."""

import json
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import autotune

MARK = "AUTOTUNE_TEST_MARK"

pytestmark = pytest.mark.timeout(700)

DEEPSPEED = """
import deepspeed, torch
def engine():
    deepspeed.init_distributed()
    model = torch.nn.Linear(8, 8)
    config = {"train_micro_batch_size_per_gpu": 2,
              "optimizer": {"type": "AdamW", "params": {"torch_adam": True}}}
    return deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)[0]
"""


@pytest.fixture(autouse=True)
def mark(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Mark what is started, so that what is left can be found."""
    value = uuid.uuid4().hex
    monkeypatch.setenv(MARK, value)
    yield value
    assert _left(value) == []


def _left(value: str) -> list[str]:
    """Return the command lines of the live processes with the mark, this one aside."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            if f"{MARK}={value}".encode() in (entry / "environ").read_bytes().split(b"\0"):
                found.append((entry / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        except OSError:
            continue
    return [line for line in found if line]


def refused(tmp_path: Path, text: str, *arguments: str) -> str:
    """Run a script that cannot be tuned; returns the sentence that says why."""
    (tmp_path / "script.py").write_text(text)
    done = autotune(
        *("run", "--devices", "2", "--run-dir", "run", "--script", "script.py"),
        *("--", *arguments),
        cwd=tmp_path,
        timeout=600,
    )
    assert done.returncode == 70, done.stderr
    assert "Traceback" not in done.stderr.partition("the end of it:")[0]
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert (result["exit_reason"], result["exit_code"]) == ("SetupFaultError", 70)
    (sentence,) = [line for line in done.stderr.splitlines() if line.startswith("autotune: ")]
    return sentence


def test_one_that_never_calls_deepspeed(tmp_path: Path) -> None:
    assert "never called deepspeed.initialize" in refused(tmp_path, "print('done')")


def test_one_that_trains_without_deepspeed(tmp_path: Path) -> None:
    sentence = refused(
        tmp_path,
        "import torch\n"
        "weight = torch.nn.Parameter(torch.ones(2))\n"
        "optimizer = torch.optim.SGD([weight], lr=0.1)\n"
        "while True:\n"
        "    weight.sum().backward()\n"
        "    optimizer.step()\n",
    )

    assert "not called deepspeed.initialize" in sentence


def test_one_that_crashes_as_it_is_imported(tmp_path: Path) -> None:
    assert "no_such_module" in refused(tmp_path, "import no_such_module")


def test_one_that_does_not_take_its_arguments(tmp_path: Path) -> None:
    sentence = refused(tmp_path, "import argparse; argparse.ArgumentParser().parse_args()", "--x")

    assert "exit code 2" in sentence


def test_one_that_wants_an_answer(tmp_path: Path) -> None:
    assert "EOFError" in refused(tmp_path, "input('continue? ')")


def test_one_that_prints_megabytes(tmp_path: Path) -> None:
    started = time.monotonic()
    sentence = refused(
        tmp_path, "for _ in range(100):\n    print('x' * 1_000_000)\nraise ValueError('enough')"
    )

    assert "enough" in sentence
    assert time.monotonic() - started < 120


def test_one_that_does_not_end_when_it_is_asked_to(tmp_path: Path) -> None:
    sentence = refused(
        tmp_path,
        "import os, signal, time\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "if os.environ['RANK'] == '0':\n"
        "    raise ValueError('rank 0 is through')\n"
        "time.sleep(600)\n",
    )

    assert "rank 0 is through" in sentence


def test_one_that_leaves_processes_of_its_own_behind(tmp_path: Path) -> None:
    sentence = refused(
        tmp_path,
        "import subprocess, sys\n"
        "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'],\n"
        "                 start_new_session=True)\n"
        "raise ValueError('left one')\n",
    )

    assert "left one" in sentence


@pytest.mark.parametrize(
    "method",
    [pytest.param("fork", marks=pytest.mark.slow), pytest.param("spawn", marks=pytest.mark.long)],
)
def test_one_that_starts_its_own_ranks(tmp_path: Path, method: str) -> None:
    sentence = refused(
        tmp_path,
        "import multiprocessing\n"
        f"{DEEPSPEED}\n"
        "if __name__ == '__main__':\n"
        f"    worker = multiprocessing.get_context('{method}').Process(target=engine)\n"
        "    worker.start()\n"
        "    worker.join()\n"
        "    raise SystemExit(worker.exitcode)\n",
    )

    assert "in a process that it has started itself" in sentence


@pytest.mark.slow
def test_a_failed_training_has_the_scripts_own_code(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(
        DEEPSPEED + "import os, sys\n"
        "engine = engine()\n"
        "for _ in range(40):\n"
        "    engine.backward(engine(torch.ones(2, 8)).sum())\n"
        "    engine.step()\n"
        "print('output of the script', flush=True)\n"
        "sys.exit(17)\n"
    )

    done = autotune(
        *("run", "--devices", "1", "--max-probes", "1", "--run-dir", "run"),
        *("--script", "script.py"),
        cwd=tmp_path,
        timeout=600,
    )

    assert done.returncode == 17, done.stderr
    assert "output of the script" in done.stdout
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert (result["exit_reason"], result["exit_code"]) == ("ScriptFailedError", 17)
    assert result["setting"]["micro_batch_size"] == 2


def test_what_is_of_no_script_is_refused(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text("")
    cases = [
        (("--script", "none.py"), 66, "none.py is not there"),
        (("--script", "script.py", "--arg-map", "x=--y"), 2, "KEY=--OPTION"),
        (("--script", "script.py", "--epochs", "3"), 2, "--epochs is of autotune's own training"),
        (("--arg-map", "train_batch_size=--b"), 2, "name it with --script"),
        (("--", "--lr", "1"), 2, "unexpected arguments --lr 1"),
    ]

    for arguments, code, text in cases:
        done = autotune("run", *arguments, cwd=tmp_path)
        assert done.returncode == code, done.stderr
        assert text in done.stderr


def test_a_dry_run_says_what_would_be_tuned(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text("raise ValueError")

    done = autotune(
        *("tune", "--dry-run", "--devices", "2", "--script", "script.py"),
        *("--", "--per_device_train_batch_size", "4"),
        cwd=tmp_path,
    )

    assert done.returncode == 0, done.stderr
    assert "train_micro_batch_size_per_gpu by --per_device_train_batch_size" in done.stdout
    assert not (tmp_path / "runs").exists()


def test_no_process_is_left_where_the_run_itself_is_killed(tmp_path: Path, mark: str) -> None:
    (tmp_path / "script.py").write_text(
        "import pathlib, time\npathlib.Path('started').touch()\ntime.sleep(600)"
    )
    started = subprocess.Popen(
        ["autotune", "run", "--devices", "2", "--script", "script.py"],
        cwd=tmp_path,
        env={**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    deadline = time.monotonic() + 200
    while not (tmp_path / "started").exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    assert (tmp_path / "started").exists()

    started.kill()
    started.wait()

    while _left(mark) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert _left(mark) == []
