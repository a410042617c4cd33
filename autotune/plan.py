"""Estimates every setting and keeps those that can fit; what is rejected says by which rule."""

from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autotune.hardware import Cluster, Rates
from autotune.memory import PARTS, MemoryEstimate, estimate_memory
from autotune.prune import best_beside, has_place_between, outdone
from autotune.setting import Setting
from autotune.space import Space
from autotune.throughput import (
    DrawnRows,
    Ints,
    StepRate,
    integrate,
    predicted_communication_s,
    predicted_micro_step,
    predicted_update_s,
    synchronises_every_micro_step,
)
from autotune.units import format_bytes
from autotune.workload import Job, ModelProfile

SCHEMA = 1

_MEMORY_TOLERANCE = 0.15
"""A setting is rejected only if it would not fit with the estimate this much too high."""

_NEAREST_REJECTED = 20

_UNKNOWN_HOST_BYTES = 2**60
"""The host of hardware that is only named rejects nothing; what it would need is shown."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rejection:
    rule: str
    detail: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Every setting with its estimate. Columns are those of the space."""

    space: Space
    memory: MemoryEstimate
    step_time_s: NDArray[np.float64]
    samples_per_s: NDArray[np.float64]
    tokens_per_s: NDArray[np.float64]
    budget_bytes: int
    host_budget_bytes: int

    @property
    def fits(self) -> NDArray[np.bool_]:
        """Whether the estimate says that a setting fits."""
        host_bytes = self.memory.host_bytes * self.space.ranks
        fits: NDArray[np.bool_] = (self.memory.device_bytes <= self.budget_bytes) & (
            host_bytes <= self.host_budget_bytes
        )
        return fits

    @property
    def kept(self) -> NDArray[np.bool_]:
        """Whether a setting may fit, the estimate's tolerance granted."""
        return self.may_fit(self.memory.device_bytes)

    def may_fit(self, device_bytes: NDArray[np.float64]) -> NDArray[np.bool_]:
        """Whether settings that need so much of a device may fit, the tolerance granted."""
        granted = 1 + _MEMORY_TOLERANCE
        may_fit: NDArray[np.bool_] = (device_bytes <= granted * self.budget_bytes) & (
            self.memory.host_bytes * self.space.ranks <= granted * self.host_budget_bytes
        )
        return may_fit & ~self.outdone

    @property
    def surely_fits(self) -> NDArray[np.bool_]:
        """Whether a setting fits even if the estimate is too low by the tolerance."""
        granted = 1 + _MEMORY_TOLERANCE
        surely: NDArray[np.bool_] = (granted * self.memory.device_bytes <= self.budget_bytes) & (
            granted * self.memory.host_bytes * self.space.ranks <= self.host_budget_bytes
        )
        return surely

    @property
    def outdone(self) -> NDArray[np.bool_]:
        """Whether a setting lies between two ways to checkpoint of which one is faster and fits."""
        return outdone(self.space, self.surely_fits, self.tokens_per_s)

    def has_place_between(self) -> bool:
        """Tell whether checkpointing some of the layers may beat both none and all of them."""
        return has_place_between(self.space, self.surely_fits, self.kept, self.tokens_per_s)

    def ranking(self) -> Ints:
        """Return the rows: kept ones first, the fastest first, then the rest by what they need."""
        speed = np.where(self.kept, -self.tokens_per_s, self.memory.device_bytes)
        return np.lexsort((speed, ~self.kept))

    def rejection(self, row: int) -> Rejection | None:
        """Return the rule that a setting falls to, with its numbers."""
        if self.kept[row]:
            return None
        parts = self.memory.row(row)
        if self.memory.device_bytes[row] > self.budget_bytes * (1 + _MEMORY_TOLERANCE):
            largest = sorted(PARTS, key=lambda name: -parts[name])[:3]
            shares = ", ".join(
                f"{name.removesuffix('_bytes')} {format_bytes(parts[name])}" for name in largest
            )
            detail = (
                f"needs {format_bytes(parts['device_bytes'])} a rank ({shares}), "
                f"{format_bytes(self.budget_bytes)} are there"
            )
            return Rejection(rule="device_memory", detail=detail)
        if self.outdone[row]:
            best = best_beside(self.space, self.surely_fits, self.tokens_per_s)[row]
            detail = (
                f"{self.tokens_per_s[row]:.0f} tokens/s are estimated, and {best:.0f} with other "
                "checkpointing that fits"
            )
            return Rejection(rule="partial_checkpointing", detail=detail)
        needed = parts["host_bytes"] * self.space.ranks
        detail = (
            f"needs {format_bytes(needed)} of host memory for {self.space.ranks} ranks, "
            f"{format_bytes(self.host_budget_bytes)} are there"
        )
        return Rejection(rule="host_memory", detail=detail)

    def entry(self, row: int) -> dict[str, Any]:
        """Return a setting with its estimate in the form of the contract."""
        rejection = self.rejection(row)
        return {
            "schema": SCHEMA,
            "setting": self.space.setting(row).to_json(),
            "memory": self.memory.row(row),
            "budget_bytes": self.budget_bytes,
            "fits": bool(self.fits[row]),
            "step_time_s": float(self.step_time_s[row]),
            "tokens_per_s": float(self.tokens_per_s[row]),
            "samples_per_s": float(self.samples_per_s[row]),
            "rejected_by": asdict(rejection) if rejection else None,
        }

    def listed(self, *, everything: bool = False) -> list[dict[str, Any]]:
        """Return the kept settings, best first, and the rejected ones nearest to fitting."""
        ranking = self.ranking()
        kept = int(self.kept.sum())
        last = len(ranking) if everything else kept + _NEAREST_REJECTED
        return [self.entry(int(row)) for row in ranking[:last]]

    def rejected_by_rule(self) -> dict[str, int]:
        """Count the rejected settings of each rule."""
        counts: dict[str, int] = {}
        for row in np.flatnonzero(~self.kept):
            rejection = self.rejection(int(row))
            assert rejection is not None, "only rejected rows are counted"
            counts[rejection.rule] = counts.get(rejection.rule, 0) + 1
        return counts

    def row_of(self, setting: Setting) -> int | None:
        """Find a setting's row; None if it is not in the space."""
        for row in np.flatnonzero(self.space.micro_batch_size == setting.micro_batch_size):
            if self.space.setting(int(row)) == setting:
                return int(row)
        return None


