"""What runs of like jobs have measured, kept for the next one."""

import hashlib
import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from autotune import __version__
from autotune.environment import cache_dir, versions
from autotune.intake import Workload
from autotune.outcome import Measured, OutOfMemory, Rung
from autotune.rundir import read_json, write_json
from autotune.throughput import Ints
from autotune.tune.earlier import holds

_log = logging.getLogger(__name__)

_SHARES = np.linspace(0, 100, 21)
_A_STEP = 0.05

_OF_SPEED = (
    "method",
    "lora",
    "optimizer",
    "precision",
    "max_seq_length",
    "global_batch_size",
    "max_grad_norm",
    "seed",
)
"""What of a job changes how fast its steps are, or which rows meet in them."""


@dataclass(frozen=True, slots=True)
class OutcomeCache:
    """Outcomes of jobs that are alike in all that makes a setting fast or large.

    They are kept by the content of the model, the devices, the versions of the libraries and the
    lengths of the rows: lengths count as alike when their quantiles are, to 5 %.
    """

    path: Path

    @classmethod
    def of(cls, workload: Workload) -> "OutcomeCache":
        question, job = workload.question, workload.job
        facts = (
            question.source.content_hash(),
            question.cluster.identity(),
            [getattr(job, name) for name in _OF_SPEED],
            _length_profile(workload.lengths),
            bool(workload.dataset and workload.dataset.packing),
            question.deepspeed,
            versions(),
            __version__,
        )
        key = hashlib.blake2b(repr(facts).encode(), digest_size=16).hexdigest()
        return cls(cache_dir() / "outcomes" / f"{key}.json")

    @property
    def kind_of_job(self) -> str:
        """Name what jobs have in common whose outcomes hold for each other."""
        return self.path.stem

    def read(self, workload: Workload) -> list[Rung]:
        """Return the outcomes that hold for this job's devices, marked as cached."""
        budget = workload.plan.budget_bytes
        rungs = []
        for entry in self._entries():
            try:
                rung = replace(Rung.from_json(entry["rung"]), cached=True, job="")
                had = int(entry["budget_bytes"])
            except (KeyError, TypeError, ValueError):
                _log.warning("%s holds what is no outcome; it is left out", self.path)
                continue
            if holds(rung, had, budget) and workload.plan.row_of(rung.setting) is not None:
                rungs.append(rung)
        return rungs if any(isinstance(rung.outcome, Measured) for rung in rungs) else []

    def keep(self, rungs: tuple[Rung, ...], workload: Workload) -> None:
        """Keep what a search ended with, in place of what was kept before.

        Crashes are not kept: what they came from may be mended by the next run. Nor are
        verifications of what is kept already, of which each run would add one.
        """
        found = {rung.setting for rung in rungs if rung.purpose != "verification"}
        entries = [
            {"budget_bytes": workload.plan.budget_bytes, "rung": rung.to_json()}
            for rung in rungs
            if isinstance(rung.outcome, Measured | OutOfMemory)
            and (rung.purpose != "verification" or rung.setting not in found)
        ]
        if not entries:
            return
        self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_json(self.path, {"schema": 1, "outcomes": entries})

    def _entries(self) -> list[dict[str, Any]]:
        document = read_json(self.path)
        entries = document.get("outcomes") if isinstance(document, dict) else None
        return entries if isinstance(entries, list) else []


def _length_profile(lengths: Ints) -> list[int]:
    """Return the quantiles of the lengths in steps of 5 %."""
    quantiles = np.percentile(lengths, _SHARES)
    return [round(float(step)) for step in np.log(np.maximum(quantiles, 1)) / np.log1p(_A_STEP)]
