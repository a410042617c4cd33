"""Holds the arithmetic and the virtual run against real DeepSpeed on CPU ranks, byte by byte.

    python benchmarks/memory_truth/memory_truth.py [--cases 40] [--seed 0] [--model NAME ...]

Cases are drawn from the whole grid of models, sizes, ZeRO stages, ranks, checkpointing, micro-batch
sizes, lengths, accumulation and padding. For each of them it prints what the arithmetic predicts,
what the virtual run says, what live tensors were measured at most on the worst rank from the first
tensor of the model on, and the errors. Writes benchmarks/results/memory_truth.json.
"""

import argparse
import json
import os
import platform
import random
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from gloo_ranks import real_runs

from autotune import environment, processes
from autotune.emit import ds_config, train_spec
from autotune.hardware import Cluster
from autotune.knobs import Value
from autotune.memory import estimate_memory, shards_of
from autotune.optimizer import Optimizer
from autotune.profile.child import build_ops, profile_from_json, traced
from autotune.profile.request import TraceRequest
from autotune.profile.virtual import VirtualRequest, virtual_run
from autotune.setting import Structure
from autotune.space import Space
from autotune.workload import ALL_LINEAR, Job, Lora, ModelProfile, Precision

RESULT = Path(__file__).parent.parent / "results" / "memory_truth.json"

_GQA = {"num_key_value_heads": 2}
MODELS: dict[str, dict[str, Any]] = {
    "llama": _GQA,
    "qwen2": _GQA | {"tie_word_embeddings": True},
    "qwen3": _GQA | {"head_dim": 16},
    "mistral": _GQA | {"sliding_window": 128},
    "gpt2": {},
    "glm": _GQA | {"head_dim": 16},
    "gemma": {"num_key_value_heads": 1, "head_dim": 16},
    "gemma2": _GQA | {"head_dim": 16, "sliding_window": 128},
    "gpt_neox": {},
    "opt": {},
    "phi": {},
    "mixtral": _GQA | {"num_local_experts": 4, "num_experts_per_tok": 2},
}
"""What each architecture has beside the sizes that are drawn."""


LORA = Lora(rank=8, alpha=16, dropout=0.0, targets=(ALL_LINEAR,))


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """A model's size; heads of 16 or 32 elements, four times the width between the layers."""

    hidden: int
    layers: int
    vocabulary: int


