"""The host is read from trees of /proc and /sys, made here as the kernel writes them."""

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from autotune.detect.host import read_host
from autotune.errors import NoUsableDeviceError
from autotune.units import GIB

UNLIMITED_V1 = "9223372036854771712\n"
MEMINFO = "MemTotal: 67108864 kB\nMemFree: 8388608 kB\nMemAvailable: 50331648 kB\n"  # 64, 8, 48 GiB
V2_MOUNT = "31 23 0:28 / /sys/fs/cgroup rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate\n"


def make_root(root: Path, files: Mapping[str, str]) -> Path:
    for name, text in {"proc/meminfo": MEMINFO, **files}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def cpuinfo(*cpus: tuple[int, int, int]) -> str:
    return "\n".join(
        f"processor\t: {cpu}\nmodel name\t: Example  CPU @ 2.00GHz\nphysical id\t: {socket}\n"
        f"core id\t\t: {core}\nflags\t\t: fpu sse2\n"
        for cpu, socket, core in cpus
    )


def topology(*cpus: tuple[int, int, str], siblings: str = "core_cpus_list") -> dict[str, str]:
    folder = "sys/devices/system/cpu/cpu{}/topology/{}"
    return {
        folder.format(cpu, name): f"{value}\n"
        for cpu, socket, core in cpus
        for name, value in (("physical_package_id", socket), (siblings, core))
    }


def test_without_cgroups_the_memory_is_that_of_meminfo(tmp_path: Path) -> None:
    host = read_host(make_root(tmp_path, {}), cpus={0, 1})
    assert (host.memory_bytes, host.memory_source) == (64 * GIB, "/proc/meminfo MemTotal")
    assert host.available_bytes == 48 * GIB


def test_an_ancestor_with_a_lower_limit_binds(tmp_path: Path) -> None:
    root = make_root(
        tmp_path,
        {
            "proc/self/cgroup": "0::/job.slice/step.scope\n",
            "proc/self/mountinfo": V2_MOUNT,
            "sys/fs/cgroup/job.slice/memory.max": f"{8 * GIB}\n",
            "sys/fs/cgroup/job.slice/memory.current": f"{3 * GIB}\n",
            "sys/fs/cgroup/job.slice/memory.stat": f"anon {2 * GIB}\ninactive_file {GIB}\n",
            "sys/fs/cgroup/job.slice/step.scope/memory.max": f"{16 * GIB}\n",
            "sys/fs/cgroup/job.slice/step.scope/memory.current": f"{GIB}\n",
        },
    )
    host = read_host(root, cpus={0})
    assert (host.memory_bytes, host.memory_source) == (8 * GIB, "cgroup /job.slice memory.max")
    assert host.available_bytes == 6 * GIB


def test_the_own_cgroup_binds_where_it_is_lower_than_its_ancestors(tmp_path: Path) -> None:
    root = make_root(
        tmp_path,
        {
            "proc/self/cgroup": "0::/job.slice/step.scope\n",
            "proc/self/mountinfo": V2_MOUNT,
            "sys/fs/cgroup/job.slice/memory.max": f"{8 * GIB}\n",
            "sys/fs/cgroup/job.slice/step.scope/memory.max": f"{2 * GIB}\n",
        },
    )
    host = read_host(root, cpus={0})
    assert host.memory_source == "cgroup /job.slice/step.scope memory.max"
    assert host.available_bytes == 2 * GIB


def test_max_is_no_limit(tmp_path: Path) -> None:
    root = make_root(
        tmp_path,
        {
            "proc/self/cgroup": "0::/a\n",
            "proc/self/mountinfo": V2_MOUNT,
            "sys/fs/cgroup/a/memory.max": "max\n",
            "sys/fs/cgroup/a/memory.current": f"{3 * GIB}\n",
            "sys/fs/cgroup/a/cpu.max": "max 100000\n",
        },
    )
    host = read_host(root, cpus={0, 1, 2})
    assert (host.memory_bytes, host.available_bytes) == (64 * GIB, 48 * GIB)
    assert host.usable_cores == 3


