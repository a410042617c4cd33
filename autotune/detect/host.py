"""The host: its processor, and the memory and cores that this process may use under its cgroups."""

import os
import platform
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from autotune.errors import NoUsableDeviceError
from autotune.hardware import Host
from autotune.units import KIB


@dataclass(frozen=True, slots=True, kw_only=True)
class _Hierarchy:
    """A tree of cgroups: in version 2 there is one, for the controller "" so to speak."""

    controller: str
    filesystem: str
    usual_mount: PurePosixPath


_UNIFIED = _Hierarchy(
    controller="", filesystem="cgroup2", usual_mount=PurePosixPath("/sys/fs/cgroup")
)
_MEMORY_V1 = _Hierarchy(
    controller="memory", filesystem="cgroup", usual_mount=PurePosixPath("/sys/fs/cgroup/memory")
)
_CPU_V1 = _Hierarchy(
    controller="cpu", filesystem="cgroup", usual_mount=PurePosixPath("/sys/fs/cgroup/cpu")
)

# Limit, use, and the entry of memory.stat that counts the page cache the kernel gives up first.
_MEMORY_FILES = (
    (_UNIFIED, "memory.max", "memory.current", "inactive_file"),
    (_MEMORY_V1, "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)
# Together they read "quota period", both in microseconds.
_CPU_FILES = (
    (_UNIFIED, ("cpu.max",)),
    (_CPU_V1, ("cpu.cfs_quota_us", "cpu.cfs_period_us")),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Mount:
    filesystem: str
    options: tuple[str, ...]
    shown: PurePosixPath  # the cgroup that appears at the mount point
    point: PurePosixPath


@dataclass(frozen=True, slots=True, kw_only=True)
class _MemoryBound:
    limit_bytes: int
    free_bytes: int
    source: str


def read_host(root: Path = Path("/"), cpus: Collection[int] | None = None) -> Host:
    """Describe the host; sockets, cores and bytes are those that this process may use.

    Args:
        root: where /proc and /sys are found.
        cpus: numbers of the logical CPUs that may be used; by default this process's affinity.

    Raises:
        NoUsableDeviceError: the size of the memory cannot be read.
    """
    allowed = os.sched_getaffinity(0) if cpus is None else cpus
    processors = _read_processors(root)
    bounds = [_host_memory(root), *_cgroup_memory(root)]
    tightest = min(bounds, key=lambda bound: bound.limit_bytes)
    return Host(
        cpu_name=_cpu_name(processors),
        sockets=_count_sockets(root, allowed, processors),
        physical_cores=_count_cores(root, allowed, processors),
        usable_cores=max(1, min([len(allowed), *_cpu_quotas(root)])),
        memory_bytes=tightest.limit_bytes,
        memory_source=tightest.source,
        available_bytes=min(bound.free_bytes for bound in bounds),
    )


def kernel_memory_kills(root: Path = Path("/")) -> int:
    """Count the processes that the kernel has killed for memory in this process's own cgroup."""
    own_v2, _ = next(_cgroup_levels(root, _UNIFIED))
    own_v1, _ = next(_cgroup_levels(root, _MEMORY_V1))
    events = _read_figures(own_v2 / "memory.events") | _read_figures(own_v1 / "memory.oom_control")
    return events.get("oom_kill", 0)


def _host_memory(root: Path) -> _MemoryBound:
    figures = _read_figures(root / "proc/meminfo")
    if "MemTotal" not in figures:
        msg = (
            f"{root / 'proc/meminfo'} tells no MemTotal, and without the size of the memory nothing"
            " can be planned: run on Linux with /proc mounted"
        )
        raise NoUsableDeviceError(msg)
    total = figures["MemTotal"]
    # Kernels before 3.14 and some sandboxes lack MemAvailable; MemFree is then the safe side.
    available = figures.get("MemAvailable", figures.get("MemFree", total))
    return _MemoryBound(
        limit_bytes=total * KIB, free_bytes=available * KIB, source="/proc/meminfo MemTotal"
    )


def _cgroup_memory(root: Path) -> Iterator[_MemoryBound]:
    # Version 1 writes "unlimited" as a number near 2**63: it never binds, as MemTotal is less.
    for hierarchy, limit_file, use_file, cache in _MEMORY_FILES:
        for directory, name in _cgroup_levels(root, hierarchy):
            limit = _read_number(directory / limit_file)
            if limit is None:
                continue
            stat = _read_figures(directory / "memory.stat")
            used = max(0, (_read_number(directory / use_file) or 0) - stat.get(cache, 0))
            yield _MemoryBound(
                limit_bytes=limit,
                free_bytes=max(0, limit - used),
                source=f"cgroup {name} {limit_file}",
            )


def _cpu_quotas(root: Path) -> Iterator[int]:
    """Yield the whole cores that each level's quota comes to."""
    for hierarchy, files in _CPU_FILES:
        for directory, _ in _cgroup_levels(root, hierarchy):
            text = " ".join(_read_text(directory / file) for file in files)
            # "max" and -1 stand for no quota.
            if match := re.fullmatch(r"(\d+)\s+([1-9]\d*)\s*", text):
                yield int(match[1]) // int(match[2])


def _cgroup_levels(root: Path, hierarchy: _Hierarchy) -> Iterator[tuple[Path, PurePosixPath]]:
    """Yield directory and name of this process's cgroup, then of each ancestor that can be seen."""
    own = _own_cgroup(root, hierarchy.controller)
    mounts = _cgroup_mounts(root, hierarchy)
    holding = [mount for mount in mounts if own.is_relative_to(mount.shown)]
    # ".." is how a cgroup outside of the namespace is written, and such a one is not in the mount;
    # in both cases the mount point is the nearest that can be seen.
    if holding and ".." not in own.parts:
        mount, below = holding[0], own.relative_to(holding[0].shown)
    else:
        mount, below = mounts[0], PurePosixPath()
    point = root / mount.point.relative_to("/")
    for level in (below, *below.parents):
        yield point / level, mount.shown / level


def _own_cgroup(root: Path, controller: str) -> PurePosixPath:
    for line in _read_text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controller in controllers.split(","):
            return PurePosixPath(path)
    return PurePosixPath("/")


def _cgroup_mounts(root: Path, hierarchy: _Hierarchy) -> list[_Mount]:
    found = [
        mount
        for mount in map(_parse_mount, _read_text(root / "proc/self/mountinfo").splitlines())
        if mount.filesystem == hierarchy.filesystem
        and (not hierarchy.controller or hierarchy.controller in mount.options)
    ]
    usual = _Mount(
        filesystem=hierarchy.filesystem,
        options=(),
        shown=PurePosixPath("/"),
        point=hierarchy.usual_mount,
    )
    return found or [usual]


def _parse_mount(line: str) -> _Mount:
    """Read a line of mountinfo; the fields are those of proc_pid_mountinfo(5)."""
    place, _, kind = line.partition(" - ")
    _, _, _, shown, point, *_ = place.split(" ")
    filesystem, *_, options = kind.split(" ")
    return _Mount(
        filesystem=filesystem,
        options=tuple(options.split(",")),
        shown=PurePosixPath(_unescape(shown)),
        point=PurePosixPath(_unescape(point)),
    )


def _unescape(field: str) -> str:
    """Undo the octal escapes by which the kernel writes blanks and backslashes."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), field)


def _read_processors(root: Path) -> list[dict[str, str]]:
    """Read /proc/cpuinfo: a table for each logical CPU, on some machines one for the board too."""
    blocks = _read_text(root / "proc/cpuinfo").strip().split("\n\n")
    return [
        {
            key.strip(): value.strip()
            for key, _, value in (line.partition(":") for line in block.splitlines())
        }
        for block in blocks
    ]


def _cpu_name(processors: list[dict[str, str]]) -> str:
    # x86 says "model name", POWER "cpu", some ARM boards "Model"; ARM servers give no name at all.
    for key in ("model name", "cpu", "Model"):
        for processor in processors:
            if name := processor.get(key):
                return " ".join(name.split())
    return f"{platform.machine()} CPU"


def _count_sockets(root: Path, cpus: Collection[int], processors: list[dict[str, str]]) -> int:
    told = {p["physical id"] for p in _among(processors, cpus) if "physical id" in p}
    return _count_distinct(root, cpus, "physical_package_id") or len(told) or 1


def _count_cores(root: Path, cpus: Collection[int], processors: list[dict[str, str]]) -> int:
    told = {
        (p.get("physical id"), p["core id"]) for p in _among(processors, cpus) if "core id" in p
    }
    return (
        _count_distinct(root, cpus, "core_cpus_list")
        or _count_distinct(root, cpus, "thread_siblings_list")  # its name before Linux 5.3
        or len(told)
        or len(cpus)
    )


def _among(processors: list[dict[str, str]], cpus: Collection[int]) -> list[dict[str, str]]:
    numbers = {str(cpu) for cpu in cpus}
    return [processor for processor in processors if processor.get("processor") in numbers]


def _count_distinct(root: Path, cpus: Collection[int], topology_file: str) -> int:
    """Count the values of a topology file over the CPUs; 0 if one of them lacks it."""
    topology = root / "sys/devices/system/cpu"
    values = {_read_text(topology / f"cpu{cpu}/topology/{topology_file}").strip() for cpu in cpus}
    return 0 if "" in values else len(values)


def _read_figures(path: Path) -> dict[str, int]:
    """Read lines of a name and a number, as in meminfo (KiB) and memory.stat (bytes)."""
    found = re.finditer(r"^(\w+):?\s+(\d+)", _read_text(path), re.MULTILINE)
    return {match[1]: int(match[2]) for match in found}


def _read_number(path: Path) -> int | None:
    text = _read_text(path).strip()
    return int(text) if re.fullmatch(r"\d+", text) else None


def _read_text(path: Path) -> str:
    """Read a file of the kernel; one that is missing or closed to us tells nothing: empty."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
