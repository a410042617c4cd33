"""Regret by number of probes on clusters that are simulated, beside Optuna's own samplers.

    python benchmarks/search/simulated.py [--jobs 200] [--seed 0]

A job is a model of configs/models, devices (1 to 1024 of a kind of the table), a length of rows and
a global batch, all drawn. What a setting really does is its estimate times an error that is drawn
from what was measured: the errors of the estimate on the grids of benchmarks/search/exhaustive.py
(whole, by ZeRO stage, by checkpointing, by micro-batch size, and what these leave), and the spread
of repeated micro-steps there; memory errors from benchmarks/results/published.json. A device that
is full is out of memory. All samplers propose structures of the same plan, and each ladder is
climbed alike. Writes benchmarks/results/search_simulated.json.
"""

import argparse
import json
import logging
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autotune import intake
from autotune.config import Layer, resolve
from autotune.devices import in_nodes, parse_kinds
from autotune.outcome import Measured, Rung
from autotune.plan import Plan
from autotune.rehearse import Rehearsal
from autotune.setting import Setting
from autotune.tune.loop import Tuner

BENCHMARKS = Path(__file__).parent.parent
RESULT = BENCHMARKS / "results" / "search_simulated.json"
SAMPLERS = ("prior", "tpe", "gp", "random")
COUNTS = (1, 2, 3, 5, 8, 12)

MODELS = ("chatglm3-6b", "llama-2-7b", "llama-2-13b", "glm-4-9b", "gemma-2-9b", "llama-2-70b")
KINDS = ("A100-80GB", "A100-40GB", "H100-80GB", "RTX3090-24GB", "RTX4090-24GB", "A40-48GB")

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Errors:
    """Errors of estimates that were measured, as logarithms of measured over predicted."""

    stages: Floats
    modes: Floats
    doublings: Floats
    rests: Floats
    spreads: Floats
    memory: Floats

    @classmethod
    def read(cls) -> "Errors":
        grids = [
            json.loads(path.read_text())
            for path in sorted((BENCHMARKS / "search" / "grids").glob("*.json"))
        ]
        parts = zip(*(cls._of_grid(grid["grid"]) for grid in grids), strict=True)
        stages, modes, doublings, rests, spreads = map(np.concatenate, parts)
        published = json.loads((BENCHMARKS / "results" / "published.json").read_text())
        memory = np.array(memory_errors(published))
        return cls(stages, modes, doublings, rests, spreads, memory)

    @staticmethod
    def _of_grid(lines: Sequence[dict[str, Any]]) -> tuple[Floats, ...]:
        """Take the errors of a grid apart: least squares over stage, checkpointing and size.

        Size weighs differently at each stage.
        """
        measured = [line for line in lines if line["outcome"]]
        error = np.log(
            [line["outcome"]["tokens_per_s"] / line["predicted_tokens_per_s"] for line in measured]
        )
        stages = np.array([line["setting"]["zero_stage"] for line in measured])
        modes = np.array([line["setting"]["checkpointing"] == "full" for line in measured])
        doublings = np.log2([line["setting"]["micro_batch_size"] for line in measured])
        at = np.stack([stages == stage for stage in range(4)], axis=1).astype(float)
        columns = np.column_stack([at, modes, at * doublings[:, None]])
        found, *_ = np.linalg.lstsq(columns, error, rcond=None)
        spreads = np.array([line["outcome"]["spread"] for line in measured])
        by_stage = found[:4] - found[:4].mean()
        return by_stage, found[4:5], found[5:9], error - columns @ found, spreads


def memory_errors(published: dict[str, Any]) -> list[float]:
    """Return the logarithm of published over estimated memory, of rows of equal length."""
    return [
        float(np.log(row["stated"] / row["predicted"]))
        for row in published["rows"]
        if row["stated"] and row["kind"] in ("allocated", "reserved", "nvidia-smi")
    ]


class Simulation(Rehearsal):
    """A rehearsal whose devices do something else than the plan says."""

    def __init__(
        self,
        workload: intake.Workload,
        logs: Path,
        speeds: Floats,
        needs: Floats,
        noise: float,
        seed: int,
    ) -> None:
        super().__init__(workload, logs, noise=noise, seed=seed)
        self._speeds, self._needs = speeds, needs

    def outcome(self, setting: Setting, measured: Any) -> Measured:  # noqa: ANN401
        estimate = super().outcome(setting, measured)
        row = self._row(setting)
        factor = float(self._speeds[row] / self._workload.plan.tokens_per_s[row])
        return replace(
            estimate,
            tokens_per_s=estimate.tokens_per_s * factor,
            samples_per_s=estimate.samples_per_s * factor,
            step_time_s=estimate.step_time_s / factor,
        )

    def _device_bytes(self, row: int) -> int:
        return round(float(self._needs[row]))


