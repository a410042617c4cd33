"""The commands that look at runs: report, explain, compare and dashboard."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import autotune
from run_directories import CLUSTER, PLAN, Example, fastest, plan_json, rungs_of

from autotune.outcome import Measured
from autotune.report.comparison import compare
from autotune.report.record import RunRecord
from autotune.rundir import RunDir
from autotune.setting import Setting
from autotune.tune.loop import write_study
from autotune.tune.search import Search, new_study


@pytest.fixture
def run_dir(tmp_path: Path) -> RunDir:
    return Example().write(tmp_path / "the run's directory")


def test_report_prints_where_it_is(run_dir: RunDir) -> None:
    done = autotune("report", run_dir.root.name, cwd=run_dir.root.parent)

    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{run_dir.report}\n"
    assert "The answer" in run_dir.report.read_text()
    assert run_dir.report.stat().st_mode & 0o077 == 0


def test_report_opens_the_browser_that_is_named(run_dir: RunDir, tmp_path: Path) -> None:
    opened = tmp_path / "opened"
    browser = tmp_path / "browser"
    browser.write_text(f'#!/bin/sh\nprintf %s "$1" > "{opened}"\n')
    browser.chmod(0o700)
    done = subprocess.run(
        [str(Path(sys.executable).parent / "autotune"), "report", run_dir.root, "--open", "--json"],
        env=os.environ | {"BROWSER": str(browser)},
        text=True,
        capture_output=True,
        check=False,
    )

    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"schema": 1, "report": str(run_dir.report)}
    assert opened.read_text() == run_dir.report.as_uri()


@pytest.mark.parametrize("command", ["report", "explain", "compare", "dashboard"])
def test_where_no_run_was_they_exit_66(command: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    done = autotune(command, *["empty"] * (2 if command == "compare" else 1), cwd=tmp_path)

    assert done.returncode == 66
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert list((tmp_path / "empty").iterdir()) == []


def test_explain_says_it_in_words(run_dir: RunDir) -> None:
    done = autotune("explain", run_dir.root, cwd=run_dir.root.parent)

    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"Why {fastest(1)[0].label()}\n")
    assert "\nWhy not\n" in done.stdout
    assert "in place of" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 100


def test_explain_as_json_names_the_terms(run_dir: RunDir) -> None:
    done = autotune("explain", run_dir.root, "--json", cwd=run_dir.root.parent)

    document = json.loads(done.stdout)
    assert document["chosen"] == fastest(1)[0].to_json()
    assert document["state"] == "trained"
    assert document["reasons"]
    assert {one["standing"] for one in document["alternatives"]} >= {"measured"}
    for one in document["alternatives"]:
        Setting.from_json(one["setting"])


def test_explain_of_a_failed_run_says_why_it_failed(tmp_path: Path) -> None:
    end = {
        "exit_reason": "NothingFitsError",
        "exit_code": 71,
        "message": "no setting fits: so it is",
    }
    run_dir = Example(phase="stopped", end=end, rungs=(), steps=(), is_tuned=False).write(
        tmp_path / "run"
    )
    done = autotune("explain", run_dir.root, cwd=tmp_path)

    assert done.returncode == 0, done.stderr
    assert "no setting fits: so it is" in done.stdout
    assert "What to try" in done.stdout
    document = json.loads(autotune("explain", run_dir.root, "--json", cwd=tmp_path).stdout)
    assert (document["state"], document["chosen"]) == ("failed", None)
    assert document["advice"]


def test_compare_shows_figures_differences_and_what_both_measured(tmp_path: Path) -> None:
    first = Example().write(tmp_path / "a")
    second = Example(rungs=rungs_of(fastest(6), slower=2.6), options={"seed": 7}).write(
        tmp_path / "b"
    )
    done = autotune("compare", first.root, second.root, cwd=tmp_path)

    assert done.returncode == 0, done.stderr
    assert re.search(r"^tokens/s +\d+ +\d+ +0\.50$", done.stdout, re.MULTILINE)
    assert "options, seed: 42 in A, 7 in B" in done.stdout
    assert len(re.findall(r"^micro-batch .* 0\.50", done.stdout, re.MULTILINE)) == 6
    document = json.loads(
        autotune("compare", first.root, second.root, "--json", cwd=tmp_path).stdout
    )
    assert document["same_work"] is True
    assert [one["ratio"] for one in document["settings"]] == pytest.approx([0.5] * 6)


def test_runs_of_other_work_are_told_apart(tmp_path: Path) -> None:
    plan = plan_json()
    plan["job"]["max_seq_length"] = 512
    first = RunRecord.read(Example().write(tmp_path / "a"))
    second = RunRecord.read(Example(plan=plan).write(tmp_path / "b"))

    document = compare(first, second)
    assert document["same_work"] is False
    assert {"of": "job", "name": "max_seq_length", "runs": [2048, 512]} in document["differences"]
    assert compare(first, first)["differences"] == []
    hardware = second.hardware | {"num_devices": CLUSTER.num_devices + 1}
    assert compare(first, replace(second, hardware=hardware))["same_devices"] is False


def test_runs_that_came_to_nothing_are_compared_too(tmp_path: Path) -> None:
    end = {"exit_reason": "NothingFitsError", "exit_code": 71, "message": "no setting fits"}
    failed = Example(phase="stopped", end=end, rungs=(), steps=(), is_tuned=False).write(
        tmp_path / "b"
    )
    done = autotune("compare", Example().write(tmp_path / "a").root, failed.root, cwd=tmp_path)

    assert done.returncode == 0, done.stderr
    assert "failed, no setting chosen" in done.stdout


@contextmanager
def dashboard(run_dir: RunDir, *options: object) -> Iterator["subprocess.Popen[str]"]:
    process = subprocess.Popen(
        [
            str(Path(sys.executable).parent / "autotune"),
            *map(str, ("dashboard", run_dir.root, *options)),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def test_the_dashboard_shows_the_study_until_it_is_interrupted(run_dir: RunDir) -> None:
    pytest.importorskip("optuna_dashboard")
    rungs = rungs_of(fastest(6))
    write_study(new_study(Search(PLAN, rungs)), run_dir.study)
    with dashboard(run_dir, "--port", 0) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        (address,) = re.findall(r"http://127\.0\.0\.1:\d+", line)
        with urllib.request.urlopen(f"{address}/api/studies", timeout=120) as answer:  # noqa: S310 - ours
            (study,) = json.load(answer)["study_summaries"]
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=120)

    assert study["study_name"] == "autotune"
    assert (process.returncode, errors) == (0, "")
    assert all(isinstance(rung.outcome, Measured) for rung in rungs)


def test_a_port_that_is_taken_is_a_usage_error(run_dir: RunDir) -> None:
    pytest.importorskip("optuna_dashboard")
    write_study(new_study(Search(PLAN, rungs_of(fastest(2)))), run_dir.study)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        done = autotune(
            "dashboard", run_dir.root, "--port", taken.getsockname()[1], cwd=run_dir.root.parent
        )

    assert done.returncode == 2
    assert "choose another" in done.stderr
