"""Every configuration that the project ships is one that it takes."""

import json
from pathlib import Path

import pytest
from conftest import QUICKSTART, REPOSITORY, autotune

CONFIGS = sorted((REPOSITORY / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_it_is_read_and_planned(path: Path, tmp_path: Path) -> None:
    done = autotune("plan", "--config", path, "--dataset", QUICKSTART, "--json", cwd=tmp_path)

    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["counts"]["kept"] > 0


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_the_table_of_configurations_names_it(path: Path) -> None:
    assert f"`{path.name}`" in (REPOSITORY / "configs" / "README.md").read_text()
