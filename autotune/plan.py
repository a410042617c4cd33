"""Estimates every setting and keeps those that can fit; what is rejected says by which rule."""

from dataclasses import asdict, astuple, dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autotune.hardware import Cluster, Rates
from autotune.memory import PARTS, STATES, MemoryEstimate, estimate_memory
from autotune.prune import Outdone, has_place_between
from autotune.setting import Setting
from autotune.space import Space
from autotune.throughput import (
    DrawnRows,
    DrawnSteps,
    Floats,
    Ints,
    hidden_s,
    predicted_communication,
    predicted_hideable,
    predicted_micro_step,
    predicted_offload_s,
    predicted_update_s,
    synchronises_every_micro_step,
)
from autotune.units import format_bytes
from autotune.workload import Job, ModelProfile

SCHEMA = 1

Bools = NDArray[np.bool_]

_GRANTED = 1.15
"""A setting is rejected only if it would not fit with the estimate this many times too high."""

_NEAREST_REJECTED = 20

_OUTDONE_BY = {
    "partial_checkpointing": "other checkpointing",
    "memory_saving": "a setting that saves less memory, and",
}
"""Rules by which a setting falls to a faster one, and what that is."""

_UNKNOWN_HOST_BYTES = 2**60
"""The host of hardware that is only named rejects nothing; what it would need is shown."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rejection:
    rule: str
    detail: str


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTerms:
    """What the estimate of a step is made of, a column a term; the seconds add up to the step.

    Attributes:
        computing_s: forward and backward passes, recomputation and padding included.
        communication_s: between ranks, as far as it is not hidden behind computing.
        offload_s: copies between device and host.
        update_s: the optimizer.
        padding_share: share of the computed tokens that is padding.
    """

    computing_s: Floats
    communication_s: Floats
    offload_s: Floats
    update_s: Floats
    padding_share: Floats

    @property
    def step_time_s(self) -> Floats:
        """Return the seconds of an optimizer step."""
        total: Floats = self.computing_s + self.communication_s + self.offload_s + self.update_s
        return total

    def rows(self, indices: Ints) -> list[dict[str, float]]:
        """Return the terms of some settings."""
        columns = {one.name: getattr(self, one.name)[indices].tolist() for one in fields(self)}
        values = zip(*columns.values(), strict=True)
        return [dict(zip(columns, row, strict=True)) for row in values]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Every setting with its estimate. Columns are those of the space."""

    space: Space
    memory: MemoryEstimate
    terms: StepTerms
    step_time_s: Floats
    samples_per_s: Floats
    tokens_per_s: Floats
    budget_bytes: int
    host_budget_bytes: int

    @property
    def fits(self) -> Bools:
        """Whether the estimate says that a setting fits."""
        return self._within(1.0, self.memory.device_bytes)

    @property
    def kept(self) -> Bools:
        """Whether a setting may fit, the estimate's tolerance granted, and is not outdone."""
        return self.may_fit(self.memory.device_bytes) & ~self._outdone.any_rule

    def may_fit(self, device_bytes: Floats) -> Bools:
        """Whether settings that need so much of a device may fit, the tolerance granted."""
        return self._within(_GRANTED, device_bytes)

    def _within(self, granted: float, device_bytes: Floats) -> Bools:
        host_bytes = self.memory.host_bytes * self.space.ranks
        within: Bools = (device_bytes <= granted * self.budget_bytes) & (
            host_bytes <= granted * self.host_budget_bytes
        )
        return within

    @property
    def surely_fits(self) -> Bools:
        """Whether a setting fits even if the estimate is too low by the tolerance."""
        return self._within(1 / _GRANTED, self.memory.device_bytes)

    @property
    def _outdone(self) -> Outdone:
        return Outdone.of(self.space, self.surely_fits, self.tokens_per_s)

    def has_place_between(self) -> bool:
        """Tell whether checkpointing some of the layers may beat both none and all of them."""
        return has_place_between(self.space, self.surely_fits, self.kept, self.tokens_per_s)

    def ranking(self) -> Ints:
        """Return the rows: kept ones first, the fastest first, then the rest by what they need."""
        kept = self.kept
        return np.lexsort((np.where(kept, -self.tokens_per_s, self.memory.device_bytes), ~kept))

    def rule(self) -> NDArray[np.str_]:
        """Return the name of the rule that each setting falls to; empty for those that are kept."""
        too_large = self.memory.device_bytes > _GRANTED * self.budget_bytes
        outdone = self._outdone
        return np.select(
            [self.kept, too_large, outdone.partial_checkpointing, outdone.memory_saving],
            ["", "device_memory", "partial_checkpointing", "memory_saving"],
            "host_memory",
        )

    def rejection(self, row: int) -> Rejection | None:
        """Return the rule that a setting falls to, with its numbers."""
        rejected_by = self.entry(row)["rejected_by"]
        return Rejection(**rejected_by) if rejected_by else None

    def _rejection(self, rule: str, row: int, memory: dict[str, int]) -> Rejection:
        if rule in _OUTDONE_BY:
            detail = (
                f"{self.tokens_per_s[row]:.0f} tokens/s are estimated, and "
                f"{self._outdone.best[row]:.0f} with {_OUTDONE_BY[rule]} that fits"
            )
        elif rule == "device_memory":
            largest = sorted(PARTS, key=lambda name: -memory[name])[:3]
            shares = ", ".join(
                f"{name.removesuffix('_bytes')} {format_bytes(memory[name])}" for name in largest
            )
            detail = (
                f"needs {format_bytes(memory['device_bytes'])} a rank ({shares}), "
                f"{format_bytes(self.budget_bytes)} are there"
            )
            states = sum(memory[name] for name in STATES)
            if states > self.budget_bytes:
                detail += f"; weights, gradients and optimizer alone are {format_bytes(states)}"
        else:
            ranks = self.space.ranks
            detail = (
                f"needs {format_bytes(memory['host_bytes'] * ranks)} of host memory for {ranks} "
                f"ranks, {format_bytes(self.host_budget_bytes)} are there"
            )
        return Rejection(rule=rule, detail=detail)

    def best(self) -> int | None:
        """Return the fastest row that fits by the estimate; None if none does."""
        speed = np.where(self.fits, self.tokens_per_s, 0.0)
        best = int(speed.argmax())
        return best if self.fits[best] else None

    def shortfall(self) -> dict[str, Any]:
        """Return the setting that is nearest to fitting, and the bytes it lacks, where none does.

        Bytes are those of a device and of a host.
        """
        device = np.maximum(self.memory.device_bytes - self.budget_bytes, 0)
        host = np.maximum(self.memory.host_bytes * self.space.ranks - self.host_budget_bytes, 0)
        nearest = int((device / self.budget_bytes + host / self.host_budget_bytes).argmin())
        return {
            "setting": self.space.setting(nearest).to_json(),
            "device_bytes": round(float(device[nearest])),
            "host_bytes": round(float(host[nearest])),
            "may_fit": bool(self.kept[nearest]),
        }

    def entry(self, row: int) -> dict[str, Any]:
        """Return a setting with its estimate in the form of the contract."""
        return self.entries(np.array([row]))[0]

    def entries(self, rows: Ints) -> list[dict[str, Any]]:
        """Return settings with their estimates in the form of the contract."""
        columns = (self.fits, self.rule(), self.step_time_s, self.tokens_per_s, self.samples_per_s)
        return [
            {
                "schema": SCHEMA,
                "setting": self.space.setting(row).to_json(),
                "memory": memory,
                "budget_bytes": self.budget_bytes,
                "fits": fits,
                "step_time_s": step_time_s,
                "tokens_per_s": tokens_per_s,
                "samples_per_s": samples_per_s,
                "rejected_by": asdict(self._rejection(rule, row, memory)) if rule else None,
            }
            for row, memory, fits, rule, step_time_s, tokens_per_s, samples_per_s in zip(
                rows.tolist(),
                self.memory.rows(rows),
                *(column[rows].tolist() for column in columns),
                strict=True,
            )
        ]

    def listed(self, *, everything: bool = False) -> list[dict[str, Any]]:
        """Return the kept settings, best first, and the rejected ones nearest to fitting."""
        return self.entries(self.listed_rows(everything=everything))

    def listed_rows(self, *, everything: bool = False) -> Ints:
        """Return the rows of what `listed` returns."""
        ranking = self.ranking()
        last = len(ranking) if everything else int(self.kept.sum()) + _NEAREST_REJECTED
        return ranking[:last]

    def rejected_by_rule(self) -> dict[str, int]:
        """Count the rejected settings of each rule."""
        rules, counts = np.unique(self.rule(), return_counts=True)
        found = zip(rules.tolist(), counts.tolist(), strict=True)
        return {rule: count for rule, count in found if rule}

    def row_of(self, setting: Setting) -> int | None:
        """Find a setting's row; None if it is not in the space."""
        return self.space.row_of(setting)


