"""Detection through the real nvidia-ml-py, which talks to a library that says what a scenario says.

A child process, whose loader finds the stand-in where the driver's library would be, looks at one
machine after the other; what a machine is the stand-in reads anew with every call.
"""

import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nvml_standin
import pytest
from nvml_standin import A100, RTX3090, scenario, uuid_of

from autotune.devices import named_cluster, parse_gpus
from autotune.units import GIB, MIB

pytestmark = pytest.mark.skipif(nvml_standin.COMPILER is None, reason="needs a C compiler")


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return nvml_standin.build(tmp_path_factory.mktemp("nvml"))


@dataclass(frozen=True, kw_only=True)
class Case:
    """A scenario, what is asked of it, and what has to come of it.

    Attributes:
        says: fields of the cluster that was chosen.
        notes: a part of a note each, in their order.
        refused: parts of the refusal, the device and the reason among them.
    """

    scenario: str
    devices: str = "auto"
    memory: int | None = None
    environ: Mapping[str, str] = field(default_factory=dict)
    without_library: bool = False
    says: Mapping[str, object] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    refused: tuple[str, ...] = ()
    exit_code: int = 69


def mig(place: int) -> dict[str, object]:
    return {
        "uuid": uuid_of(place, "MIG"),
        "name": "NVIDIA A100-SXM4-80GB MIG 3g.40gb",
        "memory": 40192 * MIB,
        "reserved": 512 * MIB,
        "used": 0,
    }


def on_cpu(reason: str, **case: Any) -> Case:  # noqa: ANN401 - fields of a case
    note = f"because no NVIDIA GPU is usable: {reason}"
    return Case(says={"kind": "cpu"}, notes=(note,), **case)


A100_BYTES = named_cluster([parse_gpus("A100-80GB")]).device_memory_bytes
RTX3090_BYTES = named_cluster([parse_gpus("RTX3090-24GB")]).device_memory_bytes
BARE: nvml_standin.Facts = {"uuid": uuid_of(0), "name": "NVIDIA GeForce RTX 3090"}
UNLIKE = scenario(RTX3090, A100, RTX3090)
TWO = scenario(A100, A100)
LOST, FORBIDDEN, UNSUPPORTED, UNKNOWN = 15, 4, 3, 999
BUSY: nvml_standin.Facts = RTX3090 | {"used": 20 * GIB, "processes": f"4242:{20 * GIB};77:na"}

