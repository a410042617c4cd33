"""Options: what there is, where each value came from, and how text becomes a value."""

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import Any, TypeVar

import yaml

from autotune.errors import ConfigError
from autotune.knobs import KNOBS, read_pins
from autotune.optimizer import ADAFACTOR, OPTIMIZERS, Optimizer, read_optimizer
from autotune.units import parse_bytes, parse_duration
from autotune.workload import ALL_LINEAR

Parse = Callable[[Any], Any]

FORMATS = (
    "messages",
    "sharegpt",
    "sharegpt-pairs",
    "chatglm3",
    "glm4",
    "alpaca",
    "prompt-completion",
    "prompt-response",
    "context-target",
    "adgen",
    "text",
    "segments",
    "tokens",
)
"""The conventions of rows that the dataset package reads; a test holds the two lists together."""

METHODS = ("full", "lora", "qlora")
"""What can be trained."""

SAMPLERS = ("prior", "tpe", "gp", "random")
"""What can propose what to probe; all but the first are Optuna's."""

AUTO = "auto"

_LEARNING_RATES = {"full": 2e-5, "lora": 2e-4, "qlora": 2e-4}
_RELATIVE_RATES = {"full": 1e-3, "lora": 1e-2, "qlora": 1e-2}
"""Of Adafactor, whose rate is a share of a weight's size: that of T5's fine-tuning
(arXiv:1910.10683, section 3.1.2), and torch's own default."""

_OF_ADAPTERS = ("lora_rank", "lora_alpha", "lora_dropout", "lora_targets", "merge")

_TUNED = "it is part of the setting that is tuned"
_OWN_ARGUMENTS = {
    "per_device_train_batch_size": _TUNED,
    "gradient_accumulation_steps": _TUNED,
    "gradient_checkpointing": _TUNED,
    "auto_find_batch_size": _TUNED,
    "train_sampling_strategy": _TUNED,
    "deepspeed": _TUNED,
    "output_dir": "use --run-dir",
    "num_train_epochs": "use --epochs",
    "max_steps": "use --max-steps",
    "learning_rate": "use --learning-rate",
    "lr_scheduler_type": "use --lr-scheduler",
    "warmup_steps": "use --warmup-ratio",
    "warmup_ratio": "use --warmup-ratio",
    "weight_decay": "use --weight-decay",
    "max_grad_norm": "use --max-grad-norm",
    "bf16": "use --precision",
    "fp16": "use --precision",
    "seed": "use --seed",
    "data_seed": "use --seed",
    "use_cpu": "use --devices",
    "optim": "use --optimizer",
    "adam_beta1": "the emitted DeepSpeed config names the optimizer",
    "adam_beta2": "the emitted DeepSpeed config names the optimizer",
    "adam_epsilon": "the emitted DeepSpeed config names the optimizer",
    "remove_unused_columns": "the rows are tokenised already",
    "dataloader_drop_last": "every row of an epoch is trained on",
}
"""Arguments of transformers' TrainingArguments that follow from something else, and from what."""

_MAX_WHOLE = 2**63 - 1
_MAX_SEED = 2**32 - 1
"""What the random generators of NumPy take."""

Schema = dict[str, Any]

_Reader = TypeVar("_Reader", bound=Parse)

_SCHEMAS: dict[Parse, Schema] = {}
"""JSON Schema of what each reader takes from YAML."""

_NUMERIC = r"^\s*[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?\s*$"
_AMOUNT = r"^\s*[0-9]+(\.[0-9]+)?\s*[A-Za-z]*\s*$"
_PAIR = "="


def _takes(schema: Schema) -> Callable[[_Reader], _Reader]:
    """Say what a reader takes, for editors; only the reader decides what is refused."""

    def register(parse: _Reader) -> _Reader:
        _SCHEMAS[parse] = schema
        return parse

    return register


def _a_number(**bounds: Any) -> Schema:  # noqa: ANN401 - keywords of JSON Schema
    # YAML 1.1 reads 1e-4 as text, YAML 1.2 as a number; an editor may do either.
    return {"anyOf": [{"type": "number", **bounds}, {"type": "string", "pattern": _NUMERIC}]}


