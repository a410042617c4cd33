"""What a probe says of memory holds for the training that follows."""

import json
from pathlib import Path

import pytest
from conftest import autotune, write_rows

from autotune.outcome import Measured
from autotune.rundir import RunDir


@pytest.mark.slow
@pytest.mark.parametrize("longest", [pytest.param(40, marks=pytest.mark.long), 400])
def test_no_step_of_the_training_needs_more_than_the_probe_has_seen(
    tmp_path: Path, longest: int
) -> None:
    pairs = [
        (f"Count to {number}.", " ".join(map(str, range(1 + number * longest // 64))))
        for number in range(64)
    ]
    data = write_rows(tmp_path / "data.jsonl", pairs)
    job = ["--devices", "2", "--global-batch-size", "16", "--max-probes", "2", "--epochs", "2"]

    done = autotune("run", "--dataset", data, "--run-dir", "run", *job, cwd=tmp_path, timeout=280)

    assert done.returncode == 0, done.stderr
    run = RunDir(tmp_path / "run")
    chosen = json.loads(run.result.read_text())["setting"]
    (probed,) = [
        rung.outcome.peak_bytes
        for rung in run.read_rungs()
        if isinstance(rung.outcome, Measured) and rung.setting.to_json() == chosen
    ]
    lines = (run.training / "metrics.jsonl").read_text().splitlines()
    trained = [json.loads(line)["peak_bytes"] for line in lines]
    assert len(trained) == 8
    assert max(trained) <= probed