CASES = {
    "one idle A100 is all there": Case(
        scenario=scenario(A100),
        says={
            "kind": "cuda",
            "device_name": "A100-80GB",
            "num_devices": 1,
            "device_memory_bytes": A100_BYTES,
            "headroom_bytes": 0,
            "compute_capability": [8, 0],
            "visible_devices": [uuid_of(0)],
        },
    ),
    "eight idle 3090s": Case(
        scenario=scenario(*[RTX3090] * 8),
        says={
            "device_name": "RTX3090-24GB",
            "num_devices": 8,
            "device_memory_bytes": RTX3090_BYTES,
        },
    ),
    "no GPU": on_cpu("NVML lists no GPU", scenario=scenario()),
    "driver and library do not match": on_cpu(
        "NVML fails with 'Driver/library version mismatch'",
        scenario=scenario(A100, nvmlInitWithFlags=18),
    ),
    "an unknown error at the start": on_cpu(
        "NVML fails with 'Unknown Error'", scenario=scenario(A100, nvmlInitWithFlags=UNKNOWN)
    ),
    "the driver is not loaded": on_cpu(
        "NVML fails with 'Driver Not Loaded'", scenario=scenario(A100, nvmlInitWithFlags=9)
    ),
    "no library": on_cpu(
        "NVML fails with 'NVML Shared Library Not Found'", scenario="", without_library=True
    ),
    "an unknown error after the start": on_cpu(
        "NVML fails with 'Unknown Error'", scenario=scenario(A100, nvmlDeviceGetCount_v2=UNKNOWN)
    ),
    "an error that the binding has no words for": on_cpu(
        "NVML fails with 'an error that the stand-in has no words for'",
        scenario=scenario(A100, nvmlInitWithFlags=777),
    ),
    "one of two GPUs is lost": Case(
        scenario=scenario(A100, A100 | {"nvmlDeviceGetHandleByIndex_v2": LOST}),
        says={"num_devices": 1, "visible_devices": [uuid_of(0)]},
        notes=("GPU 1 of NVML's is left out: NVML says 'GPU is lost'",),
    ),
    "all GPUs are lost": on_cpu(
        "NVML lists no GPU; GPU 0 of NVML's is left out: NVML says 'GPU is lost'",
        scenario=scenario(A100 | {"nvmlDeviceGetHandleByIndex_v2": LOST}),
    ),
    "a GPU that is closed to the container is not numbered": Case(
        scenario=scenario(A100 | {"nvmlDeviceGetHandleByIndex_v2": FORBIDDEN}, A100, A100),
        environ={"CUDA_VISIBLE_DEVICES": "0"},
        says={"visible_devices": [uuid_of(1)]},
        notes=("GPU 0 of NVML's is left out: NVML says 'Insufficient Permissions'",),
    ),
    "a GPU is lost after its handle was given": Case(
        scenario=scenario(A100 | {"nvmlDeviceGetTotalEccErrors": LOST}),
        refused=(f"GPU 0 ({uuid_of(0)}) cannot be used", "does not answer NVML (GPU is lost)"),
    ),
    "memory is not told": Case(
        scenario=scenario(A100 | {"memory": None}),
        refused=("GPU 0 NVIDIA A100-SXM4-80GB", "free memory", "--device-memory 16GiB"),
    ),
    "memory is not told, but by the user": Case(
        scenario=scenario(A100 | {"memory": None}),
        memory=16 * GIB,
        says={"device_memory_bytes": 16 * GIB, "device_memory_source": "--device-memory"},
        notes=("NVML does not tell the free memory",),
    ),
    "a driver that does not tell reserved memory apart": Case(
        scenario=scenario(A100 | {"nvmlDeviceGetMemoryInfo_v2": UNSUPPORTED}),
        says={"device_memory_bytes": A100_BYTES},
    ),
    "a GPU without a name": Case(
        scenario=scenario(A100 | {"name": None}),
        says={"device_name": "NVIDIA GPU", "device_memory_bytes": (81920 - 762) * MIB},
    ),
    "a name that is no text": Case(
        scenario=scenario(A100 | {"name": "\udcff\udcfe"}), says={"device_name": "NVIDIA GPU"}
    ),
    "a GPU without a UUID is named by its number": Case(
        scenario=scenario(A100, A100 | {"uuid": None}),
        devices="gpu:1",
        says={"visible_devices": ["1"]},
    ),
    "a GPU that tells nothing but name and memory, as under WSL": Case(
        scenario=scenario(BARE | {"bus": None, "memory": 24576 * MIB, "used": 400 * MIB}),
        says={
            "kind": "cuda",
            "compute_capability": None,
            "device_memory_bytes": RTX3090_BYTES,
            "rank_cpus": [],
        },
    ),
    "a product that is not in the table": Case(
        scenario=scenario(A100 | {"name": "NVIDIA X1", "memory": 50 * GIB, "reserved": GIB}),
        says={"device_name": "NVIDIA X1", "device_memory_bytes": 49 * GIB},
    ),
    "a known name with another memory, as of a virtual GPU": Case(
        scenario=scenario(A100 | {"memory": 20 * GIB, "reserved": GIB}),
        says={"device_memory_bytes": 19 * GIB},
    ),
    "MIG: one instance is a job": Case(
        scenario=scenario(A100 | {"mig": 1, "mig0": mig(0), "mig1": mig(1)}),
        says={
            "num_devices": 1,
            "visible_devices": [uuid_of(0, "MIG")],
            "device_memory_bytes": (40192 - 512) * MIB,
            "compute_capability": [8, 0],
        },
        notes=("CUDA opens one MIG instance a process",),
    ),
    "MIG: an instance by the mask": Case(
        scenario=scenario(A100 | {"mig": 1, "mig0": mig(0), "mig1": mig(1)}),
        environ={"CUDA_VISIBLE_DEVICES": uuid_of(1, "MIG")},
        says={"visible_devices": [uuid_of(1, "MIG")]},
    ),
    "MIG: an instance by --devices": Case(
        scenario=scenario(A100 | {"mig": 1, "mig0": mig(0), "mig1": mig(1)}),
        devices=uuid_of(1, "MIG"),
        says={"visible_devices": [uuid_of(1, "MIG")]},
    ),
    "MIG: two instances are refused": Case(
        scenario=scenario(A100 | {"mig": 1, "mig0": mig(0), "mig1": mig(1)}),
        devices=f"{uuid_of(0, 'MIG')},{uuid_of(1, 'MIG')}",
        refused=(uuid_of(0, "MIG"), "NCCL does not connect instances"),
        exit_code=2,
    ),
    "MIG: two by number are refused": Case(
        scenario=scenario(A100 | {"mig": 1, "mig0": mig(0), "mig1": mig(1)}),
        devices="2",
        refused=("--devices 2", uuid_of(0, "MIG"), "one MIG instance a process"),
        exit_code=2,
    ),
    "MIG: no instance was made": on_cpu("NVML lists no GPU", scenario=scenario(A100 | {"mig": 1})),
    "unlike GPUs are refused": Case(
        scenario=UNLIKE,
        refused=("GPU 1 NVIDIA A100-SXM4-80GB", "unlike", "CUDA_VISIBLE_DEVICES=0,2"),
    ),
    "unlike GPUs, alike ones by --devices": Case(
        scenario=UNLIKE,
        devices="gpu:0,2",
        says={"visible_devices": [uuid_of(0), uuid_of(2)], "device_name": "RTX3090-24GB"},
    ),
    "unlike GPUs, numbered by an order that is not known": Case(
        scenario=UNLIKE,
        environ={"CUDA_VISIBLE_DEVICES": "1"},
        says={"visible_devices": [uuid_of(1)]},
        notes=("CUDA by default numbers the fastest GPU first",),
    ),
    "unlike GPUs, numbered by the PCI bus": Case(
        scenario=UNLIKE,
        environ={"CUDA_VISIBLE_DEVICES": "1", "CUDA_DEVICE_ORDER": "PCI_BUS_ID"},
        says={"visible_devices": [uuid_of(1)], "notes": []},
    ),
    "others use some: a headroom is left": Case(
        scenario=scenario(RTX3090 | {"used": 8 * GIB, "processes": f"4242:{8 * GIB}"}),
        says={
            "device_memory_bytes": 24576 * MIB - 322 * MIB - 8 * GIB - (8 * GIB - MIB) // 10,
            "headroom_bytes": (8 * GIB - MIB) // 10,
        },
    ),
    "others use little": Case(
        scenario=scenario(RTX3090 | {"used": 600 * MIB}),
        says={
            "device_memory_bytes": (24576 - 322 - 600 - 256) * MIB,
            "headroom_bytes": 256 * MIB,
        },
    ),
    "others use most of one": Case(
        scenario=scenario(RTX3090, BUSY),
        refused=(
            f"20.0 GiB of the 23.7 GiB of GPU 1 ({uuid_of(1)}) by process 4242, 77",
            "--devices gpu:0",
            "--device-memory",
        ),
    ),
    "others use most of one, and it is said what may be taken": Case(
        scenario=scenario(BUSY), memory=2 * GIB, says={"device_memory_bytes": 2 * GIB}
    ),
    "a number takes those that are free": Case(
        scenario=scenario(BUSY, RTX3090, RTX3090),
        devices="2",
        says={"visible_devices": [uuid_of(1), uuid_of(2)]},
    ),
    "processes of other containers on an idle GPU": Case(
        scenario=scenario(A100 | {"processes": "4194304:na;1:na"}),
        says={"device_memory_bytes": A100_BYTES},
    ),
    "processes are not told": Case(
        scenario=scenario(A100 | {"nvmlDeviceGetComputeRunningProcesses_v3": UNSUPPORTED}),
        says={"device_memory_bytes": A100_BYTES},
    ),
    "a GPU for one process, which has it": Case(
        scenario=scenario(A100 | {"compute_mode": 3, "processes": "4242:1048576"}),
        refused=(f"GPU 0 ({uuid_of(0)}) by process 4242", "one process at a time"),
    ),
    "a GPU for one process, which is to come": Case(
        scenario=scenario(A100 | {"compute_mode": 3}), says={"num_devices": 1}
    ),
    "a GPU for no process": Case(
        scenario=scenario(A100, A100 | {"compute_mode": 2}),
        refused=(f"GPU 1 ({uuid_of(1)})", "compute mode prohibited", "--devices"),
    ),
    "errors of memory so far": Case(
        scenario=scenario(A100 | {"ecc_uncorrected": 2}),
        says={"num_devices": 1},
        notes=(f"GPU 0 ({uuid_of(0)}): 2 uncorrectable errors of its memory",),
    ),
    "a row to be remapped": Case(
        scenario=scenario(A100 | {"remap_pending": 1}), notes=("waits to be remapped",)
    ),
    "a row that could not be remapped": Case(
        scenario=scenario(A100, A100 | {"remap_failed": 1}),
        refused=(f"GPU 1 ({uuid_of(1)})", "could not be remapped"),
    ),
    "a mask by the beginning of a UUID": Case(
        scenario=TWO,
        environ={"CUDA_VISIBLE_DEVICES": "GPU-1000"},
        says={"visible_devices": [uuid_of(1)]},
    ),
    "a mask that two UUIDs begin with": on_cpu(
        "CUDA_VISIBLE_DEVICES='GPU-' leaves none of 2 visible: 'GPU-' is the beginning of 2 UUIDs",
        scenario=TWO,
        environ={"CUDA_VISIBLE_DEVICES": "GPU-"},
    ),
    "a mask that hides all": on_cpu(
        "CUDA_VISIBLE_DEVICES='-1' leaves none of 2 visible",
        scenario=TWO,
        environ={"CUDA_VISIBLE_DEVICES": "-1"},
    ),
    "a mask that names a GPU twice": on_cpu(
        "CUDA_VISIBLE_DEVICES='0,0' leaves none of 2 visible: it names a device twice",
        scenario=TWO,
        environ={"CUDA_VISIBLE_DEVICES": "0,0"},
    ),
    "a mask with an entry that is not valid": Case(
        scenario=TWO,
        environ={"CUDA_VISIBLE_DEVICES": "1,7,0"},
        says={"visible_devices": [uuid_of(1)]},
        notes=("entry 2 is not valid",),
    ),
    "devices by UUID, in this order": Case(
        scenario=TWO,
        devices=f"{uuid_of(1)},GPU-0000",
        says={"visible_devices": [uuid_of(1), uuid_of(0)]},
    ),
    "devices by place among those that the mask shows": Case(
        scenario=scenario(A100, A100, A100),
        environ={"CUDA_VISIBLE_DEVICES": "2,1"},
        devices="gpu:0",
        says={"visible_devices": [uuid_of(2)]},
    ),
    "a UUID that is not there": Case(
        scenario=TWO, devices="GPU-ffff", refused=("'GPU-ffff'", uuid_of(0)), exit_code=2
    ),
    "a number that is not there": Case(
        scenario=TWO, devices="gpu:0,5", refused=("'5'", uuid_of(1)), exit_code=2
    ),
    "a device named twice": Case(
        scenario=TWO, devices="gpu:1,1", refused=(uuid_of(1), "twice"), exit_code=2
    ),
    "a UUID on a machine without a GPU": Case(
        scenario=scenario(), devices="GPU-ffff", refused=("NVML lists no GPU",)
    ),
    "NVLinks between all": Case(
        scenario=scenario(*[A100] * 4, nvlinked="all", peers=0),
        says={
            "links": {
                "kind": "nvlink",
                "peer_bytes_per_s": 12 * 25e9,
                "host_bytes_per_s": 32e9,
                "linked_pairs": [],
                "no_peer_access": [],
            }
        },
    ),
    "bridges between pairs, so that a ring goes over PCIe": Case(
        scenario=scenario(*[RTX3090 | {"nvlinks": 4}] * 4, nvlinked="0-1,2-3", peers=5),
        says={
            "links": {
                "kind": "pcie",
                "peer_bytes_per_s": 32e9,
                "host_bytes_per_s": 32e9,
                "linked_pairs": [[0, 1], [2, 3]],
                "no_peer_access": [[0, 1], [0, 2], [1, 2], [0, 3], [1, 3], [2, 3]],
            }
        },
    ),
    "bridges in a ring": Case(
        scenario=scenario(*[RTX3090 | {"nvlinks": 4}] * 4, nvlinked="0-1,1-2,2-3,0-3"),
        says={"links.kind": "nvlink", "links.peer_bytes_per_s": 4 * 14.0625e9},
    ),
    "a slot of eight lanes": Case(
        scenario=scenario(RTX3090, RTX3090 | {"pcie_width": 8, "pcie_generation": 3}),
        says={"links.peer_bytes_per_s": 8e9, "links.host_bytes_per_s": 8e9},
    ),
    "CPUs near each GPU": Case(
        scenario=scenario(A100 | {"cpus": "0"}, A100 | {"cpus": "1,64-127"}),
        says={"rank_cpus": [[0], [1]]},
    ),
    "a GPU near all CPUs": Case(
        scenario=scenario(A100 | {"cpus": "0-1023"}), says={"rank_cpus": []}
    ),
    "sixteen GPUs": Case(scenario=scenario(*[A100] * 16), says={"num_devices": 16}),
}