_TEXTS: Schema = {
    "anyOf": [
        {"type": ["string", "integer"]},
        {"type": "array", "items": {"type": ["string", "integer"]}},
    ]
}
_PAIRS: Schema = {
    "anyOf": [
        {"type": "object"},
        {"type": "string", "pattern": _PAIR},
        {"type": "array", "items": {"type": "string", "pattern": _PAIR}},
    ]
}


def _number(value: Any) -> Decimal:  # noqa: ANN401 - YAML or text; YAML reads 1e-4 as text
    try:
        number = Decimal(str(value))
    except InvalidOperation:
        number = Decimal("nan")
    if not number.is_finite():
        msg = f"{value!r} is not a number"
        raise ValueError(msg)
    return number


def _whole(smallest: int, largest: int = _MAX_WHOLE) -> Parse:
    up_to = "" if largest == _MAX_WHOLE else f" and {largest} or less"

    @_takes(_a_number(minimum=smallest, maximum=largest, multipleOf=1))
    def parse(value: Any) -> int:  # noqa: ANN401 - YAML or text
        number = _number(value)
        if not smallest <= number <= largest or number % 1:
            msg = f"{value!r} is not a whole number of {smallest} or more{up_to}"
            raise ValueError(msg)
        return int(number)

    return parse


_POSITIVE = _whole(1)


@_takes(_a_number(exclusiveMinimum=0))
def _above_zero(value: Any) -> float:  # noqa: ANN401 - YAML or text
    number = float(_number(value))
    if not 0 < number < float("inf"):
        msg = f"{value!r} is not a number above zero"
        raise ValueError(msg)
    return number


@_takes(_a_number(minimum=0, exclusiveMaximum=1))
def _share(value: Any) -> float:  # noqa: ANN401 - YAML or text
    number = float(_number(value))
    if not 0 <= number < 1:
        msg = f"{value!r} is not a share from 0 to below 1"
        raise ValueError(msg)
    return number


@_takes(_a_number(minimum=0))
def _not_negative(value: Any) -> float:  # noqa: ANN401 - YAML or text
    number = float(_number(value))
    if not 0 <= number < float("inf"):
        msg = f"{value!r} is not a number of zero or more"
        raise ValueError(msg)
    return number


@_takes({"type": ["string", "integer"]})
def _text(value: Any) -> str:  # noqa: ANN401 - YAML or text
    text = str(value)
    if isinstance(value, bool) or not isinstance(value, str | int) or not text.strip():
        msg = f"{value!r} is not a text"
        raise ValueError(msg)
    return text


@_takes({"type": "boolean"})
def _flag(value: Any) -> bool:  # noqa: ANN401 - YAML or text
    if value is not True and value is not False:
        msg = f"{value!r} is neither true nor false"
        raise ValueError(msg)
    return value


@_takes({"anyOf": [{"const": "auto"}, *_a_number(minimum=1, multipleOf=1)["anyOf"]]})
def _whole_or_auto(value: Any) -> int | None:  # noqa: ANN401 - YAML or text
    return None if value == "auto" else _POSITIVE(value)


@_takes({"anyOf": [*_TEXTS["anyOf"], {"type": "object"}]})
def _texts(value: Any) -> tuple[str, ...]:  # noqa: ANN401 - YAML or text, one or a list
    """Read one text or several; a mapping gives a text "name=value" for each of its entries."""
    if isinstance(value, dict):
        value = [f"{name}={entry}" for name, entry in value.items()]
    return tuple(_text(entry) for entry in (value if isinstance(value, (list, tuple)) else [value]))


@_takes(_PAIRS)
def _trainer_arguments(value: Any) -> dict[str, Any]:  # noqa: ANN401 - YAML or text
    """Read key=value, or a mapping; values are YAML, so that 10 is a number and yes is true."""
    if isinstance(value, dict):
        given = dict(value)
    else:
        given = {}
        for text in _texts(value):
            name, separator, content = text.partition("=")
            if not separator:
                msg = f"{text!r} is not key=value"
                raise ValueError(msg)
            try:
                given[name] = yaml.safe_load(content)
            except yaml.YAMLError:
                msg = f"the value of {text!r} is not YAML"
                raise ValueError(msg) from None
    for name in given:
        if name in _OWN_ARGUMENTS:
            msg = f"{name} is not yours to set here: {_OWN_ARGUMENTS[name]}"
            raise ValueError(msg)
    return given


