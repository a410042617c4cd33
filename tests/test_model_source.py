"""Where a model comes from, and what makes it another one."""

import json
from pathlib import Path

import pytest

from autotune.errors import ConfigError, InputMissingError
from autotune.model_source import find_model


def model(directory: Path, weights: bytes | None = None) -> Path:
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (directory / "tokenizer.json").write_text("{}")
    if weights is not None:
        (directory / "model.safetensors").write_bytes(weights)
    return directory


def test_a_directory_without_weights_is_trained_from_scratch(tmp_path: Path) -> None:
    assert find_model(str(model(tmp_path / "a"))).from_scratch
    assert not find_model(str(model(tmp_path / "b", b"w"))).from_scratch


def test_the_same_files_elsewhere_are_the_same_model(tmp_path: Path) -> None:
    one, other = (find_model(str(model(tmp_path / name, bytes(10**6)))) for name in "ab")
    assert one.content_hash() == other.content_hash()


@pytest.mark.parametrize("change", ["config", "tokenizer", "weights"])
def test_other_content_of_the_same_size_is_another_model(tmp_path: Path, change: str) -> None:
    directory = model(tmp_path / "a", bytes(10**6))
    before = find_model(str(directory)).content_hash()

    match change:
        case "config":
            (directory / "config.json").write_text(json.dumps({"model_type": "gemma"}))
        case "tokenizer":
            (directory / "tokenizer.json").write_text("[]")
        case _:
            (directory / "model.safetensors").write_bytes(b"\1" * 10**6)

    assert find_model(str(directory)).content_hash() != before


def test_a_directory_without_configuration_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(InputMissingError, match=r"config\.json"):
        find_model(str(tmp_path))


def test_weights_as_pickles_are_refused(tmp_path: Path) -> None:
    directory = model(tmp_path / "a")
    (directory / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ConfigError, match="safetensors"):
        find_model(str(directory))
