"""Run directories of runs that never ran: the files are as `run` writes them, the figures drawn."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from records import LENGTHS, make_cluster, make_job, make_profile, plan_for

from autotune.outcome import Measured, OutOfMemory, Rung
from autotune.remedy import near_misses
from autotune.rundir import RunDir, write_json
from autotune.setting import Setting
from autotune.units import GIB

CLUSTER = make_cluster(gpus=2, memory_bytes=24 * GIB)
JOB = make_job(model="example/model", global_batch_size=16)
PLAN = plan_for(CLUSTER, job=JOB)


def plan_json() -> dict[str, Any]:
    """Return plan.json of the example."""
    rows = PLAN.listed_rows()
    profile = make_profile()
    model = {"name": JOB.model, **asdict(profile)}
    model.pop("traces")
    return {
        "schema": 1,
        "model": model,
        "cluster": asdict(CLUSTER),
        "job": asdict(JOB),
        "settings": [
            entry | {"terms": terms, "source": "arithmetic"}
            for entry, terms in zip(PLAN.entries(rows), PLAN.terms.rows(rows), strict=True)
        ],
        "counts": {"kept": int(PLAN.kept.sum()), "rejected_by_rule": PLAN.rejected_by_rule()},
        "near_misses": near_misses(PLAN, profile, JOB, CLUSTER, int(LENGTHS.max())),
    }


def row_of(setting: Setting) -> int:
    """Return the row of a setting of the example's plan."""
    row = PLAN.row_of(setting)
    assert row is not None
    return row


def truth(setting: Setting, *, slower: float = 1.3) -> Measured:
    """Return what a setting is measured to do that is so much slower than estimated."""
    row = row_of(setting)
    updates_s = float(PLAN.terms.update_s[row])
    return Measured(
        step_time_s=slower * float(PLAN.step_time_s[row]),
        samples_per_s=float(PLAN.samples_per_s[row]) / slower,
        tokens_per_s=float(PLAN.tokens_per_s[row]) / slower,
        accumulate_s=((128, 0.5), (1024, 2.0)),
        boundary_extra_s=slower * updates_s,
        spread=0.01,
        peak_bytes=round(0.97 * float(PLAN.memory.device_bytes[row])),
    )


def rungs_of(settings: Sequence[Setting], *, slower: float = 1.3) -> list[Rung]:
    """Return a measured rung of each setting, a minute apart."""
    return [
        Rung(
            setting=setting,
            ranks=2,
            lengths={"longest": 1123, "timed": [128, 1024]},
            outcome=truth(setting, slower=slower),
            at=f"2026-01-01T00:{minute % 60:02d}:00+00:00",
            seconds=20.0 + minute,
        )
        for minute, setting in enumerate(settings)
    ]


def fastest(count: int) -> list[Setting]:
    """Return so many settings that fit, the fastest first."""
    rows = [row for row in PLAN.ranking().tolist() if PLAN.fits[row]]
    return [PLAN.space.setting(row) for row in rows[:count]]


def failed(rung: Rung, evidence: str = "torch.OutOfMemoryError: no more") -> Rung:
    return replace(rung, outcome=OutOfMemory(where="device", evidence=evidence))


def steps(count: int) -> list[dict[str, Any]]:
    """Return metrics of so many steps, whose loss falls."""
    return [
        {
            "step": step,
            "max_steps": count,
            "loss": 2.0 + 6.0 * math.exp(-step / count),
            "learning_rate": 2e-5,
            "step_time_s": 1.5,
            "tokens": 9000,
            "tokens_per_s": 6000.0 + 50 * (step % 7),
            "peak_bytes": 20 * GIB,
        }
        for step in range(1, count + 1)
    ]


