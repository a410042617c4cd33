"""Examines a machine: versions, devices, DeepSpeed's ops, limits of the system, room on disks."""

import importlib.util
import os
import platform
import resource
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any, Literal

from autotune import __version__, processes
from autotune.config import Options
from autotune.detect import detect, read_gpus
from autotune.detect.nvml import is_wsl
from autotune.detect.torch_build import read_torch_build
from autotune.environment import cache_dir, rank_environment
from autotune.errors import (
    AutotuneError,
    CannotWriteError,
    NoUsableDeviceError,
    SetupFaultError,
)
from autotune.hardware import Cluster
from autotune.units import GIB, MIB, format_bytes

SCHEMA = 1

Status = Literal["ok", "warning", "failed", "skipped"]

_VERSIONS, _DEVICES, _OPS, _LIMITS, _DISKS = "versions", "devices", "ops", "limits", "disks"

_LEAST_SHARED_BYTES = GIB
"""NCCL keeps segments of some MiB a pair of ranks in /dev/shm, and data loaders their batches;
containers have 64 MiB unless told otherwise, and a rank that runs out is killed by SIGBUS."""

_LEAST_OPEN_FILES = 4096
_LEAST_PROCESSES = 4096
_LEAST_CACHE_BYTES = 2 * GIB
_LEAST_RUN_BYTES = 5 * GIB

