"""What a job runs on."""

from dataclasses import dataclass
from typing import Literal

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
class Cluster:
    """Alike devices, one data-parallel rank on each.

    `device_memory_bytes` is what one rank may allocate at most. On a CPU the ranks share the host's
    memory, so it is a share of that. `host` is None where the hardware is only named, not there.
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
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """What one rank of this machine was measured to do.

    `link_bytes_per_s` is what ranks exchange; on a CPU that goes through its memory. The rates of
    the host count for an offloaded optimizer: between device and host, and of the host's memory,
    for one rank while all are busy.
    """

    matmul_flops_per_s: float
    memory_bytes_per_s: float
    link_bytes_per_s: float
    host_link_bytes_per_s: float
    host_memory_bytes_per_s: float
    operator_overhead_s: float
