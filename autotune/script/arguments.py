"""Which of a script's arguments carry what is tuned, and its command with other values. Pure."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from autotune.errors import ConfigError, UsageError

MICRO_BATCH, ACCUMULATION = "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"
STAGE, GLOBAL_BATCH = "zero_optimization.stage", "train_batch_size"
CONFIG = "config"

MAPPABLE = (MICRO_BATCH, ACCUMULATION, GLOBAL_BATCH, STAGE, CONFIG)

_KNOWN: Mapping[str, tuple[str, ...]] = {
    MICRO_BATCH: (
        "--per_device_train_batch_size",
        "--train_micro_batch_size_per_gpu",
        "--per_gpu_train_batch_size",
        "--micro_batch_size",
        "--per_device_batch_size",
    ),
    ACCUMULATION: (
        "--gradient_accumulation_steps",
        "--grad_accumulation_steps",
        "--grad_accum_steps",
        "--accumulation_steps",
    ),
    STAGE: ("--zero_stage",),
    GLOBAL_BATCH: ("--train_batch_size", "--global_batch_size"),
}
"""Names that scripts commonly have for them; `--batch_size` is none, as some mean the global one.
"""

_SECTIONS = frozenset(
    {
        *("zero_optimization", "train_batch_size", MICRO_BATCH, ACCUMULATION),
        *("optimizer", "scheduler", "fp16", "bf16", "autotuning", "gradient_clipping"),
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Carriers:
    """The option that carries each of `MAPPABLE`, of those that one does.

    Attributes:
        config_file: the DeepSpeed config that `CONFIG` carries now.
    """

    options: Mapping[str, str] = field(default_factory=dict)
    config_file: Path | None = None

    def arguments(
        self, given: Sequence[str], values: Mapping[str, str | int | None]
    ) -> tuple[str, ...]:
        """Return a script's arguments with these values, whoever carries them."""
        argv = tuple(given)
        for key, value in values.items():
            if key in self.options and value is not None:
                argv = replaced(argv, self.options[key], str(value))
        return argv

    def label(self) -> str:
        return ", ".join(f"{key} by {option}" for key, option in self.options.items())


def parse_maps(maps: Sequence[str]) -> dict[str, str]:
    """Read --arg-map KEY=--OPTION.

    Raises:
        UsageError: a key is not known, or there is no option.
    """
    found = {}
    for one in maps:
        key, _, option = (part.strip() for part in one.partition("="))
        if key not in MAPPABLE or not option.startswith("-"):
            msg = (
                f"--arg-map {one}: write KEY=--OPTION, with a KEY of {', '.join(MAPPABLE)} and the "
                "script's own option that carries it"
            )
            raise UsageError(msg)
        found[key] = option
    return found


def find_carriers(
    argv: Sequence[str],
    known_options: Mapping[str, Any],
    mapped: Mapping[str, str],
    directory: Path,
    seen: Mapping[str, int] = MappingProxyType({}),
) -> Carriers:
    """Find the options that carry what is tuned.

    What the user has mapped goes before what is known by name; a name alone is nothing where its
    value is not what was seen.

    Args:
        argv: the script's arguments.
        known_options: what its parser has, as far as that was seen, with `value` of each.
        mapped: by the user, options by key.
        directory: that files are named from.
        seen: what they have to carry, of what is known of the script's own setting.
    """
    there = {word.partition("=")[0] for word in argv if word.startswith("--")}
    there |= {name for name, option in known_options.items() if option["takes_value"]}
    options = dict(mapped)
    values = dict(_values(argv))
    values |= {name: str(one["value"]) for name, one in known_options.items() if name not in values}
    for key, names in _KNOWN.items():
        spelt = [name for one in names for name in (one, "--" + one[2:].replace("_", "-"))]
        fitting = [
            name
            for name in spelt
            if name in there and (key not in seen or values.get(name) == str(seen[key]))
        ]
        if key not in options and fitting:
            options[key] = fitting[0]
    candidates = [options[CONFIG]] if CONFIG in options else list(values)
    for option in candidates:
        path = directory / values.get(option, "")
        if read_config(path) is not None:
            return Carriers(options={**options, CONFIG: option}, config_file=path)
    options.pop(CONFIG, None)
    return Carriers(options=options)


def read_config(path: Path) -> dict[str, Any] | None:
    """Return what a file holds if it is a DeepSpeed config; None if it is none."""
    if path.suffix not in {".json", ".hjson"}:
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) and _SECTIONS & content.keys() else None


def _values(argv: Sequence[str]) -> list[tuple[str, str]]:
    found = []
    for place, word in enumerate(argv):
        if not word.startswith("-"):
            continue
        name, equals, value = word.partition("=")
        following = argv[place + 1] if place + 1 < len(argv) else ""
        found.append((name, value if equals else following))
    return found


def value_of(argv: Sequence[str], option: str) -> str | None:
    """Return what an option is given; None if it is not there. The last one counts."""
    return dict(_values(argv)).get(option)


def replaced(argv: Sequence[str], option: str, value: str) -> tuple[str, ...]:
    """Return the arguments with another value of an option, which is added if it is not there."""
    result: list[str] = []
    place, is_there = 0, False
    while place < len(argv):
        word = argv[place]
        name, equals, _ = word.partition("=")
        if name != option:
            result.append(word)
            place += 1
            continue
        is_there = True
        result.extend([f"{name}={value}"] if equals else [name, value])
        place += 1 if equals else 2
    return tuple(result) if is_there else (*argv, option, value)


def mappings_of_deepspeed(section: Mapping[str, Any]) -> dict[str, str]:
    """Return `arg_mappings` of DeepSpeed's own autotuner as ours.

    Raises:
        ConfigError: it is no mapping of keys to options.
    """
    mappings = section.get("arg_mappings") or {}
    if not isinstance(mappings, Mapping):
        msg = f"autotuning.arg_mappings is {mappings!r}: it has to map keys to options"
        raise ConfigError(msg)
    found = {}
    for name, option in mappings.items():
        key = str(name).strip()
        if key in MAPPABLE and str(option).strip().startswith("-"):
            found[key] = str(option).strip()
    return found