def make_plan(
    space: Space, profile: ModelProfile, job: Job, cluster: Cluster, rates: Rates, lengths: Ints
) -> Plan:
    """Estimate memory and time of every setting of the space, on rows of these lengths."""
    memory = estimate_memory(space, profile, job, cluster, int(lengths.max()))
    rows = DrawnRows.draw(lengths, job.seed)
    predict = partial(_predict, profile, job, cluster, rates, rows)
    steps = [predict(setting=space.setting(row)) for row in range(len(space))]
    return Plan(
        space=space,
        memory=memory,
        step_time_s=np.array([step.step_time_s for step in steps]),
        samples_per_s=np.array([step.samples_per_s for step in steps]),
        tokens_per_s=np.array([step.tokens_per_s for step in steps]),
        budget_bytes=cluster.device_memory_bytes,
        host_budget_bytes=cluster.host.available_bytes if cluster.host else _UNKNOWN_HOST_BYTES,
    )


def _predict(
    profile: ModelProfile,
    job: Job,
    cluster: Cluster,
    rates: Rates,
    rows: DrawnRows,
    *,
    setting: Setting,
) -> StepRate:
    stage, ranks = setting.structure.zero_stage, cluster.num_devices
    each_micro_step_s, each_update_s = predicted_communication_s(
        profile, stage, ranks, rates, job.compute_bytes
    )
    compute_s = predicted_micro_step(
        profile, setting.structure.checkpointing, rates, setting.micro_batch_size
    )
    return integrate(
        rows,
        micro_batch_size=setting.micro_batch_size,
        gradient_accumulation_steps=setting.gradient_accumulation_steps,
        ranks=ranks,
        micro_step_s=lambda padded: compute_s(padded) + each_micro_step_s,
        boundary_extra_s=each_update_s
        + predicted_update_s(profile, setting.structure, cluster, rates, job.compute_bytes),
        synchronises_every_micro_step=synchronises_every_micro_step(stage, ranks),
    )
