"""A forward and a backward pass over fake tensors, followed from one allocation to the next."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from autotune.profile.fakery import LibraryScratch
from autotune.profile.live_bytes import LiveBytes, Parts
from autotune.workload import Moment, Polynomial

Floats = NDArray[np.float64]
Places = NDArray[np.int64]
Points = Sequence[tuple[int, int]]

_HANDED_OVER = "a gradient is handed over"
"""Stands among the operators where DeepSpeed takes a gradient, and may reduce a full bucket."""

_LEVELS = 16
"""Shares of the gradients for which a peak is kept where passes differ in their operators."""

_ROWS_TRIED = (1, 8, 64)
_LENGTHS_TRIED = tuple(2**power for power in range(4, 18))
_BYTES_OF_A_GRADIENT = (0.0, 2.0, 4.0, 8.0, 1e6)
"""What an element may cost once its gradient is handed over; the last finds what comes last."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeline:
    """What was alive after each allocation of a pass; arrays of one length.

    Attributes:
        operators: which operator allocated.
        bytes: of activations and of gradients that are not handed over yet.
        logits: those of them in tensors as wide as the vocabulary.
        gradients: elements of the parameters whose gradients have been handed over.
        flops: of all operators until then.
        backward: index of the first allocation of the backward pass.
    """

    operators: tuple[str, ...]
    bytes: Floats
    logits: Floats
    gradients: Floats
    flops: Floats
    backward: int

    def __len__(self) -> int:
        return len(self.operators)


def follow_pass(
    model: Any,  # noqa: ANN401 - PreTrainedModel
    rows: int,
    length: int,
    device: torch.device,
) -> Timeline:
    """Run a batch whose rows have padding; each gradient is let go of as soon as it is whole.

    That is when DeepSpeed takes it over. What becomes of it from there is not the model's.
    """
    live = _Recorder(model, device)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(live.take_gradient)
    with live, LibraryScratch(device.type):
        ids = torch.zeros((rows, length), dtype=torch.int64)
        batch = {"input_ids": ids, "labels": ids.clone(), "attention_mask": ids.clone()}
        # The Trainer copies the batch to the device, and lets go of it when the loss is there.
        on_device = {name: tensor.to(device, copy=True) for name, tensor in batch.items()}
        loss = model(**on_device).loss
        del on_device
        backward = len(live.names)
        loss.backward()
    return Timeline(
        operators=tuple(live.names),
        bytes=np.array(live.bytes, dtype=np.float64),
        logits=np.array(live.logits, dtype=np.float64),
        gradients=np.array(live.gradients, dtype=np.float64),
        flops=np.array(live.flops_until, dtype=np.float64),
        backward=backward,
    )


