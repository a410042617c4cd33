"""What a rank may allocate of a device, and where that figure comes from. Pure.

The budget is what is free, less an explicit headroom for those who use the device too.
"""

from dataclasses import dataclass

from autotune.units import MIB, format_bytes

IDLE_BYTES = 512 * MIB
"""In use up to this, a device is nobody's: a driver's own, a display, a persistence daemon."""

LEAST_HEADROOM_BYTES = 256 * MIB
_HEADROOM_SHARE = 0.1
"""Others whose programs go on take more and give it back; a tenth of what they have is left."""

_BUSY_SHARE = 0.5
"""Of a device with less than half of its memory free nothing is taken unasked."""

_KNOWN_WITHIN = 0.95
_SEEN_OF_TOTAL = 0.98
"""NVML's total has what the driver keeps; where that is not told apart it is taken for 2 %."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """What a rank may allocate.

    Attributes:
        headroom_bytes: what is free and left to others all the same.
    """

    num_bytes: int
    source: str
    headroom_bytes: int = 0
    notes: tuple[str, ...] = ()


def capacity(total_bytes: int, reserved_bytes: int, known_bytes: int | None) -> int:
    """Return what a process can see of a device that nobody else uses.

    Args:
        total_bytes: as NVML tells.
        reserved_bytes: of it, what the driver keeps, 0 where that is not told apart.
        known_bytes: what the table of known GPUs says of a device of this name.
    """
    if known_bytes is not None and _KNOWN_WITHIN * total_bytes <= known_bytes <= total_bytes:
        return known_bytes
    if reserved_bytes:
        return total_bytes - reserved_bytes
    return int(total_bytes * _SEEN_OF_TOTAL)


def used_by_others(capacity_bytes: int, free_bytes: int) -> int:
    """Return what others have of a device; 0 of one that is idle."""
    used = max(0, capacity_bytes - free_bytes)
    return 0 if used <= IDLE_BYTES else used


def headroom(others_bytes: int) -> int:
    """Return what of the free memory is left to those who use a device too."""
    if not others_bytes:
        return 0
    return max(LEAST_HEADROOM_BYTES, int(others_bytes * _HEADROOM_SHARE))


def is_busy(capacity_bytes: int, free_bytes: int) -> bool:
    """Tell whether others have so much of a device that it is not taken unasked."""
    return free_bytes < _BUSY_SHARE * capacity_bytes


def gpu_budget(capacity_bytes: int, free_bytes: int) -> Budget:
    """Return the budget of a device with so much free."""
    others = used_by_others(capacity_bytes, free_bytes)
    if not others:
        return Budget(num_bytes=capacity_bytes, source="all of the GPU, which nobody else uses")
    left = headroom(others)
    return Budget(
        num_bytes=max(0, free_bytes - left),
        headroom_bytes=left,
        source=(
            f"{format_bytes(free_bytes)} free of the GPU less a headroom of {format_bytes(left)}, "
            f"as others use {format_bytes(others)}"
        ),
    )


def capped(there: Budget, asked: int | None, free_bytes: int | None = None) -> Budget:
    """Return what is asked for if there is as much.

    Args:
        there: what a rank may allocate unasked.
        asked: by --device-memory.
        free_bytes: up to which the headroom can be given up.
    """
    if asked is None:
        return there
    if asked <= there.num_bytes:
        return Budget(num_bytes=asked, source="--device-memory")
    if free_bytes is not None and asked <= free_bytes:
        note = f"--device-memory {format_bytes(asked)} takes of the headroom that is left to others"
        return Budget(
            num_bytes=asked,
            source="--device-memory",
            headroom_bytes=free_bytes - asked,
            notes=(note,),
        )
    note = (
        f"--device-memory {format_bytes(asked)} is more than there is, so"
        f" {format_bytes(there.num_bytes)} is kept ({there.source})"
    )
    return Budget(
        num_bytes=there.num_bytes,
        source=there.source,
        headroom_bytes=there.headroom_bytes,
        notes=(note,),
    )
