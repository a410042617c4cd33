"""Reads a run directory, as far as the run got: what is not there yet, or torn, is left empty."""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from autotune.errors import InputMissingError
from autotune.outcome import Measured, Outcome, Rung
from autotune.rundir import RunDir, read_json
from autotune.setting import Setting
from autotune.tune.beliefs import in_one

Document = dict[str, Any]

_TAIL_LINES = 40
_TAIL_BYTES = 16_000

_FIGURES = ("setting", "tokens_per_s")
"""What result.json has once a setting was chosen."""


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """What is known of a run.

    Attributes:
        run, hardware, dataset, plan, result, status: the documents of these names.
        rungs: what was tried, in its order.
        steps: those of the training.
        evaluations: of the training, where it held rows out.
        recoveries: each time that the training went on with another setting.
        training_tail: the last lines of the training's log.
    """

    root: Path
    run: Document = field(default_factory=dict)
    hardware: Document = field(default_factory=dict)
    dataset: Document = field(default_factory=dict)
    plan: Document = field(default_factory=dict)
    result: Document = field(default_factory=dict)
    status: Document = field(default_factory=dict)
    rungs: tuple[Rung, ...] = ()
    steps: tuple[Document, ...] = ()
    evaluations: tuple[Document, ...] = ()
    recoveries: tuple[Document, ...] = ()
    training_tail: str = ""

    @classmethod
    def read(cls, run_dir: RunDir) -> "RunRecord":
        """Read a run directory.

        Raises:
            InputMissingError: no run was ever started there.
        """
        run, status = _document(run_dir.run), _document(run_dir.status)
        if not run and not status:
            msg = (
                f"{run_dir.root} holds no run: name the directory that `autotune run` or "
                "`autotune tune` has printed"
            )
            raise InputMissingError(msg)
        recovered = _document(run_dir.training / "recoveries.json")
        return cls(
            root=run_dir.root,
            run=run,
            hardware=_document(run_dir.hardware),
            dataset=_document(run_dir.dataset_profile),
            plan=_document(run_dir.plan),
            result=_document(run_dir.result),
            status=status,
            rungs=tuple(run_dir.read_rungs()),
            steps=tuple(_lines(run_dir.training / "metrics.jsonl")),
            evaluations=tuple(_lines(run_dir.training / "evaluations.jsonl")),
            recoveries=tuple(recovered.get("recoveries", [])),
            training_tail=_tail(run_dir.logs / "training.log"),
        )

    @cached_property
    def chosen(self) -> Setting | None:
        """The setting that was chosen; None if tuning did not come to its end."""
        if not all(self.result.get(name) for name in _FIGURES):
            return None
        return Setting.from_json(self.result["setting"])

    @cached_property
    def tried(self) -> dict[Setting, Outcome]:
        """What came of each setting that was tried, in the order of the first time."""
        outcomes: dict[Setting, list[Outcome]] = {}
        for rung in self.rungs:
            outcomes.setdefault(rung.setting, []).append(rung.outcome)
        return {setting: in_one(found) for setting, found in outcomes.items()}

    @cached_property
    def measured(self) -> dict[Setting, Measured]:
        """The settings that were measured, the fastest first."""
        found = [(one, out) for one, out in self.tried.items() if isinstance(out, Measured)]
        return dict(sorted(found, key=lambda pair: -pair[1].tokens_per_s))

    @cached_property
    def entries(self) -> dict[Setting, Document]:
        """The settings of the plan with their estimates, in its order."""
        return {Setting.from_json(one["setting"]): one for one in self.plan.get("settings", [])}

    @property
    def phase(self) -> str:
        """What the run does or did last."""
        return str(self.status.get("phase", ""))

    def option(self, name: str) -> Any:  # noqa: ANN401 - JSON
        """Return an option as run.json has it."""
        return self.run.get("options", {}).get(name, {}).get("value")


def _document(path: Path) -> Document:
    document = read_json(path)
    return document if isinstance(document, dict) else {}


def _lines(path: Path) -> Iterator[Document]:
    """Yield the whole lines of a file of steps; a figure that is no number is left out."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return
    for line in text.splitlines():
        try:
            fields = json.loads(line)
        except ValueError:
            continue
        if isinstance(fields, dict) and "step" in fields:
            yield {name: value for name, value in fields.items() if _is_finite(value)}


def _is_finite(value: object) -> bool:
    return not isinstance(value, float) or math.isfinite(value)


def _tail(path: Path) -> str:
    try:
        text = path.read_bytes()[-_TAIL_BYTES:].decode(errors="replace")
    except OSError:
        return ""
    return "\n".join(text.splitlines()[-_TAIL_LINES:])
