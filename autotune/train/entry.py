"""The training process of a rank: `torchrun -m autotune.train.entry`.

Takes the two emitted files and nothing else; the tuner is not needed.
"""

import argparse
import atexit
import gc
import json
import logging
import math
import os
import shutil
import sys
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from autotune.dataset.rows import Rows
from autotune.dataset.splitting import split_rows
from autotune.engine.batches import RowDataset
from autotune.engine.device import enter_rank
from autotune.engine.ops import load_ops, needed_ops
from autotune.engine.trainer import build_trainer
from autotune.lease import exclusive
from autotune.processes import die_with_parent
from autotune.rundir import write_json
from autotune.train.adapters import adapters_dir, merge, with_base
from autotune.train.deaths import STOPPED, STOPPED_CODE, write_death
from autotune.train.metrics import MetricsLog
from autotune.train.progress import Progress
from autotune.train.stopping import StepBoundary, StopRequest
from autotune.train.trainer import COMPLETE, ResumableTrainer, last_checkpoint
from autotune.workload import TrainSpec

_ZERO_3 = 3


def main(argv: list[str] | None = None) -> None:
    options = _parser().parse_args(argv)
    # torchrun can be killed before it has ended its ranks.
    die_with_parent()
    request = StopRequest()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    ds_config = json.loads(options.ds_config.read_text())
    spec = TrainSpec.from_json(json.loads(options.train_args.read_text()))
    output_dir = options.output_dir or Path(spec.trainer["output_dir"])
    model_dir = output_dir / "model" if options.output_dir else Path(spec.model_output_dir)
    spec.trainer["output_dir"] = str(output_dir)
    output_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    with _reporting_death(output_dir):
        stopped = train(spec, ds_config, output_dir, model_dir, request, resume=options.resume)
    _leave(STOPPED_CODE if stopped else 0)


def _leave(code: int) -> None:
    """End without tearing the interpreter down, once everything is written and trackers have ended.

    In a teardown, a thread of a library that asks for the interpreter's lock is unwound through C++
    and aborts the process: a training that had ended well would be told as failed.
    """
    atexit._run_exitfuncs()  # noqa: SLF001 - what the interpreter does first at its end
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="autotune.train.entry", description=__doc__)
    parser.add_argument("--ds-config", type=Path, required=True, help="the DeepSpeed config")
    parser.add_argument("--train-args", type=Path, required=True, help="train_args.json")
    parser.add_argument("--output-dir", type=Path, help="where checkpoints and the model go")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    return parser


@contextmanager
def _reporting_death(output_dir: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # noqa: BLE001 - whatever it is, the controller has to know
        traceback.print_exc()
        write_death(output_dir, int(os.environ.get("RANK", "0")), error)
        sys.stderr.flush()
        # Interpreter shutdown would wait for collectives that the other ranks never join.
        os._exit(1)


def train(
    spec: TrainSpec,
    ds_config: dict[str, Any],
    output_dir: Path,
    model_dir: Path,
    request: StopRequest,
    *,
    resume: bool,
) -> bool:
    """Train to the end, then save the model with its tokenizer; returns whether it was stopped."""
    load_ops(needed_ops(spec.device_kind, ds_config))
    meter, cap = enter_rank(spec, int(os.environ.get("LOCAL_RANK", "0")))
    with _alone(output_dir):
        if spec.from_scratch and (spec.lora or _stage(ds_config) == _ZERO_3):
            base = adapters_dir(spec, model_dir) if spec.lora else output_dir
            with cap.lifted():
                spec = with_base(spec, base / "base")
        progress = Progress(output_dir, writes=torch.distributed.get_rank() == 0)
        with progress.loading():
            trainer = _trainer(spec, ds_config)
        trainer.progress = progress
        trainer.memory_cap = cap
        metrics = MetricsLog(output_dir, meter, trainer)
        boundary = StepBoundary(request, spec.save_every_s)
        trainer.add_callback(metrics)
        trainer.add_callback(boundary)
        checkpoint = last_checkpoint(output_dir) if resume else None
        # As in probes: what was imported and built is no garbage that steps should look through.
        gc.freeze()
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        if not boundary.stopped:
            _save(trainer, spec, model_dir)
        if trainer.is_world_process_zero():
            if boundary.stopped:
                (output_dir / STOPPED).touch()
            else:
                write_json(output_dir / "summary.json", metrics.summary())
        torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    return boundary.stopped


@contextmanager
def _alone(output_dir: Path) -> Iterator[None]:
    """Wait for a training that still writes to the same place, and clear up what it left half.

    One whose controller was killed saves a checkpoint before it ends.
    """
    with ExitStack() as held:
        if torch.distributed.get_rank() == 0:
            held.enter_context(exclusive(output_dir / ".lock", wait=True))
            for path in output_dir.glob("checkpoint-*"):
                if not (path / COMPLETE).exists():
                    shutil.rmtree(path)
            (output_dir / STOPPED).unlink(missing_ok=True)
        torch.distributed.barrier()
        yield


def _stage(ds_config: dict[str, Any]) -> int:
    return int(ds_config["zero_optimization"]["stage"])


def _trainer(spec: TrainSpec, ds_config: dict[str, Any]) -> ResumableTrainer:
    rows = Rows.open(Path(spec.dataset_dir))
    trained, held_out = split_rows(len(rows), spec.eval_share, spec.seed)
    trainer = build_trainer(
        spec,
        ds_config,
        load_weights=True,
        kind=ResumableTrainer,
        dataset=RowDataset(rows, trained),
        eval_dataset=RowDataset(rows, held_out) if len(held_out) else None,
    )
    assert isinstance(trainer, ResumableTrainer)
    trainer.probed_tokens = math.inf if spec.probed_tokens is None else spec.probed_tokens
    return trainer


def _save(trainer: ResumableTrainer, spec: TrainSpec, model_dir: Path) -> None:
    trainer.save_model(str(adapters_dir(spec, model_dir)))
    if not trainer.is_world_process_zero():
        return
    if spec.merge:
        with trainer.uncapped():
            merge(spec, adapters_dir(spec, model_dir), model_dir)
    tokenizer = AutoTokenizer.from_pretrained(
        spec.model_dir, trust_remote_code=spec.trust_remote_code, local_files_only=True
    )
    tokenizer.save_pretrained(str(model_dir))


if __name__ == "__main__":
    main()
