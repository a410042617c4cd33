"""Times the micro-steps of a script's DeepSpeed engine and reads its memory, from within."""

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from autotune.engine.device import (
    AllocatorMeter,
    MemoryCap,
    MemoryMeter,
    ResidentSetMeter,
    synchronize,
)
from autotune.probe.protocol import RungMeasurement
from autotune.probe.settle import settled
from autotune.probe.worker import Answer
from autotune.script.errand import AS_IT_IS, ScriptErrand

_WARM_UP = 1
"""Updates before any counts: the first makes the optimizer's states."""

_ROWS_NOTED = 256


def hold(model: torch.nn.Module, errand: ScriptErrand) -> MemoryMeter:
    """Hold the rank to its memory from here on, where the model is made but no engine; read it.

    What the model takes already counts; interpreter, libraries and data do not.
    """
    held = sum(map(_bytes_here, (*model.parameters(), *model.buffers())))
    on_cpu = errand.device_kind == "cpu"
    meter = ResidentSetMeter(held) if on_cpu else AllocatorMeter()
    meter.reset()
    MemoryCap(errand.device_kind, max(0, errand.device_memory_bytes - held * on_cpu)).enforce()
    return meter


def _bytes_here(tensor: torch.Tensor) -> int:
    """Return the bytes of a tensor, of one that ZeRO 3 shares out those of this rank's share."""
    own = getattr(tensor, "ds_tensor", None)
    held = tensor if own is None else own
    return int(held.numel() * held.element_size())


