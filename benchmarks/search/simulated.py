"""Regret by number of probes on clusters that are simulated, beside Optuna's own samplers.

    python benchmarks/search/simulated.py [--jobs 200] [--seed 0]

A job is a model of configs/models, devices (1 to 1024 of a kind of the table), a length of rows and
a global batch, all drawn. What a setting really does is its estimate times errors that are drawn
from what was measured. A device that is full is out of memory. Errors of

- speed are those of the grids of benchmarks/search/exhaustive.py, by micro-batch size for ZeRO
  stages (and, as no grid has them, for offload), for checkpointing, for sampling, and what these
  leave of a structure but for the noise of the grid;
- each measurement are the noise of repeated probes (results/predicted_against_trained.json);
- memory are those of a whole job, from published measurements (results/published.json), and those
  of a structure, from virtual runs (results/virtual_gpu.json).

All samplers propose structures of the same plan, and each ladder is climbed alike. Writes
benchmarks/results/search_simulated.json.
"""

import argparse
import csv
import itertools
import json
import logging
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
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
from autotune.setting import RANDOM, Setting, recomputed_share
from autotune.tune.loop import Tuner

BENCHMARKS = Path(__file__).parent.parent
RESULT = BENCHMARKS / "results" / "search_simulated.json"
SAMPLERS = ("prior", "tpe", "gp", "random")
COUNTS = (1, 2, 3, 5, 8, 12)
DOUBLINGS = 5
"""Micro-batch sizes of a grid, at most."""
KNOBS_OF_GRIDS = (
    "zero_stage",
    "offload_optimizer",
    "offload_param",
    "checkpointing",
    "attention",
    "sampling",
)
EQUAL_ROWS = ("allocated", "reserved", "nvidia-smi")
"""Kinds of published figures of rows of one length."""

MODELS = ("chatglm3-6b", "llama-2-7b", "llama-2-13b", "glm-4-9b", "gemma-2-9b", "llama-2-70b")
KINDS = ("A100-80GB", "A100-40GB", "H100-80GB", "RTX3090-24GB", "RTX4090-24GB", "A40-48GB")

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Errors:
    """Errors of estimates that were measured, as logarithms of measured over predicted.

    Speeds: curves over doublings of the micro-batch size, arrays (curves, doublings).

    Attributes:
        sizes: of all settings of a grid alike.
        stages: of each ZeRO stage of a grid, beside the others: (grids, stages, doublings).
        modes: of full checkpointing, beside none.
        samplings: of rows split by length, beside rows as drawn.
        rests: of a structure, what these leave but for the noise.
        noise: of probes of the same setting on a quiet machine.
        jobs: memory of all settings of a published job: at one row, and more with each doubling.
        places: memory of a setting, arithmetic held against a virtual run of the engine.
    """

    sizes: Floats
    stages: Floats
    modes: Floats
    samplings: Floats
    rests: Floats
    noise: float
    jobs: Floats
    places: Floats

    @classmethod
    def read(cls) -> "Errors":
        paths = sorted((BENCHMARKS / "search" / "grids").glob("*.json"))
        grids = [Grid.read(json.loads(path.read_text())["grid"]) for path in paths]
        variance = _variance_of_rests(grids)
        return cls(
            sizes=_curves(grid.of_size[None] for grid in grids),
            stages=np.stack([_curves([grid.of_stages]) for grid in grids]),
            modes=_curves(grid.of_mode[None] for grid in grids),
            samplings=_curves(grid.of_sampling for grid in grids),
            rests=_curves(grid.rests(variance) for grid in grids),
            noise=noise_of_probes(),
            jobs=published_jobs(),
            places=virtual_errors(),
        )


def _curves(curves: Iterable[Floats]) -> Floats:
    """Join curves; a grid of fewer sizes goes on as it ends."""
    return np.concatenate(
        [np.pad(some, ((0, 0), (0, DOUBLINGS - some.shape[1])), mode="edge") for some in curves]
    )


