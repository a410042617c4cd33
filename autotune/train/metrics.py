"""metrics.jsonl: a line a step, each step once."""

import json
import logging
import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers import TrainingArguments as Arguments

from autotune.engine.device import MemoryMeter
from autotune.rundir import write_text
from autotune.train.trainer import ResumableTrainer

METRICS, EVALUATIONS = "metrics.jsonl", "evaluations.jsonl"
_RECENT_STEPS = 20

_log = logging.getLogger(__name__)


class MetricsLog(TrainerCallback):
    """Writes a line a step to metrics.jsonl; a step done again after a resume replaces its line.

    Evaluations go to evaluations.jsonl in the same way.
    """

    def __init__(self, output_dir: Path, meter: MemoryMeter, trainer: ResumableTrainer) -> None:
        self._output_dir = output_dir
        self._meter = meter
        self._trainer = trainer
        self._lines: list[dict[str, Any]] = []

    def on_train_begin(
        self, args: Arguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        del args, control
        if state.is_world_process_zero:
            self._lines = _keep_until(self._output_dir / METRICS, state.global_step)
            _keep_until(self._output_dir / EVALUATIONS, state.global_step)
        self._meter.reset()

    def on_log(
        self,
        args: Arguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: object,
    ) -> None:
        del args, control
        if not logs or not state.is_world_process_zero:
            return
        if "eval_loss" in logs:
            line = {"step": state.global_step, **logs}
            _append(self._output_dir / EVALUATIONS, line)
            _log.info("step %d: evaluation loss %.4f", state.global_step, logs["eval_loss"])
        if "loss" in logs:
            self._log_step(state, logs)

    def _log_step(self, state: TrainerState, logs: dict[str, float]) -> None:
        seconds = self._trainer.step_seconds()
        recent = [line["step_time_s"] for line in self._lines[-_RECENT_STEPS:]] + [seconds]
        left = state.max_steps - state.global_step
        shape = self._trainer.shape
        assert shape is not None
        line = {
            "step": state.global_step,
            "max_steps": state.max_steps,
            "epoch": state.epoch,
            "loss": logs["loss"],
            "grad_norm": logs.get("grad_norm"),
            "learning_rate": logs.get("learning_rate"),
            "step_time_s": seconds,
            "tokens": shape.tokens,
            "longest_row": shape.longest_row,
            "tokens_per_s": shape.tokens / seconds,
            "peak_bytes": self._meter.peak_bytes(),
            "left_s": left * sum(recent) / len(recent),
            "at": time.time(),
        }
        self._lines.append(line)
        _append(self._output_dir / METRICS, line)
        _log.info("step %d/%d: loss %.4f", state.global_step, state.max_steps, logs["loss"])

    def summary(self) -> dict[str, Any]:
        """Return how the training went."""
        return {
            "steps": self._lines[-1]["step"],
            "loss_start": self._lines[0]["loss"],
            "loss_end": self._lines[-1]["loss"],
            "peak_bytes": max(line["peak_bytes"] for line in self._lines),
        }


def _append(path: Path, line: dict[str, Any]) -> None:
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")


def _keep_until(path: Path, step: int) -> list[dict[str, Any]]:
    """Leave out what is after a step, and a line torn by a kill; returns the rest."""
    text = path.read_text() if path.exists() else ""
    lines = [line for line in map(_parsed, text.splitlines()) if line and line["step"] <= step]
    if path.exists() or path.name == METRICS:
        write_text(path, "".join(json.dumps(line) + "\n" for line in lines))
    return lines


def _parsed(line: str) -> dict[str, Any] | None:
    try:
        fields = json.loads(line)
    except ValueError:
        return None
    return fields if isinstance(fields, dict) else None