def test_in_a_cgroup_namespace_the_limit_stands_at_the_mount_point(tmp_path: Path) -> None:
    root = make_root(
        tmp_path,
        {
            "proc/self/cgroup": "0::/\n",
            "proc/self/mountinfo": V2_MOUNT,
            "sys/fs/cgroup/memory.max": f"{4 * GIB}\n",
            "sys/fs/cgroup/memory.current": f"{5 * GIB}\n",
        },
    )
    host = read_host(root, cpus={0})
    assert (host.memory_bytes, host.memory_source) == (4 * GIB, "cgroup / memory.max")
    assert host.available_bytes == 0


def test_a_cgroup_outside_of_the_namespace_is_read_at_the_mount_point(tmp_path: Path) -> None:
    root = make_root(
        tmp_path,
        {
            "proc/self/cgroup": "0::/../other\n",
            "proc/self/mountinfo": V2_MOUNT,
            "sys/fs/cgroup/memory.max": f"{4 * GIB}\n",
            "sys/fs/other/memory.max": f"{GIB}\n",
        },
    )
    assert read_host(root, cpus={0}).memory_bytes == 4 * GIB


def test_a_mount_that_shows_a_part_of_the_tree_is_followed_from_there(tmp_path: Path) -> None:
    root = make_root(
        tmp_path,
        {
            "proc/self/cgroup": "4:memory:/docker/abc/inner\n",
            "proc/self/mountinfo": (
                "35 31 0:32 /docker/abc /run/my\\040groups rw - cgroup cgroup rw,memory\n"
            ),
            "run/my groups/memory.limit_in_bytes": f"{6 * GIB}\n",
            "run/my groups/inner/memory.limit_in_bytes": UNLIMITED_V1,
        },
    )
    host = read_host(root, cpus={0})
    assert host.memory_source == "cgroup /docker/abc memory.limit_in_bytes"
    assert host.memory_bytes == 6 * GIB


def test_unlimited_of_version_1_does_not_bind(tmp_path: Path) -> None:
    root = make_root(
        tmp_path,
        {
            "proc/self/cgroup": "4:memory:/a\n1:cpu,cpuacct:/a\n",
            "sys/fs/cgroup/memory/a/memory.limit_in_bytes": UNLIMITED_V1,
            "sys/fs/cgroup/memory/a/memory.usage_in_bytes": f"{GIB}\n",
            "sys/fs/cgroup/cpu/a/cpu.cfs_quota_us": "-1\n",
            "sys/fs/cgroup/cpu/a/cpu.cfs_period_us": "100000\n",
        },
    )
    host = read_host(root, cpus={0, 1})
    assert (host.memory_source, host.available_bytes) == ("/proc/meminfo MemTotal", 48 * GIB)
    assert host.usable_cores == 2


def test_a_hybrid_host_limits_through_version_1(tmp_path: Path) -> None:
    root = make_root(
        tmp_path,
        {
            "proc/self/cgroup": "4:memory:/box\n1:cpu,cpuacct:/box\n0::/box\n",
            "proc/self/mountinfo": (
                "32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n"
                "35 31 0:32 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"
                "41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n"
            ),
            "sys/fs/cgroup/unified/box/cgroup.procs": "",
            "sys/fs/cgroup/memory/box/memory.limit_in_bytes": f"{10 * GIB}\n",
            "sys/fs/cgroup/memory/box/memory.usage_in_bytes": f"{4 * GIB}\n",
            "sys/fs/cgroup/memory/box/memory.stat": (
                f"inactive_file 4096\ntotal_inactive_file {2 * GIB}\n"
            ),
            "sys/fs/cgroup/cpu,cpuacct/box/cpu.cfs_quota_us": "250000\n",
            "sys/fs/cgroup/cpu,cpuacct/box/cpu.cfs_period_us": "100000\n",
        },
    )
    host = read_host(root, cpus=range(8))
    assert host.memory_source == "cgroup /box memory.limit_in_bytes"
    assert (host.memory_bytes, host.available_bytes) == (10 * GIB, 8 * GIB)
    assert host.usable_cores == 2


