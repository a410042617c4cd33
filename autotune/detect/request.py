"""What `--devices` asks for. Pure."""

import re
from dataclasses import dataclass

from autotune.detect.masks import find_entry, is_uuid
from autotune.detect.nvidia import NvidiaDevice, NvidiaInventory
from autotune.errors import UsageError

_BY_INDEX = "gpu:"


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceRequest:
    """What `--devices` asks for; without a count the number of ranks is chosen.

    Attributes:
        entries: names of GPUs, in the order of their ranks: by UUID (or the beginning of one), or
            by place among the visible GPUs, as CUDA numbers them in a process.
    """

    on_cpu: bool
    count: int | None
    entries: tuple[str, ...] = ()


def parse_devices(text: str) -> DeviceRequest:
    """Read `auto`, `cpu`, `cpu:N`, `N`, `gpu:I,J`, `I,J` or UUIDs.

    Raises:
        UsageError: the text has none of these forms.
    """
    match = re.fullmatch(r"auto|cpu|(?:cpu:)?(?P<count>[1-9][0-9]{0,5})", text)
    if match is not None:
        count = match["count"]
        return DeviceRequest(on_cpu=text.startswith("cpu"), count=int(count) if count else None)
    entries = tuple(entry.strip() for entry in text.removeprefix(_BY_INDEX).split(","))
    lists = text.startswith(_BY_INDEX) or len(entries) > 1 or is_uuid(entries[0])
    if not lists or not all(is_uuid(one) or re.fullmatch(r"[0-9]{1,6}", one) for one in entries):
        msg = (
            f"--devices {text!r} names no devices: pass auto, cpu, cpu:N for N ranks on the CPU,"
            " or N for N devices (N at least 1), or name GPUs by number as in gpu:0,2, or by UUID"
        )
        raise UsageError(msg)
    return DeviceRequest(on_cpu=False, count=len(entries), entries=entries)


def named_devices(request: DeviceRequest, gpus: NvidiaInventory) -> tuple[NvidiaDevice, ...]:
    """Return the GPUs that are asked for by name.

    Raises:
        UsageError: one is not visible, or named twice, or CUDA cannot open them together.
    """
    chosen: list[NvidiaDevice] = []
    for entry in request.entries:
        device = _find(entry, gpus)
        if device in chosen:
            msg = f"--devices names {device.label} twice: a device has one rank"
            raise UsageError(msg)
        chosen.append(device)
    instances = [device for device in chosen if device.is_instance]
    if instances and len(chosen) > 1:
        msg = (
            f"--devices names {len(chosen)} devices, of which {instances[0].label} is a MIG"
            " instance: an instance is trained on alone, as NCCL does not connect instances"
        )
        raise UsageError(msg)
    return tuple(chosen)


def _find(entry: str, gpus: NvidiaInventory) -> NvidiaDevice:
    if is_uuid(entry):
        device = find_entry(entry, gpus.all_named)
    else:
        place = int(entry)
        device = gpus.devices[place] if place < len(gpus.devices) else None
    if device is not None:
        return device
    there = ", ".join(f"{place}: {one.label}" for place, one in enumerate(gpus.devices))
    msg = f"--devices names {entry!r}, which is none of the visible GPUs ({there})"
    raise UsageError(msg)