@_takes(_TEXTS)
def _targets(value: Any) -> tuple[str, ...]:  # noqa: ANN401 - YAML or text, one or a list
    targets = _texts(value)
    if ALL_LINEAR in targets and len(targets) > 1:
        msg = f"{ALL_LINEAR} has every linear layer already: name it alone, or layers"
        raise ValueError(msg)
    return targets


@_takes({"type": ["integer", "string"], "minimum": 0, "pattern": r"^\s*[0-9.]+%?\s*$"})
def _cap(value: Any) -> str:  # noqa: ANN401 - YAML or text
    text = str(value).strip()
    if _number(text.removesuffix("%")) < 0:
        msg = f"{value!r} is neither a number of lines nor a share like 2%"
        raise ValueError(msg)
    return text


@_takes({"type": ["integer", "string"], "pattern": _AMOUNT})
def _size(value: Any) -> int:  # noqa: ANN401 - YAML or text
    return parse_bytes(str(value))


@_takes({"type": ["number", "string"], "pattern": _AMOUNT})
def _duration(value: Any) -> float:  # noqa: ANN401 - YAML or text
    return parse_duration(str(value))


@_takes({"type": ["number", "string"], "pattern": f"{_AMOUNT}|^auto$"})
def _duration_or_auto(value: Any) -> float | str:  # noqa: ANN401 - YAML or text
    return AUTO if value == AUTO else _duration(value)


def _one_of(*choices: str) -> Parse:
    @_takes({"enum": list(choices)})
    def parse(value: Any) -> str:  # noqa: ANN401 - YAML or text
        if value not in choices:
            msg = f"{value!r} is none of {', '.join(choices)}"
            raise ValueError(msg)
        return str(value)

    return parse


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """An option of the command line and key of the configuration file.

    `default` is what holds if nobody says anything; None means that it follows from other facts.
    With `multiple` the flag may be repeated. With `is_config` a value that cannot be is a
    ConfigError on the command line too.
    """

    name: str
    parse: Parse
    default: Any
    metavar: str
    help: str
    multiple: bool = False
    is_config: bool = False

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    @property
    def schema(self) -> Schema:
        """JSON Schema of its value in YAML; a key without a value says nothing."""
        return {"anyOf": [_SCHEMAS.get(self.parse, {}), {"type": "null"}]}

    @property
    def choices(self) -> tuple[str, ...]:
        """The values that it can have, where they can be listed."""
        schema = _SCHEMAS.get(self.parse, {})
        choices: list[str] = schema.get("enum") or schema.get("examples") or []
        return tuple(choices)


