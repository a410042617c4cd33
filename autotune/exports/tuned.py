"""What is exported, and what an export is."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import yaml

from autotune.optimizer import OF_TRANSFORMERS, Optimizer
from autotune.setting import CHUNKED, REBALANCE, Setting, checkpointing_period
from autotune.workload import TrainSpec

Data = Literal["tokens", "messages", "none"]

DS_CONFIG = "ds_config.json"
TRAIN_ROWS, EVAL_ROWS = "train.jsonl", "eval.jsonl"
OUTPUT = "output"
"""Where the other tool puts its checkpoints and the model, below the directory of the export."""

DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


@dataclass(frozen=True, slots=True, kw_only=True)
class TunedRun:
    """A run that was tuned, as far as another tool can go on with it.

    Attributes:
        name: what the run is called in comments.
        directory: where the export goes.
        model: hub id, or a directory with weights and tokenizer.
        setting: that was chosen.
        ds_config: the emitted DeepSpeed config, literal.
        spec: what the trainer would get besides it.
        ranks: processes, one a device, all on one machine.
        max_seq_length: tokens of a row at most.
        packing: whether several sequences share a row.
        optimizer: what updates the weights.
        measured: what was measured of the setting, for comments.
    """

    name: str
    directory: str
    model: str
    setting: Setting
    ds_config: Mapping[str, Any]
    spec: TrainSpec
    ranks: int
    max_seq_length: int
    packing: bool
    optimizer: Optimizer
    measured: str

    @property
    def trainer(self) -> Mapping[str, Any]:
        """The arguments of transformers' TrainingArguments."""
        return self.spec.trainer

    @property
    def on_cpu(self) -> bool:
        return self.spec.device_kind == "cpu"

    @property
    def evaluates(self) -> bool:
        return self.spec.eval_share > 0

    @property
    def checkpoints(self) -> bool:
        """Whether layers recompute their activations."""
        return self.setting.structure.checkpointing != "none"

    @property
    def compiles(self) -> bool | None:
        """Whether torch compiles the model; None, which is left out of files, if it does not."""
        return self.setting.structure.torch_compile or None

    @property
    def every_n_layers(self) -> int:
        """How many layers apart those are that recompute."""
        return checkpointing_period(self.setting.structure.checkpointing)

    @property
    def optim(self) -> str:
        """What transformers calls the optimizer, where the DeepSpeed config does not name it."""
        return OF_TRANSFORMERS[self.optimizer]


@dataclass(frozen=True, slots=True, kw_only=True)
class Export:
    """The files of an export, and how they are started.

    Attributes:
        files: text by name.
        commands: what `run.sh` runs in the directory of the export, `"$@"` behind the last of them.
        data: what the rows are written as beside the files, in `train.jsonl`.
        all_rows: whether rows that are held out are among them, as the tool holds out its own.
        keeps_packs: whether rows stay packed as they are; else each sequence is a row.
        notes: what differs from the run, a sentence each.
    """

    files: Mapping[str, str]
    commands: tuple[str, ...]
    data: Data = "tokens"
    all_rows: bool = False
    keeps_packs: bool = False
    notes: tuple[str, ...] = field(default=())


def header(tuned: TunedRun, notes: Sequence[str]) -> str:
    """Return the comment at the top of a file."""
    lines = [
        f"Made by autotune from {tuned.name}",
        f"{tuned.setting.label()}: {tuned.measured}",
        *notes,
    ]
    # A line break in a name would end the comment.
    return "".join(f"# {' '.join(line.split())}\n" for line in lines)


def as_yaml(tuned: TunedRun, notes: Sequence[str], content: Mapping[str, Any]) -> str:
    """Return a commented YAML file; keys without a value are left out."""
    said = {key: value for key, value in content.items() if value is not None}
    return header(tuned, notes) + yaml.safe_dump(said, sort_keys=False, allow_unicode=True)


def differences(
    tuned: TunedRun, tool: str, *, every_n: bool, rebalances: bool, chunks: bool
) -> tuple[str, ...]:
    """Say what of the setting a tool has no word for, and what that does.

    Args:
        tuned: the run.
        tool: its name, for people.
        every_n: whether it can checkpoint every n-th layer.
        rebalances: whether it can split the rows of a step by length.
        chunks: whether it can take the loss from a share of the logits at a time.
    """
    structure, notes = tuned.setting.structure, []
    if tuned.every_n_layers > 1 and not every_n:
        notes.append(
            f"{tool} cannot checkpoint every {tuned.every_n_layers} layers, so all layers "
            "recompute: less memory, fewer tokens/s than measured"
        )
    if structure.sampling == REBALANCE and not rebalances:
        notes.append(
            f"{tool} does not split the rows of a step by length, so that long rows can meet in a "
            "micro-batch: more memory, fewer tokens/s than measured"
        )
    if structure.loss == CHUNKED and not chunks:
        notes.append(
            f"{tool} takes the loss from all logits at once: more memory than measured; tune "
            "without loss=chunked for it"
        )
    if tuned.packing:
        notes.append(f"{tool} packs rows by a rule of its own, so that they are other rows")
    if tuned.spec.save_every_s:
        notes.append(f"{tool} does not save by the clock, but after each quarter of the steps")
    return tuple(notes)


def save_strategy(tuned: TunedRun) -> dict[str, Any]:
    """Return when to save, in transformers' words; those who save by the clock get quarters."""
    by_clock = bool(tuned.spec.save_every_s)
    return {
        "save_strategy": "steps" if by_clock else tuned.trainer["save_strategy"],
        "save_steps": tuned.trainer["save_steps"],
        "save_total_limit": tuned.trainer["save_total_limit"],
    }


def attention(tuned: TunedRun) -> str:
    return tuned.setting.structure.attention
