"""A search as it would go on hardware that is not there, answered by virtual runs."""

import logging
import math
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from autotune.config import AUTO
from autotune.errors import UsageError, VirtualRunUnavailableError
from autotune.intake import Workload, on_one_node, run_virtually, total_steps
from autotune.outcome import Measured, OutOfMemory, Rung
from autotune.pipeline import require_any_kept, require_best
from autotune.probe.protocol import ProbeRequest, RungFailure, RungMeasurement
from autotune.setting import Setting, Structure
from autotune.tune import narrowing
from autotune.tune.beliefs import NO_HINTS, Hint
from autotune.tune.loop import Tuned, Tuner
from autotune.tune.search import rungs_s, start_s
from autotune.tune.site import JobSite
from autotune.units import format_bytes

_log = logging.getLogger(__name__)


class Rehearsal:
    """What asks for probes and what answers them: a machine that is not there, with its own clock.

    Where the estimate leaves in doubt whether a setting fits, a virtual run of the real engine
    tells; elsewhere the estimate does. Times are those of the throughput model, with `noise` (the
    standard deviation of their logarithm) drawn from the seed.
    """

    def __init__(
        self, workload: Workload, logs: Path, *, noise: float = 0.0, seed: int = 0
    ) -> None:
        self.now_s = 0.0
        self._workload = workload
        self._logs = logs
        self._noise = noise
        self._random = np.random.default_rng(seed)
        self._rungs_s = rungs_s(workload.plan)
        self._start_s = start_s(workload.profile.parameters)
        self._ladder: dict[int, Setting] = {}
        self._site = JobSite(
            job=workload.job,
            cluster=workload.question.cluster,
            profile=workload.profile,
            lengths_of_rows=workload.lengths,
            rebalanced=workload.drawn.rebalanced,
            dataset_dir=logs,
            scratch_dir=logs,
            total_steps=total_steps(workload) or 1,
        )

    def clock(self) -> float:
        return self.now_s

    def request(self, ladder: Sequence[Setting]) -> ProbeRequest:
        self._ladder = {setting.micro_batch_size: setting for setting in ladder}
        return self._site.request(ladder)

    def lengths(self, setting: Setting) -> dict[str, object]:
        return self._site.lengths(setting)

    def probe(self, request: ProbeRequest) -> Generator[RungMeasurement | RungFailure]:
        """Answer as devices would that the plan is right about, but for what a virtual run says."""
        self.now_s += self._start_s
        for rung in request.rungs:
            setting = self._ladder[rung.micro_batch_size]
            row = self._row(setting)
            needs, budget = self._device_bytes(row), self._workload.plan.budget_bytes
            if needs > budget:
                evidence = f"needs {format_bytes(needs)} of {format_bytes(budget)}"
                yield RungFailure(
                    micro_batch_size=rung.micro_batch_size,
                    outcome=OutOfMemory(where="device", evidence=evidence),
                    seconds=0.0,
                )
                return
            seconds = float(self._rungs_s[row])
            self.now_s += seconds
            yield RungMeasurement(
                micro_batch_size=rung.micro_batch_size,
                accumulate_s=(),
                boundary_s=(),
                peak_bytes=needs,
                seconds=seconds,
            )

    def outcome(self, setting: Setting, measured: RungMeasurement) -> Measured:
        plan, row = self._workload.plan, self._row(setting)
        slower = float(np.exp(self._random.normal(0.0, self._noise)))
        return Measured(
            step_time_s=float(plan.step_time_s[row]) * slower,
            samples_per_s=float(plan.samples_per_s[row]) / slower,
            tokens_per_s=float(plan.tokens_per_s[row]) / slower,
            accumulate_s=(),
            boundary_extra_s=0.0,
            spread=self._noise,
            peak_bytes=measured.peak_bytes,
        )

    def _row(self, setting: Setting) -> int:
        row = self._workload.plan.row_of(setting)
        assert row is not None, "what is probed is of the plan"
        return row

    def _device_bytes(self, row: int) -> int:
        plan = self._workload.plan
        estimate = round(float(plan.memory.device_bytes[row]))
        if plan.surely_fits[row] or not plan.kept[row]:
            return estimate
        setting = plan.space.setting(row)
        log = self._logs / f"virtual-{setting.structure.label()}.log"
        _log.info("virtual run of %s", setting.label())
        try:
            run = run_virtually(self._workload, setting, log)
        except VirtualRunUnavailableError as error:
            _log.warning("answered by arithmetic, as %s", error)
            return estimate
        return run.peak_device_bytes + round(float(plan.memory.runtime_bytes[row]))