OPTIONS: tuple[Option, ...] = (
    Option(
        name="model",
        parse=_text,
        default="builtin:glm-tiny",
        metavar="MODEL",
        help="Hub id, local directory, or builtin:glm-tiny (a small demo model).",
    ),
    Option(
        name="dataset",
        parse=_texts,
        default=None,
        metavar="FILE[@WEIGHT]",
        help="JSONL file to train on; its rows are taken WEIGHT times an epoch. May be repeated.",
        multiple=True,
    ),
    Option(
        name="format",
        parse=_one_of(*FORMATS),
        default=None,
        metavar="NAME",
        help=f"Convention of the rows [recognised]: {', '.join(FORMATS)}.",
    ),
    Option(
        name="map",
        parse=_texts,
        default=None,
        metavar="ROLE=KEY",
        help="Key of the rows for user, assistant, input, system, history, tools; or for messages, "
        "role, content; or for text. May be repeated.",
        multiple=True,
    ),
    Option(
        name="train_on_prompt",
        parse=_flag,
        default=False,
        metavar="",
        help="Train on every token, not on the answers alone.",
    ),
    Option(
        name="on_bad_line",
        parse=_one_of("fail", "skip", "quarantine"),
        default="fail",
        metavar="fail|skip|quarantine",
        help="What a line that cannot be used does; quarantine keeps it in a file.",
    ),
    Option(
        name="max_bad_lines",
        parse=_cap,
        default=None,
        metavar="N|X%",
        help="Bad lines that are borne when they are skipped [1% of the rows, at least 100].",
    ),
    Option(
        name="run_dir",
        parse=_text,
        default=None,
        metavar="DIR",
        help="Where everything about the run goes [runs/<dataset>-<model>-<fingerprint>].",
    ),
    Option(
        name="method",
        parse=_one_of(*METHODS),
        default="full",
        metavar="|".join(METHODS),
        help="What is trained: all parameters, or low-rank adapters of the linear layers, with "
        "qlora beside weights in 4 bits.",
    ),
    Option(
        name="lora_rank",
        parse=_POSITIVE,
        default=16,
        metavar="N",
        help="Inner dimension of an adapter.",
    ),
    Option(
        name="lora_alpha",
        parse=_POSITIVE,
        default=None,
        metavar="N",
        help="Adapters are scaled by this over their rank [twice the rank].",
    ),
    Option(
        name="lora_dropout",
        parse=_share,
        default=0.0,
        metavar="X",
        help="Share of an adapter's inputs that is dropped.",
    ),
    Option(
        name="lora_targets",
        parse=_targets,
        default=None,
        metavar="NAME",
        help="Layers that get an adapter, by the end of their name; may be repeated "
        f"[{ALL_LINEAR}, but for the head].",
        multiple=True,
    ),
    Option(
        name="merge",
        parse=_flag,
        default=False,
        metavar="",
        help="Add the adapters to the weights in the end, and save the whole model.",
    ),
    Option(
        name="precision",
        parse=_one_of("auto", "bf16", "fp16", "fp32"),
        default="auto",
        metavar="auto|bf16|fp16|fp32",
        help="Type that the model computes in; auto takes what the device is made for.",
    ),
    Option(
        name="global_batch_size",
        parse=_POSITIVE,
        default=32,
        metavar="N",
        help="Rows an optimizer step, over all ranks; kept exactly.",
    ),
    Option(
        name="max_seq_length",
        parse=_whole_or_auto,
        default=None,
        metavar="N|auto",
        help="Tokens a sequence at most; auto is the model's limit [auto].",
    ),
    Option(
        name="overlong",
        parse=_one_of("truncate", "drop", "refuse"),
        default="truncate",
        metavar="truncate|drop|refuse",
        help="What happens to a row that is longer.",
    ),
    Option(
        name="packing",
        parse=_flag,
        default=False,
        metavar="",
        help="Put several sequences into one row, kept apart by their positions.",
    ),
    Option(
        name="epochs",
        parse=_above_zero,
        default=1.0,
        metavar="X",
        help="Times the dataset is gone through.",
    ),
    Option(
        name="max_steps",
        parse=_POSITIVE,
        default=None,
        metavar="N",
        help="Optimizer steps, in place of --epochs.",
    ),
    Option(
        name="optimizer",
        parse=read_optimizer,
        default=OPTIMIZERS[0],
        metavar="|".join(OPTIMIZERS),
        help="What updates the weights; transformers' names of them are taken too.",
    ),
    Option(
        name="learning_rate",
        parse=_above_zero,
        default=None,
        metavar="X",
        help="Peak learning rate [2e-5; 2e-4 with lora; with adafactor 1e-3 and 1e-2].",
    ),
    Option(
        name="lr_scheduler",
        parse=_one_of("cosine", "linear", "constant_with_warmup"),
        default="cosine",
        metavar="cosine|linear|constant_with_warmup",
        help="How the learning rate falls.",
    ),
    Option(
        name="warmup_ratio",
        parse=_share,
        default=0.03,
        metavar="X",
        help="Share of the steps in which the learning rate rises.",
    ),
    Option(
        name="weight_decay",
        parse=_not_negative,
        default=0.0,
        metavar="X",
        help="Weight decay of the optimizer.",
    ),
    Option(
        name="max_grad_norm",
        parse=_not_negative,
        default=1.0,
        metavar="X",
        help="Gradient norm that is clipped to; 0 does not clip.",
    ),
    Option(
        name="seed",
        parse=_whole(0, _MAX_SEED),
        default=42,
        metavar="N",
        help="Seed of weights and row order.",
    ),
    Option(
        name="devices",
        parse=_text,
        default="auto",
        metavar="auto|N|gpu:I,J|UUID,...|cpu|cpu:N",
        help="Devices to use, one data-parallel rank on each: all, so many, or those named.",
    ),
    Option(
        name="device_memory",
        parse=_size,
        default=None,
        metavar="SIZE",
        help="Memory of a device that may be used, for instance 2GiB; enforced [all that is free].",
    ),
    Option(
        name="set",
        parse=read_pins,
        default=None,
        metavar="KNOB=VALUE[,VALUE...]",
        help="Values that a knob may have, in place of those that the search would try: "
        f"{', '.join(knob.name for knob in KNOBS)}. May be repeated.",
        multiple=True,
        is_config=True,
    ),
    Option(
        name="ds_config",
        parse=_text,
        default=None,
        metavar="FILE",
        help="Your own DeepSpeed config: what it says is kept, but for what is tuned.",
    ),
    Option(
        name="max_probes",
        parse=_POSITIVE,
        default=12,
        metavar="N",
        help="Structures that are probed at most.",
    ),
    Option(
        name="tune_budget",
        parse=_duration_or_auto,
        default=None,
        metavar="TIME|auto",
        help="Time that tuning may take, for instance 20m; auto is what it may save of the "
        "training [until nothing is to be gained].",
    ),
    Option(
        name="sampler",
        parse=_one_of(*SAMPLERS),
        default="prior",
        metavar="|".join(SAMPLERS),
        help="What proposes settings: the plan corrected by outcomes, or a sampler of Optuna.",
    ),
    Option(
        name="no_cache",
        parse=_flag,
        default=False,
        metavar="",
        help="Leave out what earlier runs of such a job have measured.",
    ),
    Option(
        name="nvme_path",
        parse=_text,
        default=None,
        metavar="DIR",
        help="Directory on an NVMe drive, on each node, that ZeRO 3 may offload the optimizer to "
        "[none].",
    ),
    Option(
        name="storage",
        parse=_text,
        default=None,
        metavar="URL",
        help="Database through which jobs of one kind share what they measure: "
        "postgresql://USER@HOST/DATABASE, or another of Optuna's [none].",
    ),
    Option(
        name="on_event",
        parse=_texts,
        default=None,
        metavar="URL|COMMAND",
        help="Web address or shell command that is told of events as JSON; may be repeated.",
        multiple=True,
    ),
    Option(
        name="eval_share",
        parse=_share,
        default=0.0,
        metavar="X",
        help="Share of the rows to hold out of the training, and evaluate on after each epoch.",
    ),
    Option(
        name="save_every",
        parse=_duration,
        default=None,
        metavar="TIME",
        help="Save a checkpoint after so much time, 10m for instance [after each quarter].",
    ),
    Option(
        name="trainer",
        parse=_trainer_arguments,
        default=None,
        metavar="KEY=VALUE",
        help="An argument of transformers' TrainingArguments for the training: eval_steps=50, "
        "report_to=tensorboard. May be repeated.",
        multiple=True,
    ),
    Option(
        name="strict_handoff",
        parse=_flag,
        default=False,
        metavar="",
        help="Stop the training when its first steps do not hold what was probed.",
    ),
    Option(
        name="trust_remote_code",
        parse=_flag,
        default=False,
        metavar="",
        help="Run Python code that comes with the model.",
    ),
)

