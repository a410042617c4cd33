"""Puts what happens in a run into events: counts what was tried, and knows what is best so far."""

import os
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from autotune.config import AUTO
from autotune.events import Events, tell_progress
from autotune.intake import Workload
from autotune.outcome import Measured, Purpose, Rung
from autotune.setting import Setting, Structure
from autotune.tune.search import default_setting

if TYPE_CHECKING:
    from autotune.dataset.preparing import Progress
    from autotune.plan import Plan


class Chronicle:
    """Tells events of one run. Looks on at its probes (see tune.loop.Watch)."""

    def __init__(self, events: Events) -> None:
        self.tell = events.tell
        self._structures: set[Structure] = set()
        self._speeds: dict[Setting, float] = {}
        self._default: Setting | None = None
        self._best: Setting | None = None
        self._plan: Plan | None = None
        self._probe_began_s = 0.0

    def started(self, command: str, fingerprint: str, run_dir: str) -> None:
        self.tell(
            "run_started",
            command=command,
            fingerprint=fingerprint,
            pid=os.getpid(),
            host=os.uname().nodename,
            run_dir=run_dir,
        )

    def known(self, rungs: Sequence[Rung]) -> None:
        """Take in the outcomes that were there when the run began."""
        for rung in rungs:
            self._count(rung)
        if rungs:
            self.tell(
                "known",
                rungs=len(rungs),
                probes=len(self._structures),
                best=self._best_so_far(),
                default=self._default_so_far(),
            )

    def planned(self, workload: Workload) -> None:
        plan, options = workload.plan, workload.question.options
        self._plan = plan
        if plan.kept.any():
            self._default = default_setting(plan)
        budget = options["tune_budget"]
        self.tell(
            "planned",
            model=workload.job.model,
            parameters=workload.profile.parameters,
            rows=workload.rows,
            kept=int(plan.kept.sum()),
            budget_bytes=plan.budget_bytes,
            default=self._default_so_far(),
            max_probes=options["max_probes"],
            budget_s=None if budget == AUTO else budget,
        )
        if self._best is not None:
            # Of what was known before, the gain is known only now.
            self.tell("best", **self._best_so_far() or {})

    def data(self, progress: "Progress") -> None:
        tell_progress(
            self.tell,
            "data",
            progress.bytes_done,
            progress.bytes_total,
            unit="bytes",
            note=f"{progress.rows} rows, {progress.rows_per_s:.0f} rows/s",
            left_s=progress.seconds_left,
        )

    def ops(self, built: int, of: int, name: str) -> None:
        tell_progress(self.tell, "ops", built, of, unit="ops", note=name)

    def begins(self, ladder: Sequence[Setting], purpose: Purpose) -> None:
        self._probe_began_s = time.monotonic()
        structure = ladder[0].structure
        self.tell(
            "probe_started",
            structure=structure.to_json(),
            label=structure.label(),
            purpose=purpose,
            rungs=[self._foretold(setting) for setting in ladder],
        )

    def _foretold(self, setting: Setting) -> dict[str, Any]:
        assert self._plan is not None, "what is probed was planned"
        row = self._plan.row_of(setting)
        assert row is not None, "what is probed is of the plan"
        return {
            "micro_batch_size": setting.micro_batch_size,
            "gradient_accumulation_steps": setting.gradient_accumulation_steps,
            "predicted_bytes": float(self._plan.memory.device_bytes[row]),
            "predicted_tokens_per_s": float(self._plan.tokens_per_s[row]),
            "kind": None,
            "tokens_per_s": None,
            "peak_bytes": None,
        }

    def ends(self) -> None:
        seconds = time.monotonic() - self._probe_began_s
        self.tell("probe_ended", probes=len(self._structures), seconds=seconds)

    def waits(self, at_work: Sequence[Structure]) -> None:
        self.tell("waiting", structures=[structure.label() for structure in at_work])

    def phase_of_probe(self, phase: str) -> None:
        self.tell("probe_phase", phase=phase)

    def rung(self, rung: Rung) -> None:
        outcome = rung.outcome
        measured = outcome if isinstance(outcome, Measured) else None
        before = self._best
        self._count(rung)
        self.tell(
            "rung",
            setting=rung.setting.to_json(),
            kind=outcome.kind,
            tokens_per_s=measured and measured.tokens_per_s,
            peak_bytes=measured and measured.peak_bytes,
            seconds=rung.seconds,
            purpose=rung.purpose,
            cached=rung.cached,
        )
        if self._best != before:
            self.tell("best", **self._best_so_far() or {})

    def chosen(self, figures: Mapping[str, Any]) -> None:
        names = ("setting", "tokens_per_s", "gain_over_default", "stopped_by")
        self.tell("chosen", **{name: figures[name] for name in names})

    def ended(self, exit_reason: str, exit_code: int, message: str | None) -> None:
        self.tell("run_ended", exit_reason=exit_reason, exit_code=exit_code, message=message)

    def _count(self, rung: Rung) -> None:
        if not rung.cached:
            self._structures.add(rung.setting.structure)
        if not isinstance(rung.outcome, Measured):
            return
        self._speeds.setdefault(rung.setting, rung.outcome.tokens_per_s)
        if self._best is None or self._speeds[rung.setting] > self._speeds[self._best]:
            self._best = rung.setting

    def _best_so_far(self) -> dict[str, Any] | None:
        if self._best is None:
            return None
        speed, default = self._speeds[self._best], self._speed_of_default()
        return {
            "setting": self._best.to_json(),
            "tokens_per_s": speed,
            "gain_over_default": speed / default if default else None,
        }

    def _default_so_far(self) -> dict[str, Any] | None:
        if self._default is None:
            return None
        return {"setting": self._default.to_json(), "tokens_per_s": self._speed_of_default()}

    def _speed_of_default(self) -> float | None:
        return self._speeds.get(self._default) if self._default is not None else None
