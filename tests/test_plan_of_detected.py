"""Plans for GPUs that were found say what plans for named ones say.

The GPUs are the stand-in's, seen by the real binding; torch here cannot open any, so that what is
planned rests on the table of known GPUs in both.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import nvml_standin
import pytest
from nvml_standin import A100, RTX3090, scenario
from test_nvml_scenarios import COMMAND

from autotune.detect.torch_build import read_torch_build
from autotune.units import GIB

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


def ask(folder: Path, of: str, *arguments: object) -> dict[str, Any]:
    file = folder / "scenario"
    file.write_text(of)
    done = subprocess.run(
        [sys.executable, "-c", COMMAND, *map(str, arguments), "--json"],
        env=nvml_standin.environment(nvml_standin.build(folder), file),
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    document: dict[str, Any] = json.loads(done.stdout)
    return document


def both(name: str, folder: Path, *options: object) -> tuple[dict[str, Any], dict[str, Any]]:
    found = ask(folder, MACHINES[name], "plan", *options)
    named = ask(folder, MACHINES[name], "plan", *options, "--gpus", name)
    return found, named


SAME = ("kind", "device_name", "num_devices", "device_memory_bytes", "compute_capability")


def test_what_is_found_is_what_is_named(tmp_path: Path) -> None:
    for name, of in MACHINES.items():
        found = ask(tmp_path, of, "detect")
        named = ask(tmp_path, of, "plan", "--gpus", name, "--seq-length", 64)["cluster"]

        assert {field: found[field] for field in SAME} == {field: named[field] for field in SAME}
        assert "built without CUDA" in found["unusable"]


@pytest.mark.parametrize("name", MACHINES)
def test_every_setting_is_estimated_the_same(name: str, tmp_path: Path) -> None:
    found, named = both(name, tmp_path, "--seq-length", 512, "--all")

    assert found["model"] == named["model"]
    assert found["job"] == named["job"]
    assert found["counts"] == named["counts"]
    assert found["settings"] == named["settings"]


@pytest.mark.slow
@pytest.mark.parametrize("name", MACHINES)
def test_so_it_is_of_a_large_model_but_for_what_this_host_has_no_memory_for(
    name: str, tmp_path: Path
) -> None:
    found, named = both(name, tmp_path, "--model", "chatglm3-6b", "--seq-length", 3256, "--all")
    by_setting = {json.dumps(one["setting"]): one for one in named["settings"]}

    assert len(found["settings"]) == len(by_setting)
    for one in found["settings"]:
        other = by_setting[json.dumps(one["setting"])]
        rejected = one["rejected_by"]
        if rejected and rejected["rule"] == "host_memory":
            assert one["memory"]["host_bytes"] > 0
            assert one["memory"] == other["memory"]
        elif one["memory"]["host_bytes"] == 0:
            assert one == other
    host = found["cluster"]["host"]["available_bytes"]
    assert host > GIB
