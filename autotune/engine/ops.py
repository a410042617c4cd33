"""DeepSpeed's compiled ops, built and loaded under a lease, which does not outlive its holder.

torch guards a build by a file `lock` in the op's directory. A process that is killed meanwhile
leaves it behind, and every later one waits on it for ever. Here none of ours touches that file
without holding the lease, so one that is there all the same is a dead process's.
"""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from autotune.lease import exclusive
from autotune.setting import NVME

_log = logging.getLogger(__name__)


def needed_ops(device_kind: str, ds_config: dict[str, Any]) -> tuple[str, ...]:
    """Name the builders of the ops that an engine of this config loads."""
    communication = ("ShareMemCommBuilder",) if device_kind == "cpu" else ()
    offload = ds_config["zero_optimization"].get("offload_optimizer", {}).get("device", "none")
    # Offloaded, it is always AdamW, which the config names.
    on_host = offload != "none"
    by_torch = on_host and ds_config["optimizer"]["params"].get("torch_adam", False)
    optimizer = ("CPUAdamBuilder",) if on_host and not by_torch else ()
    swapping = ("AsyncIOBuilder",) if offload == NVME else ()
    return communication + optimizer + swapping


def load_ops(names: Sequence[str]) -> None:
    """Load the ops, built first where they are not; DeepSpeed finds them loaded from then on."""
    from deepspeed.accelerator import get_accelerator
    from torch.utils.cpp_extension import _get_build_directory

    for name in names:
        builder = get_accelerator().create_op_builder(name)
        directory = Path(_get_build_directory(builder.name, verbose=False))
        lock = directory.parent / f"{builder.name}.autotune-lease"
        with exclusive(lock, wait=True):
            _remove_stale(directory / "lock")
            builder.load(verbose=False)


def remove_stale_locks(environment: Mapping[str, str]) -> None:
    """Remove what killed builds have left where ranks of this environment build their ops."""
    for baton in Path(environment["TORCH_EXTENSIONS_DIR"]).glob("*/lock"):
        _remove_stale(baton)


def _remove_stale(baton: Path) -> None:
    """Remove torch's lock unless some other program builds in this directory just now."""
    if baton.exists() and not _is_open(baton):
        _log.warning("removing %s, which a killed build has left", baton)
        baton.unlink(missing_ok=True)


def _is_open(path: Path) -> bool:
    """Tell whether a process has the file open, as torch's builder has while it builds."""
    wanted = str(path.resolve())
    return any(_link(link) == wanted for link in Path("/proc").glob("[0-9]*/fd/*"))


def _link(path: Path) -> str | None:
    try:
        return str(path.readlink())
    except OSError:
        # Closed meanwhile, or another user's.
        return None
