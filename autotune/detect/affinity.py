"""Which CPUs a rank runs on: those near its device, as NVML knows them. Pure."""

from collections.abc import Collection, Sequence

from autotune.detect.nvidia import NvidiaDevice
from autotune.hardware import Host


def near_cpus(
    devices: Sequence[NvidiaDevice], allowed: Collection[int]
) -> tuple[tuple[int, ...], ...]:
    """Return for each device's rank the allowed CPUs near it; empty if nothing is to be gained.

    Ranks whose devices are near the same CPUs share all of them: two logical CPUs may be one core,
    and which are the scheduler knows. Memory that a rank touches first lies near its CPUs too, so
    that what is offloaded crosses no socket.
    """
    near = [
        tuple(cpu for cpu in device.cpus if cpu in allowed) if device.cpus else ()
        for device in devices
    ]
    everywhere = all(len(cpus) == len(allowed) for cpus in near)
    return () if everywhere or not all(near) else tuple(near)


def threads_near(rank_cpus: Sequence[tuple[int, ...]], host: Host, ranks: int) -> int:
    """Return the threads of a rank: a physical core each, of those that it shares with others.

    CPU Adam of an offloaded optimizer runs on them. Two threads on one physical core slow each
    other down.
    """
    cores = min(host.usable_cores, host.physical_cores)
    if not rank_cpus:
        return max(1, cores // ranks)
    a_cpu = cores / max(1, host.usable_cores)
    shares = (len(cpus) * a_cpu / rank_cpus.count(cpus) for cpus in rank_cpus)
    return max(1, min(cores // ranks, int(min(shares))))
