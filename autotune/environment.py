"""Where caches are, and the environment that ranks run in."""

import hashlib
import os
import sys
from collections.abc import Mapping
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

_VERSIONED = ("torch", "transformers", "deepspeed", "accelerate", "peft")
_OPTIONAL = ("bitsandbytes",)

RANK_ENVIRONMENT: Mapping[str, str] = {
    # A rank sets its own number of threads; what spins in a pool beside it would only slow it down.
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    # With glibc's default threshold the resident set never falls after a large rung.
    "MALLOC_MMAP_THRESHOLD_": "262144",
    # Where this counts all ranks, as some MPIs set it, DeepSpeed makes segments of shared memory,
    # which a killed rank leaves behind.
    "LOCAL_SIZE": "0",
    # torchrun hands these on to its ranks, which save a checkpoint and end; else it would just end.
    "TORCHELASTIC_SIGNALS_TO_HANDLE": "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2",
    # The model is on this disk by now; a rank that asks the hub would only wait.
    "HF_HUB_OFFLINE": "1",
}


def cache_dir() -> Path:
    """Return $AUTOTUNE_CACHE, or autotune/ below the user's cache directory."""
    if chosen := os.environ.get("AUTOTUNE_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "autotune"


def versions() -> dict[str, str]:
    """Return the versions that an outcome depends on; what is optional and missing has none."""
    found = {name: version(name) for name in _VERSIONED}
    for name in _OPTIONAL:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def rank_environment(device_kind: str, visible_devices: tuple[str, ...]) -> dict[str, str]:
    """Return the variables to set for every rank, in probes and in training alike."""
    environment = dict(RANK_ENVIRONMENT)
    environment["DS_ACCELERATOR"] = device_kind
    # ninja, which DeepSpeed builds its ops with, is installed beside the interpreter.
    environment["PATH"] = os.pathsep.join(
        [str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]
    )
    environment["TORCH_EXTENSIONS_DIR"] = os.environ.get("TORCH_EXTENSIONS_DIR") or str(
        cache_dir() / "ops" / _environment_key()
    )
    if device_kind != "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(visible_devices)
    return environment


def _environment_key() -> str:
    """Name the interpreter and versions that a built op fits: two would rebuild each other's."""
    facts = repr((sys.executable, sys.version, sorted(versions().items())))
    return hashlib.blake2b(facts.encode(), digest_size=8).hexdigest()
