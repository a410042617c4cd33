"""What a user hands to the Trainer is read by transformers itself before anything is spent."""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from autotune.profile.child import _read_trainer_arguments


def read(tmp_path: Path, **arguments: Any) -> dict[str, Any]:  # noqa: ANN401 - whatever is given
    answer = tmp_path / "answer.json"
    arguments = {"output_dir": str(tmp_path), "report_to": "none", **arguments}
    _read_trainer_arguments(arguments, "cpu", str(answer))
    document: dict[str, Any] = json.loads(answer.read_text())
    return document


def test_what_transformers_takes_is_taken(tmp_path: Path) -> None:
    assert read(tmp_path, eval_strategy="steps", eval_steps=3, logging_first_step=True) == {}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"evaluation_stategy": "steps"}, "the nearest is 'eval_strategy'"),
        ({"eval_strategy": "sometimes"}, "sometimes"),
        ({"report_to": "nobody"}, "nobody"),
        pytest.param(
            {"report_to": "comet_ml"},
            "comet",
            marks=pytest.mark.skipif(find_spec("comet_ml") is not None, reason="it is installed"),
        ),
    ],
)
def test_what_it_does_not_take_is_refused(
    tmp_path: Path, arguments: dict[str, Any], says: str
) -> None:
    assert says in read(tmp_path, **arguments)["error"]
