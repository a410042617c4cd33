"""The knobs by name: what each can be, and the values that a user pins some of them to."""

import difflib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from autotune.setting import (
    BY_MODEL,
    CHUNKED,
    FLASH_ATTENTION,
    NVME,
    RANDOM,
    REBALANCE,
    WHOLE,
    ZERO_STAGES,
    checkpointing_period,
)

Value = bool | int | str

MICRO_BATCH_SIZE = "micro_batch_size"

_LARGEST = 2**63 - 1


@dataclass(frozen=True, slots=True)
class Knob:
    """A knob: its field of a setting, how text becomes a value, and what that can be.

    Attributes:
        stages: the ZeRO stages that have it; elsewhere it is as it is by default.
    """

    name: str
    read: Callable[[str], Value]
    values: str
    stages: tuple[int, ...] = ZERO_STAGES


def _whole(smallest: int, largest: int = _LARGEST) -> Callable[[str], int]:
    def read(text: str) -> int:
        if not text.isdecimal() or not smallest <= int(text) <= largest:
            raise ValueError(text)
        return int(text)

    return read


def _one_of(*choices: str) -> Callable[[str], str]:
    def read(text: str) -> str:
        if text not in choices:
            raise ValueError(text)
        return text

    return read


def _truth(text: str) -> bool:
    if text.lower() not in {"true", "false"}:
        raise ValueError(text)
    return text.lower() == "true"


def _checkpointing(text: str) -> str:
    checkpointing_period(text)
    return text


def _elements(smallest: int, multiple: int = 1) -> Callable[[str], int]:
    def read(text: str) -> int:
        if text in {"auto", str(BY_MODEL)}:
            return BY_MODEL
        elements = _whole(smallest)(text)
        if elements % multiple:
            raise ValueError(text)
        return elements

    return read


_SHARDED = ZERO_STAGES[1:]
_ELEMENTS = "a whole number of elements, or auto to have it follow from the model"

KNOBS: tuple[Knob, ...] = (
    Knob(MICRO_BATCH_SIZE, _whole(1), "a whole number of rows"),
    Knob("zero_stage", _whole(ZERO_STAGES[0], ZERO_STAGES[-1]), "0, 1, 2, 3"),
    Knob("offload_optimizer", _one_of("none", "cpu", NVME), f"none, cpu, {NVME}", _SHARDED),
    Knob("offload_param", _one_of("none", "cpu"), "none, cpu", (3,)),
    Knob("checkpointing", _checkpointing, "none, full, every-2, every-3 and so on"),
    Knob(
        "attention",
        _one_of("sdpa", "eager", FLASH_ATTENTION),
        f"sdpa, eager, {FLASH_ATTENTION}",
    ),
    Knob("sampling", _one_of(RANDOM, REBALANCE), f"{RANDOM}, {REBALANCE}"),
    Knob("overlap_comm", _truth, "true, false", _SHARDED),
    Knob("reduce_bucket_size", _elements(1), _ELEMENTS, _SHARDED),
    # The alignment of stage_1_and_2.py for half precision.
    Knob("allgather_bucket_size", _elements(2, 2), f"even, {_ELEMENTS}", (1, 2)),
    Knob("stage3_prefetch_bucket_size", _elements(0), _ELEMENTS, (3,)),
    Knob("stage3_param_persistence_threshold", _whole(0), "a whole number of elements", (3,)),
    Knob("threads_per_rank", _whole(1), "a whole number of threads"),
    Knob("loss", _one_of(WHOLE, CHUNKED), f"{WHOLE}, {CHUNKED}"),
    Knob("expandable_segments", _truth, "true, false"),
    Knob("zero_hpz_partition_size", _whole(1), "a whole number of ranks", (3,)),
    Knob("torch_compile", _truth, "true, false"),
)
"""Every knob that can be pinned; a test holds them against the fields of Structure."""

BY_NAME: Mapping[str, Knob] = MappingProxyType({knob.name: knob for knob in KNOBS})


def read_pins(given: Any) -> dict[str, list[Value]]:  # noqa: ANN401 - YAML or texts
    """Read pins: texts KNOB=VALUE,VALUE or a mapping of knobs to a value or a list.

    Returns:
        The values of each knob, sorted, each once.

    Raises:
        ValueError: a text has no value, there is no such knob (the nearest is named), or it cannot
            have that value (those that it can are named).
    """
    pins: dict[str, set[Value]] = {}
    for name, values in _pairs(given):
        knob = find_knob(name)
        pins.setdefault(knob.name, set()).update(read_value(knob, value) for value in values)
    return {name: sorted(values) for name, values in sorted(pins.items())}


def find_knob(name: str) -> Knob:
    """Return the knob of a name, which may be written with dashes.

    Raises:
        ValueError: there is none; the nearest is named.
    """
    known = name.strip().replace("-", "_")
    if known not in BY_NAME:
        nearest = difflib.get_close_matches(known, BY_NAME, n=1, cutoff=0.0)[0]
        msg = f"there is no knob {name!r}; the nearest is {nearest!r}"
        raise ValueError(msg)
    return BY_NAME[known]


def read_value(knob: Knob, value: Any) -> Value:  # noqa: ANN401 - YAML, JSON or text
    """Return the value that a text or a number means.

    Raises:
        ValueError: the knob cannot have it; those that it can have are named.
    """
    try:
        return knob.read(str(value).strip())
    except ValueError:
        msg = f"{knob.name} cannot be {value!r}: it is {knob.values}"
        raise ValueError(msg) from None


def _pairs(given: Any) -> Iterable[tuple[str, list[Any]]]:  # noqa: ANN401 - YAML or texts
    if isinstance(given, dict):
        for name, values in given.items():
            listed = values if isinstance(values, list | tuple) else str(values).split(",")
            yield str(name), list(listed)
        return
    for text in given if isinstance(given, list | tuple) else [given]:
        name, found, values = str(text).partition("=")
        if not found:
            msg = f"{text!r} says no value: write KNOB=VALUE or KNOB=VALUE,VALUE"
            raise ValueError(msg)
        yield name, values.split(",")


@dataclass(frozen=True, slots=True, kw_only=True)
class Pins:
    """The values that some knobs may have, in place of those that a search would try.

    Attributes:
        values: by knob.
        where_there: knobs that are pinned only at the stages that have them. Others must have a
            pinned value in any setting, so that stages without the knob are left out.
    """

    values: Mapping[str, tuple[Value, ...]] = field(default_factory=dict)
    where_there: frozenset[str] = frozenset()

    @classmethod
    def of(cls, given: Mapping[str, Iterable[Value]]) -> "Pins":
        return cls(values={name: tuple(values) for name, values in given.items()})

    def __contains__(self, knob: str) -> bool:
        return knob in self.values

    def __getitem__(self, knob: str) -> tuple[Value, ...]:
        return self.values[knob]

    def get(self, knob: str, otherwise: tuple[Value, ...]) -> tuple[Value, ...]:
        """Return the values of a knob if it is pinned."""
        return self.values.get(knob, otherwise)

    def without(self, knob: str) -> "Pins":
        return Pins(
            values={name: values for name, values in self.values.items() if name != knob},
            where_there=self.where_there,
        )

    def __str__(self) -> str:
        return " ".join(
            f"{name}={','.join(map(as_text, values))}" for name, values in self.values.items()
        )


def as_text(value: Value) -> str:
    """Write a value as a user does."""
    return str(value).lower() if isinstance(value, bool) else str(value)


NO_PINS = Pins()
