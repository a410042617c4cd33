"""A job for the benchmarks beside this: glm-tiny, two ranks, rows of some hundred tokens."""

import json
import random
from dataclasses import dataclass
from pathlib import Path

from autotune import intake
from autotune.config import Layer, resolve
from autotune.intake import Workload
from autotune.probe.protocol import ProbeRequest
from autotune.profile.child import build_ops
from autotune.setting import Structure
from autotune.tune.site import JobSite

RANKS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchJob:
    """A prepared job; `request` asks for a ladder of it."""

    site: JobSite
    workload: Workload
    directory: Path

    def request(self, zero_stage: int, sizes: list[int]) -> ProbeRequest:
        structure = Structure(zero_stage=zero_stage)
        batch = self.workload.job.global_batch_size
        return self.site.request([structure.with_micro_batch(m, RANKS, batch) for m in sizes])


def write_data(path: Path, rows: int, longest: int, seed: int = 0) -> None:
    """Write rows of numbers; lengths are spread evenly up to about `longest` tokens."""
    draw = random.Random(seed)  # noqa: S311 - data, no secret
    lines = []
    for number in range(rows):
        words = " ".join(str(draw.randrange(10)) for _ in range(draw.randrange(8, longest // 2)))
        question = {"role": "user", "content": f"Row {number}?"}
        lines.append(json.dumps({"messages": [question, {"role": "assistant", "content": words}]}))
    path.write_text("\n".join(lines) + "\n")


def prepare(
    directory: Path,
    *,
    global_batch_size: int,
    rows: int,
    longest: int,
    model: str = "builtin:glm-tiny",
) -> BenchJob:
    """Start the server, look into the job, build the ops."""
    data = directory / "data.jsonl"
    write_data(data, rows, longest)
    given = {
        "dataset": data,
        "devices": RANKS,
        "global_batch_size": global_batch_size,
        "model": model,
    }
    question = intake.ask(resolve([Layer("benchmark", {k: str(v) for k, v in given.items()})]))
    intake.start_processes(question)
    workload = intake.look_into(question, dataset_dir=directory / "dataset", logs=directory)
    build_ops(["ShareMemCommBuilder"], directory / "ops.log")
    site = JobSite(
        job=workload.job,
        cluster=question.cluster,
        profile=workload.profile,
        lengths_of_rows=workload.lengths,
        rebalanced=workload.drawn.rebalanced,
        dataset_dir=directory / "dataset",
        scratch_dir=directory,
        total_steps=100,
    )
    return BenchJob(site=site, workload=workload, directory=directory)
