"""What is CUDA's own, and DeepSpeed's accelerator has no call for; nothing else names it."""

import argparse
from pathlib import Path
from typing import Any

from autotune.rundir import write_json


def cap_allocator(share: float, device: int) -> None:
    """Hold the caching allocator of this process to a share of a device's memory."""
    import torch

    torch.cuda.set_per_process_memory_fraction(min(1.0, share), device)


def expand_segments() -> None:
    """Have the caching allocator grow its segments instead of adding ever new ones.

    What PYTORCH_CUDA_ALLOC_CONF says to a process that is not yet running.
    """
    import torch

    settings = "expandable_segments:True"
    if hasattr(torch._C, "_accelerator_setAllocatorSettings"):  # noqa: SLF001 - torch's own advice
        torch._C._accelerator_setAllocatorSettings(settings)  # noqa: SLF001
    else:
        # torch before 2.11.
        torch.cuda.memory._set_allocator_settings(settings)  # noqa: SLF001


def visible_devices() -> list[dict[str, Any]]:
    """List the devices that CUDA opens here, for where NVML is not to be had."""
    import torch

    devices = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        uuid = getattr(properties, "uuid", None)
        devices.append(
            {
                "name": properties.name,
                "uuid": None if uuid is None else f"GPU-{uuid}",
                "total_bytes": int(total),
                "free_bytes": int(free),
                "capability": [properties.major, properties.minor],
            }
        )
    return devices


def main(argv: list[str] | None = None) -> None:
    """Write what `visible_devices` lists, as a program: a context of CUDA stays until its end."""
    parser = argparse.ArgumentParser(prog="autotune.engine.cuda", description=main.__doc__)
    parser.add_argument("answer", type=Path, help="the file to write")
    write_json(parser.parse_args(argv).answer, visible_devices())


if __name__ == "__main__":
    main()
