"""Models that come with the package: a config and a tokenizer each, no weights."""

from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Final

from autotune.errors import UsageError

NAMES: Final = ("glm-tiny",)

# What to train with where the user says nothing. glm-tiny starts from random weights: the rate
# meant for pretrained ones, 2e-5, would hardly move it in the few steps of a demonstration.
RECOMMENDED: Final[Mapping[str, Mapping[str, float]]] = {"glm-tiny": {"learning_rate": 1e-3}}


def directory(name: str) -> Path:
    """Return where the files of the model `builtin:NAME` are.

    Raises:
        UsageError: there is no such model.
    """
    if name not in NAMES:
        known = ", ".join(f"builtin:{one}" for one in NAMES)
        msg = f"there is no model builtin:{name}: choose one of {known}, or give a directory"
        raise UsageError(msg)
    return Path(str(files(__name__))) / name
