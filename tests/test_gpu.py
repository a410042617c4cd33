"""What only a GPU can show; skipped without one, and run by `make gpu-check`."""

import subprocess
import sys
from pathlib import Path

import pytest

from autotune.detect import read_gpus
from autotune.detect.torch_build import read_torch_build
from autotune.probe.classify import Death, exhausted_memory

BUILD = read_torch_build()

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(BUILD.cuda_version is None, reason="torch is built without CUDA"),
]


def in_a_child(code: str) -> str:
    """Run a program on the GPU in a process of its own, whose context ends with it."""
    import os

    environ = {
        name: value
        for name, value in os.environ.items()
        if name not in {"CUDA_VISIBLE_DEVICES", "DS_ACCELERATOR"}
    }
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
        env=environ,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_torch_opens_the_gpus_that_nvml_lists(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    listed = read_gpus(BUILD)
    if not listed.devices:
        pytest.skip(str(listed.absence))
    answer = tmp_path / "devices.json"
    in_a_child(f"from autotune.engine.cuda import main; main([{str(answer)!r}])")

    from autotune.rundir import read_json

    opened = read_json(answer)
    assert {one["uuid"] for one in opened} == {device.uuid for device in listed.devices}
    for one in opened:
        (device,) = [device for device in listed.devices if device.uuid == one["uuid"]]
        assert tuple(one["capability"]) == device.compute_capability
        assert one["total_bytes"] <= (device.memory_total_bytes or 0)


DIES = """
import torch
try:
    {work}
except Exception as error:
    print(type(error).__module__ + "." + type(error).__qualname__, "|", str(error)[:500])
"""


@pytest.mark.parametrize(
    "work",
    [
        "torch.empty(1 << 50, dtype=torch.uint8, device='cuda')",
        "held = [torch.empty(1 << 28, dtype=torch.uint8, device='cuda') for _ in range(10_000)]",
    ],
    ids=["at once", "bit by bit"],
)
def test_a_full_gpu_is_out_of_memory(work: str) -> None:
    exception, _, message = in_a_child(DIES.format(work=work)).partition(" | ")

    assert exhausted_memory(Death(rank=0, exception=exception, message=message), "cuda") == "device"


def test_the_allocator_keeps_to_its_cap() -> None:
    work = (
        "from autotune.engine import cuda; cuda.cap_allocator(0.05, 0);"
        " torch.empty(torch.cuda.get_device_properties(0).total_memory // 10,"
        " dtype=torch.uint8, device='cuda')"
    )
    exception, _, message = in_a_child(DIES.format(work=work)).partition(" | ")

    assert exhausted_memory(Death(rank=0, exception=exception, message=message), "cuda") == "device"


def test_segments_can_be_told_to_grow() -> None:
    code = """
import torch
from autotune.engine import cuda
cuda.expand_segments()
held = torch.empty(1 << 26, device="cuda")
print(any(one.get("is_expandable") for one in torch.cuda.memory_snapshot()))
"""
    assert in_a_child(code) == "True"
