"""What a node tells of itself, whether nodes are alike, and the cluster that they make. Pure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from autotune.errors import AutotuneError, NoUsableDeviceError, SetupFaultError
from autotune.hardware import Cluster
from autotune.units import format_bytes

_ALIKE_MEMORY_RATIO = 0.9
"""Drivers and firmware take a little more of one machine than of another."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeFacts:
    """What a node found on itself.

    Attributes:
        memory_bytes: of a device, or of the host where ranks share that.
        budget_bytes: what a rank may allocate there.
        versions: of what ranks are made of, by name.
    """

    host: str
    kind: str
    device_name: str
    num_devices: int
    memory_bytes: int
    budget_bytes: int
    threads_per_rank: int
    unusable: str | None
    versions: Mapping[str, str]

    @classmethod
    def of(cls, host: str, cluster: Cluster, versions: Mapping[str, str]) -> "NodeFacts":
        sizes = [device.memory_bytes or 0 for device in cluster.devices]
        if not sizes and cluster.host is not None:
            sizes = [cluster.host.memory_bytes]
        return cls(
            host=host,
            kind=cluster.kind,
            device_name=cluster.device_name,
            num_devices=cluster.num_devices,
            memory_bytes=min(sizes, default=0),
            budget_bytes=cluster.device_memory_bytes,
            threads_per_rank=cluster.threads_per_rank,
            unusable=cluster.unusable,
            versions=versions,
        )

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> "NodeFacts":
        return cls(**fields)


def require_alike(nodes: Sequence[NodeFacts]) -> None:
    """Refuse nodes on which ranks would not do the same, or not as fast.

    Raises:
        NoUsableDeviceError: their devices differ in kind, number or memory.
        SetupFaultError: what is installed differs.
    """
    for node in nodes[1:]:
        if (refusal := _difference(nodes[0], node)) is not None:
            raise refusal


def _difference(one: NodeFacts, other: NodeFacts) -> AutotuneError | None:
    if (one.kind, one.device_name) != (other.kind, other.device_name):
        return _unlike(one, one.device_name, other, other.device_name)
    if one.num_devices != other.num_devices:
        return _unlike(one, _devices(one), other, _devices(other))
    less, more = sorted((one.memory_bytes, other.memory_bytes))
    if less < more * _ALIKE_MEMORY_RATIO:
        of = "a device" if one.kind != "cpu" else "memory"
        told = [f"{format_bytes(node.memory_bytes)} of {of}" for node in (one, other)]
        return _unlike(one, told[0], other, told[1])
    for name in sorted({*one.versions, *other.versions}):
        here, there = (node.versions.get(name, "none") for node in (one, other))
        if here != there:
            msg = (
                f"the nodes differ: {one.host} has {name} {here}, {other.host} {there}, and ranks "
                "of one training need the same: use one environment on all nodes"
            )
            return SetupFaultError(msg)
    return None


def _unlike(one: NodeFacts, here: str, other: NodeFacts, there: str) -> NoUsableDeviceError:
    msg = (
        f"the nodes differ: {one.host} has {here}, {other.host} has {there}, and every rank needs "
        "the same: ask for alike nodes (sbatch --constraint, --nodelist), or for as many devices "
        "on each with --devices"
    )
    return NoUsableDeviceError(msg)


def _devices(node: NodeFacts) -> str:
    return f"{node.num_devices} x {node.device_name}"


def joined(first: Cluster, nodes: Sequence[NodeFacts]) -> Cluster:
    """Return the cluster of alike nodes, of which the first was detected here.

    The least that one of them may use counts for all.
    """
    least = min(nodes, key=lambda node: node.budget_bytes)
    source = first.device_memory_source
    if least.budget_bytes < first.device_memory_bytes:
        source = f"the least of the nodes, on {least.host}"
    unusable = [f"{node.host}: {node.unusable}" for node in nodes if node.unusable]
    return replace(
        first,
        num_devices=first.num_devices * len(nodes),
        num_nodes=len(nodes),
        devices_per_node=first.num_devices,
        device_memory_bytes=least.budget_bytes,
        device_memory_source=source,
        threads_per_rank=min(node.threads_per_rank for node in nodes),
        unusable=unusable[0] if unusable else None,
    )