@dataclass(frozen=True)
class Grid:
    """A recorded grid's errors: an array (sweeps, stages, modes, samplings, doublings)."""

    sweeps: Floats

    @classmethod
    def read(cls, lines: Sequence[dict[str, Any]]) -> "Grid":
        """Take the errors of each sweep; what a whole sweep is off by is left out."""
        settings = [line["setting"] for line in lines]
        axes = [
            np.unique([value(setting) for setting in settings], return_inverse=True)
            for value in (_stage, _mode, _sampling, _doublings)
        ]
        speeds = np.log([line["tokens_per_s"] for line in lines])
        predicted = np.log([line["predicted_tokens_per_s"] for line in lines])
        errors = np.full([speeds.shape[1], *(len(values) for values, _ in axes)], np.nan)
        stages, modes, samplings, doublings = (place for _, place in axes)
        errors[:, stages, modes, samplings, doublings] = (speeds - predicted[:, None]).T
        assert not np.isnan(errors).any(), "a grid has every setting"
        return cls(errors - errors.mean(axis=(1, 2, 3, 4), keepdims=True))

    @property
    def errors(self) -> Floats:
        return _mean(self.sweeps, (0,))

    @property
    def of_size(self) -> Floats:
        return _mean(self.errors, (0, 1, 2))

    @property
    def of_stages(self) -> Floats:
        return _mean(self.errors, (1, 2)) - self.of_size

    @property
    def of_mode(self) -> Floats:
        none, full = _mean(self.errors, (0, 2))
        more: Floats = full - none
        return more

    @property
    def of_sampling(self) -> Floats:
        """Return a curve, or none of a grid that has one sampling only."""
        drawn, *split = _mean(self.errors, (0, 1))
        more: Floats = np.array(split).reshape(-1, self.errors.shape[-1]) - drawn
        return more

    def pairs_of_rests(self) -> Iterator[tuple[float, float]]:
        """Yield of each pair of sweeps what varies alike in both, and the variance of that."""
        structures = self.errors.shape[:3]
        free = int(np.prod(structures)) - sum(count - 1 for count in structures) - 1
        share = np.prod(structures) / free
        lefts = [_left(errors) for errors in self.sweeps]
        for one, other in itertools.combinations(lefts, 2):
            of_both = share**2 * float((one**2).mean() * (other**2).mean())
            yield share * float((one * other).mean()), of_both / free

    def rests(self, variance: float) -> Floats:
        """Return what the others leave of each structure, as large as they really are."""
        left = _left(self.errors)
        scaled: Floats = left * np.sqrt(variance / left.var())
        return scaled.reshape(-1, left.shape[-1])


def _variance_of_rests(grids: Sequence[Grid]) -> float:
    """Return the variance of the rests: noise is not the same in two sweeps, they are.

    Pairs of sweeps count by how precise they are.
    """
    pairs = [pair for grid in grids for pair in grid.pairs_of_rests()]
    alike, uncertainty = zip(*pairs, strict=True)
    return max(0.0, float(np.average(alike, weights=1 / np.array(uncertainty))))


def _mean(errors: Floats, axes: tuple[int, ...]) -> Floats:
    mean: Floats = errors.mean(axis=axes)
    return mean


def _left(errors: Floats) -> Floats:
    """Return what stage, mode, sampling and size leave, an array like the errors."""
    left, of_size = errors, _mean(errors, (0, 1, 2))
    for others in ((1, 2), (0, 2), (0, 1)):
        left = left - (errors.mean(axis=others, keepdims=True) - of_size)
    return left - of_size


def _stage(setting: dict[str, Any]) -> int:
    return int(setting["zero_stage"])


def _mode(setting: dict[str, Any]) -> bool:
    return bool(setting["checkpointing"] == "full")


def _sampling(setting: dict[str, Any]) -> bool:
    return bool(setting["sampling"] == "batch_rebalance")


def _doublings(setting: dict[str, Any]) -> float:
    return float(np.log2(setting["micro_batch_size"]))


def noise_of_probes() -> float:
    """Return the standard deviation of the logarithm of what repeated probes measured."""
    result = json.loads((BENCHMARKS / "results" / "predicted_against_trained.json").read_text())
    variances = [
        np.log([pair["predicted_s"] for pair in setting["pairs"]]).var(ddof=1)
        for setting in result["settings"]
    ]
    return float(np.sqrt(np.mean(variances)))


