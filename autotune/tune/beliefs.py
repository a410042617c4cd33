"""What is believed of settings that were not measured: the plan's estimate, corrected by outcomes.

The logarithm of measured over predicted speed is taken as a linear function of the setting's knobs
plus noise, with a normal prior on every coefficient; each measured rung updates it (Bayesian linear
regression in the form of a Gaussian process: Rasmussen and Williams, Gaussian Processes for Machine
Learning, sections 2.1 and 2.2). So is that of measured over predicted memory.
"""

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autotune.memory import GPU_FRAGMENTATION
from autotune.outcome import SAYS_NOTHING, Measured, Outcome, OutOfMemory, Rung
from autotune.plan import Plan
from autotune.setting import BY_MODEL, NVME, Structure, recomputed_share
from autotune.space import Space

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]


@dataclass(frozen=True, slots=True, kw_only=True)
class Priors:
    """How far the logarithm of measured over predicted may be off; standard deviations.

    Attributes:
        machine: for all settings alike.
        knobs: for one value of a knob against another.
        minor_knobs: the same for knobs that are not named there: how a structure communicates.
        start: for one row a micro-step, against very many: what each micro-step takes whatever its
            rows are weighs the less, the more these are, in inverse proportion.
        start_by_stage: how far that may be something else at another ZeRO stage, which talks in
            another way in each micro-step.
        size: for a doubling of the micro-batch size.
        size_by_stage: how far that may be something else at another ZeRO stage.
        added_work: for what adds work to a step: recomputing all layers (a part of them does that
            part of it), offloading the optimizer, offloading parameters.
        added_work_mean: what is expected of each of them; they cost more than estimated.
        structure: what the knobs named above do together that each alone does not.
        noise: what none of these explains, measurement noise included.
    """

    machine: float
    knobs: Mapping[str, float]
    minor_knobs: float
    start: float
    start_by_stage: float
    size: float
    size_by_stage: float
    added_work: float
    added_work_mean: float
    structure: float
    noise: float

    def of_knob(self, name: str) -> float:
        return self.knobs.get(name, self.minor_knobs)


