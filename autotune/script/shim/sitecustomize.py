# ruff: noqa: INP001 - its directory is put on the path as it is
"""Imported by every interpreter below a rank of a user's script, as this directory is on its path.

It is put there only for processes that autotune starts. It does what the sitecustomize that is
hidden by it does, and then whatever the errand in the environment says; without one, nothing.
"""

import importlib.machinery
import importlib.util
import os
import sys
from pathlib import Path


def _chain() -> None:
    """Import the sitecustomize that would have been imported without this one, if there is one."""
    own = Path(__file__).resolve().parent
    path = [entry for entry in sys.path if Path(entry or ".").resolve() != own]
    spec = importlib.machinery.PathFinder.find_spec("sitecustomize", path)
    if spec is None or spec.loader is None:
        return
    module = importlib.util.module_from_spec(spec)
    sys.modules["sitecustomize"] = module
    spec.loader.exec_module(module)


if __name__ == "sitecustomize":
    _chain()
    if os.environ.get("AUTOTUNE_SCRIPT_ERRAND"):
        from autotune.script.hook import install

        install()
