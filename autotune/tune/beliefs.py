"""What is believed of settings that were not measured: the plan's estimate, corrected by outcomes.

The logarithm of measured over predicted speed is taken as a linear function of the setting's knobs
plus noise, with a normal prior on every coefficient; each measured rung updates it (Bayesian linear
regression, Bishop, Pattern Recognition and Machine Learning, section 3.3). So is that of measured
over predicted memory.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autotune.outcome import Interrupted, Measured, Outcome, OutOfMemory, Rung
from autotune.plan import Plan
from autotune.setting import checkpointing_period
from autotune.space import Space

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

_MACHINE_SD = 1.0
"""How far (in logarithm) the prediction may be off for all settings alike."""
_KNOB_SD = 0.25
"""How far it may be off for one value of a knob against another."""
_SIZE_SD = 0.15
"""How far it may be off for a doubling of the micro-batch size."""
_NOISE_SD = 0.05
"""What the knobs do not explain, measurement noise included."""

_KNOBS = ("zero_stage", "offload_optimizer", "offload_param", "checkpointing", "attention")


@dataclass(frozen=True, slots=True, kw_only=True)
class Beliefs:
    """Columns are those of the plan's space.

    Attributes:
        log_tokens_per_s: expected logarithm of the speed, and its standard deviation.
        possible: settings that were not tried and that no outcome has shown to be impossible.
        open_rows: those of them that may fit, as the estimates are corrected by measured peaks.
        best_tokens_per_s: of what was measured; 0 if nothing was.
    """

    log_tokens_per_s: Floats
    log_sd: Floats
    possible: Bools
    open_rows: Bools
    best_tokens_per_s: float

    def expected_improvement(self) -> Floats:
        """Return the expected gain of each open row over the best, as a share of the best.

        The closed form of a normal belief: (mu - b) Phi(z) + sd phi(z), with z = (mu - b) / sd
        (Jones et al., 1998), in logarithms; 0 for rows that are not open. Over nothing the gain is
        the expected speed itself.
        """
        if not self.best_tokens_per_s:
            return np.where(self.open_rows, np.exp(self.log_tokens_per_s), 0.0)
        gain = self.log_tokens_per_s - np.log(self.best_tokens_per_s)
        z = gain / self.log_sd
        density = np.exp(-0.5 * z**2) / np.sqrt(2 * np.pi)
        improvement = gain * _normal_cdf(z) + self.log_sd * density
        return np.where(self.open_rows, improvement, 0.0)


def update(plan: Plan, rungs: Sequence[Rung], too_large: Sequence[int] = ()) -> Beliefs:
    """Return what is believed after these outcomes; rows that are too large fit no device."""
    known = {
        rung.setting: rung.outcome for rung in rungs if not isinstance(rung.outcome, Interrupted)
    }
    rows = {plan.row_of(setting): outcome for setting, outcome in known.items()}
    tried = {row: outcome for row, outcome in rows.items() if row is not None}
    speeds = {row: out.tokens_per_s for row, out in tried.items() if isinstance(out, Measured)}
    features = _features(plan)
    faster, sd = _regress(
        features, {row: math.log(speed / plan.tokens_per_s[row]) for row, speed in speeds.items()}
    )
    possible = _possible(plan, tried)
    for row in too_large:
        possible &= ~_needs_as_much(plan, row)
    return Beliefs(
        log_tokens_per_s=np.log(plan.tokens_per_s) + faster,
        log_sd=sd,
        possible=possible,
        open_rows=possible & plan.may_fit(_device_bytes(plan, features, tried)),
        best_tokens_per_s=max(speeds.values(), default=0.0),
    )


def _device_bytes(plan: Plan, features: Floats, tried: Mapping[int, Outcome]) -> Floats:
    """Return what every setting is believed to need of a device, corrected by measured peaks.

    An out-of-memory says that more was needed than is there; it counts where less was believed.
    A peak leaves out what a GPU's context takes, so a correction may be too low by that share: a
    setting too many is tried then, and none too few.
    """
    estimate = plan.memory.device_bytes
    peaks = {
        row: math.log(out.peak_bytes / estimate[row])
        for row, out in tried.items()
        if isinstance(out, Measured) and out.peak_bytes
    }
    larger, _ = _regress(features, peaks)
    room = np.log(plan.budget_bytes / estimate)
    surprises = {
        row: float(room[row])
        for row, out in tried.items()
        if isinstance(out, OutOfMemory) and out.where == "device" and room[row] > larger[row]
    }
    if surprises:
        larger, _ = _regress(features, peaks | surprises)
    needs: Floats = np.exp(larger) * estimate
    return needs


def _regress(features: Floats, observed: Mapping[int, float]) -> tuple[Floats, Floats]:
    """Return mean and standard deviation of the correction of every row."""
    seen = features[list(observed)]
    precision = np.eye(features.shape[1]) + seen.T @ seen / _NOISE_SD**2
    covariance = np.linalg.inv(precision)
    coefficients = covariance @ seen.T @ np.array(list(observed.values())) / _NOISE_SD**2
    variance = np.einsum("ij,jk,ik->i", features, covariance, features) + _NOISE_SD**2
    return features @ coefficients, np.sqrt(variance)


def _features(plan: Plan) -> Floats:
    """Return a column for the machine, one a knob value and one for the size.

    Each is scaled by its prior standard deviation, so that the coefficients' prior is standard.
    """
    space = plan.space
    columns = [np.full(len(space), _MACHINE_SD)]
    for knob in _KNOBS:
        values = space.column(knob)
        columns += [np.where(values == value, _KNOB_SD, 0.0) for value in np.unique(values)]
    columns.append(_SIZE_SD * np.log2(space.micro_batch_size))
    return np.stack(columns, axis=1)


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


def _savings(space: Space) -> Iterator[NDArray[Any]]:
    """Yield for each knob a number that grows with the memory it saves."""
    yield -space.micro_batch_size
    yield space.column("zero_stage")
    for place in ("offload_optimizer", "offload_param"):
        yield space.column(place) != "none"
    yield space.column("attention") != "eager"
    modes = space.column("checkpointing")
    kept = {mode: 1 - 1 / checkpointing_period(str(mode)) for mode in np.unique(modes)}
    kept |= {"none": 1.0, "full": 0.0}
    yield np.array([-kept[mode] for mode in modes])


def _normal_cdf(z: Floats) -> Floats:
    cdf: Floats = 0.5 * (1 + np.vectorize(math.erf, otypes=[float])(z / math.sqrt(2)))
    return cdf