def value_of(answer: Mapping[str, Any], name: str) -> object:
    for part in name.split("."):
        answer = answer[part]
    return answer


@pytest.fixture(scope="module")
def answers(library: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Return what detection says of each case."""
    folder = tmp_path_factory.mktemp("cases")
    told: dict[str, dict[str, Any]] = {}
    for found in (library, None):
        cases = {
            name: {
                "scenario": case.scenario,
                "environ": dict(case.environ),
                "devices": case.devices,
                "memory": case.memory,
            }
            for name, case in CASES.items()
            if case.without_library is (found is None)
        }
        environ = nvml_standin.environment(found, folder / "scenario")
        told |= nvml_standin.detect_each(cases, environ, folder)
    return told


@pytest.mark.parametrize("name", CASES)
def test_a_machine_is_read_as_it_is(name: str, answers: dict[str, dict[str, Any]]) -> None:
    case, answer = CASES[name], answers[name]

    if case.refused:
        assert answer.get("exit_code") == case.exit_code, answer
        assert [part for part in case.refused if part not in answer["refused"]] == [], answer
        return
    assert "refused" not in answer, answer
    told = {name: value_of(answer, name) for name in case.says}
    assert told == dict(case.says)
    assert len(answer["notes"]) >= len(case.notes)
    for part, note in zip(case.notes, answer["notes"], strict=False):
        assert part in note


def test_there_are_scenarios_enough() -> None:
    assert len(CASES) >= 25
    assert sum(bool(case.refused) for case in CASES.values()) >= 8


COMMAND = """
import sys
from autotune import cli
sys.argv = ["autotune", *sys.argv[1:]]
cli.main()
"""


@pytest.mark.parametrize(
    ("of", "exit_code", "said"),
    [
        (UNLIKE, 69, "GPU 1 NVIDIA A100-SXM4-80GB"),
        (scenario(A100, nvmlInitWithFlags=18), 0, "Driver/library version mismatch"),
    ],
    ids=["unlike", "mismatch"],
)
def test_the_command_says_it_in_a_sentence(
    of: str, exit_code: int, said: str, library: Path, tmp_path: Path
) -> None:
    file = tmp_path / "scenario"
    file.write_text(of)
    done = subprocess.run(
        [sys.executable, "-c", COMMAND, "detect"],
        env=nvml_standin.environment(library, file),
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )

    assert done.returncode == exit_code, done.stderr
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_the_library_of_windows_is_found_where_windows_puts_it(
    library: Path, tmp_path: Path
) -> None:
    file = tmp_path / "scenario"
    file.write_text(scenario(RTX3090))
    code = """
import json, pathlib, platform, sys
platform.release = lambda: "5.15.167.4-microsoft-standard-WSL2"
from autotune.detect import nvml
with nvml.session(wsl_library=pathlib.Path(sys.argv[1])) as session:
    print(json.dumps(session.ask("nvmlDeviceGetCount")))
"""
    environ = nvml_standin.environment(None, file)

    assert nvml_standin.run(code, library / nvml_standin.LIBRARY, environ=environ) == 1
