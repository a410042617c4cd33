"""The stand-in for NVML: builds it, writes its scenarios, runs programs that see it."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from autotune.units import MIB

SOURCE = Path(__file__).parent / "nvml" / "nvml.c"
COMPILER = shutil.which("cc")
LIBRARY = "libnvidia-ml.so.1"

Facts = dict[str, object]

A100: Facts = {
    "name": "NVIDIA A100-SXM4-80GB",
    "memory": 81920 * MIB,
    "reserved": 762 * MIB,
    "used": 4 * MIB,
    "capability": "8.0",
    "mig": 0,
    "pcie_generation": 4,
    "pcie_width": 16,
    "nvlinks": 12,
    "compute_mode": 0,
    "ecc_uncorrected": 0,
    "remap_pending": 0,
    "throttle": 0,
}
RTX3090: Facts = {
    "name": "NVIDIA GeForce RTX 3090",
    "memory": 24576 * MIB,
    "reserved": 322 * MIB,
    "used": 1 * MIB,
    "capability": "8.6",
    "pcie_generation": 4,
    "pcie_width": 16,
    "nvlinks": 0,
    "compute_mode": 0,
    "throttle": 0,
}


def uuid_of(place: int, kind: str = "GPU") -> str:
    """Return a UUID whose first digits no other has."""
    return f"{kind}-{place:x}000aaaa-1111-2222-3333-444455556666"


def scenario(*gpus: Facts, **machine: object) -> str:
    """Write what NVML says: of each GPU its facts, None for what it does not tell; then the rest.

    A fact `migM` is a mapping of an instance's own.
    """
    lines = {"gpus": len(gpus), "driver": "575.57.08", "cuda": 12090}
    lines |= {name.replace("__", "."): value for name, value in machine.items()}
    for place, gpu in enumerate(gpus):
        facts = {"uuid": uuid_of(place), "bus": f"00000000:{place + 1:02X}:00.0"} | dict(gpu)
        for name, value in facts.items():
            if isinstance(value, Mapping):
                lines |= {f"gpu{place}.{name}.{of}": what for of, what in value.items()}
            elif value is not None:
                lines[f"gpu{place}.{name}"] = value
    return "".join(f"{name}={value}\n" for name, value in lines.items())


def build(directory: Path) -> Path:
    """Compile the library; returns the directory that the loader is to look in."""
    assert COMPILER is not None, "tests that need a compiler are skipped without one"
    command = [COMPILER, "-shared", "-fPIC", "-O1", f"-Wl,-soname,{LIBRARY}"]
    subprocess.run([*command, "-o", str(directory / LIBRARY), str(SOURCE)], check=True)
    return directory


def environment(
    library: Path | None, scenario_file: Path, environ: Mapping[str, str] | None = None
) -> dict[str, str]:
    """Return an environment in which the library is found as the driver's; None finds none."""
    kept = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    return {
        **kept,
        "LD_LIBRARY_PATH": str(library or ""),
        "NVML_SCENARIO": str(scenario_file),
        **(environ or {}),
    }


DETECT = """
import dataclasses, json, os, sys
from pathlib import Path
from autotune.detect import detect
from autotune.errors import AutotuneError

def answer(devices, memory):
    try:
        return dataclasses.asdict(detect(devices, memory))
    except AutotuneError as error:
        return {"refused": str(error), "exit_code": error.exit_code}

before = dict(os.environ)
for name, case in json.loads(Path(sys.argv[1]).read_text()).items():
    Path(before["NVML_SCENARIO"]).write_text(case["scenario"], errors="surrogateescape")
    os.environ.update(case["environ"])
    print(json.dumps([name, answer(case["devices"], case["memory"])]), flush=True)
    for added in set(os.environ) - set(before):
        del os.environ[added]
"""
"""Detection as commands have it, of one machine after the other; the library is loaded once."""


def detect_each(
    cases: Mapping[str, Mapping[str, object]], environ: Mapping[str, str], folder: Path
) -> dict[str, dict[str, Any]]:
    """Return what detection says of each machine, all of them in one child."""
    file = folder / "cases.json"
    file.write_text(json.dumps(cases))
    return dict(map(json.loads, lines(DETECT, file, environ=environ)))


COMMANDS = """
import contextlib, io, json, os, sys
from pathlib import Path
from autotune import cli

for scenario, arguments in json.loads(Path(sys.argv[1]).read_text()):
    Path(os.environ["NVML_SCENARIO"]).write_text(scenario)
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        code = cli._autotune.main(arguments, standalone_mode=False)
    print(json.dumps([code or 0, out.getvalue()]), flush=True)
"""
"""Commands one after the other, each on its machine; what they import is imported once."""


def command_each(
    calls: Sequence[tuple[str, Sequence[object]]], environ: Mapping[str, str], folder: Path
) -> list[tuple[int, str]]:
    """Run commands, each on the machine of its scenario; returns exit codes and what they print."""
    file = folder / "calls.json"
    file.write_text(json.dumps([(of, list(map(str, arguments))) for of, arguments in calls]))
    return [tuple(json.loads(line)) for line in lines(COMMANDS, file, environ=environ)]


def run(code: str, *arguments: object, environ: Mapping[str, str]) -> Any:  # noqa: ANN401 - JSON
    """Run a program in a child; returns the JSON that it prints."""
    (line,) = lines(code, *arguments, environ=environ)
    return json.loads(line)


def lines(code: str, *arguments: object, environ: Mapping[str, str]) -> list[str]:
    """Run a program in a child; returns the lines that it prints, and fails on a traceback."""
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        env=dict(environ),
        check=False,
        timeout=280,
    )
    assert "Traceback" not in done.stderr, done.stderr
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()
