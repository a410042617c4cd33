"""The doctor: what it finds of a machine, and what it says to a user and in a report."""

import json
import os
from pathlib import Path

import nvml_standin
import pytest
from conftest import autotune
from nvml_standin import A100, RTX3090, scenario

from autotune.doctor import (
    Check,
    Examination,
    _disk,
    _driver,
    _locked_memory,
    _shared_memory,
    _soft_limit,
    is_within,
)
from autotune.units import GIB

INFINITE = -1


def check(status: str, exit_code: int = 0) -> Check:
    return Check(
        group="versions",
        name="x",
        status=status,  # type: ignore[arg-type]
        found="what is there",
        exit_code=exit_code,
    )


def test_the_first_failure_is_the_exit_code() -> None:
    checks = (check("ok"), check("warning"), check("failed", 73), check("failed", 69))

    assert Examination(checks=checks, facts={}).exit_code == 73
    assert Examination(checks=checks[:2], facts={}).exit_code == 0


def test_a_report_has_the_facts_and_what_is_not_well() -> None:
    checks = (check("ok"), check("warning"), check("failed", 73), check("skipped"))
    report = Examination(checks=checks, facts={"torch": "2.13.0"}).report()

    assert report == ["torch: 2.13.0", "warning: x: what is there", "failed: x: what is there"]


@pytest.mark.parametrize(
    ("there", "wanted", "inside"),
    [
        ("2.13.0+cpu", ">=2.10", True),
        ("2.9.1", ">=2.10", False),
        ("0.20.0", "<0.20,>=0.19.6", False),
        ("5.0.0rc1", ">=4,<6", True),
    ],
)
def test_a_version_is_held_against_its_range(there: str, wanted: str, *, inside: bool) -> None:
    assert is_within(there, wanted) is inside


@pytest.mark.parametrize(
    ("driver", "cuda_driver", "cuda_torch", "status"),
    [
        ("575.1", "12.9", "12.8", "ok"),
        ("575.1", "12.9", "12.10", "ok"),
        ("535.1", "12.2", "13.0", "failed"),
        ("535.1", "12.2", None, "ok"),
        ("535.1", None, "13.0", "ok"),
        (None, None, "13.0", "warning"),
        (None, None, None, "skipped"),
    ],
)
def test_a_driver_is_too_old_for_a_later_major_cuda(
    driver: str | None, cuda_driver: str | None, cuda_torch: str | None, status: str
) -> None:
    assert _driver(driver, cuda_driver, cuda_torch, "NVML lists no GPU").status == status


def test_limits_that_are_tight_come_with_what_to_do(tmp_path: Path) -> None:
    assert _locked_memory(INFINITE).status == "ok"
    assert "memlock" in _locked_memory(64 * 1024).advice
    assert _soft_limit("open files", (1024, 4096), 4096).status == "warning"
    assert _soft_limit("open files", (INFINITE, INFINITE), 4096).status == "ok"
    assert _shared_memory(tmp_path / "none").status == "warning"
    assert _disk("cache", tmp_path / "to" / "come", 1).status == "ok"
    assert _disk("cache", tmp_path, 2**60).status == "warning"


def test_a_disk_that_cannot_be_written_fails(tmp_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    tmp_path.chmod(0o500)
    found = _disk("cache", tmp_path / "x", 1)

    assert (found.status, found.exit_code) == ("failed", 73)


BUSY: nvml_standin.Facts = RTX3090 | {"used": 20 * GIB, "processes": "4242:na"}
ON_CPU = ("--devices", "cpu:1")

CALLS: dict[str, tuple[str, tuple[str, ...]]] = {
    "text": (scenario(), ON_CPU),
    "json": (scenario(), (*ON_CPU, "--json")),
    "torch": (scenario(A100, A100), ()),
    "busy": (scenario(BUSY), ()),
    "errors": (scenario(A100 | {"ecc_uncorrected": 1}), ()),
    "mismatch": (scenario(A100, nvmlInitWithFlags=18), ()),
}


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, str]]:
    """Return exit code and output of each call, GPUs seen through the real binding of NVML."""
    if nvml_standin.COMPILER is None:
        pytest.skip("needs a C compiler")
    folder = tmp_path_factory.mktemp("doctor")
    secret = {"HF_TOKEN": "hf_secret", "NCCL_P2P_DISABLE": "1"}
    library = nvml_standin.build(folder)
    environ = nvml_standin.environment(library, folder / "scenario", secret)
    calls = [(of, ("doctor", "--no-build", *flags)) for of, flags in CALLS.values()]
    return dict(zip(CALLS, nvml_standin.command_each(calls, environ, folder), strict=True))


def test_this_machine_is_examined(told: dict[str, tuple[int, str]]) -> None:
    code, text = told["text"]

    assert code == 0, text
    assert "a run can be started" in text
    assert "for a bug report:" in text


def test_so_it_is_in_json(told: dict[str, tuple[int, str]]) -> None:
    document = json.loads(told["json"][1])

    assert (document["schema"], document["exit_code"]) == (1, 0)
    groups = {one["group"] for one in document["checks"]}
    assert groups == {"versions", "devices", "ops", "limits", "disks"}
    assert {"torch", "transformers", "deepspeed", "optuna"} <= set(document["facts"])
    names = {one["name"] for one in document["checks"]}
    assert {"/dev/shm", "open files", "run directory", "cache", "C++ compiler"} <= names


@pytest.mark.parametrize(
    ("name", "exit_code", "said"),
    [
        ("torch", 69, "built without CUDA"),
        ("busy", 69, "process 4242"),
        ("errors", 69, "1 uncorrectable error"),
        ("mismatch", 0, "Driver/library version mismatch"),
    ],
)
def test_gpus_are_examined(
    name: str, exit_code: int, said: str, told: dict[str, tuple[int, str]]
) -> None:
    code, text = told[name]

    assert code == exit_code, text
    assert said in text


def test_a_report_tells_no_secret(told: dict[str, tuple[int, str]]) -> None:
    _, text = told["text"]

    assert "hf_secret" not in text
    assert "NCCL_P2P_DISABLE=1" in text


@pytest.mark.slow
def test_the_ops_of_a_cpu_build_here(tmp_path: Path) -> None:
    done = autotune("doctor", *ON_CPU, "--json", cwd=tmp_path)

    (op,) = [one for one in json.loads(done.stdout)["checks"] if one["name"].endswith("Builder")]
    assert (op["name"], op["status"]) == ("ShareMemCommBuilder", "ok"), op
