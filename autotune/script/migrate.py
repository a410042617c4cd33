"""What the `autotuning` section of a DeepSpeed config becomes here, with a note a key. Pure."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from autotune.errors import ConfigError
from autotune.script.arguments import mappings_of_deepspeed
from autotune.setting import ZERO_STAGES

ALL = "all"


@dataclass(frozen=True, slots=True, kw_only=True)
class Wishes:
    """What a DeepSpeed config asks of a tuning.

    Attributes:
        stages: ZeRO stages to try.
        mappings: options of the script by what they carry.
        least_micro_batch, most_micro_batch: bounds of the micro-batch size.
        most_global_batch: what the global batch must not be beyond.
        trials: processes to start at most.
        notes: what each key became, a sentence each.
    """

    stages: tuple[int, ...] = ZERO_STAGES
    mappings: Mapping[str, str]
    least_micro_batch: int = 1
    most_micro_batch: int | None = None
    most_global_batch: int | None = None
    trials: int | None = None
    notes: tuple[str, ...] = ()

    def sizes(self, sizes: tuple[int, ...]) -> tuple[int, ...]:
        """Return the micro-batch sizes that are within the bounds."""
        most = self.most_micro_batch
        return tuple(
            size
            for size in sizes
            if size >= self.least_micro_batch and (most is None or size <= most)
        )

    def require_within(self, global_batch_size: int) -> None:
        """Refuse a global batch beyond what the config allows.

        Raises:
            ConfigError: with both sizes.
        """
        if self.most_global_batch is not None and global_batch_size > self.most_global_batch:
            msg = (
                f"the script trains with a global batch of {global_batch_size}, and "
                f"autotuning.max_train_batch_size is {self.most_global_batch}: here the global "
                "batch is kept, so start the script with one within that, or leave the key out"
            )
            raise ConfigError(msg)


def read_wishes(config: Mapping[str, Any]) -> Wishes:
    """Read what a DeepSpeed config asks of a tuning.

    Raises:
        ConfigError: a value cannot be meant.
    """
    section = config.get("autotuning") or {}
    if not isinstance(section, Mapping):
        msg = f"autotuning is {section!r} in the DeepSpeed config: it has to be a section"
        raise ConfigError(msg)
    stages, notes = _stages(config, is_tuned=bool(section))
    notes += [_note(key, value) for key, value in section.items() if key != "enabled"]
    return Wishes(
        stages=stages,
        mappings=mappings_of_deepspeed(section),
        least_micro_batch=_count(section, "min_train_micro_batch_size_per_gpu") or 1,
        most_micro_batch=_count(section, "max_train_micro_batch_size_per_gpu"),
        most_global_batch=_count(section, "max_train_batch_size"),
        trials=_count(section, "tuner_num_trials"),
        notes=tuple(notes),
    )


def _stages(config: Mapping[str, Any], *, is_tuned: bool) -> tuple[tuple[int, ...], list[str]]:
    """Return the stages to try; lists of them are what DeepSpeed's autotuner alone takes."""
    zero = config.get("zero_optimization")
    asked = zero.get("stage", 0) if isinstance(zero, Mapping) else None
    where = "zero_optimization.stage"
    if asked == ALL:
        return ZERO_STAGES, [f"{where} {ALL}: ZeRO 0 to 3 are tried"]
    if isinstance(asked, list):
        stages = tuple(stage for stage in ZERO_STAGES if stage in asked)
        if not stages or len(stages) < len(set(map(str, asked))):
            msg = f"{where} is {asked}: its stages have to be of 0, 1, 2 and 3"
            raise ConfigError(msg)
        return stages, [f"{where} {asked}: these are tried"]
    if is_tuned and asked is not None:
        text = f"{where} {asked}: the others are tried too, where DeepSpeed's would keep to it"
        return ZERO_STAGES, [text]
    return ZERO_STAGES, []


def _count(section: Mapping[str, Any], key: str) -> int | None:
    value = section.get(key)
    if value is None:
        return None
    if type(value) is not int or value < 1:
        msg = f"autotuning.{key} is {value!r}: it has to be a whole number of 1 or more"
        raise ConfigError(msg)
    return value


_BECAME: Mapping[str, Callable[[Any], str]] = {
    "max_train_batch_size": lambda value: (
        f"a limit of {value} on the global batch, which is kept as the script has it"
    ),
    "min_train_batch_size": lambda _: "left out: the global batch is kept as the script has it",
    "max_train_micro_batch_size_per_gpu": lambda value: f"no micro-batch above {value} is tried",
    "min_train_micro_batch_size_per_gpu": lambda value: f"no micro-batch below {value} is tried",
    "num_tuning_micro_batch_sizes": lambda _: (
        "left out: the sizes to try follow from what is known of the others"
    ),
    "arg_mappings": lambda _: "the same as --arg-map",
    "tuner_num_trials": lambda value: f"--max-probes {value}, unless that is given",
    "tuner_early_stopping": lambda _: "left out: the search ends when nothing is to be gained",
    "tuner_type": lambda value: (
        f"left out ({value}): settings are tried in the order of what is expected of them"
    ),
    "fast": lambda _: "left out: ZeRO stages and micro-batches are searched together",
    "metric": lambda value: (
        f"{value} becomes the time of a step at the same global batch, the shortest of which is "
        "the least latency, the highest throughput and the most FLOPS alike"
    ),
    "mp_size": lambda value: f"left out ({value}): how a model is split is the script's own",
    "start_profile_step": lambda _: "left out: steps count from the first that takes no longer",
    "end_profile_step": lambda _: "left out: steps are taken until their times agree",
    "results_dir": lambda _: "--run-dir",
    "exps_dir": lambda _: "the directory logs of --run-dir",
    "overwrite": lambda _: "left out: the same command goes on where it was left",
}


def _note(key: str, value: object) -> str:
    became = _BECAME.get(str(key), lambda _: "left out: it has no meaning here")
    return f"autotuning.{key}: {became(value)}"