def draw_truth(plan: Plan, errors: Errors, random: np.random.Generator) -> tuple[Floats, Floats]:
    """Draw what each setting really does and needs."""
    space = plan.space

    def of(values: Any, pool: Floats) -> Floats:  # noqa: ANN401 - a column
        kinds, place = np.unique(values, return_inverse=True)
        signs = random.choice([-1, 1], len(kinds))
        drawn: Floats = (signs * random.choice(pool, len(kinds)))[place]
        return drawn

    off = of(space.column("zero_stage"), errors.stages)
    off = off + of(space.column("offload_optimizer"), errors.stages)
    off = off + of(space.column("checkpointing"), errors.modes)
    slope = of(space.column("zero_stage"), errors.doublings)
    off = off + slope * np.log2(space.micro_batch_size)
    off = off + random.choice(errors.rests, len(space))
    memory = random.choice(errors.memory, len(space.structures))[space.structure_index]
    return plan.tokens_per_s * np.exp(off), plan.memory.device_bytes * np.exp(memory)


def draw_job(random: np.random.Generator, scratch: Path) -> intake.Workload:
    """Draw model, devices, rows and batch; the model is traced once for each kind of device."""
    kind = str(random.choice(KINDS))
    devices = int(2 ** random.integers(0, 11))
    given = {
        "model": str(random.choice(MODELS)),
        "global_batch_size": str(devices * int(2 ** random.integers(0, 6))),
    }
    (gpu,) = parse_kinds(kind)
    named = intake.NamedHardware(gpus=in_nodes(gpu, devices))
    question = intake.ask(resolve([Layer("benchmark", given)]), named)
    intake.start_processes(question)
    return intake.look_into(
        question,
        dataset_dir=scratch,
        logs=scratch,
        imagined=intake.ImaginedRows(
            seq_length=int(random.choice([512, 1024, 2048])), rows=100_000
        ),
    )


def best_after(
    workload: intake.Workload, simulation: Simulation, sampler: str, seed: int
) -> list[float]:
    """Return the fastest true speed found after 1, 2, ... probes."""
    rungs: list[Rung] = []
    tuner = Tuner(
        workload.plan,
        simulation,
        simulation,
        [],
        record=rungs.append,
        clock=simulation.clock,
        parameters=workload.profile.parameters,
        steps=1,
        sampler=sampler,
        seed=seed,
    )
    tuner.run(max_probes=max(COUNTS), budget_s=None)
    best, after, begun = 0.0, [], []
    for rung in rungs:
        if rung.setting.structure not in begun:
            begun.append(rung.setting.structure)
            after.append(best)
        if isinstance(rung.outcome, Measured):
            row = workload.plan.row_of(rung.setting)
            assert row is not None
            best = max(best, float(simulation._speeds[row]))  # noqa: SLF001
        after[-1] = best
    return after


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--samplers", nargs="+", default=SAMPLERS)
    parser.add_argument("--output", type=Path, default=RESULT)
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    errors = Errors.read()
    random = np.random.default_rng(options.seed)
    regrets: dict[str, list[list[float]]] = {name: [] for name in options.samplers}
    seconds = dict.fromkeys(options.samplers, 0.0)
    probes = dict.fromkeys(options.samplers, 0)
    jobs: list[int] = []
    with tempfile.TemporaryDirectory(prefix="autotune-benchmark-") as scratch:
        while len(jobs) < options.jobs:
            workload = draw_job(random, Path(scratch))
            plan = workload.plan
            speeds, needs = draw_truth(plan, errors, random)
            fits = (needs <= plan.budget_bytes) & (
                plan.memory.host_bytes * plan.space.ranks <= plan.host_budget_bytes
            )
            noise = float(np.median(errors.spreads))
            if not (fits & plan.kept).any():
                continue
            truly_best = float(speeds[fits].max())
            for name in options.samplers:
                simulation = Simulation(workload, Path(scratch), speeds, needs, noise, len(jobs))
                started = time.perf_counter()
                found = best_after(workload, simulation, name, len(jobs))
                seconds[name] += time.perf_counter() - started
                probes[name] += len(found)
                padded = found + [found[-1]] * (max(COUNTS) - len(found))
                regrets[name].append([1 - padded[count - 1] / truly_best for count in COUNTS])
            jobs.append(plan.space.ranks)
            if len(jobs) % 20 == 0:
                for name in options.samplers:
                    means = np.mean(regrets[name], axis=0)
                    print(
                        len(jobs), name, [round(100 * mean, 3) for mean in means], file=sys.stderr
                    )
    result = {
        "jobs": len(jobs),
        "devices": {"least": min(jobs), "median": float(np.median(jobs)), "most": max(jobs)},
        "probes": list(COUNTS),
        "mean_regret": {name: np.mean(all_, axis=0).tolist() for name, all_ in regrets.items()},
        "standard_error": {
            name: (np.std(all_, axis=0) / np.sqrt(len(jobs))).tolist()
            for name, all_ in regrets.items()
        },
        "worst_after_12": {
            name: float(np.max(np.array(all_)[:, -1])) for name, all_ in regrets.items()
        },
        "probes_until_done": {name: count / len(jobs) for name, count in probes.items()},
        "sampler_s_a_job": {name: value / len(jobs) for name, value in seconds.items()},
    }
    options.output.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
