"""The README says what is so: its commands run, and it names what there is."""

import re
import subprocess
from dataclasses import fields
from pathlib import Path

import pytest
from conftest import REPOSITORY

from autotune import cli, errors
from autotune.rundir import RunDir

README = (REPOSITORY / "README.md").read_text()
BLOCKS = re.findall(r"^```sh\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def test_it_has_command_blocks() -> None:
    assert BLOCKS


@pytest.mark.slow
@pytest.mark.parametrize("block", BLOCKS)
def test_every_command_block_runs_in_a_clean_clone(block: str, tmp_path: Path) -> None:
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "--quiet", REPOSITORY, clone], check=True)
    # What is installed is the same; installing it again is what CI does anyway.
    (clone / ".venv").symlink_to(REPOSITORY / ".venv")

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
