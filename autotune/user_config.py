"""A user's own DeepSpeed config: what of it is kept, and what it says of job and knobs.

One rule for what two say: the job goes before the file where its option was given, and the file
before a default; a flag --set goes before the file. What gives way is told.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from autotune.config import Options, default_rate, read_option
from autotune.errors import ConfigError
from autotune.knobs import BY_NAME, Pins, Value, as_text, read_value
from autotune.optimizer import ADAFACTOR, Optimizer

AUTO = "auto"
"""What transformers takes for: fill this in."""

_ZERO = "zero_optimization"

_OF_THE_JOB = {
    ("train_batch_size",): "global_batch_size",
    ("gradient_clipping",): "max_grad_norm",
    ("optimizer", "params", "lr"): "learning_rate",
    ("optimizer", "params", "weight_decay"): "weight_decay",
    (_ZERO, "offload_optimizer", "nvme_path"): "nvme_path",
}
"""Keys that say what an option of the job says."""

_TUNED = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps")

_KNOBS = {
    (_ZERO, "stage"): "zero_stage",
    (_ZERO, "offload_optimizer", "device"): "offload_optimizer",
    (_ZERO, "offload_param", "device"): "offload_param",
    (_ZERO, "overlap_comm"): "overlap_comm",
    (_ZERO, "reduce_bucket_size"): "reduce_bucket_size",
    (_ZERO, "allgather_bucket_size"): "allgather_bucket_size",
    (_ZERO, "stage3_prefetch_bucket_size"): "stage3_prefetch_bucket_size",
    (_ZERO, "stage3_param_persistence_threshold"): "stage3_param_persistence_threshold",
    (_ZERO, "zero_hpz_partition_size"): "zero_hpz_partition_size",
}
_PLACES = frozenset({"zero_stage", "offload_optimizer", "offload_param"})
"""Knobs that a file means for the training as a whole; others only where a stage has them."""

_OPTIMIZERS: dict[str, Optimizer] = {"adam": "adamw", "adamw": "adamw", "adafactor": "adafactor"}
"""Types that DeepSpeed's config can name, and what they are called here."""

_HOW_ADAM_RUNS = ("torch_adam", "fused", "adam_w_mode")
_SECTIONS = (_ZERO, "optimizer", "bf16", "fp16", "scheduler")
_DEPRECATED = {"cpu_offload": "offload_optimizer", "cpu_offload_params": "offload_param"}


@dataclass(frozen=True, slots=True, kw_only=True)
class UserConfig:
    """What a file says.

    Attributes:
        kept: what goes into the emitted config as it is, over what would be there.
        options: the options, with what the file says in place of defaults.
        pins: the pins, those of the file added.
        notes: what gave way, a sentence each.
    """

    kept: dict[str, Any]
    options: Options
    pins: Pins
    notes: tuple[str, ...]


def read_user_config(text: str, name: str, options: Options, pins: Pins) -> UserConfig:
    """Read the content of a DeepSpeed config file that is called `name`.

    Raises:
        ConfigError: it is no JSON object, or a key of it has a value that cannot be.
    """
    reader = _Reader(_parsed(text, name), name, options)
    reader.drop_what_is_not_kept()
    reader.read_job()
    reader.read_precision()
    reader.read_optimizer()
    pins = reader.read_knobs(pins)
    reader.drop_autos()
    return UserConfig(
        kept=reader.kept,
        options=options.recommended(reader.taken, name),
        pins=pins,
        notes=tuple(reader.notes),
    )


def _parsed(text: str, name: str) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except ValueError as error:
        msg = f"{name} is not JSON: {error}"
        raise ConfigError(msg) from None
    if not isinstance(content, dict):
        msg = f"{name} holds no JSON object, as a DeepSpeed config is"
        raise ConfigError(msg)
    for section in _SECTIONS:
        if not isinstance(content.get(section, {}), dict):
            msg = f"{name}: {section} is no JSON object"
            raise ConfigError(msg)
    zero = content.get(_ZERO, {})
    for section in ("offload_optimizer", "offload_param"):
        if not isinstance(zero.get(section) or {}, dict):
            msg = f"{name}: {_ZERO}.{section} is no JSON object"
            raise ConfigError(msg)
    if not isinstance(content.get("optimizer", {}).get("params", {}), dict):
        msg = f"{name}: optimizer.params is no JSON object"
        raise ConfigError(msg)
    return content


