"""How fast the devices of a host exchange data, from what NVML says of their links. Pure."""

from collections.abc import Sequence
from typing import Literal

from autotune.detect.nvidia import NvidiaDevice, Pair
from autotune.hardware import Links

_NVLINK_BYTES_PER_S = {7: 25e9, 8: 25e9, 9: 25e9, 10: 50e9, 12: 50e9}
"""One direction of one link, by the major compute capability: NVLink 2 to 4 have 25 GB/s, 5 has 50
(white papers of V100, A100, H100 and Blackwell)."""

_NVLINK_OF_RTX30_BYTES_PER_S = 14.0625e9
"""One link of the bridge of GeForce RTX 3090 and RTX A-series cards, 112.5 GB/s for four and both
directions (NVIDIA Ampere GA102 white paper)."""

_GA102 = (8, 6)


def read_links(devices: Sequence[NvidiaDevice], pairs: Sequence[Pair]) -> Links:
    """Return how the devices talk, as far as NVML tells.

    Ranks exchange in a ring, so that its slowest hop counts: NVLinks where the devices can be put
    in a ring of them, else PCIe.
    """
    slots = [device.pcie_bytes_per_s for device in devices]
    known_slots = [slot for slot in slots if slot is not None]
    host = min(known_slots) if len(known_slots) == len(slots) else None
    kind, peer = _ring(devices, pairs, host)
    linked = tuple(sorted(pair.places for pair in pairs if pair.by_nvlink))
    return Links(
        kind=kind,
        peer_bytes_per_s=peer,
        host_bytes_per_s=host,
        linked_pairs=() if kind == "nvlink" else linked,
        no_peer_access=tuple(pair.places for pair in pairs if pair.peer_access is False),
    )


def _ring(
    devices: Sequence[NvidiaDevice], pairs: Sequence[Pair], host_bytes_per_s: float | None
) -> tuple[Literal["nvlink", "pcie"] | None, float | None]:
    """Return what the ring of the devices goes over, and what that carries."""
    if len(devices) == 1:
        return None, None
    linked = {frozenset(pair.places) for pair in pairs if pair.by_nvlink}
    if has_ring(len(devices), linked):
        rates = [_nvlink_bytes_per_s(device) for device in devices]
        known = [rate for rate in rates if rate]
        return "nvlink", min(known) if len(known) == len(rates) else None
    if any(pair.by_nvlink is None for pair in pairs) and any(one.nvlinks != 0 for one in devices):
        return None, None
    return "pcie", host_bytes_per_s


def _nvlink_bytes_per_s(device: NvidiaDevice) -> float | None:
    """Return what all NVLinks of a device carry in one direction; None where it is not known."""
    if device.nvlinks is None or device.compute_capability is None:
        return None
    a_link = _NVLINK_BYTES_PER_S.get(device.compute_capability[0])
    if device.compute_capability == _GA102:
        a_link = _NVLINK_OF_RTX30_BYTES_PER_S
    return None if a_link is None else device.nvlinks * a_link


def has_ring(count: int, linked: set[frozenset[int]]) -> bool:
    """Tell whether so many devices can be put in a ring whose neighbours are all linked."""
    if count == 2:  # noqa: PLR2004 - a pair is a ring
        return frozenset({0, 1}) in linked
    near = {
        one: {other for other in range(count) if {one, other} in linked} for one in range(count)
    }

    def closes(path: tuple[int, ...]) -> bool:
        if len(path) == count:
            return path[0] in near[path[-1]]
        return any(closes((*path, after)) for after in sorted(near[path[-1]] - set(path)))

    return all(len(others) >= 2 for others in near.values()) and closes((0,))  # noqa: PLR2004
