"""The versions that `make test-lowest` installs are the lower bounds that the package states."""

import tomllib

from conftest import REPOSITORY
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version


def pinned(file: str) -> dict[str, Version]:
    lines = (REPOSITORY / file).read_text().splitlines()
    pins = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(name): Version(version) for name, version in pins}


def required() -> dict[str, Requirement]:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    found = map(Requirement, project["dependencies"])
    return {canonicalize_name(one.name): one for one in found}


def lower_bound(requirement: Requirement) -> Version:
    (bound,) = (Version(one.version) for one in requirement.specifier if one.operator == ">=")
    return bound


def test_every_lower_bound_but_torch_s_is_pinned_to_its_first_release() -> None:
    lowest, bounds = pinned("constraints-lowest.txt"), required()

    assert set(bounds) - set(lowest) == {"torch"}
    for name, requirement in bounds.items():
        if name != "torch":
            bound = lower_bound(requirement)
            assert lowest[name].release[: len(bound.release)] == bound.release, name


def test_what_is_tested_is_within_what_is_supported() -> None:
    tested, bounds = pinned("constraints.txt"), required()

    outside = [
        name for name in bounds if name in tested and tested[name] not in bounds[name].specifier
    ]
    assert outside == []
