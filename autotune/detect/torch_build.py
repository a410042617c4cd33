"""What the installed torch was built for, without importing it (that takes seconds)."""

import runpy
from collections.abc import Callable
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class TorchBuild:
    """`cuda_version` is None if torch cannot use an NVIDIA GPU; `note` tells an unusual reason."""

    version: str | None
    cuda_version: str | None
    note: str | None = None


def read_torch_build(find: Callable[[str], ModuleSpec | None] = find_spec) -> TorchBuild:
    """Read the version.py that torch's build writes; `find` locates a package as find_spec does."""
    spec = find("torch")
    if spec is None or spec.origin is None:
        return TorchBuild(version=None, cuda_version=None, note="torch is not installed")
    version_file = Path(spec.origin).with_name("version.py")
    if not version_file.is_file():
        note = f"torch does not tell its build: {version_file} is missing"
        return TorchBuild(version=None, cuda_version=None, note=note)
    return _describe(runpy.run_path(str(version_file)))


def _describe(told: dict[str, object]) -> TorchBuild:
    version, hip = told.get("__version__"), told.get("hip")
    cuda = told.get("cuda")
    return TorchBuild(
        version=None if version is None else str(version),
        cuda_version=None if cuda is None else str(cuda),
        note=None if hip is None else f"torch {version} is built for ROCm {hip}, which is not used",
    )
