"""The state of a training without the shape that an engine gave it: any ZeRO stage can read it.

A checkpoint has, by parameter name, the fp32 weight and the moments of every parameter that is
trained, whole, in safetensors files; state.json has the optimizer's step, the schedule and the loss
scale. Each rank writes some of the parameters, and reads them all, one at a time. Adam's moments
are in fp32 there, also those that are held in 8 bits, whose blocks depend on the stage.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from autotune.rundir import write_json
from autotune.train import eight_bit

MOMENTS = ("exp_avg", "exp_avg_sq")
_FACTORED = ("row_var", "col_var", "variance")
"""Of torch's Adafactor: a parameter has the first two or the last."""

_WEIGHT = "weight"
_DIRECTORY, _DOCUMENT = "state", "state.json"
_FILE_BYTES = 1 << 29
_SCALER_FIELDS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")

_Flats = list[torch.Tensor]


class EngineState:
    """Weights and moments of a DeepSpeed engine, whole and by name, whatever its optimizer."""

    def __init__(self, engine: Any) -> None:  # noqa: ANN401 - DeepSpeedEngine
        self._optimizer = engine.optimizer
        self._inner = getattr(engine.optimizer, "optimizer", engine.optimizer)
        self.parameters = {
            name: parameter
            for name, parameter in engine.module.named_parameters()
            if parameter.requires_grad
        }
        self._views = _views_of_groups(engine.optimizer)

    @property
    def has_moments(self) -> bool:
        """Whether an update was taken; before the first one there are none."""
        return any(self._inner.state.get(flat) for flat in self._flats())

    def keys(self, name: str) -> tuple[str, ...]:
        """Return the moments of a parameter."""
        if not isinstance(self._inner, torch.optim.Adafactor):
            return MOMENTS
        state = self._inner.state[self._weight(self.parameters[name])]
        return tuple(key for key in _FACTORED if key in state)

    @contextmanager
    def unquantised(self, *, changes: bool) -> Iterator[None]:
        """Hold moments of 8 bits in fp32 meanwhile, on the host; back in 8 bits if it `changes`."""
        states = [
            state for state in map(self._inner.state.get, self._flats()) if eight_bit.holds(state)
        ]
        for state in states:
            eight_bit.widen(state, MOMENTS)
        self._link()
        yield
        for state in states:
            eight_bit.narrow(state, MOMENTS, changed=changes)
        self._link()

    def _link(self) -> None:
        """Have ZeRO 1 and 2 look at the states of parameters anew."""
        if hasattr(self._optimizer, "_lazy_init_hp_params_optimizer_state"):
            self._optimizer._hp_optimizer_states_linked = False  # noqa: SLF001
            self._optimizer._lazy_init_hp_params_optimizer_state()  # noqa: SLF001 - as its own step does

    def tensor(self, name: str, key: str) -> torch.Tensor:
        """Return a whole tensor in fp32; a collective."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        parameter = self.parameters[name]
        if _is_partitioned(parameter):
            if key == _WEIGHT:
                whole = safe_get_full_fp32_param(parameter)
            else:
                whole = safe_get_full_optimizer_state(parameter, key)
        else:
            whole = self._replicated(parameter, key)
        as_fp32: torch.Tensor = whole.detach().float()
        return as_fp32 if key in _FACTORED else as_fp32.reshape(_shape(parameter))

    def set_tensor(self, name: str, key: str, value: torch.Tensor) -> None:
        """Put a whole tensor in place, a weight in both types; a collective."""
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        parameter = self.parameters[name]
        if key == _WEIGHT:
            _set_computed(parameter, value)
        value = value.to(parameter.device)
        if not _is_partitioned(parameter):
            self._replicated(parameter, key).data.copy_(value)
        elif key == _WEIGHT:
            safe_set_full_fp32_param(parameter, value)
        else:
            safe_set_full_optimizer_state(parameter, value, key)

    def _replicated(self, parameter: torch.Tensor, key: str) -> torch.Tensor:
        if not self._views:
            return parameter if key == _WEIGHT else self._inner.state[parameter][key]
        flat, start = self._views[parameter]
        source: torch.Tensor = flat if key == _WEIGHT else self._inner.state[flat][key]
        if key in _FACTORED:
            return source
        return source.view(-1).narrow(0, start, parameter.numel()).view(parameter.shape)

    def _weight(self, parameter: torch.Tensor) -> torch.Tensor:
        """Return the tensor that a parameter's states belong to, without ZeRO."""
        return self._views[parameter][0] if self._views else parameter

    @property
    def step(self) -> int:
        """Updates that the moments have seen, which their bias is corrected for."""
        state = self._inner.state[self._flats()[0]]
        return int(state["step"] if "step" in state else self._inner.param_groups[0]["step"])

    def make_moments(self, step: int) -> None:
        """Make the states that the optimizer would make at its first update."""
        if eight_bit.updates_in(self._inner):
            eight_bit.make(self._inner, self._flats(), step)
            return
        by_torch = isinstance(self._inner, torch.optim.AdamW | torch.optim.Adafactor)
        for flat in self._flats():
            state = self._inner.state[flat]
            for key, shape in self._shapes(flat).items():
                state.setdefault(key, flat.new_zeros(shape))
            # torch's optimizer counts in a tensor, DeepSpeed's in a number, by state or by group.
            state["step"] = torch.tensor(float(step), device=flat.device) if by_torch else step
            if by_torch and not self._inner.param_groups[0].get("fused"):
                state["step"] = state["step"].cpu()
        if not by_torch:
            for group in self._inner.param_groups:
                group["step"] = step
        self._link()

    def _shapes(self, flat: torch.Tensor) -> dict[str, torch.Size]:
        """Return the shapes of the moments of a tensor."""
        if not isinstance(self._inner, torch.optim.Adafactor):
            return dict.fromkeys(MOMENTS, flat.shape)
        if flat.dim() == 1:
            return {"variance": flat.shape}
        return {
            "row_var": torch.Size([*flat.shape[:-1], 1]),
            "col_var": torch.Size([*flat.shape[:-2], 1, flat.shape[-1]]),
        }

    def _flats(self) -> _Flats:
        """Return the tensors that the inner optimizer's states belong to."""
        for name in (
            "fp32_partitioned_groups_flat",
            "single_partition_of_fp32_groups",
            "fp32_groups_flat_partition",
            "fp32_groups_flat",
        ):
            if hasattr(self._optimizer, name):
                return list(getattr(self._optimizer, name))
        return [one for group in self._inner.param_groups for one in group["params"]]

    @property
    def _scaler(self) -> Any:  # noqa: ANN401 - DeepSpeed has several
        return getattr(
            self._optimizer, "loss_scaler", getattr(self._optimizer, "loss_scale_config", None)
        )

    def scale(self) -> dict[str, float]:
        """Return where the loss scale of fp16 stands."""
        scaler = self._scaler
        return {name: getattr(scaler, name) for name in _SCALER_FIELDS if hasattr(scaler, name)}

    def set_scale(self, scale: dict[str, float]) -> None:
        scaler = self._scaler
        for name, value in scale.items():
            if hasattr(scaler, name):
                setattr(scaler, name, value)


