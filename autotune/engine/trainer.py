"""transformers' Trainer, opened so that a probe can take its steps one by one."""

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainingArguments

from autotune.dataset.rows import Rows
from autotune.engine.batches import IGNORED, PaddingCollator, RowDataset
from autotune.engine.device import MemoryCap
from autotune.engine.model import build_model
from autotune.workload import TrainSpec


class TunedTrainer(Trainer):
    """The Trainer of the training run, whose engine and micro-step are those of the probes too.

    `memory_cap` holds for what a device does, and is lifted while a checkpoint is written.
    """

    memory_cap: MemoryCap | None = None
    _counted_parameters: int | None = None

    def prepare_engine(self, total_steps: int) -> Any:  # noqa: ANN401 - DeepSpeedEngine
        """Build the DeepSpeed engine as `train` does, without training; returns the engine."""
        engine, _ = self._prepare_for_training(total_steps, None, None)
        return engine

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:  # noqa: ANN401, ARG002 - Trainer's signature
        """Make the optimizer, unless the DeepSpeed config names it.

        In one group, as DeepSpeed makes those that it knows, so that weight decay means the same.
        """
        if self.optimizer is None:
            kind, arguments = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            trained = [one for one in self.model.parameters() if one.requires_grad]
            self.optimizer: Any = kind(trained, weight_decay=self.args.weight_decay, **arguments)
        return self.optimizer  # type: ignore[no-any-return] # the Trainer has no types

    def micro_step(
        self, batch: dict[str, torch.Tensor], trained_tokens: int, *, boundary: bool
    ) -> torch.Tensor:
        """Run forward and backward of one micro-batch, and the optimizer update at a boundary.

        `trained_tokens` of the whole global batch normalise the loss, as in training.
        """
        self.accelerator.gradient_state._set_sync_gradients(boundary)  # noqa: SLF001 - as Trainer
        count = torch.tensor(trained_tokens, device=self.args.device)
        loss: torch.Tensor = self.training_step(self.model_wrapped, batch, count)
        return loss

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Return what the Trainer's own does, which walks the whole model in every micro-step."""
        if self._counted_parameters is None:
            self._counted_parameters = self.model.num_parameters(exclude_embeddings=True)
        return 6 * int(inputs["input_ids"].numel()) * self._counted_parameters

    def _save_checkpoint(self, model: Any, trial: Any) -> None:  # noqa: ANN401 - Trainer's signature
        with self.memory_cap.lifted() if self.memory_cap else nullcontext():
            super()._save_checkpoint(model, trial)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:  # noqa: FBT001, FBT002 - Trainer's signature
        with self.memory_cap.lifted() if self.memory_cap else nullcontext():
            super().save_model(output_dir, _internal_call)


def build_trainer(
    spec: TrainSpec,
    ds_config: dict[str, Any],
    *,
    load_weights: bool,
    dataset: torch.utils.data.Dataset[dict[str, Any]] | None = None,
    wrap_model: Callable[[Any], Any] = lambda model: model,
    kind: type[TunedTrainer] = TunedTrainer,
    eval_dataset: torch.utils.data.Dataset[dict[str, Any]] | None = None,
) -> TunedTrainer:
    """Build model and Trainer; the DeepSpeed engine follows with `train` or `prepare_engine`.

    The rows are those of the spec unless `dataset` gives others. `wrap_model` gives a virtual run
    the chance to place the parameters.
    """
    import deepspeed

    # Under ZeRO 3 transformers shards the model as it is built, over the ranks that DeepSpeed knows
    # by then, and if the arguments exist before it.
    deepspeed.init_distributed()
    arguments = TrainingArguments(
        deepspeed=ds_config, use_cpu=spec.device_kind == "cpu", **spec.trainer
    )
    model = wrap_model(build_model(spec, load_weights=load_weights))
    return kind(
        model=model,
        args=arguments,
        eval_dataset=eval_dataset,
        train_dataset=dataset or RowDataset(Rows.open(Path(spec.dataset_dir))),
        data_collator=PaddingCollator(_pad_token_id(model.config)),
    )


def count_trained(batch: dict[str, torch.Tensor]) -> int:
    """Count the tokens of a batch that the shifted loss sees."""
    return int(batch["labels"][..., 1:].ne(IGNORED).sum())


def _pad_token_id(config: Any) -> int:  # noqa: ANN401 - PretrainedConfig
    """Return the id to pad with; what it is does not matter, as padding is masked and untrained."""
    pad = config.get_text_config().pad_token_id
    return 0 if pad is None or pad < 0 else int(pad)
