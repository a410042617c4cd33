"""Everything that gives way for a virtual run, each with its reason; all of it comes back.

The real engine runs over fake tensors, which have shapes and storages but no values, on a process
group that exists in this process alone. Where a library asks for values, moves parameters or talks
to other ranks, it gets an answer from here.
"""

import os
import pkgutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from autotune.profile.live_bytes import FixedScalars
from autotune.profile.virtual import VirtualRunUnavailableError

_CONVERSIONS = ("to", "float", "half", "bfloat16")
_ZERO = "deepspeed.runtime.zero"
_RANK_COMPARISONS = tuple(
    f"{_ZERO}.{module}.assert_ints_same_as_other_ranks"
    for module in ("utils", "stage3", "partition_parameters", "partitioned_param_coordinator")
)


@contextmanager
def faked(*, rank: int, ranks: int) -> Iterator[None]:
    """Be one of `ranks` ranks over fake tensors.

    Raises:
        VirtualRunUnavailableError: a library lacks a name that has to give way.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    with ExitStack() as stack:
        stack.enter_context(_rank_environment(rank, ranks))
        stack.enter_context(_process_group(rank, ranks))
        for target, stand_in in _stand_ins().items():
            stack.enter_context(_replaced(target, stand_in))
        # Constants that libraries made at import, real ones, meet fake tensors.
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(_CpuWithoutIndex())
        stack.enter_context(FixedScalars())
        yield


def _stand_ins() -> dict[str, Callable[..., Any]]:
    """Return what replaces what, by dotted name."""
    # Parameters of a fake model cannot be swapped under the weak references that follow them. The
    # model is built in its type and on its device, so that there is nothing to convert.
    conversions = {f"torch.nn.Module.{name}": _stay for name in _CONVERSIONS}
    # ZeRO 3 compares with what rank 0 sends; a fake collective brings no data.
    comparisons = dict.fromkeys(_RANK_COMPARISONS, _agree)
    return {**conversions, **comparisons}


def _stay(module: torch.nn.Module, *_args: object, **_kwargs: object) -> torch.nn.Module:
    return module


def _agree(_ints: list[int]) -> None:
    return None


@contextmanager
def _replaced(target: str, stand_in: object) -> Iterator[None]:
    owner_name, _, name = target.rpartition(".")
    try:
        owner = pkgutil.resolve_name(owner_name)
        original = getattr(owner, name)
    except (ImportError, AttributeError) as error:
        msg = (
            f"a virtual run needs {target}, which the installed version does not have: install the"
            " tested versions of constraints.txt, or go on with estimates"
        )
        raise VirtualRunUnavailableError(msg) from error
    setattr(owner, name, stand_in)
    try:
        yield
    finally:
        setattr(owner, name, original)


@contextmanager
def _rank_environment(rank: int, ranks: int) -> Iterator[None]:
    before = dict(os.environ)
    # DeepSpeed and accelerate read them; the port is never opened.
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK="0",
        WORLD_SIZE=str(ranks),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT="0",
    )
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextmanager
def _process_group(rank: int, ranks: int) -> Iterator[None]:
    # Importing the module registers the backend.
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", store=FakeStore(), rank=rank, world_size=ranks)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


class _CpuWithoutIndex(TorchDispatchMode):
    """Takes the index off a CPU device, as a real allocation does; a fake tensor would keep it."""

    def __torch_dispatch__(
        self,
        func: torch._ops.OpOverload[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401 - whatever the operator returns
        kwargs = dict(kwargs or {})
        device = kwargs.get("device")
        if device is not None and device.type == "cpu":
            kwargs["device"] = torch.device("cpu")
        return func(*args, **kwargs)


class LibraryScratch(TorchDispatchMode):
    """Allocates what a library behind an operator takes while it works, unseen by dispatch.

    Entered after the mode that follows the bytes, so that this one sees them.
    """

    def __torch_dispatch__(
        self,
        func: torch._ops.OpOverload[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401 - whatever the operator returns
        scratch_of = _SCRATCH.get(func)
        scratch = None if scratch_of is None else scratch_of(args)
        result = func(*args, **(kwargs or {}))
        del scratch
        return result


def _reduce_scatter_scratch(args: tuple[Any, ...]) -> torch.Tensor:
    """Gloo reduces a copy of the whole input and keeps a share of it (ProcessGroupGloo.cpp)."""
    source: torch.Tensor = args[1]
    return source.clone()


_SCRATCH: Mapping[Any, Callable[[tuple[Any, ...]], torch.Tensor]] = {
    torch.ops.c10d._reduce_scatter_base_.default: _reduce_scatter_scratch,
}
