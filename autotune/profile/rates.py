"""Measures what a rank of this machine does: an unknown device is measured, never guessed."""

import time
from collections.abc import Callable

import torch

from autotune.engine.model import DTYPES
from autotune.hardware import Rates

_MATMUL_SIZE = {"cpu": 512}
_MATMUL_SIZE_ACCELERATOR = 8192
_COPY_BYTES = {"cpu": 32 * 1024 * 1024}
_COPY_BYTES_ACCELERATOR = 1024 * 1024 * 1024
_SECONDS_EACH = 0.3


def measure_rates(device_kind: str, precision: str, threads: int) -> Rates:
    """Measure matrix multiplication, copying, and the time that starting an operator takes."""
    from deepspeed.accelerator import get_accelerator

    torch.set_num_threads(threads)
    accelerator = get_accelerator()
    device = accelerator.current_device_name() if device_kind != "cpu" else "cpu"
    size = _MATMUL_SIZE.get(device_kind, _MATMUL_SIZE_ACCELERATOR)
    matrix = torch.randn(size, size, device=device, dtype=DTYPES[precision])
    source = torch.ones(_COPY_BYTES.get(device_kind, _COPY_BYTES_ACCELERATOR), dtype=torch.uint8)
    host_target = torch.empty_like(source)
    on_device, target = source.to(device), torch.empty_like(source, device=device)
    small = torch.ones(8, device=device)

    def best_s(work: Callable[[], object]) -> float:
        return _best_s(work, accelerator.synchronize)

    copied = 2 * source.numel() / best_s(lambda: target.copy_(on_device))
    host_copied = 2 * source.numel() / best_s(lambda: host_target.copy_(source))
    return Rates(
        matmul_flops_per_s=2 * size**3 / best_s(lambda: matrix @ matrix),
        memory_bytes_per_s=copied,
        # Ranks on one host exchange through its memory; each byte is written once and read once.
        link_bytes_per_s=copied / 2,
        host_link_bytes_per_s=source.numel() / best_s(lambda: host_target.copy_(on_device)),
        host_memory_bytes_per_s=host_copied,
        operator_overhead_s=best_s(lambda: small + small),
    )


def _best_s(work: Callable[[], object], synchronize: Callable[[], object]) -> float:
    """Return the seconds of one call: the best of calls made for a while after a warm-up."""
    work()
    synchronize()
    best = float("inf")
    deadline = time.perf_counter() + _SECONDS_EACH
    while time.perf_counter() < deadline:
        started = time.perf_counter()
        work()
        synchronize()
        best = min(best, time.perf_counter() - started)
    return best
