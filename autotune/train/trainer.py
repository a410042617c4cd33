"""The Trainer of a training: whole global batches, checkpoints that are complete, stops."""

import math
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from transformers.trainer_utils import rotate_checkpoints

from autotune.engine.sampling import GlobalBatches, StepShape
from autotune.engine.trainer import TunedTrainer, count_trained
from autotune.rundir import write_text
from autotune.setting import REBALANCE
from autotune.train.progress import CHECKPOINT, Progress
from autotune.train.state import load_state, save_state

COMPLETE = "complete"
"""The file that marks a checkpoint as complete."""


class ResumableTrainer(TunedTrainer):
    """Splits global batches so that no split changes them, and keeps checkpoints of any shape.

    Attributes:
        probed_tokens: padded tokens of the largest micro-batch that was probed; before a step that
            has a larger one, a checkpoint is saved.
        shape: of the step at work.
        progress: is told of checkpoints.
    """

    probed_tokens: float = math.inf
    progress: Progress | None = None
    shape: StepShape | None = None
    _step_started: float = 0.0
    _saved_step: int | None = None
    _batches: GlobalBatches | None = None

    def step_seconds(self) -> float:
        """Return the seconds since the step at work began, drawing its rows included."""
        return time.perf_counter() - self._step_started

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:  # noqa: ANN401 - Trainer's signature
        dataset = self.train_dataset if train_dataset is None else train_dataset
        arguments = self.args
        self._batches = GlobalBatches(
            dataset.lengths,
            global_batch_size=arguments.per_device_train_batch_size
            * arguments.gradient_accumulation_steps
            * arguments.world_size,
            ranks=arguments.world_size,
            rank=arguments.process_index,
            accumulation=arguments.gradient_accumulation_steps,
            seed=arguments.seed if arguments.data_seed is None else arguments.data_seed,
            rebalance=arguments.train_sampling_strategy == REBALANCE,
        )
        return self._batches

    def _run_epoch(self, **arguments: Any) -> None:  # noqa: ANN401 - Trainer's signature
        # The Trainer would take a step more from a checkpoint of the last one.
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        # A dataloader that skips rows after a resume does not hand the epoch on.
        if self._batches is not None:
            self._batches.set_epoch(arguments["epoch"])
        super()._run_epoch(**arguments)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """Draw a step's micro-batches, and save a checkpoint where they are a risk."""
        self._step_started = time.perf_counter()
        assert self._batches is not None
        self.shape = self._batches.shape_of(self.state.global_step)
        if self.shape.largest_micro_batch > self.probed_tokens:
            self.probed_tokens = self.shape.largest_micro_batch
            # Every rank has to decide alike, and one may look for a file before another writes it.
            if self._saved_step != self.state.global_step:
                self._save_checkpoint(self.model, None)
                self._step_started = time.perf_counter()
        return super().get_batch_samples(epoch_iterator, num_batches, device)  # type: ignore[no-any-return] # the Trainer has no types

    def evaluate(
        self,
        eval_dataset: Any = None,  # noqa: ANN401 - Trainer's signature
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Return the loss a trained token of the rows held out, however they are split.

        The Trainer's own averages ranks that have unlike many tokens, and repeats rows.
        """
        del ignore_keys
        started = time.perf_counter()
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        arguments = self.args
        batches = GlobalBatches(
            dataset.lengths,
            global_batch_size=arguments.per_device_eval_batch_size * arguments.world_size,
            ranks=arguments.world_size,
            rank=arguments.process_index,
            accumulation=1,
            seed=0,
            rebalance=False,
        )
        total = torch.zeros(2, dtype=torch.float64, device=arguments.device)
        model = self.model_wrapped
        model.eval()
        for rows in batches:
            inputs = self._prepare_inputs(self.data_collator([dataset[row] for row in rows]))
            with torch.no_grad(), self.compute_loss_context_manager():
                # As a sum: it is divided by this number of tokens.
                loss = model(**inputs, num_items_in_batch=torch.ones((), device=total.device)).loss
            total += torch.stack([loss.double(), total.new_tensor(count_trained(inputs))])
        model.train()
        torch.distributed.all_reduce(total)
        seconds = time.perf_counter() - started
        metrics = {
            f"{metric_key_prefix}_loss": float(total[0] / total[1]),
            f"{metric_key_prefix}_runtime": seconds,
            f"{metric_key_prefix}_samples_per_second": len(dataset) / seconds,
        }
        self.log(metrics)
        handler = self.callback_handler
        self.control: Any = handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _prepare_for_training(
        self,
        max_steps: int,
        train_dataloader: Any,  # noqa: ANN401 - Trainer's signature
        resume_from_checkpoint: str | None,
    ) -> tuple[Any, Any]:
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        if resume_from_checkpoint is not None:
            self._saved_step = step_of(Path(resume_from_checkpoint))
            # What is read in passing is the host's affair.
            with self.uncapped():
                load_state(self.deepspeed, self._schedule, Path(resume_from_checkpoint))
        return prepared  # type: ignore[no-any-return] # the Trainer has no types

    def _load_best_model(self) -> None:
        """Bring weights and states back to the best checkpoint, as load_best_model_at_end asks."""
        with self.uncapped():
            load_state(self.deepspeed, self._schedule, Path(self.state.best_model_checkpoint))

    @property
    def _schedule(self) -> Any:  # noqa: ANN401 - accelerate wraps torch's scheduler
        return getattr(self.lr_scheduler, "scheduler", self.lr_scheduler)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        save_state(self.deepspeed, self._schedule, Path(output_dir))

    def _save_checkpoint(self, model: Any, trial: Any) -> None:  # noqa: ANN401 - Trainer's signature
        """Save a checkpoint, mark it once all ranks have written, and only then remove others."""
        self._tell_checkpoint(0)
        keep, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = keep
        torch.distributed.barrier()
        self._saved_step = self.state.global_step
        if self.is_world_process_zero():
            directory = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
            write_text(directory / COMPLETE, "")
            rotate_checkpoints(
                output_dir=self.args.output_dir,
                save_total_limit=keep,
                best_model_checkpoint=self.state.best_model_checkpoint,
            )
        self._tell_checkpoint(1)

    def _tell_checkpoint(self, complete: int) -> None:
        if self.progress is not None:
            self.progress.tell(CHECKPOINT, complete, 1, str(self.state.global_step))

    def uncapped(self) -> AbstractContextManager[None]:
        """Let go of the memory cap for work on the host."""
        return self.memory_cap.lifted() if self.memory_cap else nullcontext()


def step_of(checkpoint: Path) -> int:
    """Return the step after which a checkpoint was saved."""
    return int(checkpoint.name.rpartition("-")[2])


def last_checkpoint(output_dir: Path) -> Path | None:
    """Return the latest checkpoint that is complete; one that was cut short cannot be loaded."""
    complete = [path.parent for path in output_dir.glob(f"checkpoint-*/{COMPLETE}")]
    return max(complete, key=step_of, default=None)