_USE_ANOTHER = (
    "set AUTOTUNE_CACHE, TORCH_EXTENSIONS_DIR, TMPDIR or --run-dir to a disk with more room"
)
_OPTIONAL = ("bitsandbytes", "flash-attn", "scipy")


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One finding.

    Attributes:
        found: what is there.
        advice: what to do about it; empty where nothing is to be done.
        exit_code: what a run would end with, of a check that failed.
    """

    group: str
    name: str
    status: Status
    found: str
    advice: str = ""
    exit_code: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Examination:
    """All findings, and the facts that a bug report needs."""

    checks: tuple[Check, ...]
    facts: Mapping[str, str]

    @property
    def exit_code(self) -> int:
        """Return the exit code of the first check that failed; 0 if none did."""
        return next((check.exit_code for check in self.checks if check.status == "failed"), 0)

    def report(self) -> list[str]:
        """Return the lines of a bug report: facts, and what is not well."""
        facts = [f"{name}: {value}" for name, value in self.facts.items()]
        unwell = [
            f"{check.status}: {check.name}: {check.found}"
            for check in self.checks
            if check.status in {"warning", "failed"}
        ]
        return [*facts, *unwell]

    def to_json(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "exit_code": self.exit_code,
            "checks": [asdict(check) for check in self.checks],
            "facts": dict(self.facts),
            "report": self.report(),
        }


def examine(options: Options, scratch: Path, *, build: bool) -> Examination:
    """Examine the machine for a run with these options.

    Args:
        options: devices and the run directory count.
        scratch: for logs of what is tried.
        build: whether DeepSpeed's ops are built, or loaded where they are built already.
    """
    cluster, devices = _devices(options)
    checks = (
        *_versions(),
        *devices,
        *_ops(cluster, scratch, build=build),
        *_limits(cluster),
        *_disks(options),
    )
    return Examination(checks=checks, facts=_facts(cluster))


def _versions() -> Iterator[Check]:
    python = platform.python_version()
    yield Check(group=_VERSIONS, name="python", status="ok", found=f"{python} ({sys.executable})")
    for name, wanted in _requirements():
        try:
            there = version(name)
        except PackageNotFoundError:
            yield Check(
                group=_VERSIONS,
                name=name,
                status="failed",
                found="not installed",
                advice=f"pip install '{name}{wanted}'",
                exit_code=SetupFaultError.exit_code,
            )
            continue
        inside = is_within(there, wanted)
        yield Check(
            group=_VERSIONS,
            name=name,
            status="ok" if inside else "warning",
            found=there,
            advice="" if inside else f"{wanted} is supported: pip install '{name}{wanted}'",
        )
    for name in _OPTIONAL:
        installed = _version_of(name)
        yield Check(
            group=_VERSIONS,
            name=name,
            status="ok" if installed else "skipped",
            found=installed or "not installed, and not needed by default",
        )


def _requirements() -> list[tuple[str, str]]:
    """Return the packages that a run needs with the versions that are supported, as installed."""
    from packaging.requirements import Requirement

    listed = [Requirement(text) for text in requires("autotune-launcher") or ()]
    return [(one.name, str(one.specifier)) for one in listed if one.marker is None]


def is_within(there: str, wanted: str) -> bool:
    """Tell whether a version is in a range, local labels such as +cu130 aside."""
    from packaging.specifiers import SpecifierSet

    return SpecifierSet(wanted).contains(there.partition("+")[0], prereleases=True)


def _version_of(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _devices(options: Options) -> tuple[Cluster | None, list[Check]]:
    """Return the devices of a run, if there are any, and what is found of them."""
    build = read_torch_build()
    gpus = read_gpus(build)
    checks = [_driver(gpus.driver, gpus.cuda_driver, build.cuda_version, gpus.absence)]
    for gpu in gpus.devices:
        memory = (
            "its memory is not told"
            if gpu.memory_free_bytes is None or gpu.memory_total_bytes is None
            else f"{format_bytes(gpu.memory_free_bytes)} of {format_bytes(gpu.memory_total_bytes)}"
            " free"
        )
        found = f"{gpu.name or 'of unknown name'}, {memory}"
        checks.append(Check(group=_DEVICES, name=gpu.label, status="ok", found=found))
    try:
        cluster = detect(options["devices"], options["device_memory"])
    except AutotuneError as error:
        checks.append(
            Check(
                group=_DEVICES,
                name="devices of a run",
                status="failed",
                found=str(error),
                exit_code=error.exit_code,
            )
        )
        return None, checks
    checks.append(_chosen(cluster))
    checks += [
        Check(group=_DEVICES, name="note", status="warning", found=note) for note in cluster.notes
    ]
    return cluster, checks


def _driver(
    driver: str | None, cuda_driver: str | None, cuda_torch: str | None, absence: str | None
) -> Check:
    on_wsl = " (WSL, whose driver tells less than others)" if is_wsl() else ""
    if driver is None:
        return Check(
            group=_DEVICES,
            name="NVIDIA driver",
            status="skipped" if cuda_torch is None else "warning",
            found=(absence or "not told by NVML") + on_wsl,
        )
    too_old = (
        cuda_torch is not None
        and cuda_driver is not None
        and _numbers(cuda_driver)[0] < _numbers(cuda_torch)[0]
    )
    return Check(
        group=_DEVICES,
        name="NVIDIA driver",
        status="failed" if too_old else "ok",
        found=f"{driver}, for CUDA up to {cuda_driver or 'an unknown version'}, torch is built"
        f" {f'for {cuda_torch}' if cuda_torch else 'without CUDA'}{on_wsl}",
        advice="install a newer driver, or a torch for an older CUDA" if too_old else "",
        exit_code=SetupFaultError.exit_code if too_old else 0,
    )


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".") if part.isdecimal())


def _chosen(cluster: Cluster) -> Check:
    if cluster.unusable is not None:
        return Check(
            group=_DEVICES,
            name="devices of a run",
            status="failed",
            found=cluster.unusable,
            exit_code=NoUsableDeviceError.exit_code,
        )
    headroom = cluster.headroom_bytes
    kept = f", headroom {format_bytes(headroom)}" if headroom else ""
    return Check(
        group=_DEVICES,
        name="devices of a run",
        status="ok",
        found=f"{cluster.num_devices} x {cluster.device_name} ({cluster.kind}), "
        f"{format_bytes(cluster.device_memory_bytes)} each ({cluster.device_memory_source}{kept})",
    )


def _ops(cluster: Cluster | None, scratch: Path, *, build: bool) -> Iterator[Check]:
    compiler = shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++")
    yield Check(
        group=_OPS,
        name="C++ compiler",
        status="ok" if compiler else "failed",
        found=compiler or "none: DeepSpeed builds its ops with one",
        advice="" if compiler else "install g++ (apt-get install g++), or name one with CXX",
        exit_code=0 if compiler else SetupFaultError.exit_code,
    )
    if cluster is None or cluster.unusable or not build or not compiler:
        why = "not asked for" if not build else "there is nothing to build them for, or with"
        yield Check(group=_OPS, name="DeepSpeed's ops", status="skipped", found=why)
        return
    on_gpu = cluster.has_separate_memory
    if on_gpu:
        yield _nvcc()
    processes.start_server(rank_environment(cluster.kind, cluster.visible_devices))
    for op, what in _OPS_OF[cluster.kind].items():
        yield _built(op, what, scratch / f"{op}.log", needed=not on_gpu)


_OPS_OF: Mapping[str, Mapping[str, str]] = {
    "cpu": {"ShareMemCommBuilder": "collectives of ranks on a CPU"},
    "cuda": {"CPUAdamBuilder": "the update of an offloaded optimizer"},
}
"""What a run of each kind of device may build, and what it is for."""


def _nvcc() -> Check:
    nvcc = shutil.which("nvcc")
    return Check(
        group=_OPS,
        name="nvcc",
        status="ok" if nvcc else "warning",
        found=nvcc or "none",
        advice=""
        if nvcc
        else "only offload needs CUDA's toolkit: AdamW on the GPU is torch's own, and on the host"
        " torch's slower one is taken",
    )


def _built(op: str, what: str, log: Path, *, needed: bool) -> Check:
    from autotune.profile.child import build_ops

    try:
        build_ops([op], log)
    except SetupFaultError as error:
        return Check(
            group=_OPS,
            name=op,
            status="failed" if needed else "warning",
            found=str(error),
            advice=f"it is for {what}" + ("" if needed else "; torch's is taken in its place"),
            exit_code=SetupFaultError.exit_code if needed else 0,
        )
    return Check(group=_OPS, name=op, status="ok", found=f"builds and loads, for {what}")


def _limits(cluster: Cluster | None) -> Iterator[Check]:
    yield _shared_memory(Path("/dev/shm"))  # noqa: S108 - where NCCL puts its segments
    if cluster is None or cluster.has_separate_memory:
        yield _locked_memory(resource.getrlimit(resource.RLIMIT_MEMLOCK)[0])
    for name, number, least in (
        ("open files", resource.RLIMIT_NOFILE, _LEAST_OPEN_FILES),
        ("processes", resource.RLIMIT_NPROC, _LEAST_PROCESSES),
    ):
        yield _soft_limit(name, resource.getrlimit(number), least)
    if cluster is not None and cluster.host is not None:
        host = cluster.host
        yield Check(
            group=_LIMITS,
            name="host memory",
            status="ok",
            found=f"{format_bytes(host.available_bytes)} available of "
            f"{format_bytes(host.memory_bytes)} ({host.memory_source}), {host.usable_cores} cores",
        )


def _shared_memory(path: Path) -> Check:
    if not path.is_dir():
        return Check(
            group=_LIMITS,
            name=str(path),
            status="warning",
            found="is not there",
            advice="several ranks exchange data through it: mount a tmpfs there",
        )
    free = shutil.disk_usage(path).free
    enough = free >= _LEAST_SHARED_BYTES
    return Check(
        group=_LIMITS,
        name=str(path),
        status="ok" if enough else "warning",
        found=f"{format_bytes(free)} free",
        advice=""
        if enough
        else "several ranks may be killed by SIGBUS: docker run --shm-size 8g, or --ipc=host",
    )


def _locked_memory(limit: int) -> Check:
    enough = limit == resource.RLIM_INFINITY
    return Check(
        group=_LIMITS,
        name="locked memory",
        status="ok" if enough else "warning",
        found=_limit_text(limit, format_bytes),
        advice=""
        if enough
        else "InfiniBand and pinned host memory may need more: ulimit -l unlimited, or docker run"
        " --ulimit memlock=-1",
    )


def _soft_limit(name: str, limits: tuple[int, int], least: int) -> Check:
    soft, hard = limits
    enough = soft == resource.RLIM_INFINITY or soft >= least
    return Check(
        group=_LIMITS,
        name=name,
        status="ok" if enough else "warning",
        found=f"{_limit_text(soft, str)} at most, {_limit_text(hard, str)} if asked for",
        advice="" if enough else f"many ranks may need {least} or more: see ulimit -a",
    )


def _limit_text(limit: int, write: Callable[[int], str]) -> str:
    return "unlimited" if limit == resource.RLIM_INFINITY else write(limit)


def _disks(options: Options) -> Iterator[Check]:
    ops = os.environ.get("TORCH_EXTENSIONS_DIR")
    places: Sequence[tuple[str, Path, int]] = (
        ("run directory", Path(options["run_dir"] or "runs"), _LEAST_RUN_BYTES),
        ("cache", cache_dir(), _LEAST_CACHE_BYTES),
        *((("built ops", Path(ops), 256 * MIB),) if ops else ()),
        ("temporary directory", processes.temporary_dir(), 256 * MIB),
    )
    for name, path, least in places:
        yield _disk(name, path.absolute(), least)


def _disk(name: str, path: Path, least_bytes: int) -> Check:
    there = next(parent for parent in (path, *path.parents) if parent.exists())
    if not os.access(there, os.W_OK | os.X_OK):
        return Check(
            group=_DISKS,
            name=name,
            status="failed",
            found=f"{there} cannot be written",
            advice=_USE_ANOTHER,
            exit_code=CannotWriteError.exit_code,
        )
    room = os.statvfs(there)
    free, entries = room.f_bavail * room.f_frsize, room.f_favail
    # Some file systems count no entries: both figures are 0 there.
    full = free < least_bytes or (room.f_files > 0 and entries == 0)
    return Check(
        group=_DISKS,
        name=name,
        status="warning" if full else "ok",
        found=f"{format_bytes(free)} free on {path}",
        advice=f"{format_bytes(least_bytes)} may be needed: {_USE_ANOTHER}" if full else "",
    )


def _facts(cluster: Cluster | None) -> dict[str, str]:
    names = ("torch", "transformers", "deepspeed", "accelerate", "peft", "optuna", "nvidia-ml-py")
    return {
        "autotune": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        **{name: _version_of(name) or "not installed" for name in names},
        "torch CUDA": read_torch_build().cuda_version or "none",
        "devices": "none usable"
        if cluster is None
        else f"{cluster.num_devices} x {cluster.device_name} ({cluster.kind})",
        "environment": " ".join(
            f"{name}={os.environ[name]}" for name in _TELLING if name in os.environ
        )
        or "nothing set",
        "flash-attn": "installed" if importlib.util.find_spec("flash_attn") else "not installed",
    }


_TELLING = (
    "CUDA_VISIBLE_DEVICES",
    "CUDA_DEVICE_ORDER",
    "CUDA_HOME",
    "DS_ACCELERATOR",
    "NCCL_P2P_DISABLE",
    "NCCL_SOCKET_IFNAME",
    "PYTORCH_CUDA_ALLOC_CONF",
    "SLURM_JOB_ID",
    "TORCH_EXTENSIONS_DIR",
    "AUTOTUNE_CACHE",
)
"""Variables that change what happens; a report has these and no others, which may be secret."""
