"""Follows the bytes of live tensors, operator by operator."""

import weakref
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry


def _flops_of_groups(left: torch.Tensor, right: torch.Tensor, *_args: Any, **_kwargs: Any) -> int:  # noqa: ANN401 - the rest of the operator's
    """Count a product of groups, whose sizes sum to the dimension that has no group of its own."""
    if left.dim() > right.dim():
        return 2 * left.shape[1] * right.numel()
    return 2 * left.numel() * right.shape[-1]


_FLOPS = {
    **flop_registry,
    # torch counts attention by its GPU kernels alone; a CPU's takes the same arguments.
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: (  # noqa: SLF001 - its name
        flop_registry[torch.ops.aten._scaled_dot_product_flash_attention]  # noqa: SLF001
    ),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (  # noqa: SLF001
        flop_registry[torch.ops.aten._scaled_dot_product_flash_attention_backward]  # noqa: SLF001
    ),
    torch.ops.aten._grouped_mm: _flops_of_groups,  # noqa: SLF001 - its name
}


@dataclass(slots=True)
class _Storage:
    """A live storage: where it is, how large, which part of the memory it belongs to, its turn."""

    device: str
    size: int
    part: str
    turn: int


class Parts:
    """Says which part of the memory a storage belongs to; this one tells nothing apart."""

    def of_new(self, tensor: torch.Tensor) -> str:  # noqa: ARG002 - for those that look at it
        return "other"

    def of_operand(self, part: str) -> str:
        """Return what a collective's operand belongs to that was put to `part` when it was made."""
        return part


class ShapeMode(TorchDispatchMode):
    """A dispatch mode for runs over fake tensors: an operator costs as little as it can there."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # Nothing is compiled, so there is no compiler to be kept off; that took a tenth of a run.
        return False


class LiveBytes(ShapeMode):
    """Counts the bytes of tensor storages from the operator that makes them until they are freed.

    Args:
        known: tensors that are there already and do not count.
        parts: tells apart what the bytes belong to.

    Attributes:
        current: bytes alive now, by device type.
        peak: the most that were alive at once, by device type.
        peak_parts: what was alive at the latest peak, by device type and part.
        operators: operators that made a storage of their own.
        flops: floating-point operations of the operators, as torch's registry counts them; the
            whole of causal attention, as kernels and published figures differ in what they skip.
        collectives: bytes that collectives worked on (the larger of input and output), by operator.
    """

    def __init__(self, known: Iterable[torch.Tensor] = (), parts: Parts | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.current: dict[str, int] = defaultdict(int)
        self.peak: dict[str, int] = defaultdict(int)
        self.peak_parts: dict[str, dict[str, int]] = {}
        self.operators = 0
        self.flops = 0
        self.collectives: dict[str, int] = defaultdict(int)
        self._parts = parts or Parts()
        self._turn = 0
        self._peak_turn: dict[str, int] = defaultdict(int)
        self._current_parts: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
        self._known = weakref.WeakSet(tensor.untyped_storage() for tensor in known)
        self._live: weakref.WeakKeyDictionary[torch.UntypedStorage, _Storage]
        self._live = weakref.WeakKeyDictionary()

    def __torch_dispatch__(
        self,
        func: torch._ops.OpOverload[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401 - whatever the operator returns
        kwargs = kwargs or {}
        if func.namespace == "c10d":
            self._count_collective(func, args)
        result = func(*args, **kwargs)
        count_flops = _FLOPS.get(func._overloadpacket)  # noqa: SLF001 - the registry's key
        if count_flops is not None:
            self.flops += count_flops(*args, **kwargs, out_val=result)
        for tensor in _tensors(result):
            self._follow(tensor)
        return result

    def reset_counts(self) -> None:
        """Start operators, flops and collectives again from nothing."""
        self.operators = self.flops = 0
        self.collectives.clear()

    def multiply_counts(self, times: int) -> None:
        """Count what was counted so far as often as it is to happen."""
        self.operators *= times
        self.flops *= times
        for name in self.collectives:
            self.collectives[name] *= times

    def assign(self, tensors: Iterable[torch.Tensor], part: str) -> None:
        """Say what part live tensors belong to, now that it is known; also at the latest peak."""
        for storage in self._storages(tensors):
            self._move(storage, part)

    def _follow(self, tensor: torch.Tensor) -> None:
        untyped = tensor.untyped_storage()
        if untyped in self._live or untyped in self._known:
            return
        self.operators += 1
        device, size = tensor.device.type, untyped.nbytes()
        self._turn += 1
        storage = _Storage(device, size, self._parts.of_new(tensor), self._turn)
        self._live[untyped] = storage
        self.current[device] += size
        self._current_parts[device][storage.part] += size
        if self.current[device] >= self.peak[device]:
            self.peak[device] = self.current[device]
            self.peak_parts[device] = dict(self._current_parts[device])
            self._peak_turn[device] = self._turn
        weakref.finalize(untyped, self._release, storage)

    def _release(self, storage: _Storage) -> None:
        self.current[storage.device] -= storage.size
        self._current_parts[storage.device][storage.part] -= storage.size

    def _storages(self, tensors: Iterable[torch.Tensor]) -> Iterator[_Storage]:
        for tensor in tensors:
            storage = self._live.get(tensor.untyped_storage())
            if storage is not None:
                yield storage

    def _move(self, storage: _Storage, part: str) -> None:
        affected = [self._current_parts[storage.device]]
        # Alive now and made before the peak: it was alive at the peak.
        if storage.turn <= self._peak_turn[storage.device]:
            affected.append(self.peak_parts[storage.device])
        for parts in affected:
            parts[storage.part] -= storage.size
            parts[part] = parts.get(part, 0) + storage.size
        storage.part = part

    def _count_collective(
        self, func: torch._ops.OpOverload[..., Any], args: tuple[Any, ...]
    ) -> None:
        operands = [_tensors(arg) for arg in args]
        self.collectives[func._overloadpacket.__name__] += max(  # noqa: SLF001 - its name
            sum(tensor.nbytes for tensor in operand) for operand in operands
        )
        for storage in self._storages(chain.from_iterable(operands)):
            self._move(storage, self._parts.of_operand(storage.part))


def _tensors(value: object) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]


class FixedScalars(ShapeMode):
    """Answers questions about values that fake tensors do not have: no, nought, or one.

    A mask is then taken for one with padding, and a gradient norm for finite. Experts of a mixture
    are multiplied in the type that they are in.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call] # torch

    def __torch_dispatch__(
        self,
        func: torch._ops.OpOverload[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401 - whatever the operator returns
        if func is torch.ops.aten._local_scalar_dense.default:  # noqa: SLF001 - the operator's name
            dtype = args[0].dtype
            return False if dtype == torch.bool else 1.0 if dtype.is_floating_point else 0
        if func is torch.ops.aten._grouped_mm.default:  # noqa: SLF001 - the operator's name
            return _multiply_groups(func, args, kwargs or {})
        return func(*args, **(kwargs or {}))


def _multiply_groups(
    func: torch._ops.OpOverload[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> torch.Tensor:
    """Shape a product of groups: for fake tensors torch has it in bf16 alone, as its CUDA kernel.

    On a CPU the real one takes other types too.
    """
    dtype = args[0].dtype
    in_bf16 = [
        arg.to(torch.bfloat16) if torch.is_tensor(arg) and arg.is_floating_point() else arg
        for arg in args
    ]
    product: torch.Tensor = func(*in_bf16, **kwargs)
    return product.to(dtype)
