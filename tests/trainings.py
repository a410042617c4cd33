"""Trainings from emitted files alone, without a tuning before them."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from records import make_cluster

from autotune import builtin, emit, environment, intake
from autotune.config import Layer, resolve
from autotune.hardware import Cluster
from autotune.profile.child import profile_from_json
from autotune.setting import Structure
from autotune.workload import Job, ModelProfile

GLOBAL_BATCH = 8
LIMIT_S = 280

SMALL = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}


@dataclass(frozen=True)
class Workshop:
    """A job that was looked into once, and what its trainings are emitted from."""

    job: Job
    profile: ModelProfile
    cluster: Cluster
    dataset: Path

    def emit(
        self,
        directory: Path,
        *,
        micro_batch_size: int = 2,
        ranks: int = 2,
        trainer: dict[str, Any] | None = None,
        **changes: Any,  # noqa: ANN401 - fields of a Structure, then of a TrainSpec
    ) -> Path:
        names = {one.name for one in fields(Structure)} & changes.keys()
        knobs = {name: changes.pop(name) for name in names}
        structure = Structure(**{"zero_stage": 0} | knobs)
        setting = structure.with_micro_batch(micro_batch_size, ranks, self.job.global_batch_size)
        cluster = replace(self.cluster, num_devices=ranks)
        spec = emit.train_spec(
            self.job,
            setting,
            cluster,
            dataset_dir=str(self.dataset),
            output_dir="training",
            model_output_dir="model",
        )
        spec = replace(spec, **changes, trainer=spec.trainer | (trainer or {}))
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "train_args.json").write_text(json.dumps(spec.to_json()))
        config = emit.ds_config(self.job, setting, self.profile, cluster)
        (directory / "ds_config.json").write_text(json.dumps(config))
        return directory


def of_run(run_dir: Path) -> Workshop:
    """Return what the trainings of a tuned run are emitted from."""
    fields = json.loads((run_dir / "result.json").read_text())["job"]
    profile = json.loads((run_dir / "profile.json").read_text())
    profile.pop("schema")
    cluster = replace(make_cluster(cpu_ranks=2), threads_per_rank=1)
    return Workshop(Job(**fields), profile_from_json(profile), cluster, run_dir / "dataset")


def small_model(directory: Path, **changes: Any) -> Path:  # noqa: ANN401 - keys of config.json
    """Write the demo model at a size whose step takes milliseconds."""
    directory.mkdir()
    for file in builtin.directory("glm-tiny").iterdir():
        (directory / file.name).write_bytes(file.read_bytes())
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | SMALL | changes))
    return directory


def workshop(directory: Path, data: Path, model: Path, **options: Any) -> Workshop:  # noqa: ANN401
    given = {"dataset": data, "model": model, "devices": "cpu:1"}
    given |= {"global_batch_size": GLOBAL_BATCH, "learning_rate": 1e-3, **options}
    question = intake.ask(resolve([Layer("test", {k: str(v) for k, v in given.items()})]))
    intake.start_processes(question)
    found = intake.look_into(question, dataset_dir=directory / "dataset", logs=directory)
    cluster = replace(question.cluster, threads_per_rank=1)
    return Workshop(found.job, found.profile, cluster, directory / "dataset")


def start(directory: Path, ranks: int, *arguments: str) -> "subprocess.Popen[str]":
    """Start the training from the files in a directory."""
    return subprocess.Popen(
        [*emit.torchrun_command(sys.executable, ranks), *arguments],
        cwd=directory,
        env={**os.environ, **environment.rank_environment("cpu", ())},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def train(directory: Path, ranks: int, *arguments: str) -> list[float]:
    """Train from the files in a directory; returns the losses."""
    process = start(directory, ranks, *arguments)
    output, _ = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 0, output[-4000:]
    return losses(directory)


def losses(directory: Path) -> list[float]:
    return [line["loss"] for line in metrics(directory)]


def metrics(directory: Path) -> list[dict[str, Any]]:
    lines = (directory / "training" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]