def published_jobs() -> Floats:
    """Return for each published job its memory error at one row and that of a doubling.

    Of rows of equal length whose setting is all stated and whose figure says how it was taken; the
    others differ from their estimate by what is not known of them.
    """
    with (BENCHMARKS / "published" / "measurements.csv").open(newline="") as file:
        stated = {row["id"]: row for row in csv.DictReader(file) if "[Q=A]" in row["notes"]}
    jobs: dict[tuple[str, ...], list[tuple[float, float]]] = {}
    for row in json.loads((BENCHMARKS / "results" / "published.json").read_text())["rows"]:
        if row["stated"] and row["id"] in stated and row["kind"] in EQUAL_ROWS:
            of = stated[row["id"]]
            doublings = float(np.log2(int(of["micro_batch"])))
            job = (of["source_repo"], of["model"], of["gpu"])
            jobs.setdefault(job, []).append((doublings, np.log(row["stated"] / row["predicted"])))
    return np.array([_line(points) for points in jobs.values()])


def _line(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Return a job's error at one row and that of a doubling, 0 where only one was measured."""
    doublings, errors = zip(*points, strict=True)
    if len(set(doublings)) == 1:
        return float(np.mean(errors)), 0.0
    slope, at_one = np.polyfit(doublings, errors, 1)
    return float(at_one), float(slope)


def virtual_errors() -> Floats:
    rows = json.loads((BENCHMARKS / "results" / "virtual_gpu.json").read_text())["rows"]
    return np.array([-np.log1p(row["error_percent"] / 100) for row in rows])


class Simulation(Rehearsal):
    """A rehearsal whose devices do something else than the plan says."""

    def __init__(
        self,
        workload: intake.Workload,
        logs: Path,
        speeds: Floats,
        needs: Floats,
        errors: Errors,
        seed: int,
    ) -> None:
        super().__init__(workload, logs, noise=errors.noise, seed=seed)
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
    """Draw what each setting really does and needs.

    A grid's errors of the stages are those of other stages here: what is slower than estimated on
    one machine need not be on another. That checkpointing adds more work than estimated stays so;
    what recomputes one layer in N has that share of it. Offload, which no grid has, adds work too,
    and has an error of its own from there. Beyond the sizes that were measured an error is that of
    the last. Knobs that no grid has, and that add no work, have none.
    """
    space = plan.space
    doublings = np.log2(space.micro_batch_size)

    def at_size(curves: Floats) -> Floats:
        """Take each row's own curve at its micro-batch size, arrays (rows, doublings) to (rows)."""
        places = np.clip(doublings, 0, curves.shape[1] - 1)
        below = np.floor(places).astype(int)
        above = np.minimum(below + 1, curves.shape[1] - 1)
        rows = np.arange(len(curves))
        part = places - below
        taken: Floats = (1 - part) * curves[rows, below] + part * curves[rows, above]
        return taken

    def of(values: Any, curves: Floats) -> Floats:  # noqa: ANN401 - a column
        kinds, place = np.unique(values, return_inverse=True, axis=0)
        return at_size(random.choice(curves, len(kinds))[place])

    modes = space.column("checkpointing")
    recomputed = [recomputed_share(str(mode)) for mode in modes]
    stages = random.permutation(random.choice(errors.stages))
    structures = np.stack([_codes(space.column(name)) for name in KNOBS_OF_GRIDS], axis=1)
    alike = np.zeros(len(space))
    speed = of(alike, errors.sizes) + of(structures, errors.rests)
    speed = speed + at_size(stages[np.asarray(space.column("zero_stage"), dtype=int)])
    speed = speed + np.array(recomputed) * of(alike, errors.modes)
    for place in ("offload_optimizer", "offload_param"):
        speed = speed + (space.column(place) != "none") * of(alike, errors.modes)
    if len(errors.samplings):
        split = space.column("sampling") != RANDOM
        speed = speed + split * of(alike, errors.samplings)
    at_one, a_doubling = random.choice(errors.jobs)
    memory = at_one + a_doubling * doublings
    memory = memory + random.choice(errors.places, len(space.structures))[space.structure_index]
    return plan.tokens_per_s * np.exp(speed), plan.memory.device_bytes * np.exp(memory)


def _codes(values: Any) -> Floats:  # noqa: ANN401 - a column
    codes: Floats = np.unique(values, return_inverse=True)[1].astype(float)
    return codes


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
            if not (fits & plan.kept).any():
                continue
            truly_best = float(speeds[fits].max())
            for name in options.samplers:
                simulation = Simulation(workload, Path(scratch), speeds, needs, errors, len(jobs))
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
