"""CUDA_VISIBLE_DEVICES, as CUDA reads it. Pure."""

import re
from collections.abc import Sequence
from typing import Protocol, TypeVar

MASK = "CUDA_VISIBLE_DEVICES"

_UUID_PREFIXES = ("GPU-", "MIG-")


class Numbered(Protocol):
    """What a mask can name: by its number in CUDA's order, or by its UUID."""

    @property
    def index(self) -> int: ...
    @property
    def uuid(self) -> str | None: ...


_Device = TypeVar("_Device", bound=Numbered)


def apply_mask(mask: str, devices: Sequence[_Device]) -> tuple[_Device, ...]:
    """Choose devices as CUDA reads CUDA_VISIBLE_DEVICES.

    An entry is a number, a UUID or a prefix of exactly one UUID. The first that is none of these
    ends the list, so "" and "-1" hide everything; a device named twice hides everything too.
    """
    chosen: list[_Device] = []
    for entry in mask.split(","):
        device = find_entry(entry.strip(), devices)
        if device is None:
            break
        if device in chosen:
            return ()
        chosen.append(device)
    return tuple(chosen)


def find_entry(entry: str, devices: Sequence[_Device]) -> _Device | None:
    """Return the device that one entry of a mask names; None if it is not valid."""
    if is_uuid(entry):
        matches = [device for device in devices if (device.uuid or "").startswith(entry)]
        return matches[0] if len(matches) == 1 else None
    # CUDA reads as strtoul does: what follows the digits is passed over.
    if (digits := re.match(r"[0-9]+", entry)) is None:
        return None
    number = digits[0].lstrip("0") or "0"
    return next((device for device in devices if str(device.index) == number), None)


def is_uuid(entry: str) -> bool:
    """Tell whether an entry names a device by UUID, or a prefix of one."""
    return entry.startswith(_UUID_PREFIXES)
