"""Follows the bytes of live tensors, operator by operator."""

import weakref
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensor storages from the operator that makes them until they are freed.

    Args:
        known: tensors that are there already and do not count.

    Attributes:
        current: bytes alive now, by device type.
        peak: the most that were alive at once, by device type.
        operators: operators that made a storage of their own.
        flops: floating-point operations of the operators, as torch's registry counts them.
    """

    def __init__(self, known: Iterable[torch.Tensor] = ()) -> None:
        super().__init__()
        self.current: dict[str, int] = defaultdict(int)
        self.peak: dict[str, int] = defaultdict(int)
        self.operators = 0
        self.flops = 0
        self._seen = weakref.WeakSet(tensor.untyped_storage() for tensor in known)

    def __torch_dispatch__(
        self,
        func: torch._ops.OpOverload[..., Any],
        types: Sequence[type],  # noqa: ARG002 - torch's signature
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401 - whatever the operator returns
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        count_flops = flop_registry.get(func._overloadpacket)  # noqa: SLF001 - the registry's key
        if count_flops is not None:
            self.flops += count_flops(*args, **kwargs, out_val=result)
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._follow(leaf)
        return result

    def _follow(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage in self._seen:
            return
        self._seen.add(storage)
        self.operators += 1
        device, size = tensor.device.type, storage.nbytes()
        self.current[device] += size
        self.peak[device] = max(self.peak[device], self.current[device])
        weakref.finalize(storage, self._release, device, size)

    def _release(self, device: str, size: int) -> None:
        self.current[device] -= size


class FixedScalars(TorchDispatchMode):
    """Answers questions about values that fake tensors do not have: no, nought, or one.

    A mask is then taken for one with padding, and a gradient norm for finite.
    """

    def __torch_dispatch__(
        self,
        func: torch._ops.OpOverload[..., Any],
        types: Sequence[type],  # noqa: ARG002 - torch's signature
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401 - whatever the operator returns
        if func is torch.ops.aten._local_scalar_dense.default:  # noqa: SLF001 - the operator's name
            dtype = args[0].dtype
            return False if dtype == torch.bool else 1.0 if dtype.is_floating_point else 0
        return func(*args, **(kwargs or {}))
