"""The README says what is so: its commands run, and it names what there is."""

import os
import re
import subprocess
from dataclasses import fields
from pathlib import Path

import pytest
from conftest import REPOSITORY

from autotune import cli, errors
from autotune.cli.summary import result_text
from autotune.rundir import RunDir

README = (REPOSITORY / "README.md").read_text()
BLOCKS = re.findall(r"^```sh\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def test_it_has_command_blocks() -> None:
    assert BLOCKS


def test_its_transcript_has_all_that_a_run_prints_at_its_end() -> None:
    (transcript,) = re.findall(r"^```text\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    result = {
        "setting": {
            "micro_batch_size": 1,
            "gradient_accumulation_steps": 1,
            "zero_stage": 0,
            "checkpointing": "none",
        },
        "tokens_per_s": 1.0,
        "samples_per_s": 1.0,
        "gain_over_default": None,
        "default": {},
        "memory": {"measured_bytes": 1, "predicted_bytes": 1, "budget_bytes": 1},
        "tuning_seconds": 1.0,
        "probes": 1,
        "rungs": 1,
        "stopped_by": "max_probes",
        "training": {"steps": 1, "loss_start": 1.0, "loss_end": 1.0},
        "training_seconds": 1.0,
        "model_dir": "model",
        "run_dir": "run",
    }
    for line in result_text(result).splitlines():
        label = re.split(r"\s{2,}", line)[0]
        assert re.search(rf"^{label}\s{{2,}}\S", transcript, re.MULTILINE), label


@pytest.mark.slow
@pytest.mark.parametrize("block", BLOCKS)
def test_every_command_block_runs_in_a_clean_clone(block: str, tmp_path: Path) -> None:
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "--quiet", REPOSITORY, clone], check=True)
    # The environment of these tests is lent. Files that look older than it keep `make install` from
    # installing the clone into it, which would leave every later test with the clone's code.
    (clone / ".venv").symlink_to(REPOSITORY / ".venv")
    for asked_by_make in ("pyproject.toml", "constraints.txt"):
        os.utime(clone / asked_by_make, (0, 0))

    done = subprocess.run(
        ["bash", "-e"], input=block, cwd=clone, text=True, capture_output=True, check=False
    )

    assert done.returncode == 0, done.stderr
    if "autotune run" in block:
        (run_dir,) = (clone / "runs").iterdir()
        assert (run_dir / "model" / "model.safetensors").exists()


def test_it_names_every_command() -> None:
    for command in cli.COMMANDS:
        assert f"`autotune {command}" in README


def test_it_names_every_exit_code() -> None:
    codes = {error.exit_code for error in vars(errors).values() if hasattr(error, "exit_code")}
    section = README.split("## Exit codes")[1].split("##")[0]
    assert {int(code) for code in re.findall(r"(?:^|· |\n)(\d+) ", section)} == codes | {0}


def test_it_names_every_file_of_the_run_directory() -> None:
    paths = [
        value
        for name, value in vars(RunDir).items()
        if isinstance(value, property) and name not in {field.name for field in fields(RunDir)}
    ]
    run_dir = RunDir(Path("/r"))
    for path in paths:
        assert path.fget is not None
        name = path.fget(run_dir).name
        assert f"`{name}" in README, name


def test_its_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert (REPOSITORY / target).exists(), target
