"""Plans for GPUs that were found say what plans for named ones say.

The GPUs are the stand-in's, seen by the real binding; torch here cannot open any, so that what is
planned rests on the table of known GPUs in both.
"""

import json
from pathlib import Path
from typing import Any

import nvml_standin
import pytest
from nvml_standin import A100, RTX3090, scenario

from autotune.detect.torch_build import read_torch_build

pytestmark = [
    pytest.mark.skipif(nvml_standin.COMPILER is None, reason="needs a C compiler"),
    pytest.mark.skipif(
        read_torch_build().cuda_version is not None, reason="torch would look for the GPUs"
    ),
]

MACHINES = {
    "8xRTX3090-24GB": scenario(*[RTX3090] * 8, peers=5),
    "1xA100-80GB": scenario(A100),
}


SAME = ("kind", "device_name", "num_devices", "device_memory_bytes", "compute_capability")


def ask_both(folder: Path, *options: object) -> dict[str, list[dict[str, Any]]]:
    """Return for each machine what `detect`, `plan` and `plan --gpus` say."""
    plan = ("plan", *options, "--json")
    calls = [
        (of, arguments)
        for name, of in MACHINES.items()
        for arguments in (("detect", "--json"), plan, (*plan, "--gpus", name))
    ]
    environ = nvml_standin.environment(nvml_standin.build(folder), folder / "scenario")
    told = [json.loads(out) for _, out in nvml_standin.command_each(calls, environ, folder)]
    return {name: told[3 * place : 3 * place + 3] for place, name in enumerate(MACHINES)}


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    return ask_both(tmp_path_factory.mktemp("plans"), "--seq-length", 512, "--all")


@pytest.mark.parametrize("name", MACHINES)
def test_what_is_found_is_what_is_named(name: str, told: dict[str, list[dict[str, Any]]]) -> None:
    detected, found, named = told[name]

    for one in (detected, found["cluster"]):
        assert {key: one[key] for key in SAME} == {key: named["cluster"][key] for key in SAME}
        assert "built without CUDA" in one["unusable"]


@pytest.mark.parametrize("name", MACHINES)
def test_every_setting_is_estimated_the_same(
    name: str, told: dict[str, list[dict[str, Any]]]
) -> None:
    _, found, named = told[name]

    assert len(found["settings"]) > 10
    for part in ("model", "job", "counts", "settings", "near_misses"):
        assert found[part] == named[part]


@pytest.mark.slow
def test_so_it_is_of_a_large_model_but_for_what_this_host_has_no_memory_for(
    tmp_path: Path,
) -> None:
    large = ask_both(tmp_path, "--model", "chatglm3-6b", "--seq-length", 3256, "--all")
    for _, found, named in large.values():
        others = {json.dumps(one["setting"]): one for one in named["settings"]}
        # Variants are listed of what fits: fewer where the host has no memory for offloading.
        assert 10 < len(found["settings"]) <= len(others)
        for one in found["settings"]:
            other = others[json.dumps(one["setting"])]
            rejected = one["rejected_by"]
            if one["memory"]["host_bytes"] == 0:
                assert one == other
            elif rejected and rejected["rule"] == "host_memory":
                assert one["memory"] == other["memory"]
        assert kept_on_devices(found) == kept_on_devices(named)


def kept_on_devices(plan: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the settings of a plan that fit without memory of the host."""
    return [
        one
        for one in plan["settings"]
        if not one["rejected_by"] and one["memory"]["host_bytes"] == 0
    ]