SIZES = (
    Size(hidden=32, layers=1, vocabulary=100),
    Size(hidden=64, layers=3, vocabulary=512),
    Size(hidden=64, layers=2, vocabulary=20_000),
    Size(hidden=128, layers=5, vocabulary=1001),
    Size(hidden=256, layers=4, vocabulary=2000),
    Size(hidden=256, layers=12, vocabulary=4000),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A model and a setting of it."""

    model: str
    size: Size
    zero_stage: int
    ranks: int
    checkpointing: str
    micro_batch_size: int
    seq_length: int
    accumulation: int = 2
    padded: bool = False
    precision: Precision = "fp32"
    lora: bool = False
    quantised: bool = False
    optimizer: Optimizer = "adamw"
    knobs: tuple[tuple[str, Value], ...] = ()

    def __str__(self) -> str:
        size = self.size
        return (
            f"{self.model}-{size.hidden}x{size.layers}-v{size.vocabulary} zero{self.zero_stage} "
            f"{self.ranks} ranks {self.checkpointing} m{self.micro_batch_size} s{self.seq_length} "
            f"x{self.accumulation} {'padded ' if self.padded else ''}{self.precision}"
            f"{' lora' if self.lora else ''}{' in 4 bits' if self.quantised else ''}"
            f"{'' if self.optimizer == 'adamw' else f' {self.optimizer}'}"
            f"{''.join(f' {name}={value}' for name, value in self.knobs)}"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Truth:
    """A case's peak bytes, predicted by arithmetic, of the virtual run, and measured."""

    case: Case
    predicted: int
    exact: int
    measured: int

    @property
    def predicted_error(self) -> float:
        return self.predicted / self.measured - 1

    @property
    def exact_error(self) -> float:
        return self.exact / self.measured - 1

    def __str__(self) -> str:
        sizes = "  ".join(
            f"{name} {size / 1e6:9.3f} MB"
            for name, size in (
                ("predicted", self.predicted),
                ("exact", self.exact),
                ("measured", self.measured),
            )
        )
        return f"{sizes}  {self.predicted_error:+8.3%} {self.exact_error:+8.3%}  {self.case}"


def drawn_cases(number: int, seed: int, models: Sequence[str]) -> list[Case]:
    """Draw cases evenly, each model in its turn."""
    draw = random.Random(seed)  # noqa: S311 - a sample, no secret
    return [_drawn(models[index % len(models)], draw) for index in range(number)]


def _drawn(model: str, draw: random.Random) -> Case:
    rows = draw.choice((1, 2, 4, 8))
    size = draw.choice(SIZES)
    return Case(
        model=model,
        size=size,
        zero_stage=draw.randrange(4),
        ranks=draw.choice((1, 2)),
        checkpointing=draw.choice(("none", "full")),
        micro_batch_size=rows,
        # Attention of the long rows of a batch takes long on a CPU.
        seq_length=draw.choice((16, 50, 128, 333) if rows > 2 else (16, 100, 500, 1024)),  # noqa: PLR2004
        accumulation=draw.choice((1, 2, 3)),
        padded=rows > 1 and draw.random() < 0.5,  # noqa: PLR2004 - one in two
        precision="bf16" if draw.random() < 0.25 else "fp32",  # noqa: PLR2004 - one in four
        lora=draw.random() < 0.25,  # noqa: PLR2004 - one in four
    )


def write_model(name: str, size: Size, parent: Path) -> Path:
    """Write the configuration of a model; returns its directory."""
    from transformers import AutoConfig

    directory = parent / f"{name}-{size.hidden}-{size.layers}-{size.vocabulary}"
    if not directory.exists():
        sizes = {
            "hidden_size": size.hidden,
            "num_hidden_layers": size.layers,
            "num_attention_heads": 4,
            "intermediate_size": 4 * size.hidden,
            "vocab_size": size.vocabulary,
            "max_position_embeddings": 1024,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        }
        if name == "opt":
            sizes |= {"ffn_dim": 4 * size.hidden, "word_embed_proj_dim": size.hidden}
        AutoConfig.for_model(name, **(sizes | MODELS[name])).save_pretrained(directory)
    return directory


class Bench:
    """Profiles of models, kept, and cases held against the truth."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._profiles: dict[TraceRequest, ModelProfile] = {}
        processes.start_server(environment.rank_environment("cpu", ()))
        build_ops(("ShareMemCommBuilder",), directory / "ops.log")

    def truth(self, case: Case) -> Truth:
        """Predict, run virtually and measure."""
        request, predicted = self.asked(case)
        runs = real_runs(request, self._directory)
        virtual = virtual_run(request, self._directory / "virtual.log")
        return Truth(
            case=case,
            predicted=predicted,
            exact=virtual.peak_device_bytes,
            measured=max(run["peak"] for run in runs),
        )

    def asked(self, case: Case) -> tuple[VirtualRequest, int]:
        """Return what to run, of the worst rank, and the predicted bytes."""
        model = write_model(case.model, case.size, self._directory)
        profile = self._profile(model, case)
        job, cluster = _job(case, model), _cluster(case.ranks)
        knobs: dict[str, Any] = dict(case.knobs)
        structure = Structure(
            zero_stage=case.zero_stage,
            checkpointing=case.checkpointing,
            attention=profile.attention,
            **knobs,
        )
        setting = structure.with_micro_batch(
            case.micro_batch_size, case.ranks, job.global_batch_size
        )
        space = Space(
            structures=(structure,),
            structure_index=np.zeros(1, dtype=np.int64),
            micro_batch_size=np.array([case.micro_batch_size]),
            gradient_accumulation_steps=np.array([case.accumulation]),
            ranks=case.ranks,
        )
        memory = estimate_memory(space, profile, job, cluster, case.seq_length).row(0)
        request = VirtualRequest(
            spec=train_spec(
                job, setting, cluster, dataset_dir="", output_dir="", model_output_dir=""
            ),
            ds_config=ds_config(job, setting, profile, cluster),
            ranks=case.ranks,
            micro_batch_size=case.micro_batch_size,
            gradient_accumulation_steps=case.accumulation,
            seq_length=case.seq_length,
            padded=case.padded,
        )
        if case.zero_stage in {1, 2}:
            request = replace(request, rank=shards_of(profile, case.ranks, structure).worst_rank)
        return request, memory["allocated_bytes"]

    def _profile(self, model: Path, case: Case) -> ModelProfile:
        request = TraceRequest(
            model_dir=str(model),
            trust_remote_code=False,
            attention="auto",
            precision=case.precision,
            device_kind="cpu",
            padded=case.padded,
            lora=_lora(case),
        )
        if request not in self._profiles:
            log = self._directory / "profile.log"
            self._profiles[request] = profile_from_json(traced(request, log))
        return self._profiles[request]


def _lora(case: Case) -> Lora | None:
    return replace(LORA, quantised=case.quantised) if case.lora else None


def _job(case: Case, model: Path) -> Job:
    return Job(
        model=case.model,
        model_dir=str(model),
        from_scratch=True,
        trust_remote_code=False,
        method="qlora" if case.quantised else "lora" if case.lora else "full",
        lora=_lora(case),
        optimizer=case.optimizer,
        precision=case.precision,
        max_seq_length=1024,
        global_batch_size=case.micro_batch_size * case.ranks * case.accumulation,
        epochs=1,
        max_steps=None,
        learning_rate=1e-3,
        lr_scheduler="cosine",
        warmup_ratio=0.03,
        weight_decay=0.01,
        max_grad_norm=1.0,
        seed=42,
    )


def _cluster(ranks: int) -> Cluster:
    return Cluster(
        kind="cpu",
        device_name="CPU",
        num_devices=ranks,
        device_memory_bytes=10**12,
        device_memory_source="given",
        threads_per_rank=1,
        compute_capability=None,
        visible_devices=(),
        host=None,
    )


def summary(truths: Sequence[Truth]) -> dict[str, float]:
    """Return median and worst of the absolute errors."""
    predicted = [abs(truth.predicted_error) for truth in truths]
    exact = [abs(truth.exact_error) for truth in truths]
    return {
        "predicted_median": statistics.median(predicted),
        "predicted_worst": max(predicted),
        "exact_median": statistics.median(exact),
        "exact_worst": max(exact),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=48)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", nargs="+", default=list(MODELS), choices=MODELS)
    options = parser.parse_args()
    truths = []
    with tempfile.TemporaryDirectory(prefix="autotune-benchmark-") as directory:
        bench = Bench(Path(directory))
        for case in drawn_cases(options.cases, options.seed, options.model):
            truths.append(bench.truth(case))
            print(truths[-1], file=sys.stderr, flush=True)
    result = {
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs",
        "versions": environment.versions(),
        "seed": options.seed,
        **summary(truths),
        "cases": [
            asdict(truth)
            | {"predicted_error": truth.predicted_error, "exact_error": truth.exact_error}
            for truth in truths
        ],
    }
    RESULT.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(summary(truths), indent=2))


if __name__ == "__main__":
    main()
