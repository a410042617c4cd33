"""What a job runs on."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

DeviceKind = Literal["cpu", "cuda"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """The machine that holds the devices; memory is what this process may use."""

    cpu_name: str
    sockets: int
    physical_cores: int
    usable_cores: int
    memory_bytes: int
    memory_source: str
    available_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """A device that was found, as it is now; None is not known."""

    index: int
    uuid: str | None
    name: str | None
    memory_bytes: int | None
    free_bytes: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Links:
    """How the devices of a host reach each other and the host; one direction, the slowest counts.

    Attributes:
        kind: what a ring of the devices goes over; None is not known.
        linked_pairs: places of devices that NVLinks connect, where there is no ring of them.
        no_peer_access: places of devices that exchange through the host's memory.
    """

    kind: Literal["nvlink", "pcie"] | None
    peer_bytes_per_s: float | None
    host_bytes_per_s: float | None
    linked_pairs: tuple[tuple[int, int], ...] = ()
    no_peer_access: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """Alike devices, one data-parallel rank on each.

    `device_memory_bytes` is what one rank may allocate at most. On a CPU the ranks share the host's
    memory, so it is a share of that. `host` is None where the hardware is only named, not there;
    of several nodes it is one of them.

    Attributes:
        devices_per_node: what each node has, or of unlike nodes the most that stay together when
            ranks are counted off; 0 where all are in one.
        headroom_bytes: of a device's free memory, what is left to others who use it.
        devices: those that were found, in the order of their ranks.
        links: of a host's devices, as far as they tell.
        rank_cpus: logical CPUs near each rank's device, where they are known.
        unusable: why nothing can be run on these devices here, though they can be planned for.
    """

    kind: DeviceKind
    device_name: str
    num_devices: int
    device_memory_bytes: int
    device_memory_source: str
    threads_per_rank: int
    compute_capability: tuple[int, int] | None
    visible_devices: tuple[str, ...]
    host: Host | None
    notes: tuple[str, ...] = ()
    headroom_bytes: int = 0
    devices: tuple[Device, ...] = ()
    links: Links | None = None
    rank_cpus: tuple[tuple[int, ...], ...] = ()
    unusable: str | None = None
    num_nodes: int = 1
    devices_per_node: int = 0

    @property
    def ranks_per_node(self) -> int:
        """How many ranks in a row are always in one node."""
        return self.devices_per_node or self.num_devices

    @property
    def has_separate_memory(self) -> bool:
        """Whether moving a tensor to the host frees memory of the device."""
        return self.kind != "cpu"

    def identity(self) -> dict[str, object]:
        """Return the stable facts that make outcomes comparable, so never memory free just now."""
        return {
            "kind": self.kind,
            "device_name": self.device_name,
            "num_devices": self.num_devices,
            "threads_per_rank": self.threads_per_rank,
        } | ({"num_nodes": self.num_nodes} if self.num_nodes > 1 else {})


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """What one rank of this machine was measured to do.

    `link_bytes_per_s` is what a rank sends when all ranks exchange by a ring, which is as fast as
    the slowest link that it goes through, and `collective_overhead_s` what starting a collective of
    all takes. `node_link_bytes_per_s` and `node_collective_overhead_s` are the same of the ranks of
    one node, None where there is only one. The rates of the host count for an offloaded optimizer:
    between device and host, and of the host's memory, for one rank while all are busy.
    """

    matmul_flops_per_s: float
    memory_bytes_per_s: float
    link_bytes_per_s: float
    host_link_bytes_per_s: float
    host_memory_bytes_per_s: float
    operator_overhead_s: float
    collective_overhead_s: float
    node_link_bytes_per_s: float | None = None
    node_collective_overhead_s: float | None = None

    def of_one_node(self) -> "Rates":
        """Return the rates of ranks that all are in one node."""
        if self.node_link_bytes_per_s is None or self.node_collective_overhead_s is None:
            return self
        return replace(
            self,
            link_bytes_per_s=self.node_link_bytes_per_s,
            collective_overhead_s=self.node_collective_overhead_s,
            node_link_bytes_per_s=None,
            node_collective_overhead_s=None,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """What ranks of this machine were measured to do while all of them were busy; the slowest.

    Attributes:
        matmul_flops_per_s: by precision.
        memory_bytes_per_s: of the device's memory, bytes read and bytes written.
        all_reduce_bytes_per_s: what a rank sends in an all-reduce by a ring; None for one rank.
        host_link_bytes_per_s: from device to host.
        host_memory_bytes_per_s: as `memory_bytes_per_s`, of the host.
        operator_overhead_s: time that a small operator takes.
        collective_overhead_s: time that an all-reduce of next to nothing takes; 0 of one rank.
    """

    ranks: int
    matmul_flops_per_s: tuple[tuple[str, float], ...]
    memory_bytes_per_s: float
    all_reduce_bytes_per_s: float | None
    host_link_bytes_per_s: float
    host_memory_bytes_per_s: float
    operator_overhead_s: float
    collective_overhead_s: float

    @classmethod
    def slowest(cls, ranks: Sequence["Bench"]) -> "Bench":
        """Return what all ranks can do: each waits for the slowest."""
        by_precision = [dict(one.matmul_flops_per_s) for one in ranks]
        common = [name for name in by_precision[0] if all(name in one for one in by_precision)]
        exchanged = [one.all_reduce_bytes_per_s for one in ranks]
        return cls(
            ranks=len(ranks),
            matmul_flops_per_s=tuple(
                (name, min(one[name] for one in by_precision)) for name in common
            ),
            memory_bytes_per_s=min(one.memory_bytes_per_s for one in ranks),
            all_reduce_bytes_per_s=min((rate for rate in exchanged if rate), default=None),
            host_link_bytes_per_s=min(one.host_link_bytes_per_s for one in ranks),
            host_memory_bytes_per_s=min(one.host_memory_bytes_per_s for one in ranks),
            operator_overhead_s=max(one.operator_overhead_s for one in ranks),
            collective_overhead_s=max(one.collective_overhead_s for one in ranks),
        )

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> "Bench":
        """Read what `asdict` and JSON made of it.

        Raises:
            TypeError: a field is missing, unknown or not what it should be.
            ValueError: so too.
        """
        matmul = tuple((str(name), float(rate)) for name, rate in fields["matmul_flops_per_s"])
        return cls(**{**fields, "matmul_flops_per_s": matmul})

    def rates(self, precision: str) -> Rates | None:
        """Return the rates of a rank that computes in this precision; None if it cannot."""
        matmul = dict(self.matmul_flops_per_s).get(precision)
        if matmul is None:
            return None
        return Rates(
            matmul_flops_per_s=matmul,
            memory_bytes_per_s=self.memory_bytes_per_s,
            # One rank talks to nobody, so that any figure does.
            link_bytes_per_s=self.all_reduce_bytes_per_s or self.memory_bytes_per_s / 2,
            host_link_bytes_per_s=self.host_link_bytes_per_s,
            host_memory_bytes_per_s=self.host_memory_bytes_per_s,
            operator_overhead_s=self.operator_overhead_s,
            collective_overhead_s=self.collective_overhead_s,
        )
