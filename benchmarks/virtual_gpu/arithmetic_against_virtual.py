"""Holds the arithmetic against virtual runs of DeepSpeed on GPUs that are only named.

    python benchmarks/virtual_gpu/arithmetic_against_virtual.py [--model NAME] [--continue]

Full depth, allocated bytes of the worst rank. Each virtual run takes 10 to 70 seconds of one core.
Prints a line a setting and writes benchmarks/results/virtual_gpu.json; --continue goes on after
the settings that are in it.
"""

import argparse
import json
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from autotune import intake
from autotune.cli.options import named_hardware
from autotune.config import Layer, resolve
from autotune.setting import Offload, Structure
from autotune.units import GIB

RESULT = Path(__file__).parent.parent / "results" / "virtual_gpu.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    model: str
    gpus: str
    zero_stage: int
    offload_optimizer: Offload = "none"
    offload_param: Offload = "none"
    checkpointing: str = "full"
    precision: str = "bf16"
    micro_batch_size: int = 1
    accumulation: int = 2
    seq_length: int = 2048


def case(gpus: str, model: str, place: tuple[int, Offload, Offload], **changes: Any) -> Case:  # noqa: ANN401
    stage, optimizer, parameters = place
    return Case(
        model=model,
        gpus=gpus,
        zero_stage=stage,
        offload_optimizer=optimizer,
        offload_param=parameters,
        **changes,
    )


PLACES: tuple[tuple[int, Offload, Offload], ...] = (
    (0, "none", "none"),
    (1, "none", "none"),
    (2, "none", "none"),
    (3, "none", "none"),
    (1, "cpu", "none"),
    (2, "cpu", "none"),
    (3, "cpu", "none"),
    (3, "cpu", "cpu"),
)
GRID = (
    *(case("8xA100-80GB", "llama-2-7b", place, seq_length=4096) for place in PLACES),
    *(case("8xRTX3090-24GB", "chatglm3-6b", place, seq_length=3256) for place in PLACES[1:]),
    *(
        case("8xA100-80GB", "llama-2-7b", place, seq_length=1024, checkpointing="none")
        for place in PLACES[2:4]
    ),
    *(
        case("4xA100-80GB", "qwen2.5-7b", place, precision="fp16", micro_batch_size=2)
        for place in PLACES[2:6]
    ),
)
"""Stages by offload, with models of 6 to 8 billion parameters."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Bytes of a rank's device; the error of the arithmetic in per cent of the virtual run."""

    case: Case
    arithmetic_bytes: int
    virtual_bytes: int
    error_percent: float
    arithmetic_host_bytes: int
    virtual_host_bytes: int
    seconds: float
    resident_bytes: int


def compare(case: Case, directory: Path) -> Comparison:
    """Answer a case in both ways.

    Raises:
        AutotuneError: it is refused, or cannot be run virtually.
    """
    hardware = named_hardware((case.gpus,), 1)
    rows = case.micro_batch_size * case.accumulation
    options = {"model": case.model, "precision": case.precision}
    ranks = int(case.gpus.partition("x")[0])
    layer = Layer("the grid", options | {"global_batch_size": rows * ranks})
    question = intake.ask(resolve([layer]), hardware)
    intake.start_processes(question)
    workload = intake.look_into(
        question,
        dataset_dir=directory / "dataset",
        logs=directory,
        imagined=intake.ImaginedRows(seq_length=case.seq_length),
        attention=intake.ATTENTION,
    )
    setting = Structure(
        zero_stage=case.zero_stage,
        offload_optimizer=case.offload_optimizer,
        offload_param=case.offload_param,
        checkpointing=case.checkpointing,
    ).with_micro_batch(case.micro_batch_size, ranks, rows * ranks)
    memory = intake.estimate_setting(workload, setting).entry(0)["memory"]
    virtual = intake.run_virtually(workload, setting, directory / "virtual.log")
    return Comparison(
        case=case,
        arithmetic_bytes=memory["allocated_bytes"],
        virtual_bytes=virtual.peak_device_bytes,
        error_percent=round(100 * (memory["allocated_bytes"] / virtual.peak_device_bytes - 1), 2),
        arithmetic_host_bytes=memory["host_bytes"],
        virtual_host_bytes=virtual.peak_host_bytes,
        seconds=round(virtual.seconds, 1),
        resident_bytes=virtual.resident_bytes,
    )


def summary(compared: Sequence[dict[str, Any]]) -> dict[str, Any]:
    errors = [abs(one["error_percent"]) for one in compared]
    return {
        "settings": len(errors),
        "median_error_percent": statistics.median(errors),
        "largest_error_percent": max(errors),
        "largest_seconds": max(one["seconds"] for one in compared),
        "largest_resident_bytes": max(one["resident_bytes"] for one in compared),
    }


def line(one: Comparison) -> str:
    case = one.case
    return (
        f"{one.error_percent:+6.1f} %  {one.arithmetic_bytes / GIB:7.2f} "
        f"{one.virtual_bytes / GIB:7.2f}"
        f"  host {one.arithmetic_host_bytes / GIB:6.2f} {one.virtual_host_bytes / GIB:6.2f}"
        f"  {one.seconds:4.0f} s  {case.model} {case.gpus} {case.precision} ZeRO {case.zero_stage}"
        f" {case.offload_optimizer}/{case.offload_param} checkpointing {case.checkpointing}"
        f" {case.micro_batch_size} x {case.seq_length}, accumulation {case.accumulation}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model")
    parser.add_argument("--continue", dest="go_on", action="store_true")
    options = parser.parse_args()
    known = json.loads(RESULT.read_text())["rows"] if options.go_on and RESULT.exists() else []
    done = [Case(**one["case"]) for one in known]
    with tempfile.TemporaryDirectory(prefix="autotune-virtual-gpu-") as directory:
        for case in GRID:
            if case in done or options.model not in {None, case.model}:
                continue
            compared = compare(case, Path(directory))
            print(line(compared), flush=True)
            known.append(asdict(compared))
            RESULT.write_text(json.dumps({**summary(known), "rows": known}, indent=2) + "\n")
    print(json.dumps(summary(known), indent=2))


if __name__ == "__main__":
    main()
