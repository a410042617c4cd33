"""Sizes, durations and counts as people write and read them."""

import math
import re

KIB = 1024
MIB = 1024 * KIB
GIB = 1024 * MIB

_SIZE_UNITS = {
    "": 1,
    "b": 1,
    "k": KIB,
    "m": MIB,
    "g": GIB,
    "t": 1024 * GIB,
    "kib": KIB,
    "mib": MIB,
    "gib": GIB,
    "tib": 1024 * GIB,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
}
_DURATION_UNITS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}
_NUMBER_AND_UNIT = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", re.IGNORECASE)


def _parse(text: str, units: dict[str, int], what: str, example: str) -> float:
    match = _NUMBER_AND_UNIT.fullmatch(text)
    factor = units.get(match[2].lower()) if match else None
    amount = float(match[1]) * factor if match and factor else math.inf
    if math.isinf(amount):
        msg = f"{text!r} is not a {what} (expected for instance {example})"
        raise ValueError(msg)
    return amount


def parse_bytes(text: str) -> int:
    """Read `2GiB`, `512M` or `8000000000`; KB, MB and GB are decimal, K, M and G binary.

    Raises:
        ValueError: the text is no positive size.
    """
    size = int(_parse(text, _SIZE_UNITS, "memory size", "2GiB"))
    if size <= 0:
        msg = f"{text!r} is not a memory size above zero"
        raise ValueError(msg)
    return size


def parse_duration(text: str) -> float:
    """Read `90`, `90s`, `20m` or `1.5h` as seconds.

    Raises:
        ValueError: the text is no positive duration.
    """
    seconds = _parse(text, _DURATION_UNITS, "duration", "20m")
    if seconds <= 0:
        msg = f"{text!r} is not a duration above zero"
        raise ValueError(msg)
    return seconds


def format_bytes(num_bytes: float) -> str:
    """Write a size with three significant places: `1.50 GiB`."""
    size = float(num_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < KIB:
            return f"{size:.0f} B" if unit == "B" else f"{size:.{_places(size)}f} {unit}"
        size /= KIB
    return f"{size:.{_places(size)}f} TiB"


def _places(value: float) -> int:
    return 2 if abs(value) < 10 else 1 if abs(value) < 100 else 0  # noqa: PLR2004 - powers of ten


def format_duration(seconds: float) -> str:
    """Write a duration: `0.42 s`, `48 s`, `3 min 05 s`, `2 h 10 min`."""
    if seconds < 10:  # noqa: PLR2004 - below ten seconds the places matter
        return f"{seconds:.2f} s"
    whole = round(seconds)
    if whole < 60:  # noqa: PLR2004 - seconds a minute
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:  # noqa: PLR2004 - minutes an hour
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min"


def format_count(count: float) -> str:
    """Write a count of parameters or tokens: `3.1 M`, `6.24 B`."""
    for limit, unit in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if abs(count) >= limit:
            value = count / limit
            return f"{value:.{_places(value)}f} {unit}"
    return f"{count:.0f}"
