"""Every configuration that the project ships is one that it takes."""

import json
import re
from pathlib import Path

import pytest
from conftest import QUICKSTART, REPOSITORY, autotune

CONFIGS = sorted((REPOSITORY / "configs").glob("*.yaml"))
TABLE = (REPOSITORY / "configs" / "README.md").read_text()
PLANNED_ON = dict(re.findall(r"^\| `(.+?\.yaml)` \|[^|]+\| (.+?) \|", TABLE, re.MULTILINE))


def test_there_are_as_many_as_the_table_names() -> None:
    assert set(PLANNED_ON) == {path.name for path in CONFIGS}
    assert len(CONFIGS) >= 8


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(
            path,
            id=path.name,
            marks=[pytest.mark.slow] if "x" in PLANNED_ON[path.name].split("-")[0] else [],
        )
        for path in CONFIGS
    ],
)
def test_it_is_read_and_planned(path: Path, tmp_path: Path) -> None:
    where = PLANNED_ON[path.name]
    # A published model's configuration has no tokenizer to read data with.
    rows = ["--dataset", QUICKSTART] if where == "this machine" else ["--gpus", where]

    done = autotune("plan", "--config", path, *rows, "--json", cwd=tmp_path)

    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["counts"]["kept"] > 0
