"""A container with CUDA and without NVML: the GPUs are those that torch opens.

torch stands in for itself, as there is no GPU: a package of that name with the few functions that
are asked, found by the child as the real one would be.
"""

import os
from pathlib import Path

import nvml_standin
import pytest

from autotune.units import GIB

TORCH = """
import types
class _Properties:
    name, major, minor, uuid = "NVIDIA GeForce RTX 3090", 8, 6, "12345678-aaaa"
cuda = types.SimpleNamespace(
    device_count=lambda: {count},
    get_device_properties=lambda index: _Properties,
    mem_get_info=lambda index: ({free}, {total}),
)
{more}
"""


def make_torch(folder: Path, *, count: int, free: int = 24 * GIB, more: str = "") -> None:
    package = folder / "torch"
    package.mkdir()
    (package / "version.py").write_text("__version__ = '2.13.0+cu130'\ncuda = '13.0'\nhip = None\n")
    content = TORCH.format(count=count, free=free, total=24 * GIB + 2**26, more=more)
    (package / "__init__.py").write_text(content)


def detect(folder: Path, **environ: str) -> dict[str, object]:
    path = os.pathsep.join([str(folder), str(Path(__file__).parent.parent)])
    environment = nvml_standin.environment(None, folder / "scenario", {"PYTHONPATH": path})
    case = {"scenario": "", "environ": environ, "devices": "auto", "memory": None}
    return nvml_standin.detect_each({"this": case}, environment, folder)["this"]


def notes_of(answer: dict[str, object]) -> list[str]:
    notes = answer["notes"]
    assert isinstance(notes, list)
    return notes


def test_the_gpus_that_torch_opens_are_used(tmp_path: Path) -> None:
    make_torch(tmp_path, count=2)
    answer = detect(tmp_path)

    assert answer["kind"] == "cuda"
    assert answer["num_devices"] == 2
    assert answer["device_name"] == "RTX3090-24GB"
    assert answer["visible_devices"] == ["GPU-12345678-aaaa"] * 2
    (note,) = notes_of(answer)
    assert note.startswith("NVML fails with 'NVML Shared Library Not Found', so the GPUs are those")


def test_memory_that_others_use_is_left_to_them(tmp_path: Path) -> None:
    make_torch(tmp_path, count=1, free=14 * GIB)
    answer = detect(tmp_path)

    assert isinstance(answer["headroom_bytes"], int)
    assert answer["device_memory_bytes"] == 14 * GIB - answer["headroom_bytes"]
    assert answer["headroom_bytes"] > 0


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ("", "and torch lists no GPU either"),
        ("raise RuntimeError('no CUDA driver')", "and torch fails with 'RuntimeError: no CUDA"),
    ],
    ids=["none", "error"],
)
def test_if_torch_opens_none_either_both_reasons_are_told(
    more: str, reason: str, tmp_path: Path
) -> None:
    make_torch(tmp_path, count=0, more=more)
    answer = detect(tmp_path)

    assert answer["kind"] == "cpu"
    assert reason in notes_of(answer)[0]


def test_what_the_user_calls_a_gpu_it_is_called_for_its_rank(tmp_path: Path) -> None:
    make_torch(tmp_path, count=2)
    answer = detect(tmp_path, CUDA_VISIBLE_DEVICES="MIG-77,3")

    assert answer["visible_devices"] == ["MIG-77", "GPU-12345678-aaaa"]
