"""The virtual run: the real DeepSpeed engine, built and stepped over fake tensors.

It takes no weights, no device and no other ranks, and what it allocates is followed to the byte.
The engine, its micro-step and its config are those of probes and training.
"""

import json
import os
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from autotune import processes
from autotune.emit import BETWEEN_STEPS_NOTHING
from autotune.errors import VirtualRunUnavailableError
from autotune.workload import TrainSpec

_TIMEOUT_S = 900.0


@dataclass(frozen=True, slots=True, kw_only=True)
class VirtualRequest:
    """What to run: every row `seq_length` tokens long.

    Attributes:
        padded: whether the attention mask is kept, as it is where rows of a batch differ in length.
        rank: whose memory is followed. Ranks differ by what their partitions cut off a parameter.
        steps: optimizer updates. In the first the optimizer makes its states, and ZeRO 3 learns the
            order of the layers; the second is like every later one.
    """

    spec: TrainSpec
    ds_config: dict[str, Any]
    ranks: int
    micro_batch_size: int
    gradient_accumulation_steps: int
    seq_length: int
    padded: bool = True
    rank: int = 0
    steps: int = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class VirtualRun:
    """What one rank was seen to do.

    Attributes:
        peak_device_bytes: most bytes of live tensors on the device at once, from the first tensor
            of the model to the last update.
        peak_host_bytes: the same of host memory beside a device; nought for a CPU.
        parts: the device bytes at the peak: weights, gradients, optimizer, activations, logits,
            buffers and other, which sum to `peak_device_bytes`.
        collectives: bytes that an optimizer update hands to collectives, by operator.
        flops: floating-point operations of an optimizer update.
        operators: operators of an optimizer update that make a tensor of their own.
        seconds: what the virtual run took.
        resident_bytes: peak resident set of the process that ran it.
    """

    peak_device_bytes: int
    peak_host_bytes: int
    parameters: int
    parts: dict[str, int]
    collectives: dict[str, int]
    flops: int
    operators: int
    seconds: float
    resident_bytes: int


def virtual_run(request: VirtualRequest, log: Path) -> VirtualRun:
    """Run in a process of its own, whose output goes to the file `log`.

    Raises:
        VirtualRunUnavailableError: it ended without an answer; the text has its last words.
    """
    with tempfile.TemporaryDirectory(prefix="autotune-virtual-") as scratch:
        answer = Path(scratch) / "answer.json"
        process = processes.start(_answer, request, str(answer), log=log)
        try:
            process.join(_TIMEOUT_S)
            if not answer.exists():
                raise VirtualRunUnavailableError(_last_words(process.exitcode, log))
            return VirtualRun(**json.loads(answer.read_bytes()))
        finally:
            processes.end([process])


def _answer(request: VirtualRequest, path: str) -> None:
    text = json.dumps(asdict(run_virtual(request)))
    draft = Path(f"{path}.draft")
    draft.write_text(text)
    draft.replace(path)
    # Taking apart what the libraries set up globally is of no use to anyone.
    os._exit(0)


def _last_words(exit_code: int | None, log: Path) -> str:
    ending = f"took over {_TIMEOUT_S:.0f} s" if exit_code is None else f"ended with {exit_code}"
    words = log.read_text(errors="replace").strip() if log.exists() else ""
    return (
        f"the virtual run {ending}: {words.rpartition(chr(10))[2] or 'it left no output'} ({log})"
    )


def run_virtual(request: VirtualRequest) -> VirtualRun:
    """Run in this process, whose environment and libraries are changed meanwhile.

    Raises:
        VirtualRunUnavailableError: a library lacks a name that has to give way.
    """
    from autotune.profile.virtual_engine import follow

    # The Trainer makes its output directory, and this run has nothing to put there.
    with tempfile.TemporaryDirectory(prefix="autotune-virtual-") as output:
        trainer = {**request.spec.trainer, **BETWEEN_STEPS_NOTHING, "output_dir": output}
        return follow(replace(request, spec=replace(request.spec, trainer=trainer)))
