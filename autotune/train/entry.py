"""The training process of a rank: `torchrun -m autotune.train.entry`.

Takes the two emitted files and nothing else; the tuner is not needed.
"""

import argparse
import json
import logging
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, TrainerCallback, TrainerControl, TrainerState
from transformers import TrainingArguments as Arguments

from autotune.dataset.rows import Rows
from autotune.engine.device import MemoryMeter, enter_rank
from autotune.engine.ops import load_ops, needed_ops
from autotune.engine.trainer import build_trainer
from autotune.processes import die_with_parent
from autotune.rundir import write_json, write_text
from autotune.train.adapters import adapters_dir, merge, with_base
from autotune.workload import TrainSpec

_log = logging.getLogger(__name__)

_WHOLE = "complete"
"""The file that marks a checkpoint as complete."""


def main(argv: list[str] | None = None) -> None:
    options = _parser().parse_args(argv)
    # torchrun can be killed before it has ended its ranks.
    die_with_parent()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    ds_config = json.loads(options.ds_config.read_text())
    spec = TrainSpec.from_json(json.loads(options.train_args.read_text()))
    output_dir = options.output_dir or Path(spec.trainer["output_dir"])
    model_dir = output_dir / "model" if options.output_dir else Path(spec.model_output_dir)
    spec.trainer["output_dir"] = str(output_dir)
    train(spec, ds_config, output_dir, model_dir, resume=options.resume)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="autotune.train.entry", description=__doc__)
    parser.add_argument("--ds-config", type=Path, required=True, help="the DeepSpeed config")
    parser.add_argument("--train-args", type=Path, required=True, help="train_args.json")
    parser.add_argument("--output-dir", type=Path, help="where checkpoints and the model go")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    return parser


def train(
    spec: TrainSpec, ds_config: dict[str, Any], output_dir: Path, model_dir: Path, *, resume: bool
) -> None:
    """Train to the end, then save the model with its tokenizer."""
    output_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    load_ops(needed_ops(spec.device_kind, ds_config))
    meter, cap = enter_rank(spec.device_kind, spec.device_memory_bytes, spec.threads_per_rank)
    if spec.lora is not None and spec.from_scratch:
        with cap.lifted():
            spec = with_base(spec, adapters_dir(spec, model_dir) / "base")
    trainer = build_trainer(spec, ds_config, load_weights=True)
    trainer.memory_cap = cap
    checkpoint = last_whole_checkpoint(output_dir) if resume else None
    metrics = MetricsLog(output_dir, meter, trainer.train_dataset.rows)
    trainer.add_callback(metrics)
    trainer.add_callback(WholeCheckpoints())
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model(str(adapters_dir(spec, model_dir)))
    if trainer.is_world_process_zero():
        if spec.merge:
            with cap.lifted():
                merge(spec, adapters_dir(spec, model_dir), model_dir)
        _save_tokenizer(spec, model_dir)
        write_json(output_dir / "summary.json", metrics.summary())
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def _save_tokenizer(spec: TrainSpec, model_dir: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(
        spec.model_dir, trust_remote_code=spec.trust_remote_code, local_files_only=True
    )
    tokenizer.save_pretrained(str(model_dir))


class WholeCheckpoints(TrainerCallback):
    """Marks a checkpoint that every rank has written its part of."""

    def on_save(
        self, args: Arguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        del control
        torch.distributed.barrier()
        if state.is_world_process_zero:
            write_text(Path(args.output_dir) / f"checkpoint-{state.global_step}" / _WHOLE, "")


def last_whole_checkpoint(output_dir: Path) -> str | None:
    """Return the latest checkpoint that is complete; one that was cut short cannot be loaded."""
    whole = [path.parent for path in output_dir.glob(f"checkpoint-*/{_WHOLE}")]
    latest = max(whole, key=lambda path: int(path.name.rpartition("-")[2]), default=None)
    return None if latest is None else str(latest)


class MetricsLog(TrainerCallback):
    """Writes a line a step to metrics.jsonl; a step done again after a resume replaces its line."""

    def __init__(self, output_dir: Path, meter: MemoryMeter, rows: Rows) -> None:
        self._path = output_dir / "metrics.jsonl"
        self._meter = meter
        self._mean_tokens = float(rows.lengths.mean())
        self._step_started = 0.0
        self._lines: list[dict[str, Any]] = []

    def on_train_begin(
        self, args: Arguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        del args, control
        if state.is_world_process_zero and self._path.exists() and state.global_step:
            lines = [json.loads(line) for line in self._path.read_text().splitlines()]
            self._lines = [line for line in lines if line["step"] <= state.global_step]
        if state.is_world_process_zero:
            write_text(self._path, "".join(json.dumps(line) + "\n" for line in self._lines))
        self._meter.reset()

    def on_step_begin(
        self, args: Arguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        del args, state, control
        self._step_started = time.perf_counter()

    def on_log(
        self,
        args: Arguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: object,
    ) -> None:
        del control
        if not logs or "loss" not in logs or not state.is_world_process_zero:
            return
        seconds = time.perf_counter() - self._step_started
        rows = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        line = {
            "step": state.global_step,
            "max_steps": state.max_steps,
            "epoch": state.epoch,
            "loss": logs["loss"],
            "grad_norm": logs.get("grad_norm"),
            "learning_rate": logs.get("learning_rate"),
            "step_time_s": seconds,
            "tokens_per_s": rows * self._mean_tokens / seconds,
            "peak_bytes": self._meter.peak_bytes(),
            "at": time.time(),
        }
        self._lines.append(line)
        with self._path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        _log.info("step %d/%d: loss %.4f", state.global_step, state.max_steps, logs["loss"])

    def summary(self) -> dict[str, Any]:
        """Return how the training went."""
        return {
            "steps": self._lines[-1]["step"],
            "loss_start": self._lines[0]["loss"],
            "loss_end": self._lines[-1]["loss"],
            "peak_bytes": max(line["peak_bytes"] for line in self._lines),
        }


if __name__ == "__main__":
    main()