class _Recorder(LiveBytes):
    """Writes down what is alive at each allocation."""

    def __init__(self, model: Any, device: torch.device) -> None:  # noqa: ANN401 - PreTrainedModel
        known = [*model.parameters(), *model.buffers()]
        super().__init__(known, _ByWidth(model.config.get_text_config().vocab_size))
        self.names: list[str] = []
        self.bytes: list[int] = []
        self.logits: list[int] = []
        self.gradients: list[int] = []
        self.flops_until: list[int] = []
        self._handed_over = 0
        self._device = device.type

    def take_gradient(self, parameter: torch.Tensor) -> None:
        self._write_down(_HANDED_OVER)
        self._handed_over += parameter.numel()
        parameter.grad = None

    def __torch_dispatch__(
        self,
        func: torch._ops.OpOverload[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401 - whatever the operator returns
        before = self.operators
        result = super().__torch_dispatch__(func, types, args, kwargs)
        if self.operators > before:
            self._write_down(str(func))
        return result

    def _write_down(self, name: str) -> None:
        self.names.append(name)
        self.bytes.append(self.current[self._device])
        self.logits.append(self._current_parts[self._device]["logits"])
        self.gradients.append(self._handed_over)
        self.flops_until.append(self.flops)


class _ByWidth(Parts):
    """Takes what is as wide as the vocabulary for logits."""

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size

    def of_new(self, tensor: torch.Tensor) -> str:
        wide = tensor.dim() > 0 and tensor.shape[-1] == self._vocab_size
        return "logits" if wide else "other"


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """What a layer adds to a pass: allocations of forward and backward, elements it trains."""

    forward: int
    backward: int
    gradients: int

    @classmethod
    def between(cls, smaller: Timeline, larger: Timeline) -> "Layer":
        """Tell from passes of a model and of the same model with one layer more."""
        forward = larger.backward - smaller.backward
        return cls(
            forward=forward,
            backward=len(larger) - len(smaller) - forward,
            gradients=int(larger.gradients[-1] - smaller.gradients[-1]),
        )


def deepened(timeline: Timeline, layer: Layer, more: int) -> Timeline:
    """Go on from the pass of a model of three layers to one with so many more of the last kind.

    What a layer keeps for the backward pass is what is alive after an operator beyond what was
    alive after the same operator of the layer before. That much more is alive from the first layer
    of forward to the last of backward; the layers in between only repeat.
    """
    place = np.arange(len(timeline))
    within = 3 * layer.forward - 1
    last_layers = place >= len(timeline) - 2 * layer.backward
    keeping = (place >= layer.forward) & ~last_layers

    def kept(values: Floats) -> Floats:
        a_layer = values[within] - values[within - layer.forward]
        return values + np.where(keeping, more * a_layer, 0.0)

    return replace(
        timeline,
        bytes=kept(timeline.bytes),
        logits=kept(timeline.logits),
        gradients=timeline.gradients + np.where(last_layers, more * layer.gradients, 0.0),
    )


def work_of(timeline: Timeline, layer: Layer | None, more: int) -> tuple[float, float]:
    """Return FLOPs and allocations of a pass, with so many layers more of the last kind."""
    made = [name != _HANDED_OVER for name in timeline.operators]
    flops, allocations = float(timeline.flops[-1]), float(sum(made))
    if layer is None:
        return flops, allocations
    forward, backward = 3 * layer.forward - 1, len(timeline) - 2 * layer.backward
    a_layer = (
        timeline.flops[forward]
        - timeline.flops[forward - layer.forward]
        + timeline.flops[backward]
        - timeline.flops[backward - layer.backward]
    )
    of_a_layer = layer.forward + sum(made[backward - layer.backward : backward])
    return flops + more * float(a_layer), allocations + more * of_a_layer


def moments_of(
    points: Points, timelines: Sequence[Timeline], lengths: tuple[int, int]
) -> tuple[Moment, ...]:
    """Return the moments of a pass of which one is the peak, from passes at (rows, length) points.

    Between the two `lengths` every pass has the same operators.

    A storage is as large as a product of rows and lengths, so what is alive at a moment is
    a + b s + c s^2 + m (d + e s + f s^2) bytes; three lengths with two numbers of rows give it. Of
    points with one number of rows all counts as the rows'.
    """
    if len({one.operators for one in timelines}) > 1:
        timelines = [_by_level(one) for one in timelines]
    bytes_ = _coefficients(points, [one.bytes for one in timelines])
    logits = _coefficients(points, [one.logits for one in timelines])
    operators, gradients = timelines[0].operators, timelines[0].gradients
    backward = timelines[0].backward
    return tuple(
        Moment(
            batch_bytes=_polynomial(bytes_[:3, place]),
            rows_bytes=_polynomial(bytes_[3:, place]),
            logits_bytes=_polynomial(logits[3:, place]),
            gradients=float(gradients[place]),
            hands_over=operators[place] == _HANDED_OVER,
            lengths=lengths,
        )
        for place in _peaks(bytes_, gradients, _kinds(operators, backward))
    )


def _basis(rows: float, length: float) -> list[float]:
    of_a_row = [1.0, length, length**2]
    return of_a_row + [rows * one for one in of_a_row]


def _coefficients(points: Points, values: Sequence[Floats]) -> Floats:
    """Return six coefficients for each moment; what falls with rows or length is rounding."""
    bases = np.array([_basis(*point) for point in points])
    unknown = slice(0, 6) if len({rows for rows, _ in points}) > 1 else slice(3, 6)
    scale = bases.max(axis=0)
    coefficients = np.zeros((6, len(values[0])))
    coefficients[unknown] = np.linalg.lstsq(
        (bases / scale)[:, unknown], np.array(values), rcond=None
    )[0]
    scaled: Floats = coefficients / scale[:, None]
    return np.maximum(scaled, 0.0)


def _polynomial(coefficients: Floats) -> Polynomial:
    c0, c1, c2 = coefficients.tolist()
    return Polynomial(c0=c0, c1=c1, c2=c2)


def _kinds(operators: Sequence[str], backward: int) -> list[Places]:
    """Return the places of the forward pass, of the backward pass, and where it hands over."""
    place = np.arange(len(operators))
    hands_over = np.array(operators) == _HANDED_OVER
    kinds = (place < backward, (place >= backward) & ~hands_over, hands_over)
    return [np.flatnonzero(kind) for kind in kinds if kind.any()]


def _peaks(bytes_: Floats, gradients: Floats, kinds: Sequence[Places]) -> list[int]:
    """Return the places that are the highest for some rows, length and cost of a gradient."""
    found = set()
    for rows in _ROWS_TRIED:
        for length in _LENGTHS_TRIED:
            alive = np.array(_basis(rows, length)) @ bytes_
            for cost in _BYTES_OF_A_GRADIENT:
                total = alive + cost * gradients
                found |= {int(places[np.argmax(total[places])]) for places in kinds}
    return sorted(found)


def _by_level(timeline: Timeline) -> Timeline:
    """Keep the peak of the forward pass, and those of the backward pass from a level on."""
    handed_over = timeline.gradients / max(1.0, float(timeline.gradients[-1]))
    place = np.arange(len(timeline))
    ranges = [place < timeline.backward] + [
        (place >= timeline.backward) & (handed_over >= level / _LEVELS) for level in range(_LEVELS)
    ]
    kept = [int(np.argmax(np.where(inside, timeline.bytes, -1.0))) for inside in ranges]
    return replace(
        timeline,
        operators=("", *[_HANDED_OVER] * _LEVELS),
        backward=1,
        **{
            name: getattr(timeline, name)[kept]
            for name in ("bytes", "logits", "gradients", "flops")
        },
    )
