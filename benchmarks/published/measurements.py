"""Published measurements, and which of them the estimate can express.

A row is a fact with its source. It becomes a question, or is left out for the first reason that
holds; a reason is a rule over the columns, never a list of rows.
"""

import csv
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from architectures import DISTINCT, config_of

MEASUREMENTS = Path(__file__).parent / "measurements.csv"

_TRUNCATED = re.compile(r"real lengths shorter|short(er)? (padded|samples)|unpacked|are shorter")
_PARALLEL = re.compile(
    r"impl=FSDP|impl=device_map|model.parallel|tensor parallel|sequence parallel (?!1\b)|sequence p"
    r"arallel over|\bTP\d|hybrid-engine",
    re.IGNORECASE,
)
_OTHER_KERNELS = re.compile(
    r"(?<!no )liger|chunked CE|torch[._]compile|\+compile|optimizer-in-backward"
    r"|activation CPU offload|padding_free|NEFT",
    re.IGNORECASE,
)
_GENERATES = re.compile(r"generat", re.IGNORECASE)
_SATURATED = re.compile(r"saturat|fills? (the card|4 x)", re.IGNORECASE)
_CONTRADICTED = re.compile(
    r"contradicts|weak label|suspicious|do not use|low quality", re.IGNORECASE
)
_EARLY_LOSS = ("hpcaitech/ColossalAI-Pytorch-lightning", "bigscience-workshop/bigscience")
"""GPT-2 in transformers of 2021 and 2022, whose loss took fp16 logits as they are; since 4.46 they
are taken to fp32, which is half of what such a model needs there."""

_QUANTISED = re.compile(r"int4|int8|nf4|4-bit|fp8|gptq")
_PURE = re.compile(r"pure|bf16 states|bf16-true")
_UNLIKE_LENGTHS = re.compile(r"lengths \d+\+-\d+")
_KINDS = {"alloc": "allocated", "reserved": "reserved", "smi": "nvidia-smi"}
RESERVED_OVER_UNLIKE = "reserved, unlike rows"
"""Rows of one length are what is estimated. Where each has its own, blocks that the allocator keeps
fit no later row, and what it has reserved in the end depends on their order (so that figures fall
with the length, or grow by several times what a token takes); the outcome is still one."""


@dataclass(frozen=True, slots=False, kw_only=True)
class Measurement:
    """A row of the table; the text of its columns by name."""

    row: dict[str, str]

    def __getattr__(self, name: str) -> str:
        try:
            return self.row[name]
        except KeyError:
            raise AttributeError(name) from None

    @cached_property
    def kind(self) -> str | None:
        """What the figure measures: allocated, reserved or nvidia-smi; None without a figure."""
        tag = re.search(r"\[mem=(\w+)", self.notes)
        if not (tag and self.peak_mem_gib_per_gpu):
            return None
        kind = _KINDS[tag[1]]
        unlike = kind == "reserved" and _UNLIKE_LENGTHS.search(self.notes)
        return RESERVED_OVER_UNLIKE if unlike else kind

    @cached_property
    def capacity_gib(self) -> float | None:
        return float(self.gpu_mem_gib) if self.gpu_mem_gib else None

    @property
    def saturated(self) -> bool:
        """Whether the figure is the size of the card, so that it tells no more than an outcome."""
        return bool(_SATURATED.search(self.notes))

    def reason_left_out(self) -> str | None:
        """Return the first reason for which the estimate cannot express the row."""
        return next(self._reasons(), None)

    def _reasons(self) -> Iterator[str]:  # noqa: C901, PLR0912 - a rule a branch
        notes, precision = self.notes, self.precision
        if "Q=X" in notes:
            yield "the source contradicts itself"
        if self.method not in {"full", "lora"}:
            yield f"method {self.method}"
        if _QUANTISED.search(precision):
            yield "quantised or 8-bit weights"
        if "8bit" in self.optimizer or "4bit" in self.optimizer or "Lion" in self.optimizer:
            yield "optimizer other than AdamW with fp32 moments"
        if _PARALLEL.search(notes):
            yield "parallelism other than DeepSpeed's ZeRO or plain DDP"
        if _OTHER_KERNELS.search(notes):
            yield "kernels or frameworks that keep other tensors (fused loss, compile, ...)"
        if self.lora_rank == "" and self.method == "lora" and "Lightning-AI" in self.source_repo:
            yield "a setting is not stated (rank)"
        if "DoRA" in notes:
            yield "DoRA"
        for name in ("zero_stage", "n_gpus", "micro_batch", "seq_len", "precision", "grad_ckpt"):
            if not self.row[name]:
                yield f"a setting is not stated ({name})"
        if not self.seq_len.isdigit() or self.grad_ckpt not in {"yes", "no"}:
            yield "a setting is not one of ours"
        if _TRUNCATED.search(notes) or _is_short(notes):
            yield "rows shorter than the stated length"
        if _GENERATES.search(notes):
            yield "generation beside training"
        if self.method == "full" and _PURE.search(precision):
            yield "full fine-tuning without fp32 weights or moments"
        if self.method == "full" and self.zero_stage == "0" and not precision.startswith("fp32"):
            yield "mixed precision by autocast, without DeepSpeed"
        if self.source_repo in _EARLY_LOSS:
            yield "a loss in fp16, of an earlier framework"
        if _CONTRADICTED.search(notes):
            yield "a weak report by its own notes"
        if config_of(self.row) is None:
            yield (
                "an architecture that transformers does not have"
                if self.model in DISTINCT
                else "dimensions are not stated"
            )
        if self.kind is None and self.capacity_gib is None:
            yield "neither a figure nor the size of the GPU"


def _is_short(notes: str) -> bool:
    """Whether rows are those of Alpaca, short of any usual limit, neither packed nor measured."""
    return "alpaca" in notes.casefold() and "padded to the longest sample" not in notes


def read(path: Path = MEASUREMENTS) -> list[Measurement]:
    """Read a table of measurements."""
    with path.open(encoding="utf-8", newline="") as file:
        return [Measurement(row=row) for row in csv.DictReader(file)]


def write(measurements: list[Measurement], path: Path = MEASUREMENTS) -> None:
    """Write the rows that are used."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(measurements[0].row), lineterminator="\n")
        writer.writeheader()
        writer.writerows(one.row for one in measurements)
