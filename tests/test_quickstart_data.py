import json
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path
from statistics import mean, median
from typing import Any

import pytest

from autotune import builtin

ROOT = Path(__file__).parents[1]
QUICKSTART = ROOT / "examples" / "quickstart"
DATA = QUICKSTART / "data.jsonl"


def read_rows(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def make_data(output: Path, hash_seed: int) -> Path:
    subprocess.run(
        [sys.executable, str(QUICKSTART / "make_data.py"), "--output", str(output)],
        check=True,
        capture_output=True,
        env={**os.environ, "PYTHONHASHSEED": str(hash_seed)},
    )
    return output


def version_that_wrote_the_data() -> str:
    match = re.search(
        r'^PYTHON_VERSION = "([\d.]+)"$', (QUICKSTART / "make_data.py").read_text(), re.MULTILINE
    )
    assert match is not None
    return match[1]


def assert_rows_are_conversations(rows: list[Any]) -> None:
    assert 400 <= len(rows) <= 450
    assert len({json.dumps(row) for row in rows}) == len(rows)
    for row in rows:
        roles = " ".join(message["role"] for message in row["messages"])
        assert re.fullmatch(r"(system )?user assistant( user assistant){0,2}", roles)
        assert all(message["content"].strip() for message in row["messages"])
        assert row.keys() == {"messages"}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("made") / "made.jsonl", hash_seed=1)


@pytest.fixture(scope="module")
def lengths() -> list[int]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(builtin.directory("glm-tiny"), local_files_only=True)
    rows = [row["messages"] for row in read_rows(DATA)]
    encoded = tokenizer.apply_chat_template(rows, return_dict=True)["input_ids"]
    return [len(ids) for ids in encoded]


def test_the_committed_rows_are_distinct_conversations() -> None:
    assert_rows_are_conversations(read_rows(DATA))


def test_the_committed_file_is_below_500_kilobytes() -> None:
    assert DATA.stat().st_size < 500_000


def test_some_rows_have_a_system_message_and_some_two_or_three_turns() -> None:
    rows = [row["messages"] for row in read_rows(DATA)]
    turns = [sum(message["role"] == "user" for message in messages) for messages in rows]

    assert sum(messages[0]["role"] == "system" for messages in rows) > 50
    assert turns.count(2) > 20
    assert turns.count(3) > 20


def test_lengths_run_from_about_20_to_almost_900_tokens(lengths: list[int]) -> None:
    assert 20 <= min(lengths) <= 25
    assert 800 <= max(lengths) < 900


def test_lengths_have_a_long_tail(lengths: list[int]) -> None:
    assert 150 <= mean(lengths) <= 200
    assert median(lengths) < 0.75 * mean(lengths)
    assert 70_000 <= sum(lengths) <= 80_000


def test_make_data_writes_conversations_where_it_is_told(made: Path) -> None:
    assert_rows_are_conversations(read_rows(made))


def test_make_data_writes_the_same_bytes_again(made: Path, tmp_path: Path) -> None:
    again = make_data(tmp_path / "again.jsonl", hash_seed=2)

    assert again.read_bytes() == made.read_bytes()


@pytest.mark.skipif(
    platform.python_version() != version_that_wrote_the_data(),
    reason="documentation strings differ between releases of Python",
)
def test_the_committed_file_is_what_make_data_writes(made: Path) -> None:
    assert DATA.read_bytes() == made.read_bytes()


def test_the_readme_names_the_python_and_the_licence() -> None:
    readme = (QUICKSTART / "README.md").read_text(encoding="utf-8")

    assert f"CPython {version_that_wrote_the_data()}" in readme
    assert "PSF licence" in readme


def test_the_committed_tokenizer_is_what_make_tokenizer_writes(tmp_path: Path) -> None:
    copy = tmp_path / "examples" / "quickstart"
    shutil.copytree(QUICKSTART, copy)
    model_dir = tmp_path / "autotune" / "builtin" / "glm-tiny"
    model_dir.mkdir(parents=True)

    subprocess.run(
        [sys.executable, str(copy / "make_tokenizer.py")], check=True, capture_output=True
    )

    written = {path.name: path.read_bytes() for path in model_dir.iterdir()}
    committed = builtin.directory("glm-tiny")
    assert written.keys() == {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    assert written == {name: (committed / name).read_bytes() for name in written}