@dataclass(kw_only=True)
class Example:
    """A run of the example; `write` makes its directory. What is None is not written."""

    dataset: str = "/data/rows.jsonl"
    phase: str = "done"
    plan: dict[str, Any] | None = field(default_factory=plan_json)
    rungs: Sequence[Rung] = field(default_factory=lambda: rungs_of(fastest(6)))
    steps: Sequence[dict[str, Any]] = field(default_factory=lambda: steps(40))
    end: dict[str, Any] = field(
        default_factory=lambda: {"exit_reason": "trained", "exit_code": 0, "message": ""}
    )
    is_tuned: bool = True
    options: dict[str, Any] = field(default_factory=dict)

    def write(self, root: Path) -> RunDir:
        run_dir = RunDir(root)
        run_dir.create()
        options = {"dataset": [self.dataset], "model": JOB.model, "seed": 42} | self.options
        write_json(
            run_dir.run,
            {
                "schema": 1,
                "fingerprint": "f",
                "options": {
                    name: {"value": value, "source": "command line"}
                    for name, value in options.items()
                },
                "versions": {"torch": "2.13.0", "autotune": "0"},
            },
        )
        write_json(
            run_dir.status, {"schema": 1, "phase": self.phase, "heartbeat": "2026-01-01T01:00:00"}
        )
        write_json(run_dir.hardware, {"schema": 1, **asdict(CLUSTER)})
        write_json(run_dir.dataset_profile, dataset_json(self.dataset))
        if self.plan is not None:
            write_json(run_dir.plan, self.plan)
        for rung in self.rungs:
            run_dir.append_rung(rung)
        if self.steps:
            run_dir.training.mkdir()
            lines = "".join(json.dumps(line) + "\n" for line in self.steps)
            (run_dir.training / "metrics.jsonl").write_text(lines)
        write_json(run_dir.result, {"schema": 1, "run_dir": str(root)} | self._figures() | self.end)
        return run_dir

    def _figures(self) -> dict[str, Any]:
        measured = [
            (rung.setting, rung.outcome)
            for rung in self.rungs
            if isinstance(rung.outcome, Measured)
        ]
        if not self.is_tuned or not measured:
            return {}
        best, fast = max(measured, key=lambda each: each[1].tokens_per_s)
        default, usual = measured[-1]
        row = row_of(best)
        trained = {
            "training": {
                "steps": len(self.steps),
                "loss_start": self.steps[0]["loss"],
                "loss_end": self.steps[-1]["loss"],
            },
            "training_seconds": 60.0,
            "model_dir": "model",
        }
        return {
            "setting": best.to_json(),
            "tokens_per_s": fast.tokens_per_s,
            "samples_per_s": fast.samples_per_s,
            "step_time_s": fast.step_time_s,
            "default": {
                "setting": default.to_json(),
                "tokens_per_s": usual.tokens_per_s,
            },
            "gain_over_default": fast.tokens_per_s / usual.tokens_per_s,
            "memory": {
                "predicted_bytes": round(float(PLAN.memory.device_bytes[row])),
                "measured_bytes": fast.peak_bytes,
                "budget_bytes": PLAN.budget_bytes,
            },
            "probes": 3,
            "rungs": len(self.rungs),
            "stopped_by": "nothing to gain",
            "tuning_seconds": 300.0,
            "break_even_step": 17,
            **(trained if self.steps else {}),
        }


def dataset_json(path: str) -> dict[str, Any]:
    powers = np.ceil(np.log2(LENGTHS)).astype(int)
    return {
        "schema": 1,
        "path": path,
        "format": "messages",
        "rows": 1100,
        "rows_used": 1024,
        "rows_reported": 76,
        "rows_truncated": 30,
        "rows_overlong": 0,
        "rows_without_trained_tokens": 4,
        "sequences": 1024,
        "tokens": int(LENGTHS.sum()),
        "tokens_lost": 12345,
        "trained_tokens": 300_000,
        "min_length": int(LENGTHS.min()),
        "mean_length": float(LENGTHS.mean()),
        "max_length": int(LENGTHS.max()),
        "histogram": [
            [2**power, int((powers == power).sum())]
            for power in range(int(powers.min()), int(powers.max()) + 1)
        ],
        "warnings": ["30 rows are longer than 2048 tokens"],
    }
