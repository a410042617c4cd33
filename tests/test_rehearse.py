"""A search on hardware that is not there."""

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import autotune
from test_cli import refused

ROWS = ("--seq-length", 256, "--precision", "fp32")
TWO = ("--gpus", "2xT4-16GB")


def rehearse(cwd: Path, *arguments: object) -> dict[str, Any]:
    done = autotune("rehearse", *ROWS, *arguments, "--json", cwd=cwd)
    assert done.returncode == 0, done.stderr
    document: dict[str, Any] = json.loads(done.stdout)
    return document


def test_where_all_fits_the_best_of_the_plan_is_chosen(tmp_path: Path) -> None:
    document = rehearse(tmp_path, *TWO)
    plan = autotune("plan", *ROWS, *TWO, "--json", cwd=tmp_path)
    best = json.loads(plan.stdout)["settings"][0]
    # What gains less than a twentieth of a per cent is not tried.
    assert document["chosen"]["tokens_per_s"] == pytest.approx(best["tokens_per_s"], rel=5e-4)
    assert document["gain_over_default"] >= 1
    assert document["stopped_by"] == "nothing to gain"
    tried = [rung for probe in document["probes"] for rung in probe["rungs"]]
    assert len(tried) == document["rungs"] < document["settings"]
    assert document["tuning_seconds"] >= sum(rung["seconds"] for rung in tried)
    settings = [
        json.dumps(rung["setting"])
        for probe in document["probes"]
        for rung in probe["rungs"]
        if probe["purpose"] == "search"
    ]
    assert len(set(settings)) == len(settings)


def test_noise_is_drawn_from_the_seed(tmp_path: Path) -> None:
    first, again = (rehearse(tmp_path, *TWO, "--noise", 0.1, "--seed", 7) for _ in range(2))
    other = rehearse(tmp_path, *TWO, "--noise", 0.1, "--seed", 8)
    assert first == again
    assert first["chosen"]["tokens_per_s"] != other["chosen"]["tokens_per_s"]


def test_what_is_in_doubt_is_answered_by_a_virtual_run(tmp_path: Path) -> None:
    plan = autotune("plan", *ROWS, *TWO, "--all", "--json", cwd=tmp_path)
    needs = {
        entry["setting"]["micro_batch_size"]: entry["memory"]["device_bytes"]
        for entry in json.loads(plan.stdout)["settings"]
        if entry["setting"]["zero_stage"] == 0 and entry["setting"]["checkpointing"] == "none"
    }
    budget = round(1.02 * needs[2])
    done = autotune(
        *("rehearse", *ROWS, *TWO, "--device-memory", f"{budget}B", "--max-probes", 1, "--json"),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert "virtual run of micro-batch 2" in done.stderr
    document = json.loads(done.stdout)
    assert document["chosen"]["setting"]["micro_batch_size"] == 2
    assert document["chosen"]["device_bytes"] <= budget


def test_a_short_training_is_not_tuned_for_long(tmp_path: Path) -> None:
    arguments = (*TWO, "--tune-budget", "auto", "--rows")
    short, long = (rehearse(tmp_path, *arguments, rows) for rows in (64, 10**9))
    assert len(short["probes"]) == 1
    assert short["rungs"] <= long["rungs"]


def test_auto_needs_to_know_how_long_the_training_is(tmp_path: Path) -> None:
    done = autotune("rehearse", *ROWS, *TWO, "--tune-budget", "auto", cwd=tmp_path)
    assert "--rows" in refused(done, 2)


def test_where_nothing_fits_it_says_so(tmp_path: Path) -> None:
    done = autotune("rehearse", *ROWS, *TWO, "--device-memory", "100MiB", cwd=tmp_path)
    assert "no setting fits" in refused(done, 71)


def test_people_get_a_table(tmp_path: Path) -> None:
    done = autotune("rehearse", *ROWS, *TWO, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[1].split() == ["probe", "micro-batch", "outcome", "tok/s", "memory"]
    assert [line.split()[0] for line in lines[-4:]] == ["chosen", "speed", "gain", "tuning"]
