"""Times the estimate and the ranking of a hundred thousand settings.

The profile is traced before: its checkpointing modes are multiplied, so that there are so many
structures. Reports CPU seconds beside those of the clock, as other work on the machine disturbs the
latter.

    python benchmarks/plan/many_settings.py [--settings 100000] [--json FILE]
"""

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from autotune.devices import named_cluster, named_rates, parse_gpus
from autotune.plan import make_plan
from autotune.profile.request import TraceRequest
from autotune.profile.trace import trace_model
from autotune.setting import Offload, Structure
from autotune.space import Space, micro_batch_sizes
from autotune.throughput import DrawnRows
from autotune.workload import Job, ModelProfile

GPUS = parse_gpus("8xA100-80GB")
GLOBAL_BATCH_SIZE = 8 * 5040
MODEL = Path(__file__).parents[2] / "configs" / "models" / "llama-3-8b"


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """What a stage took: the least of three times."""

    cpu_s: float
    wall_s: float


def timed(work: Callable[[], object]) -> Timing:
    cpu, wall = [], []
    for _ in range(3):
        cpu_started, wall_started = time.process_time(), time.perf_counter()
        work()
        cpu.append(time.process_time() - cpu_started)
        wall.append(time.perf_counter() - wall_started)
    return Timing(cpu_s=round(min(cpu), 4), wall_s=round(min(wall), 4))


def job() -> Job:
    return Job(
        model="llama-3-8b",
        model_dir=str(MODEL),
        from_scratch=True,
        trust_remote_code=False,
        method="full",
        precision="bf16",
        max_seq_length=8192,
        global_batch_size=GLOBAL_BATCH_SIZE,
        epochs=1.0,
        max_steps=None,
        learning_rate=2e-5,
        lr_scheduler="cosine",
        warmup_ratio=0.03,
        weight_decay=0.0,
        max_grad_norm=1.0,
        seed=42,
    )


def profile_of_many(settings: int) -> tuple[ModelProfile, Space]:
    """Trace the model, and make a space of at least so many settings of it."""
    request = TraceRequest(
        model_dir=str(MODEL),
        trust_remote_code=False,
        attention="auto",
        precision="bf16",
        device_kind="cuda",
    )
    profile = trace_model(request)
    sizes = micro_batch_sizes(GLOBAL_BATCH_SIZE, GPUS.count)
    offloads: tuple[Offload, ...] = ("none", "cpu")
    places = [(stage, place) for stage in range(4) for place in offloads]
    modes = -(-settings // (len(sizes) * len(places)))
    traces = [replace(profile.traces[1][1]) for _ in range(modes)]
    structures = tuple(
        Structure(zero_stage=stage, offload_optimizer=place, checkpointing=f"every-{mode}")
        for stage, place in places
        for mode in range(1, modes + 1)
    )
    size = np.tile(np.array(sizes), len(structures))
    space = Space(
        structures=structures,
        structure_index=np.repeat(np.arange(len(structures)), len(sizes)),
        micro_batch_size=size,
        gradient_accumulation_steps=GLOBAL_BATCH_SIZE // (GPUS.count * size),
        ranks=GPUS.count,
    )
    named = tuple((f"every-{mode}", trace) for mode, trace in enumerate(traces, start=1))
    return replace(profile, traces=named), space


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--settings", type=int, default=100_000)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    profile, space = profile_of_many(arguments.settings)
    cluster, rates = named_cluster([GPUS]), named_rates([GPUS], 1, "bf16")
    lengths = np.random.default_rng(0).integers(20, 8192, 250_000)
    rows = DrawnRows.draw(lengths, job().seed)

    def estimate_and_rank() -> None:
        make_plan(space, profile, job(), cluster, rates, rows).ranking()

    plan = make_plan(space, profile, job(), cluster, rates, rows)
    result = {
        "settings": len(space),
        "structures": len(space.structures),
        "kept": int(plan.kept.sum()),
        "estimate_and_rank": asdict(timed(estimate_and_rank)),
        "count_by_rule": asdict(timed(plan.rejected_by_rule)),
        "find_a_setting": asdict(timed(lambda: plan.row_of(space.setting(len(space) - 1)))),
        "list_the_best_hundred": asdict(timed(lambda: plan.entries(plan.ranking()[:100]))),
    }
    text = json.dumps(result, indent=2)
    print(text)
    if arguments.json:
        arguments.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
