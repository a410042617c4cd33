"""Builds and steps the engine of a virtual run, and tells its bytes apart."""

import functools
import resource
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from autotune.engine.quantised import elements
from autotune.engine.trainer import build_trainer, count_trained
from autotune.memory import gpu_runtime_bytes
from autotune.optimizer import ADAMW_8BIT, OF_TRANSFORMERS
from autotune.profile.fakery import LibraryScratch, faked
from autotune.profile.live_bytes import LiveBytes, Parts
from autotune.profile.virtual import VirtualRequest, VirtualRun
from autotune.profile.virtual_gpu import NAME as VIRTUAL_GPU
from autotune.profile.virtual_gpu import place
from autotune.units import KIB
from autotune.workload import TrainSpec

_GRADIENTS_KEPT = ("averaged_gradients", "grad_partitions_flat_buffer", "fp32_groups_gradients")
"""Stages 1 and 2, stage 3, and stage 0 in bf16; an engine lacks those of the others."""


def follow(request: VirtualRequest) -> VirtualRun:
    """Build the engine, take its steps and return what was alive at most.

    Raises:
        VirtualRunUnavailableError: a library lacks a name that has to give way.
    """
    started = time.perf_counter()
    parts = EngineParts()
    live = LiveBytes(parts=parts)

    def free_device_bytes() -> int:
        # What a device shows as free is without its context and communicators too.
        tensors = live.current[VIRTUAL_GPU]
        runtime = gpu_runtime_bytes(request.ranks)
        return request.spec.device_memory_bytes - runtime - tensors

    with (
        faked(
            request.spec.device_kind,
            rank=request.rank,
            ranks=request.ranks,
            padded=request.padded,
            free_device_bytes=free_device_bytes,
            quantises=_quantises(request.spec),
        ) as device,
        live,
        LibraryScratch(request.spec.device_kind),
    ):
        engine = VirtualEngine(request, live, parts, device)
        for step in range(1, request.steps + 1):
            live.reset_counts()
            # Micro-steps before the boundary are all alike, and show in the last update.
            if accumulates(request) and step == request.steps:
                engine.micro_step(boundary=False)
                live.multiply_counts(request.gradient_accumulation_steps - 1)
            engine.micro_step(boundary=True)
    on_cpu = device.type == "cpu"
    return VirtualRun(
        peak_device_bytes=live.peak[device.type],
        peak_host_bytes=0 if on_cpu else live.peak["cpu"],
        parameters=engine.parameters,
        parts={part: size for part, size in live.peak_parts[device.type].items() if size},
        collectives={name: size for name, size in live.collectives.items() if size},
        flops=live.flops,
        operators=live.operators,
        seconds=time.perf_counter() - started,
        resident_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * KIB,
    )


def _quantises(spec: TrainSpec) -> bool:
    in_4_bits = spec.lora is not None and spec.lora.quantised
    return in_4_bits or spec.trainer.get("optim") == OF_TRANSFORMERS[ADAMW_8BIT]


def accumulates(request: VirtualRequest) -> bool:
    """Tell whether micro-steps before the boundary may need more or less than that at it.

    At ZeRO 3 without offload they do not: gradients are added to a buffer that is there in any case
    (grad_partitions_flat_buffer of stage3.py). But each update begins without hpZ's second shards.
    """
    zero = request.ds_config["zero_optimization"]
    in_a_buffer = zero["stage"] == 3 and "offload_optimizer" not in zero  # noqa: PLR2004
    in_a_buffer &= "zero_hpz_partition_size" not in zero
    return request.gradient_accumulation_steps > 1 and not in_a_buffer


class EngineParts(Parts):
    """Tells bytes apart by what the engine is doing while they are allocated.

    What that leaves open is said afterwards with `LiveBytes.assign`: which tensors turned out to be
    parameters, gradients and optimizer states.
    """

    def __init__(self) -> None:
        self.default = "weights"
        self.vocab_size: int | None = None

    def of_new(self, tensor: torch.Tensor) -> str:
        if self.default == "activations" and tensor.dim() and tensor.shape[-1] == self.vocab_size:
            return "logits"
        return self.default

    def of_operand(self, part: str) -> str:
        # ZeRO's buckets and gathered layers are allocated amid forward and backward.
        return "buffers" if part in {"activations", "other"} else part