_SPEED = Priors(
    machine=1.0,
    knobs={
        "zero_stage": 0.25,
        "offload_optimizer": 0.02,
        "offload_param": 0.02,
        "checkpointing": 0.02,
        "attention": 0.25,
        # Its micro-steps are computed alike.
        "sampling": 0.03,
        "torch_compile": 0.25,
    },
    minor_knobs=0.03,
    start=0.4,
    start_by_stage=0.15,
    size=0.04,
    size_by_stage=0.05,
    added_work=0.15,
    # Full checkpointing took 6 to 25 % more than estimated in the grids of benchmarks/search.
    added_work_mean=-0.15,
    structure=0.04,
    noise=0.02,
)
_MEMORY = Priors(
    machine=0.1,
    knobs={
        "zero_stage": 0.03,
        "offload_optimizer": 0.03,
        "offload_param": 0.03,
        "checkpointing": 0.03,
        "attention": 0.1,
        "sampling": 0.03,
        "torch_compile": 0.1,
    },
    minor_knobs=0.02,
    start=0.0,
    start_by_stage=0.0,
    size=0.02,
    size_by_stage=0.0,
    added_work=0.0,
    added_work_mean=0.0,
    structure=0.03,
    noise=0.01,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Hint:
    """How far a setting was off its estimate where it is not what is asked for: on one node.

    Attributes:
        faster: logarithm of measured over predicted speed.
        larger: the same of memory; None if it was not measured.
    """

    faster: float
    larger: float | None


NO_HINTS: Mapping[int, Hint] = MappingProxyType({})

_HINT_OF_SPEED, _HINT_OF_MEMORY = 0.15, 0.03
"""How far off a hint may be, as a standard deviation: the network between nodes is not in it. Of
memory it is what a stage shares out among more ranks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Beliefs:
    """Columns are those of the plan's space.

    Attributes:
        log_tokens_per_s: expected logarithm of the speed, and its standard deviation.
        possible: settings that were not tried and that no outcome has shown to be impossible.
        open_rows: those of them that may fit, as the estimates are corrected by measured peaks.
            What the plan calls outdone is among them: by how much is known better now.
        fit_probability: how likely each is to fit its device.
        best_tokens_per_s: of what was measured, as it is believed after all that was; 0 if nothing
            was.
        noise: spread of repeated micro-steps over their median.
    """

    log_tokens_per_s: Floats
    log_sd: Floats
    possible: Bools
    open_rows: Bools
    fit_probability: Floats
    best_tokens_per_s: float
    noise: float

    def expected_improvement(self) -> Floats:
        """Return the expected gain of each open row over the best, as a share of the best.

        The closed form of a normal belief: (mu - b) Phi(z) + sd phi(z), with z = (mu - b) / sd
        (Jones et al., 1998), in logarithms, times the probability that the row fits (Gardner et
        al., 2014); 0 for rows that are not open. Over nothing the gain is the expected speed.
        """
        fits = np.where(self.open_rows, self.fit_probability, 0.0)
        if not self.best_tokens_per_s:
            return fits * np.exp(self.log_tokens_per_s)
        gain = self.log_tokens_per_s - np.log(self.best_tokens_per_s)
        z = gain / self.log_sd
        density = np.exp(-0.5 * z**2) / np.sqrt(2 * np.pi)
        improvement: Floats = gain * _normal_cdf(z) + self.log_sd * density
        # Far below the best the two terms cancel but for rounding.
        return fits * np.maximum(improvement, 0.0)


def update(
    plan: Plan,
    rungs: Sequence[Rung],
    too_large: Sequence[int] = (),
    hints: Mapping[int, Hint] = NO_HINTS,
) -> Beliefs:
    """Return what is believed after these outcomes; rows that are too large fit no device.

    A hint counts where its row was not measured. Of a setting that was measured again the median
    speed and the largest memory count; a failure where it had been measured before says nothing of
    it.
    """
    tried = outcomes(plan, rungs)
    measured = {row: out for row, out in tried.items() if isinstance(out, Measured)}
    faster, sd = _regress(
        Kinship(plan.space, _SPEED),
        {row: hint.faster for row, hint in hints.items()}
        | {
            row: math.log(out.tokens_per_s / plan.tokens_per_s[row])
            for row, out in measured.items()
        },
        dict.fromkeys(hints, _HINT_OF_SPEED) | {row: out.spread for row, out in measured.items()},
    )
    believed = np.log(plan.tokens_per_s) + faster
    estimate = _device_bytes(plan, measured)
    larger, larger_sd = _memory(plan, tried, hints, estimate)
    possible = _possible(plan, tried)
    for row in too_large:
        possible &= ~_needs_as_much(plan, row)
    needs = np.exp(larger) * estimate
    return Beliefs(
        log_tokens_per_s=believed,
        log_sd=sd,
        possible=possible,
        open_rows=possible & plan.may_fit(needs),
        fit_probability=_normal_cdf(np.log(plan.budget_bytes / needs) / larger_sd),
        best_tokens_per_s=max((math.exp(believed[row]) for row in measured), default=0.0),
        noise=statistics.median([out.spread for out in measured.values()] or [0.0]),
    )


def outcomes(plan: Plan, rungs: Sequence[Rung]) -> dict[int, Outcome]:
    """Return what came of each row of the plan that was tried."""
    tried: dict[int, list[Outcome]] = {}
    for rung in rungs:
        row = plan.row_of(rung.setting)
        if row is not None and not isinstance(rung.outcome, SAYS_NOTHING):
            tried.setdefault(row, []).append(rung.outcome)
    return {row: in_one(outcomes) for row, outcomes in tried.items()}


def in_one(outcomes: Sequence[Outcome]) -> Outcome:
    """Return what the outcomes of one setting, in their order, say together."""
    measured = sorted(
        (one for one in outcomes if isinstance(one, Measured)), key=lambda one: one.tokens_per_s
    )
    if not measured:
        return outcomes[-1]
    middle = measured[(len(measured) - 1) // 2]
    fullest = max(measured, key=lambda one: one.peak_bytes)
    return replace(middle, peak_bytes=fullest.peak_bytes, allocated_bytes=fullest.allocated_bytes)


def _device_bytes(plan: Plan, measured: Mapping[int, Measured]) -> Floats:
    """Return the estimates, with the fragmentation that was measured in place of the assumed one.

    An allocator that grows its segments fragments otherwise, so the two kinds are learned apart.
    """
    estimate = plan.memory.device_bytes
    expands = np.asarray(plan.space.column("expandable_segments"), dtype=bool)
    for kind in (False, True):
        shares = [
            share
            for row, out in measured.items()
            if expands[row] == kind and (share := fragmentation(plan, row, out)) is not None
        ]
        if shares:
            more = statistics.median(shares) - GPU_FRAGMENTATION
            estimate = np.where(
                expands == kind, estimate + more * plan.memory.fleeting_bytes, estimate
            )
    return estimate


def fragmentation(plan: Plan, row: int, measured: Measured) -> float | None:
    """Return what the allocator reserved beyond tensors, as a share of what comes and goes.

    None where the device does not count tensors.
    """
    if measured.allocated_bytes is None:
        return None
    beyond = max(0, measured.peak_bytes - measured.allocated_bytes)
    return min(1.0, beyond / float(plan.memory.fleeting_bytes[row]))


def _memory(
    plan: Plan, tried: Mapping[int, Outcome], hints: Mapping[int, Hint], estimate: Floats
) -> tuple[Floats, Floats]:
    """Return by how much every setting is believed to need more of a device than estimated.

    In logarithms, with the standard deviation. An out-of-memory says that more was needed than is
    there; it counts where less was believed. What the device had in use counts, where it was
    watched; the allocator's own peak leaves out what a GPU's context takes, so that a correction
    may be too low by that share: a setting too many is tried then, and none too few.
    """
    kinship = Kinship(plan.space, _MEMORY)
    peaks = {
        row: math.log((out.device_used_bytes or out.peak_bytes) / estimate[row])
        for row, out in tried.items()
        if isinstance(out, Measured) and out.peak_bytes
    }
    hinted = {row: hint.larger for row, hint in hints.items() if hint.larger is not None}
    spreads = {row: 0.0 if row in tried else _HINT_OF_MEMORY for row in hinted}
    peaks = hinted | peaks
    larger, sd = _regress(kinship, peaks, spreads)
    room = np.log(plan.budget_bytes / estimate)
    surprises = {
        row: float(room[row])
        for row, out in tried.items()
        if isinstance(out, OutOfMemory) and out.where == "device" and room[row] > larger[row]
    }
    return _regress(kinship, peaks | surprises, spreads) if surprises else (larger, sd)


def _regress(
    kinship: "Kinship", observed: Mapping[int, float], spreads: Mapping[int, float] | None = None
) -> tuple[Floats, Floats]:
    """Return mean and standard deviation of the correction of every row.

    What repetitions spread by is noise of an observation, and not of what a setting really does.
    """
    rows = np.array(list(observed), dtype=np.int64)
    towards = kinship.towards(rows)
    noise = kinship.priors.noise**2
    spread = np.array([(spreads or {}).get(row, 0.0) for row in observed])
    among = towards[rows] + np.diag(noise + spread**2)
    weights = np.linalg.solve(among, towards.T)
    surprises = np.array(list(observed.values())) - kinship.mean[rows]
    mean: Floats = kinship.mean + weights.T @ surprises
    variance = kinship.own - np.einsum("ij,ji->i", towards, weights)
    sd: Floats = np.sqrt(np.maximum(variance, 0.0) + noise)
    return mean, sd


class Kinship:
    """The prior covariance of the corrections of any two settings of a space.

    Corrections are those of the machine, of each knob's value, of the micro-batch size (which may
    depend on the stage), of work that is added, and of what the main knobs are together: structures
    that only communicate in another way are one in that.
    """

    def __init__(self, space: Space, priors: Priors) -> None:
        self.priors = priors
        self._structure = space.structure_index
        rows = np.asarray(space.micro_batch_size, dtype=np.float64)
        self._sizes = (
            (1 / rows, priors.start, priors.start_by_stage),
            (np.log2(rows), priors.size, priors.size_by_stage),
        )
        self._values = {field.name: _codes(space, field.name) for field in fields(Structure)}
        main = np.stack([self._values[name] for name in priors.knobs], axis=1)
        self._together: Ints = np.unique(main, axis=0, return_inverse=True)[1].reshape(-1)
        self._added = np.array([_added_work(structure) for structure in space.structures])

    @cached_property
    def mean(self) -> Floats:
        """Return what is expected of every setting before anything was measured."""
        expected: Floats = self.priors.added_work_mean * self._added.sum(axis=1)
        return expected[self._structure]

    @cached_property
    def own(self) -> Floats:
        """Return the variance of every setting: it is like itself in everything."""
        priors = self.priors
        knobs = sum(priors.of_knob(name) ** 2 for name in self._values)
        added = priors.added_work**2 * (self._added**2).sum(axis=1)
        own: Floats = priors.machine**2 + priors.structure**2 + knobs + added[self._structure]
        for size, everywhere, by_stage in self._sizes:
            own = own + (everywhere**2 + by_stage**2) * size**2
        return own

    def towards(self, rows: Ints) -> Floats:
        """Return the covariance of every setting with these, an array (settings, rows)."""
        seen, priors = self._structure[rows], self.priors
        together = self._together[:, None] == self._together[seen]
        level = priors.machine**2 + priors.structure**2 * together
        level = level + priors.added_work**2 * self._added @ self._added[seen].T
        for name, values in self._values.items():
            level = level + priors.of_knob(name) ** 2 * (values[:, None] == values[seen])
        towards: Floats = level[self._structure]
        stages = self._values["zero_stage"]
        same_stage = (stages[:, None] == stages[seen])[self._structure]
        for size, everywhere, by_stage in self._sizes:
            alike = everywhere**2 + by_stage**2 * same_stage
            towards = towards + np.outer(size, size[rows]) * alike
        return towards


def _added_work(structure: Structure) -> tuple[float, float, float]:
    return (
        recomputed_share(structure.checkpointing),
        float(structure.offload_optimizer != "none"),
        float(structure.offload_param != "none"),
    )


def _codes(space: Space, knob: str) -> Ints:
    """Return a number for each structure, the same for those with the same value of a knob."""
    values = [getattr(structure, knob) for structure in space.structures]
    codes: Ints = np.unique(values, return_inverse=True)[1]
    return codes


def _possible(plan: Plan, tried: Mapping[int, Outcome]) -> Bools:
    possible = np.ones(len(plan.space), dtype=bool)
    for row, outcome in tried.items():
        possible[row] = False
        if isinstance(outcome, OutOfMemory):
            possible &= ~_needs_as_much(plan, row, of_host=outcome.where != "device")
        elif not isinstance(outcome, Measured):
            # A structure that crashed or hung once is not tried again at another size.
            possible &= plan.space.structure_index != plan.space.structure_index[row]
    return possible


def _needs_as_much(plan: Plan, row: int, *, of_host: bool = False) -> Bools:
    """Say of each setting whether it needs at least as much as the row.

    No knob of it may save memory that the row did not save, and the estimate must not be lower:
    whatever an estimate is off by is then in both. Where the host's memory ran out, what an
    offloaded optimizer takes of it must be as much too.
    """
    memory = plan.memory
    as_much: Bools = memory.allocated_bytes >= memory.allocated_bytes[row]
    if of_host:
        as_much &= memory.host_bytes >= memory.host_bytes[row]
    for saves in _savings(plan.space):
        as_much &= saves <= saves[row]
    return as_much


_SIZES = (
    "reduce_bucket_size",
    "allgather_bucket_size",
    "stage3_prefetch_bucket_size",
    "stage3_param_persistence_threshold",
)
"""Knobs that save memory by being smaller."""


def _savings(space: Space) -> Iterator[NDArray[Any]]:
    """Yield for each knob a number that grows with the memory it saves."""
    yield -space.micro_batch_size
    yield space.column("zero_stage")
    for place in ("offload_optimizer", "offload_param"):
        yield space.column(place) != "none"
        yield space.column(place) == NVME
    buckets = np.isin(space.column("zero_stage"), (1, 2))
    yield ~(np.asarray(space.column("overlap_comm"), dtype=bool) & buckets)
    groups = space.column("zero_hpz_partition_size").astype(np.int64)
    yield np.where(groups == 1, np.inf, groups)
    for size in _SIZES:
        values = space.column(size)
        yield -np.where(values == BY_MODEL, np.inf, values)
    # Of which value of these saves memory nothing is known, so that they have to be the same.
    for other in ("sampling", "attention", "loss", "expandable_segments", "torch_compile"):
        values = _codes(space, other)[space.structure_index]
        yield values
        yield -values
    modes = space.column("checkpointing")
    share = {mode: recomputed_share(str(mode)) for mode in np.unique(modes)}
    yield np.array([share[mode] for mode in modes])


def _normal_cdf(z: Floats) -> Floats:
    cdf: Floats = 0.5 * (1 + np.vectorize(math.erf, otypes=[float])(z / math.sqrt(2)))
    return cdf
