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
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from autotune.errors import VirtualRunUnavailableError
from autotune.profile import bits, flash
from autotune.profile.live_bytes import FixedScalars, ShapeMode
from autotune.profile.virtual_gpu import DEVICE as VIRTUAL_DEVICE

_ZERO = "deepspeed.runtime.zero"
_RANK_COMPARISONS = tuple(
    f"{_ZERO}.{module}.assert_ints_same_as_other_ranks"
    for module in ("utils", "stage3", "partition_parameters", "partitioned_param_coordinator")
)


_GATHERED = f"{_ZERO}.partition_parameters.AllGatherCoalescedHandle.wait"


def _stay(module: torch.nn.Module, *_args: object, **_kwargs: object) -> torch.nn.Module:
    return module


# Parameters of a fake model cannot be swapped under the weak references that follow them. The model
# is built in its type and on its device, so that there is nothing to convert.
_CONVERSIONS = {f"torch.nn.Module.{name}": _stay for name in ("to", "float", "half", "bfloat16")}


@contextmanager
def faked(
    device_kind: str,
    *,
    rank: int,
    ranks: int,
    padded: bool = True,
    free_device_bytes: Callable[[], int] = lambda: 0,
    quantises: bool = False,
) -> Iterator[torch.device]:
    """Be one of `ranks` ranks over fake tensors; gives the device, the CPU or a virtual one.

    Batches are taken for ones with padding if they are `padded`. `free_device_bytes` answers
    DeepSpeed's question what a virtual device has left. What `quantises` does so by bitsandbytes.

    Raises:
        VirtualRunUnavailableError: a library lacks a name that has to give way.
    """
    with ExitStack() as stack:
        device = "cpu" if device_kind == "cpu" else VIRTUAL_DEVICE
        stack.enter_context(_rank_environment(rank, ranks, device))
        stand_ins = _stand_ins()
        if device != "cpu":
            stand_ins |= _device_stand_ins(free_device_bytes)
        if quantises:
            stand_ins |= bits.stand_ins(device_kind)
        for target, stand_in in stand_ins.items():
            stack.enter_context(replaced(target, stand_in))
        stack.enter_context(padding(present=padded))
        stack.enter_context(_process_group(rank, ranks))
        stack.enter_context(fake_tensors())
        stack.enter_context(_made_on_the_host())
        stack.enter_context(_Answers())
        yield torch.device(device)


def _stand_ins() -> dict[str, object]:
    """Return what replaces what, by dotted name."""
    # ZeRO 3 compares with what rank 0 sends; a fake collective brings no data.
    comparisons = dict.fromkeys(_RANK_COMPARISONS, _agree)
    # It would compile a C++ op that exchanges real memory between real ranks.
    shared_memory = {"deepspeed.comm.torch.build_shm_op": _nothing}
    return {**comparisons, **shared_memory, _GATHERED: _put_together_at_once(found(_GATHERED))}


def _device_stand_ins(free_device_bytes: Callable[[], int]) -> dict[str, object]:
    """Return what else gives way to a virtual device, which is registered with it."""
    from autotune.profile import virtual_gpu

    virtual_gpu.register()
    accelerator = virtual_gpu.VirtualAccelerator(free_device_bytes)
    return {
        "deepspeed.accelerator.real_accelerator.ds_accelerator": accelerator,
        # They look for devices that exist.
        "transformers.training_args.is_torch_bf16_gpu_available": _always,
        "accelerate.state.PartialState._prepare_backend": _gpu_backend,
        # Dispatch by device would end in the kernel that keeps the whole attention matrix.
        "torch.nn.functional.scaled_dot_product_attention": virtual_gpu.attend,
    }


def _put_together_at_once(wait: Callable[..., None]) -> Callable[..., None]:
    """Let ZeRO 3 copy a gathered parameter from the whole buffer, not from each rank's part of it.

    The copy is the same. Taking the parts one by one is most of a run with many ranks.
    """

    def waited(handle: Any, handle_dependency: bool = True) -> None:  # noqa: ANN401, FBT001, FBT002
        plain = handle.quantization is None and not handle.use_secondary_tensor
        if plain and not handle.complete:
            part, ranks = handle.partitions[0], handle.world_size
            handle.partitions = [part.as_strided((ranks * part.numel(),), (1,), 0)]
            for parameter in handle.params:
                parameter.ds_secondary_tensor_num_of_groups = ranks
            handle.world_size, handle.use_secondary_tensor = 1, True
        wait(handle, handle_dependency=handle_dependency)

    return waited


def _always() -> bool:
    return True


def _gpu_backend(*_args: object) -> tuple[str, str]:
    return "nccl", "MULTI_GPU"


def _agree(_ints: list[int]) -> None:
    return None


def _nothing() -> None:
    return None


_MASK_TEST = "transformers.masking_utils._ignore_causal_mask_sdpa"