_takes({"type": "string", "examples": list(OPTIMIZERS)})(read_optimizer)
_takes(
    {
        "anyOf": [
            {
                "type": "object",
                "additionalProperties": False,
                "properties": {knob.name: {"description": knob.values} for knob in KNOBS},
            },
            *_PAIRS["anyOf"][1:],
        ]
    }
)(read_pins)

_BY_NAME = {option.name: option for option in OPTIONS}


@dataclass(frozen=True, slots=True)
class Layer:
    """Options as one source gave them, not read yet."""

    source: str
    values: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Options:
    """Every option's value, and the source that it came from."""

    values: Mapping[str, Any]
    sources: Mapping[str, str]

    def __getitem__(self, name: str) -> Any:  # noqa: ANN401 - each option has its own type
        return self.values[name]

    def is_default(self, name: str) -> bool:
        return self.sources[name] == "default"

    def recommended(self, values: Mapping[str, Any], source: str) -> "Options":
        """Return the options with what `source` recommends in place of defaults."""
        taken = {name: value for name, value in values.items() if self.is_default(name)}
        return Options(
            values={**self.values, **taken},
            sources={**self.sources, **dict.fromkeys(taken, source)},
        )

    def to_json(self) -> dict[str, dict[str, Any]]:
        return {
            name: {"value": value, "source": self.sources[name]}
            for name, value in self.values.items()
        }