class Watched:
    """An engine whose micro-steps are timed: from the beginning of one to that of the next.

    What lies between two is in it: loading the next batch, logging. Where the model is evaluated
    meanwhile it does not count.

    Args:
        fail: told what is not as it should be; does not return.
        ended: called when enough is known; does not return.
    """

    def __init__(
        self,
        engine: Any,  # noqa: ANN401 - a DeepSpeedEngine
        meter: MemoryMeter,
        errand: ScriptErrand,
        answer: Answer,
        fail: Callable[[str], None],
        ended: Callable[[], None],
    ) -> None:
        self._engine = engine
        self._meter = meter
        self._errand = errand
        self._answer = answer
        self._fail = fail
        self._ended = ended
        self._began = time.perf_counter()
        self._started: float | None = None
        self._steps_before = 0
        self._has_worked = self._is_spoiled = False
        self._round: list[float] = []
        self._rounds: list[list[float]] = []
        self._slowest: list[float] = []
        self._accumulation: Counter[int] = Counter()
        self._rows: Counter[int] = Counter()
        self._widths: Counter[int] = Counter()
        self._lengths: list[int] = []
        answer.write("phase", phase=f"micro-batch {errand.micro_batch_size}")
        self._wrap()

    @property
    def steps(self) -> int:
        """Return how many optimizer steps were taken."""
        return int(self._engine.global_steps)

    def _wrap(self) -> None:
        engine = self._engine
        forward, backward, step = engine.forward, engine.backward, engine.step

        def forward_timed(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - the model's
            self._forward_begins(args, kwargs)
            return forward(*args, **kwargs)

        def worked(function: Callable[..., Any]) -> Callable[..., Any]:
            def noted(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - the engine's
                self._has_worked = True
                return function(*args, **kwargs)

            return noted

        engine.forward = forward_timed
        engine.backward = worked(backward)
        engine.step = worked(step)

    def _forward_begins(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        if not (self._engine.module.training and torch.is_grad_enabled()):
            self._is_spoiled = True
            return
        if self._started is not None and not self._has_worked:
            # A micro-step of several passes.
            return
        if self._started is not None:
            self._micro_step_ends()
            self._stop_if_settled()
        else:
            synchronize()
        self._note_batch(args, kwargs)
        self._has_worked = False
        self._steps_before = self.steps
        self._started = time.perf_counter()

    def _micro_step_ends(self) -> None:
        assert self._started is not None
        synchronize()
        self._round.append(time.perf_counter() - self._started)
        if self.steps == self._steps_before:
            return
        self._accumulation[len(self._round)] += 1
        self._require_honoured()
        if not self._is_spoiled:
            self._rounds.append(self._round)
        self._round, self._is_spoiled = [], False

    def _stop_if_settled(self) -> None:
        """End once the updates take as long as each other, on all ranks after the same one."""
        counted = self._rounds[_WARM_UP:]
        if self._round or len(counted) <= len(self._slowest):
            return
        self._slowest.append(self._of_slowest_rank(sum(counted[-1])))
        sample = settled(self._slowest)
        if sample is not None:
            self._tell(counted[-len(sample) :])
            self._ended()

    def finish(self) -> bool:
        """Tell what there is when the script has come to its end; returns whether that is enough.

        The last micro-step has none after it, so that it is left out.
        """
        counted = self._rounds[_WARM_UP:]
        if not counted:
            return False
        self._tell(counted)
        return True

    def _tell(self, rounds: Sequence[Sequence[float]]) -> None:
        """Write the rung: of each round all but the last micro-step only accumulate."""
        (width, _), *others = self._widths.most_common()
        # Rows of other lengths take other times.
        length = 0 if others else width
        accumulated = tuple(seconds for one in rounds for seconds in one[:-1])
        updated = tuple(one[-1] for one in rounds)
        measured = RungMeasurement(
            micro_batch_size=self._errand.micro_batch_size,
            accumulate_s=((length, accumulated or updated),),
            boundary_s=((length, updated),) if accumulated else (),
            peak_bytes=round(self._meter.peak_bytes() * (1 + self._meter.growth)),
            allocated_bytes=self._meter.allocated_bytes(),
            seconds=time.perf_counter() - self._began,
        )
        self._answer.write("rung", **measured.to_json())

    def _of_slowest_rank(self, seconds: float) -> float:
        if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
            return seconds
        slowest = torch.tensor(seconds, dtype=torch.float64, device=self._engine.device)
        torch.distributed.all_reduce(slowest, torch.distributed.ReduceOp.MAX)
        return float(slowest)

    def _note_batch(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        tensors = dict(_tensors(args, kwargs))
        batch = tensors.get("input_ids", next(iter(tensors.values()), None))
        if batch is None:
            return
        rows, width = len(batch), batch.shape[1] if batch.dim() > 1 else 1
        self._rows[rows] += 1
        self._widths[width] += 1
        if len(self._lengths) < _ROWS_NOTED:
            mask = tensors.get("attention_mask")
            padded = mask is not None and mask.shape == batch.shape
            lengths = mask.sum(1).tolist() if mask is not None and padded else [width] * rows
            self._lengths.extend(map(int, lengths))

    def _require_honoured(self) -> None:
        """Refuse batches and accumulation other than those asked for: they would be measured."""
        wanted = self._errand.micro_batch_size
        if wanted == AS_IT_IS:
            return
        # The last batch of an epoch may have fewer.
        rows = max(self._rows, default=wanted)
        if rows != wanted:
            self._fail(
                f"the script's batches have {rows} rows where {wanted} were asked for: name the "
                "argument that carries them with --arg-map train_micro_batch_size_per_gpu=--ARG"
            )
        taken, asked = max(self._accumulation), self._engine.gradient_accumulation_steps()
        if taken != asked:
            self._fail(
                f"the script updates after {taken} micro-steps where {asked} were asked for: name "
                "the argument that carries them with --arg-map gradient_accumulation_steps=--ARG"
            )

    def facts(self) -> dict[str, Any]:
        """Return what was seen of its batches."""
        return {
            "rows": max(self._rows, default=None),
            "lengths": self._lengths,
            "accumulation_seen": max(self._accumulation, default=None),
        }

    def model_facts(self) -> dict[str, Any]:
        """Return what the engine and its model are."""
        engine, module = self._engine, self._engine.module
        config = getattr(module, "config", None)
        dtypes = Counter(str(one.dtype).removeprefix("torch.") for one in module.parameters())
        return {
            "micro_batch_size": int(engine.train_micro_batch_size_per_gpu()),
            "accumulation": int(engine.gradient_accumulation_steps()),
            "global_batch_size": int(engine.train_batch_size()),
            "zero_stage": int(engine.zero_optimization_stage()),
            "dtype": dtypes.most_common(1)[0][0] if dtypes else "float32",
            "trained": [_elements(one) for one in module.parameters() if one.requires_grad],
            "frozen": [_elements(one) for one in module.parameters() if not one.requires_grad],
            "architecture": type(module).__name__,
            "model_config": config.to_dict()
            if config is not None and hasattr(config, "to_dict")
            else None,
            "attention": getattr(config, "_attn_implementation", None),
            "checkpointing": bool(getattr(module, "is_gradient_checkpointing", False)),
        }


def _elements(parameter: torch.nn.Parameter) -> int:
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def _tensors(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors of a batch by name, those in a mapping that the model is given too."""
    named = [*kwargs.items(), *((f"argument {place}", value) for place, value in enumerate(args))]
    for name, value in named:
        if isinstance(value, torch.Tensor) and value.dim():
            yield name, value
        elif isinstance(value, Mapping):
            yield from _tensors((), value)
        elif isinstance(value, tuple | list):
            yield from _tensors(value, {})