@contextmanager
def padding(*, present: bool) -> Iterator[None]:
    """Take masks that have no values for ones of rows with padding, or without.

    transformers takes the causal kernel of SDPA if there is no padding. It never does for a fake
    mask, so it is shown none.
    """
    if present:
        yield
        return
    ignores = found(_MASK_TEST)

    def without_mask(_mask: torch.Tensor | None, *args: object, **kwargs: object) -> object:
        return ignores(None, *args, **kwargs)

    with replaced(_MASK_TEST, without_mask):
        yield


@contextmanager
def flash_attention() -> Iterator[None]:
    """Let models be built with flash attention, and run with it where tensors are fake."""
    with ExitStack() as stack:
        for target, stand_in in flash.stand_ins().items():
            stack.enter_context(replaced(target, stand_in))
        yield


@contextmanager
def _made_on_the_host() -> Iterator[None]:
    """Let tensors of given values be made on the host and then copied, as no device can hold them.

    torch does so itself where it finds no device of a kind that it knows.
    """
    before = torch._C._only_lift_cpu_tensors()  # noqa: SLF001 - torch's own switch
    torch._C._set_only_lift_cpu_tensors(True)  # noqa: FBT003, SLF001
    try:
        yield
    finally:
        torch._C._set_only_lift_cpu_tensors(before)  # noqa: SLF001


@contextmanager
def fake_tensors() -> Iterator[None]:
    """Let tensors be fake, and the modules that hold them stay as they are built."""
    with ExitStack() as stack:
        for target, stand_in in _CONVERSIONS.items():
            stack.enter_context(replaced(target, stand_in))
        stack.enter_context(flash_attention())
        # Constants that libraries made at import, real ones, meet fake tensors.
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        yield


def found(target: str) -> Any:  # noqa: ANN401 - whatever has the name
    """Return what gives way.

    Raises:
        VirtualRunUnavailableError: the library lacks the name.
    """
    try:
        return pkgutil.resolve_name(target)
    except (ImportError, AttributeError) as error:
        msg = (
            f"a virtual run needs {target}, which the installed version does not have: install the"
            " tested versions of constraints.txt, or go on with estimates"
        )
        raise VirtualRunUnavailableError(msg) from error


@contextmanager
def replaced(target: str, stand_in: object) -> Iterator[None]:
    original = found(target)
    owner_name, _, name = target.rpartition(".")
    owner = pkgutil.resolve_name(owner_name)
    setattr(owner, name, stand_in)
    try:
        yield
    finally:
        setattr(owner, name, original)


@contextmanager
def _rank_environment(rank: int, ranks: int, device: str) -> Iterator[None]:
    """Set what DeepSpeed and accelerate read; the port is never opened."""
    before = dict(os.environ)
    if device != "cpu":
        os.environ["ACCELERATE_TORCH_DEVICE"] = device
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


class _Answers(FixedScalars):
    """Answers for values, and takes the index off a CPU device, as a real allocation does.

    Values go no further than the host.
    """

    def __torch_dispatch__(
        self,
        func: torch._ops.OpOverload[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401 - whatever the operator returns
        device = (kwargs or {}).get("device")
        if device is not None and device.type == "cpu":
            kwargs = {**(kwargs or {}), "device": torch.device("cpu")}
        elif device is not None and args and isinstance(args[0], FakeTensor):
            # torch would copy the values that it knows to a device that is not there.
            args[0].constant = None
        return super().__torch_dispatch__(func, types, args, kwargs)


class LibraryScratch(ShapeMode):
    """Allocates what a library behind an operator takes while it works, unseen by dispatch.

    Entered after the mode that follows the bytes, so that this one sees them, and the last of all,
    so that it can answer where a tensor is: more than half of what is dispatched asks for that.
    """

    def __init__(self, device_kind: str) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._scratch = _GLOO_SCRATCH if device_kind == "cpu" else _CUDA_SCRATCH

    def __torch_dispatch__(
        self,
        func: torch._ops.OpOverload[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401 - whatever the operator returns
        if func is _DEVICE:
            return args[0].fake_device if isinstance(args[0], FakeTensor) else func(*args)
        scratch_of = self._scratch.get(func)
        scratch = None if scratch_of is None else scratch_of(args)
        result = func(*args, **(kwargs or {}))
        del scratch
        return result


def _reduce_scatter_scratch(args: tuple[Any, ...]) -> torch.Tensor:
    """Gloo reduces a copy of the whole input and keeps a share of it (ProcessGroupGloo.cpp)."""
    source: torch.Tensor = args[1]
    return source.clone()


def _attention_scratch(args: tuple[Any, ...]) -> torch.Tensor:
    """Flash and memory-efficient kernels sum the gradient of the query up in fp32."""
    query: torch.Tensor = args[1]
    return torch.empty_like(query, dtype=torch.float32)


_DEVICE = torch.ops.prim.device.default
_Scratch = Mapping[Any, Callable[[tuple[Any, ...]], torch.Tensor]]
_GLOO_SCRATCH: _Scratch = {torch.ops.c10d._reduce_scatter_base_.default: _reduce_scatter_scratch}
_CUDA_SCRATCH: _Scratch = {
    getattr(torch.ops.aten, f"_scaled_dot_product_{kernel}_attention_backward").default: (
        _attention_scratch
    )
    for kernel in ("flash", "efficient")
}