def rehearse(workload: Workload, logs: Path, *, noise: float) -> dict[str, Any]:
    """Search as `run` would, and return what was tried, in which order, and what was chosen.

    Raises:
        NothingFitsError: nothing fits the hardware.
        UsageError: --tune-budget auto, and it is not known how long the training is.
    """
    options, plan = workload.question.options, workload.plan
    budget, steps = options["tune_budget"], total_steps(workload)
    if budget == AUTO and steps is None:
        msg = "--tune-budget auto needs to know how long the training is: name --dataset or --rows"
        raise UsageError(msg)
    require_any_kept(plan)
    narrowed, narrowing_s, known = None, 0.0, NO_HINTS
    if workload.question.cluster.num_nodes > 1:
        node = on_one_node(workload, logs)
        if node.plan.kept.any():
            narrowed, narrowing_s = _search(node, logs, noise, narrows=True)
            known = narrowing.hints(plan, node.plan, narrowed.rungs)
    tuned, tuning_s = _search(workload, logs, noise, hints=known)
    document = _document(workload, tuned, narrowing_s + tuning_s)
    if narrowed is not None:
        document["on_one_node"] = {
            "probes": _probes(narrowed.rungs),
            "rungs": len(narrowed.rungs),
            "seconds": narrowing_s,
        }
    return document


def _search(
    workload: Workload,
    logs: Path,
    noise: float,
    *,
    narrows: bool = False,
    hints: Mapping[int, Hint] = NO_HINTS,
) -> tuple[Tuned, float]:
    """Search, or only narrow down; returns the seconds that it would take too."""
    options = workload.question.options
    budget, steps = options["tune_budget"], total_steps(workload)
    rehearsal = Rehearsal(workload, logs, noise=noise, seed=options["seed"])
    tuner = Tuner(
        workload.plan,
        rehearsal,
        rehearsal,
        [],
        record=lambda _: None,
        clock=rehearsal.clock,
        parameters=workload.profile.parameters,
        steps=steps,
        thrifty=budget == AUTO,
        hints=hints,
        sampler=options["sampler"],
        seed=options["seed"],
    )
    share = narrowing.SHARE if narrows else 1.0
    tuned = tuner.run(
        max_probes=math.ceil(share * options["max_probes"]),
        budget_s=None if budget in {AUTO, None} else share * budget,
        tell_apart=not narrows,
    )
    return tuned, rehearsal.now_s


def _document(workload: Workload, tuned: Tuned, seconds: float) -> dict[str, Any]:
    best = require_best(workload.plan, tuned)
    default = tuned.default.outcome if tuned.default else None
    assert isinstance(best.outcome, Measured)
    slowest = default.tokens_per_s if isinstance(default, Measured) else None
    return {
        "schema": 1,
        "model": {"name": workload.job.model, "parameters": workload.profile.parameters},
        "cluster": {
            "device_name": workload.question.cluster.device_name,
            "num_devices": workload.question.cluster.num_devices,
            "num_nodes": workload.question.cluster.num_nodes,
            "device_memory_bytes": workload.question.cluster.device_memory_bytes,
        },
        "job": {"precision": workload.job.precision, "method": workload.job.method},
        "probes": _probes(tuned.rungs),
        "chosen": _entry(best),
        "default": _entry(tuned.default) if tuned.default else None,
        "gain_over_default": best.outcome.tokens_per_s / slowest if slowest else None,
        "settings": len(workload.plan.space),
        "rungs": len(tuned.rungs),
        "tuning_seconds": seconds,
        "stopped_by": tuned.stopped_by,
    }


def _probes(rungs: Sequence[Rung]) -> list[dict[str, Any]]:
    """Return the rungs by the probe that they were climbed in."""
    probes: list[dict[str, Any]] = []
    last: tuple[Structure, str] | None = None
    for rung in rungs:
        if (rung.setting.structure, rung.purpose) != last:
            last = (rung.setting.structure, rung.purpose)
            label = rung.setting.structure.label()
            probes.append({"structure": label, "purpose": rung.purpose, "rungs": []})
        probes[-1]["rungs"].append(_entry(rung))
    return probes


def _entry(rung: Rung) -> dict[str, Any]:
    outcome = rung.outcome
    figures: dict[str, Any] = {"tokens_per_s": None, "device_bytes": None}
    if isinstance(outcome, Measured):
        figures = {"tokens_per_s": outcome.tokens_per_s, "device_bytes": outcome.peak_bytes}
    return {
        "setting": rung.setting.to_json(),
        "outcome": outcome.kind,
        **figures,
        "seconds": rung.seconds,
    }