class VirtualEngine:
    """The engine, and the optimizer updates that it takes."""

    def __init__(
        self,
        request: VirtualRequest,
        live: LiveBytes,
        parts: EngineParts,
        device: torch.device,
    ) -> None:
        self._request = request
        self._live = live
        self._parts = parts
        dataset = EqualRows(request.micro_batch_size, request.seq_length)
        self._trainer = build_trainer(
            request.spec,
            _with_python_optimizer(request.ds_config),
            load_weights=False,
            dataset=dataset,
            wrap_model=functools.partial(place, device=device),
        )
        model = self._trainer.model
        parts.default = "buffers"
        parts.vocab_size = model.config.get_text_config().vocab_size
        self._weights = list(model.parameters())
        self.parameters = sum(
            # What ZeRO 3 has sharded is empty here, and says how large it was.
            getattr(weight, "ds_numel", elements(weight))
            for weight in self._weights
        )
        self._engine = self._trainer.prepare_engine(total_steps=2 * request.steps)
        self._mark_steps()
        self._mark_gradients()
        self._assign_states()

    def micro_step(self, *, boundary: bool) -> None:
        """Run forward and backward, and the optimizer update at a boundary."""
        self._parts.default = "activations"
        batch = self._trainer.data_collator(list(self._trainer.train_dataset))
        accumulation = self._request.gradient_accumulation_steps
        trained = self._request.ranks * accumulation * count_trained(batch)
        self._trainer.micro_step(batch, max(1, trained), boundary=boundary)
        if boundary:
            self._assign_states()

    def _mark_steps(self) -> None:
        step = self._engine.step

        def marked_step(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - as the engine's
            self._live.assign(_kept_gradients(self._engine.optimizer), "gradients")
            self._parts.default = "other"
            if not accumulates(self._request):
                self._live.multiply_counts(self._request.gradient_accumulation_steps)
            return step(*args, **kwargs)

        self._engine.step = marked_step

    def _mark_gradients(self) -> None:
        def mark(weight: torch.Tensor) -> None:
            if weight.grad is not None:
                self._live.assign([weight.grad], "gradients")

        for weight in self._weights:
            if weight.requires_grad:
                weight.register_post_accumulate_grad_hook(mark)

    def _assign_states(self) -> None:
        self._live.assign(_optimizer_states(self._engine.optimizer), "optimizer")
        self._live.assign(self._weights, "weights")


def _with_python_optimizer(ds_config: dict[str, Any]) -> dict[str, Any]:
    """Let torch's AdamW stand in for the C++ one, which takes no fake tensors.

    It keeps the same states, and fused it works in place, as the C++ one does.
    """
    optimizer = ds_config.get("optimizer", {})
    if optimizer.get("type") != "AdamW" or optimizer["params"].get("torch_adam"):
        return ds_config
    params = {**optimizer["params"], "torch_adam": True, "fused": True}
    return {
        **ds_config,
        "optimizer": {**optimizer, "params": params},
        "zero_force_ds_cpu_optimizer": False,
    }


def _optimizer_states(optimizer: Any) -> Iterator[torch.Tensor]:  # noqa: ANN401 - of any engine
    """Yield the weights that the optimizer updates and what it remembers of each."""
    inner = getattr(optimizer, "optimizer", optimizer)
    for group in inner.param_groups:
        yield from group["params"]
    for state in inner.state.values():
        yield from (leaf for leaf in tree_leaves(state) if isinstance(leaf, torch.Tensor))


def _kept_gradients(optimizer: Any) -> Iterator[torch.Tensor]:  # noqa: ANN401 - of any engine
    """Yield where ZeRO keeps its share of the gradients until the update."""
    for name in _GRADIENTS_KEPT:
        kept = getattr(optimizer, name, None)
        yield from (leaf for leaf in tree_leaves(kept) if isinstance(leaf, torch.Tensor))


class EqualRows(torch.utils.data.Dataset[dict[str, Any]]):
    """Rows of one length, every token trained on."""

    def __init__(self, num_rows: int, length: int) -> None:
        self._num_rows = num_rows
        self._length = length

    def __len__(self) -> int:
        return self._num_rows

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index >= self._num_rows:
            raise IndexError(index)
        return {"input_ids": [0] * self._length, "trained": [True] * self._length}
