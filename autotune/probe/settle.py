"""Tells a sample that has settled from one that is still warming up. Pure."""

import statistics
from collections.abc import Sequence

_LONG_ROUND_S = 1.0
_AGREEMENT = 0.05
_MAX_REPEATS = 16
_MAX_SECONDS = 2.0


def settled(times: Sequence[float]) -> tuple[float, ...] | None:
    """Return the repetitions that count, oldest first, or None if more are needed.

    They are the latest ones, a window whose two halves have medians within 5 % of each other; what
    came before was warm-up. A window is 4 repetitions, 2 where they take a second each: long ones
    are steady, and dear. Where no window agrees within 16 repetitions or two seconds, the machine
    is noisy rather than cold: the later half counts, and its spread tells.
    """
    window = 2 if times and times[-1] >= _LONG_ROUND_S else 4
    if len(times) < window:
        return None
    latest = tuple(times[-window:])
    if _halves_agree(latest):
        return latest
    if len(times) >= _MAX_REPEATS or sum(times) >= _MAX_SECONDS:
        return tuple(times[-max(window, len(times) // 2) :])
    return None


def _halves_agree(times: Sequence[float]) -> bool:
    middle = len(times) // 2
    early, late = statistics.median(times[:middle]), statistics.median(times[middle:])
    return abs(early - late) <= _AGREEMENT * min(early, late)