@pytest.mark.parametrize(
    ("quota", "cores"), [("350000 100000", 3), ("50000 100000", 1), ("900000 100000", 4)]
)
def test_a_quota_counts_in_whole_cores_and_at_least_one(
    tmp_path: Path, quota: str, cores: int
) -> None:
    root = make_root(
        tmp_path,
        {
            "proc/self/cgroup": "0::/a/b\n",
            "proc/self/mountinfo": V2_MOUNT,
            "sys/fs/cgroup/a/cpu.max": f"{quota}\n",
            "sys/fs/cgroup/a/b/cpu.max": "max 100000\n",
        },
    )
    assert read_host(root, cpus=range(4)).usable_cores == cores


def test_without_memavailable_the_free_memory_counts(tmp_path: Path) -> None:
    root = make_root(tmp_path, {"proc/meminfo": "MemTotal: 4194304 kB\nMemFree: 1048576 kB\n"})
    assert read_host(root, cpus={0}).available_bytes == GIB


def test_without_meminfo_the_host_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(NoUsableDeviceError, match=r"proc/meminfo tells no MemTotal.*/proc mounted"):
        read_host(tmp_path, cpus={0})


def test_threads_of_one_core_count_once_in_the_topology(tmp_path: Path) -> None:
    cpus = [(0, 0, "0,4"), (4, 0, "0,4"), (1, 0, "1,5"), (5, 0, "1,5"), (2, 1, "2"), (3, 1, "3")]
    host = read_host(make_root(tmp_path, topology(*cpus)), cpus=range(6))
    assert (host.sockets, host.physical_cores, host.usable_cores) == (2, 4, 6)


def test_sockets_and_cores_that_the_affinity_excludes_do_not_count(tmp_path: Path) -> None:
    cpus = [(0, 0, "0,4"), (4, 0, "0,4"), (1, 0, "1,5"), (5, 0, "1,5"), (2, 1, "2"), (3, 1, "3")]
    host = read_host(make_root(tmp_path, topology(*cpus)), cpus={0, 4})
    assert (host.sockets, host.physical_cores, host.usable_cores) == (1, 1, 2)


def test_older_kernels_name_the_siblings_otherwise(tmp_path: Path) -> None:
    cpus = [(0, 0, "0-1"), (1, 0, "0-1"), (2, 0, "2-3"), (3, 0, "2-3")]
    root = make_root(tmp_path, topology(*cpus, siblings="thread_siblings_list"))
    assert read_host(root, cpus=range(4)).physical_cores == 2


def test_without_a_topology_cpuinfo_tells_sockets_and_cores(tmp_path: Path) -> None:
    text = cpuinfo((0, 0, 0), (1, 0, 0), (2, 0, 1), (3, 0, 1), (4, 1, 0), (5, 1, 0))
    host = read_host(make_root(tmp_path, {"proc/cpuinfo": text}), cpus=range(6))
    assert (host.sockets, host.physical_cores) == (2, 3)
    assert host.cpu_name == "Example CPU @ 2.00GHz"


def test_an_arm_server_that_tells_no_more_than_its_cpus_still_counts_them(tmp_path: Path) -> None:
    text = "processor\t: 0\nCPU part\t: 0xd0c\n\nprocessor\t: 1\nCPU part\t: 0xd0c\n\n"
    host = read_host(make_root(tmp_path, {"proc/cpuinfo": text}), cpus={0, 1})
    assert (host.sockets, host.physical_cores, host.usable_cores) == (1, 2, 2)
    assert host.cpu_name.endswith(" CPU")


def test_a_board_with_a_name_of_its_own_is_called_by_it(tmp_path: Path) -> None:
    text = "processor\t: 0\nBogoMIPS\t: 108.00\n\nHardware\t: BCM2835\nModel\t\t: Example Pi 4\n"
    assert read_host(make_root(tmp_path, {"proc/cpuinfo": text}), {0}).cpu_name == "Example Pi 4"


def test_this_machine_can_be_read() -> None:
    host = read_host()
    assert 0 < host.available_bytes <= host.memory_bytes
    assert 1 <= host.usable_cores <= len(os.sched_getaffinity(0))
    assert 1 <= host.sockets <= host.physical_cores


def test_a_process_bound_to_one_cpu_has_one_usable_core() -> None:
    code = (
        "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))});"
        "from autotune.detect.host import read_host; print(read_host().usable_cores)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout == "1\n"
