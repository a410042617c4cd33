"""The GPUs as torch sees them, for containers that have CUDA but no NVML."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from autotune.detect.masks import MASK, is_uuid
from autotune.detect.nvidia import NvidiaDevice, NvidiaInventory
from autotune.rundir import read_json

_PATIENCE_S = 120.0
"""Importing torch and opening eight devices takes seconds, on a cold network disk a minute."""


def read_by_torch(absence: str) -> NvidiaInventory:
    """List the GPUs that torch opens, in a process of its own; `absence` is why NVML does not.

    They are numbered as CUDA does under the mask that there is.
    """
    with tempfile.TemporaryDirectory(prefix="autotune-devices-") as scratch:
        answer = Path(scratch) / "devices.json"
        command = [sys.executable, "-m", "autotune.engine.cuda", str(answer)]
        try:
            done = subprocess.run(
                command,
                check=False,
                capture_output=True,
                text=True,
                timeout=_PATIENCE_S,
                stdin=subprocess.DEVNULL,
            )
        except subprocess.TimeoutExpired:
            why = f"torch did not open the GPUs within {_PATIENCE_S:.0f} s"
            return NvidiaInventory(devices=(), absence=f"{absence}, and {why}")
        listed = read_json(answer)
    if listed is None:
        last = (done.stderr.strip().splitlines() or ["it left no word"])[-1]
        return NvidiaInventory(devices=(), absence=f"{absence}, and torch fails with {last!r}")
    if not listed:
        return NvidiaInventory(devices=(), absence=f"{absence}, and torch lists no GPU either")
    entries = os.environ.get(MASK, "").split(",") + [""] * len(listed)
    devices = tuple(
        NvidiaDevice(
            index=place,
            # What the user calls it is what CUDA has understood, also of an instance.
            uuid=entry.strip() if is_uuid(entry.strip()) else one["uuid"],
            name=one["name"],
            memory_total_bytes=one["total_bytes"],
            memory_free_bytes=one["free_bytes"],
            compute_capability=tuple(one["capability"]),
        )
        for place, (one, entry) in enumerate(zip(listed, entries, strict=False))
    )
    note = (
        f"{absence}, so the GPUs are those that torch opens: who else uses them, how they are"
        " linked and whether they are well is not known"
    )
    return NvidiaInventory(devices=devices, notes=(note,))