def host_budget_bytes(cluster: Cluster) -> int:
    """Return the host memory that all ranks may take together, on all of their hosts."""
    return cluster.host.available_bytes * cluster.num_nodes if cluster.host else _UNKNOWN_HOST_BYTES


def make_plan(
    space: Space,
    profile: ModelProfile,
    job: Job,
    cluster: Cluster,
    rates: Rates,
    rows: DrawnRows,
) -> Plan:
    """Estimate memory and time of every setting of the space, on these rows."""
    steps = _predict(space, profile, job, cluster, rates, rows)
    return Plan(
        space=space,
        memory=estimate_memory(space, profile, job, cluster, _heaviest(space, rows)),
        terms=steps.terms,
        step_time_s=steps.step_time_s,
        samples_per_s=steps.samples_per_s,
        tokens_per_s=steps.tokens_per_s,
        budget_bytes=cluster.device_memory_bytes,
        host_budget_bytes=host_budget_bytes(cluster),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Steps:
    """Optimizer steps, a column a figure."""

    terms: StepTerms
    step_time_s: Floats
    samples_per_s: Floats
    tokens_per_s: Floats


def _predict(
    space: Space, profile: ModelProfile, job: Job, cluster: Cluster, rates: Rates, rows: DrawnRows
) -> _Steps:
    """Predict the steps of all settings.

    What a structure adds in communication and update does not depend on the rows, so that they are
    integrated only once for each way to split the batch, to compute and to wait.
    """
    computing_s, tokens, padding = _integrated(space, profile, rates, rows)
    of_structure = _added(space, profile, job, cluster, rates)[:, space.structure_index]
    micro_steps = space.gradient_accumulation_steps
    talking_s, talking_late_s, copying_s, copying_late_s, updating_s, *hideable_s = of_structure
    hidden = hidden_s(hideable_s, computing_s, micro_steps)
    terms = StepTerms(
        computing_s=computing_s,
        communication_s=micro_steps * talking_s + talking_late_s - hidden,
        offload_s=micro_steps * copying_s + copying_late_s,
        update_s=updating_s,
        padding_share=padding,
    )
    step_time_s = terms.step_time_s
    samples = space.micro_batch_size * space.gradient_accumulation_steps * space.ranks
    return _Steps(
        terms=terms,
        step_time_s=step_time_s,
        samples_per_s=samples / step_time_s,
        tokens_per_s=tokens / step_time_s,
    )


def _integrated(
    space: Space, profile: ModelProfile, rates: Rates, rows: DrawnRows
) -> tuple[Floats, Floats, Floats]:
    """Return seconds of computing, tokens and padding of a step, of every setting.

    Padding is the share that it has of the tokens computed.
    """
    splits, split_of_row = _splits(space)
    of_structure = [(one.checkpointing, one.attention, one.loss) for one in space.structures]
    ways = {way: place for place, way in enumerate(dict.fromkeys(of_structure))}
    way = np.array([ways[one] for one in of_structure])
    waits = np.array(
        [synchronises_every_micro_step(one.zero_stage, space.ranks) for one in space.structures],
        dtype=np.int64,
    )
    seconds = np.empty((len(splits), len(ways), 2))
    tokens, padding = np.empty(len(splits)), np.empty(len(splits))
    micro_steps = [
        predicted_micro_step(profile, checkpointing, rates, attention, loss)
        for checkpointing, attention, loss in ways
    ]
    for split, (sampling, size, accumulation) in enumerate(splits):
        steps = DrawnSteps.draw(rows, size, accumulation, space.ranks, sampling)
        tokens[split], padding[split] = steps.tokens, steps.padding_share
        seconds[split] = steps.mean_s_of(micro_steps)
    structure = space.structure_index
    return (
        seconds[split_of_row, way[structure], waits[structure]],
        tokens[split_of_row],
        padding[split_of_row],
    )


def _splits(space: Space) -> tuple[list[tuple[str, int, int]], Ints]:
    """Return the ways to split a batch (sampling, rows, micro-steps), and that of each setting."""
    samplings, sampling = np.unique([one.sampling for one in space.structures], return_inverse=True)
    splits, of_row = np.unique(
        np.stack(
            [
                sampling[space.structure_index],
                space.micro_batch_size,
                space.gradient_accumulation_steps,
            ]
        ),
        axis=1,
        return_inverse=True,
    )
    named = [(str(samplings[kind]), size, steps) for kind, size, steps in splits.T.tolist()]
    return named, of_row


def _heaviest(space: Space, rows: DrawnRows) -> tuple[Ints, Ints]:
    """Return rows and padded length of the largest micro-batch of every setting."""
    splits, of_row = _splits(space)
    sizes, lengths = np.array([rows.heaviest(*split) for split in splits]).T
    return sizes[of_row], lengths[of_row]


def _added(space: Space, profile: ModelProfile, job: Job, cluster: Cluster, rates: Rates) -> Floats:
    """Return the seconds that each structure adds, a column a structure.

    Rows are communication of a micro-step and of an update, copies to the host likewise, the
    optimizer, and what of the communication may be hidden, as `hidden_s` takes it.
    """
    size, together = job.compute_bytes, cluster.ranks_per_node
    columns = []
    for structure in space.structures:
        talk = predicted_communication(profile, structure, space.ranks, rates, size, together)
        columns.append(
            (
                talk.forward_s + talk.backward_s,
                talk.first_forward_s + talk.last_backward_s + talk.update_s,
                *predicted_offload_s(profile, structure, cluster, rates, size),
                predicted_update_s(profile, structure, cluster, rates, job.optimizer),
                *astuple(predicted_hideable(talk, structure, cluster)),
            )
        )
    return np.array(columns).T