def resolve(layers: Sequence[Layer]) -> Options:
    """Read the layers; the first that names an option wins, and the defaults are the last.

    Raises:
        ConfigError: a layer has an unknown key (the nearest is named), a value that cannot be, or
            one that is not for the method.
    """
    values = {option.name: option.default for option in OPTIONS}
    sources = dict.fromkeys(values, "default")
    for layer in reversed(layers):
        for key, value in layer.values.items():
            option = _find(key, layer.source)
            # A key without a value says nothing.
            if value is None:
                continue
            values[option.name] = read_option(option.name, value, f"{layer.source}: {key}")
            sources[option.name] = layer.source
    _follow_method(values, sources)
    _require_rows_to_evaluate(values, sources)
    return Options(values=values, sources=sources)


def read_option(name: str, value: Any, source: str) -> Any:  # noqa: ANN401 - each its own type
    """Read one option's value.

    Raises:
        ConfigError: it cannot be; the text names `source`.
    """
    try:
        return _BY_NAME[name].parse(value)
    except ValueError as error:
        msg = f"{source}: {error}"
        raise ConfigError(msg) from None


def _follow_method(values: dict[str, Any], sources: Mapping[str, str]) -> None:
    """Give what the method decides a value, where nobody did."""
    method = values["method"]
    strays = [name for name in _OF_ADAPTERS if sources[name] != "default" and method == "full"]
    if strays:
        msg = (
            f"{sources[strays[0]]}: {strays[0]} is about adapters, and method {method} has none: "
            "leave it out, or choose method lora or qlora"
        )
        raise ConfigError(msg)
    followed = {
        "learning_rate": default_rate(method, values["optimizer"]),
        "lora_alpha": 2 * values["lora_rank"],
        "lora_targets": [ALL_LINEAR],
    }
    values.update({name: value for name, value in followed.items() if values[name] is None})


def default_rate(method: str, optimizer: Optimizer) -> float:
    """Return the learning rate where nobody gives one."""
    rates = _RELATIVE_RATES if optimizer == ADAFACTOR else _LEARNING_RATES
    return rates[method]


def _require_rows_to_evaluate(values: Mapping[str, Any], sources: Mapping[str, str]) -> None:
    asked = (values["trainer"] or {}).get("eval_strategy", "no")
    # YAML reads a bare no as false.
    if asked not in ("no", False) and not values["eval_share"]:
        msg = (
            f"{sources['trainer']}: eval_strategy {asked} has no rows to evaluate on: hold some "
            "out with --eval-share 0.05"
        )
        raise ConfigError(msg)


def json_schema() -> Schema:
    """Return the JSON Schema of configuration files, by which editors complete and check them."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "autotune configuration",
        "description": "Options of autotune run, each a key; a flag goes before the file.",
        "type": "object",
        "additionalProperties": False,
        "properties": {
            option.name: {
                "description": option.help,
                **({} if option.default is None else {"default": option.default}),
                **option.schema,
            }
            for option in OPTIONS
        },
    }


def _find(key: Any, source: str) -> Option:  # noqa: ANN401 - a YAML key
    name = str(key).replace("-", "_")
    if name in _BY_NAME:
        return _BY_NAME[name]
    nearest = difflib.get_close_matches(name, _BY_NAME, n=1, cutoff=0.0)
    msg = f"{source}: unknown key {key!r}; the nearest is {nearest[0]!r}"
    raise ConfigError(msg)
