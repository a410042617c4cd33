"""Measures what a rank of this machine does: an unknown device is measured, never guessed."""

import logging
import statistics
import time
from collections.abc import Callable, Iterator
from datetime import timedelta

import torch

from autotune.engine.model import DTYPES
from autotune.hardware import Bench
from autotune.workload import COMPUTE_BYTES

_log = logging.getLogger(__name__)

_MATMUL_SIZE = {"cpu": 512}
_MATMUL_SIZE_ACCELERATOR = 8192
_COPY_BYTES = {"cpu": 32 * 1024 * 1024}
_COPY_BYTES_ACCELERATOR = 1024 * 1024 * 1024
_SECONDS_EACH = 0.3
_OPERATORS = 100
_ALL_REDUCES = 9
_SMALL_ALL_REDUCES = 49
_MEETING_TIMEOUT = timedelta(seconds=60)


class Meter:
    """Times work on the device of this process.

    Args:
        device_kind: cpu or cuda.
        threads: of a rank.
        together: called before each measurement, so that all ranks are busy at once.
    """

    def __init__(self, device_kind: str, threads: int, together: Callable[[], object]) -> None:
        from deepspeed.accelerator import get_accelerator

        torch.set_num_threads(threads)
        self._together = together
        self._synchronize = get_accelerator().synchronize
        self._device = "cpu" if device_kind == "cpu" else get_accelerator().current_device_name()
        self._matmul_size = _MATMUL_SIZE.get(device_kind, _MATMUL_SIZE_ACCELERATOR)
        num_bytes = _COPY_BYTES.get(device_kind, _COPY_BYTES_ACCELERATOR)
        self._host = torch.ones(num_bytes, dtype=torch.uint8)

    def matmul_flops_per_s(self, precision: str) -> float:
        """Multiply square matrices."""
        size = self._matmul_size
        matrix = torch.randn(size, size, device=self._device).to(DTYPES[precision])
        return 2 * size**3 / self._seconds(lambda: matrix @ matrix)

    def memory_bytes_per_s(self) -> float:
        """Copy within the device's memory; each byte is read and written."""
        return self._copied(self._host.to(self._device))

    def host_memory_bytes_per_s(self) -> float:
        return self._copied(self._host)

    def host_link_bytes_per_s(self) -> float:
        """Copy from the device to the host."""
        source, target = self._host.to(self._device), torch.empty_like(self._host)
        return source.numel() / self._seconds(lambda: target.copy_(source))

    def operator_overhead_s(self) -> float:
        """Add next to nothing again and again, and go back: what autograd takes for it counts."""
        small = torch.ones(8, device=self._device, requires_grad=True)

        def pass_through() -> None:
            total = small
            for _ in range(_OPERATORS):
                total = total + small
            total.sum().backward()

        return self._seconds(pass_through) / (2 * _OPERATORS)

    def all_reduce_bytes_per_s(self, ranks: int) -> float:
        """All-reduce over the ranks; counted are the bytes that a rank sends in a ring."""
        gradients = self._host.to(self._device).view(torch.float32)
        seconds = self._all_reduced_s(gradients, _ALL_REDUCES)
        return 2 * (ranks - 1) / ranks * self._host.numel() / seconds

    def collective_overhead_s(self) -> float:
        """All-reduce next to nothing, so that only starting and meeting counts."""
        return self._all_reduced_s(torch.ones(8, device=self._device), _SMALL_ALL_REDUCES)

    def _all_reduced_s(self, tensor: torch.Tensor, calls: int) -> float:
        return self._seconds(lambda: torch.distributed.all_reduce(tensor), calls=calls)

    def _copied(self, source: torch.Tensor) -> float:
        target = torch.empty_like(source)
        return 2 * source.numel() / self._seconds(lambda: target.copy_(source))

    def _seconds(self, work: Callable[[], object], *, calls: int | None = None) -> float:
        """Return the seconds of one call, the median of calls made for a while after a warm-up.

        What ranks do together they do in so many `calls`, the same for each.
        """
        self._together()
        self._timed(work)
        taken: list[float] = []
        deadline = time.perf_counter() + _SECONDS_EACH
        while len(taken) < (calls or 1) or (calls is None and time.perf_counter() < deadline):
            taken.append(self._timed(work))
        return statistics.median(taken)

    def _timed(self, work: Callable[[], object]) -> float:
        started = time.perf_counter()
        work()
        self._synchronize()
        return time.perf_counter() - started


def bench_rank(
    device_kind: str,
    threads: int,
    rank: int,
    ranks: int,
    store: str | None,
    local_rank: int | None = None,
) -> Bench:
    """Measure this rank while all are busy, and what they exchange; they meet at the file `store`.

    Without it they meet where the environment says, as torchrun's. On several nodes `local_rank` is
    the place on its own. A precision that the device does not multiply matrices in is left out.
    """
    from deepspeed.accelerator import get_accelerator
    from torch.distributed import FileStore  # type: ignore[attr-defined] # public, not in __all__

    if device_kind != "cpu":
        get_accelerator().set_device(rank if local_rank is None else local_rank)
    torch.distributed.init_process_group(
        get_accelerator().communication_backend_name(),
        store=None if store is None else FileStore(store, ranks),
        rank=rank,
        world_size=ranks,
        timeout=_MEETING_TIMEOUT,
    )
    meter = Meter(device_kind, threads, torch.distributed.barrier)
    return Bench(
        ranks=ranks,
        matmul_flops_per_s=tuple(_by_precision(meter)),
        memory_bytes_per_s=meter.memory_bytes_per_s(),
        all_reduce_bytes_per_s=meter.all_reduce_bytes_per_s(ranks) if ranks > 1 else None,
        host_link_bytes_per_s=meter.host_link_bytes_per_s(),
        host_memory_bytes_per_s=meter.host_memory_bytes_per_s(),
        operator_overhead_s=meter.operator_overhead_s(),
        collective_overhead_s=meter.collective_overhead_s() if ranks > 1 else 0.0,
    )


def _by_precision(meter: Meter) -> Iterator[tuple[str, float]]:
    for precision in COMPUTE_BYTES:
        try:
            yield precision, meter.matmul_flops_per_s(precision)
        except RuntimeError:
            # This is how torch says that the device has no such matrix multiplication.
            _log.exception("no matrix multiplication in %s", precision)