def _is_partitioned(parameter: Any) -> bool:  # noqa: ANN401 - attributes of DeepSpeed's
    return hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping")


def _shape(parameter: Any) -> torch.Size:  # noqa: ANN401 - attributes of DeepSpeed's
    shape: torch.Size = getattr(parameter, "ds_shape", parameter.shape)
    return shape


def _views_of_groups(optimizer: Any) -> dict[torch.Tensor, tuple[torch.Tensor, int]]:  # noqa: ANN401
    """Return where a parameter lies in the fp32 weights of an optimizer without ZeRO.

    DeepSpeed keeps them flat by group for optimizers that are fused, one by one for others.
    """
    views: dict[torch.Tensor, tuple[torch.Tensor, int]] = {}
    groups = getattr(optimizer, "fp16_groups", ())
    for group, weights in zip(groups, getattr(optimizer, "fp32_groups", ()), strict=False):
        views |= {parameter: (weight, 0) for parameter, weight in zip(group, weights, strict=True)}
    for group, flat in zip(groups, getattr(optimizer, "fp32_groups_flat", ()), strict=False):
        start = 0
        for parameter in group:
            views[parameter] = (flat, start)
            start += parameter.numel()
    return views


def _set_computed(parameter: Any, value: torch.Tensor) -> None:  # noqa: ANN401 - DeepSpeed's
    import deepspeed

    if not hasattr(parameter, "ds_id"):
        parameter.data.copy_(value)
        return
    with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
        if torch.distributed.get_rank() == 0:
            parameter.data.copy_(value)


def save_state(engine: Any, scheduler: Any, directory: Path) -> None:  # noqa: ANN401
    """Write the state of a training into a checkpoint; every rank takes part."""
    state = EngineState(engine)
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    target = directory / _DIRECTORY
    target.mkdir(parents=True, exist_ok=True)
    has_moments = state.has_moments
    held: dict[str, torch.Tensor] = {}
    files = 0
    with state.unquantised(changes=False):
        for place, name in enumerate(state.parameters):
            for key in (_WEIGHT, *(state.keys(name) if has_moments else ())):
                whole = state.tensor(name, key)
                if place % ranks == rank:
                    held[f"{key}/{name}"] = whole.to("cpu", copy=True).contiguous()
            if sum(tensor.nbytes for tensor in held.values()) > _FILE_BYTES:
                save_file(held, target / f"{rank}-{files}.safetensors")
                files, held = files + 1, {}
    save_file(held, target / f"{rank}-{files}.safetensors")
    if rank == 0:
        write_json(
            target / _DOCUMENT,
            {
                "schema": 1,
                "step": state.step if has_moments else 0,
                "has_moments": has_moments,
                "scale": state.scale(),
                "scheduler": scheduler.state_dict(),
            },
        )


def load_state(engine: Any, scheduler: Any, directory: Path) -> None:  # noqa: ANN401
    """Bring an engine of any ZeRO stage and number of ranks to the state of a checkpoint."""
    document = json.loads((directory / _DIRECTORY / _DOCUMENT).read_text())
    state = EngineState(engine)
    has_moments = document["has_moments"]
    if has_moments:
        state.make_moments(document["step"])
    with torch.no_grad(), state.unquantised(changes=True):
        stored = dict(_stored(directory / _DIRECTORY))
        for name in state.parameters:
            for key in (_WEIGHT, *(state.keys(name) if has_moments else ())):
                state.set_tensor(name, key, stored[f"{key}/{name}"]())
    state.set_scale(document["scale"])
    scheduler.load_state_dict(document["scheduler"])
    for group, rate in zip(engine.optimizer.param_groups, scheduler.get_last_lr(), strict=True):
        group["lr"] = rate


def _stored(directory: Path) -> Iterator[tuple[str, Callable[[], torch.Tensor]]]:
    """Yield each tensor's name and what reads it; the files are mapped, not loaded."""
    for path in sorted(directory.glob("*.safetensors")):
        file = safe_open(path, framework="pt")
        for name in file.keys():  # type: ignore[no-untyped-call]  # noqa: SIM118 - no mapping
            yield name, partial(file.get_tensor, name)