class _Reader:
    """Takes what is not kept out of a config, and remembers what it said."""

    def __init__(self, content: dict[str, Any], name: str, options: Options) -> None:
        self.kept = content
        self.taken: dict[str, Any] = {}
        self.notes: list[str] = []
        self._name = name
        self._options = options

    def drop_what_is_not_kept(self) -> None:
        if self._take(("autotuning",)) is not None:
            self._note("autotuning is left out, as nothing tunes the emitted config any more")
        if self._take(("scheduler",)) is not None:
            self._note("scheduler gives way to the job's (--lr-scheduler, --warmup-ratio)")
        tuned = [key for key in _TUNED if _is_said(self._take((key,)))]
        if tuned:
            self._note(
                f"{' and '.join(tuned)} are tuned: pin micro_batch_size with --set to keep it"
            )
        for old, new in _DEPRECATED.items():
            if old in self.kept.get(_ZERO, {}):
                msg = f'{self._name}: {old} is deprecated: write "{new}": {{"device": "cpu"}}'
                raise ConfigError(msg)

    def read_job(self) -> None:
        for path, option in _OF_THE_JOB.items():
            value = self._take(path)
            if _is_said(value):
                self._say(path, option, read_option(option, value, f"{self._name}: {path[-1]}"))

    def read_precision(self) -> None:
        enabled = []
        for precision in ("bf16", "fp16"):
            value = self._take((precision, "enabled"))
            if _is_said(value) and not isinstance(value, bool):
                msg = f"{self._name}: {precision}.enabled is {value!r}, neither true nor false"
                raise ConfigError(msg)
            if value is True:
                enabled.append(precision)
        if len(enabled) > 1:
            msg = f"{self._name}: bf16 and fp16 are both enabled: choose one"
            raise ConfigError(msg)
        for precision in enabled:
            self._say((precision, "enabled"), "precision", precision)

    def _say(self, path: tuple[str, ...], option: str, value: Any) -> None:  # noqa: ANN401
        """Take what the file says of an option for it, if nobody else has said."""
        if self._options.is_default(option):
            self.taken[option] = value
        elif self._options[option] != value:
            asked, source = self._options[option], self._options.sources[option]
            flag = option.replace("_", "-")
            self._note(f"{'.'.join(path)} gives way to --{flag} {asked} ({source})")

    def read_optimizer(self) -> None:
        kind = self._take(("optimizer", "type"))
        params = self.kept.get("optimizer", {}).get("params", {})
        meant = _OPTIMIZERS.get(str(kind).lower())
        if _is_said(kind) and meant is not None:
            self._say(("optimizer", "type"), "optimizer", meant)
            if "optimizer" in self.taken and self._options.is_default("learning_rate"):
                rate = default_rate(self._options["method"], meant)
                self.taken.setdefault("learning_rate", rate)
        chosen = self.taken.get("optimizer", self._options["optimizer"])
        if _is_said(kind) and meant is None:
            self._note(f"optimizer {kind} gives way to {chosen}, which is what is trained with")
            self.kept.pop("optimizer")
        elif ADAFACTOR in {chosen, meant}:
            left_out = self.kept.pop("optimizer", {}).get("params")
            if left_out:
                self._note(f"optimizer.params {', '.join(left_out)} are not those of {chosen}")
        elif params.get("adam_w_mode") is False:
            self._note("adam_w_mode false gives way to AdamW, which is what is trained with")
        for name in _HOW_ADAM_RUNS:
            params.pop(name, None)
        self._require_numbers("betas", params.get("betas", AUTO), 2)
        self._require_numbers("eps", [params.get("eps", AUTO)], 1)

    def _require_numbers(self, name: str, values: Any, count: int) -> None:  # noqa: ANN401 - JSON
        if values in (AUTO, [AUTO]):
            return
        numbers = values if isinstance(values, list) else []
        if len(numbers) != count or not all(type(one) in {int, float} for one in numbers):
            msg = f"{self._name}: optimizer.params.{name} is {values!r}: give {count} of numbers"
            raise ConfigError(msg)

    def read_knobs(self, pins: Pins) -> Pins:
        values: dict[str, tuple[Value, ...]] = {}
        for path, knob in _KNOBS.items():
            value = self._take(path)
            if not _is_said(value):
                continue
            if knob in pins:
                if (said := pins[knob]) != (self._read(knob, value),):
                    self._note(
                        f"{'.'.join(path)} gives way to --set {knob}={','.join(map(as_text, said))}"
                    )
                continue
            values[knob] = (self._read(knob, value),)
        return Pins(
            values={**values, **pins.values},
            where_there=frozenset(values.keys() - _PLACES),
        )

    def _read(self, knob: str, value: Any) -> Value:  # noqa: ANN401 - JSON
        if isinstance(value, float) and value.is_integer():
            # People write 5e8.
            value = int(value)
        try:
            return read_value(BY_NAME[knob], value)
        except ValueError as error:
            msg = f"{self._name}: {error}"
            raise ConfigError(msg) from None

    def drop_autos(self) -> None:
        """Leave out what is still "auto": ours stands in its place, or DeepSpeed's default."""
        zero = self.kept.get(_ZERO, {})
        for section in ("offload_optimizer", "offload_param"):
            if not zero.get(section, AUTO):
                zero.pop(section)
        self.kept = _without_autos(self.kept)

    def _take(self, path: tuple[str, ...]) -> Any:  # noqa: ANN401 - JSON
        """Take a key out; None if it is not there."""
        section: Any = self.kept
        for key in path[:-1]:
            section = section.get(key) or {}
        return section.pop(path[-1], None)

    def _note(self, text: str) -> None:
        self.notes.append(f"{self._name}: {text}")


def _is_said(value: Any) -> bool:  # noqa: ANN401 - JSON
    return value is not None and value != AUTO


def _without_autos(section: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: _without_autos(value) if isinstance(value, dict) else value
        for key, value in section.items()
        if value != AUTO
    }
