"""What is believed of settings that were not measured: the plan's estimate, corrected by outcomes.

The logarithm of measured over predicted speed is taken as a linear function of the setting's knobs
plus noise, with a normal prior on every coefficient; each measured rung updates it (Bayesian linear
regression, Bishop, Pattern Recognition and Machine Learning, section 3.3).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from autotune.memory import PARTS
from autotune.outcome import Interrupted, Measured, Outcome, OutOfMemory, Rung
from autotune.plan import Plan

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
        open_rows: those of them that the plan keeps.
        best_tokens_per_s: of what was measured; 0 if nothing was.
    """

    log_tokens_per_s: Floats
    log_sd: Floats
    possible: Bools
    open_rows: Bools
    best_tokens_per_s: float

    def chance_to_win(self, rows: NDArray[np.int64], deviations: float = 1.0) -> bool:
        """Whether any of the rows may be faster than the best, at so many standard deviations."""
        if not len(rows):
            return False
        if not self.best_tokens_per_s:
            return True
        hopes = self.log_tokens_per_s[rows] + deviations * self.log_sd[rows]
        return bool(hopes.max() > np.log(self.best_tokens_per_s))

    def expected_improvement(self) -> Floats:
        """Return the expected gain of each open row over the best, as a share of the best.

        The closed form of a normal belief: (mu - b) Phi(z) + sd phi(z), with z = (mu - b) / sd
        (Jones et al., 1998), in logarithms; 0 for rows that are not open.
        """
        if not self.best_tokens_per_s:
            return np.where(self.open_rows, np.inf, 0.0)
        gain = self.log_tokens_per_s - np.log(self.best_tokens_per_s)
        z = gain / self.log_sd
        density = np.exp(-0.5 * z**2) / np.sqrt(2 * np.pi)
        improvement = gain * _normal_cdf(z) + self.log_sd * density
        return np.where(self.open_rows, improvement, 0.0)


def update(plan: Plan, rungs: Sequence[Rung]) -> Beliefs:
    """Return what is believed after these outcomes."""
    known = {
        rung.setting: rung.outcome for rung in rungs if not isinstance(rung.outcome, Interrupted)
    }
    rows = {plan.row_of(setting): outcome for setting, outcome in known.items()}
    tried = {row: outcome for row, outcome in rows.items() if row is not None}
    measured = {row: out for row, out in tried.items() if isinstance(out, Measured)}
    mean, sd = _regress(plan, measured)
    possible = _possible(plan, tried)
    return Beliefs(
        log_tokens_per_s=np.log(plan.tokens_per_s) + mean,
        log_sd=sd,
        possible=possible,
        open_rows=possible & plan.kept,
        best_tokens_per_s=max((out.tokens_per_s for out in measured.values()), default=0.0),
    )


def _regress(plan: Plan, measured: dict[int, Measured]) -> tuple[Floats, Floats]:
    """Return mean and standard deviation of the correction of every row."""
    features, prior_sd = _features(plan)
    scaled = features * prior_sd
    rows = np.array(sorted(measured), dtype=np.int64)
    observed = np.array(
        [np.log(measured[row].tokens_per_s / plan.tokens_per_s[row]) for row in rows.tolist()]
    )
    seen = scaled[rows]
    precision = np.eye(scaled.shape[1]) + seen.T @ seen / _NOISE_SD**2
    covariance = np.linalg.inv(precision)
    coefficients = covariance @ seen.T @ observed / _NOISE_SD**2
    variance = np.einsum("ij,jk,ik->i", scaled, covariance, scaled) + _NOISE_SD**2
    return scaled @ coefficients, np.sqrt(variance)


def _features(plan: Plan) -> tuple[Floats, Floats]:
    """Return a column for the machine, one a knob value, one for the size, and their prior."""
    space = plan.space
    columns = [np.ones(len(space))]
    prior_sd = [_MACHINE_SD]
    for knob in _KNOBS:
        values = space.column(knob)
        columns += [(values == value).astype(float) for value in np.unique(values)]
        prior_sd += [_KNOB_SD] * len(np.unique(values))
    columns.append(np.log2(space.micro_batch_size))
    prior_sd.append(_SIZE_SD)
    return np.stack(columns, axis=1), np.array(prior_sd)


def _possible(plan: Plan, tried: Mapping[int, Outcome]) -> Bools:
    possible = np.ones(len(plan.space), dtype=bool)
    terms = np.stack([getattr(plan.memory, name) for name in PARTS])
    for row, outcome in tried.items():
        possible[row] = False
        if isinstance(outcome, OutOfMemory):
            # What needs at least as much in every term cannot fit either.
            possible &= ~(terms >= terms[:, row : row + 1]).all(axis=0)
        elif not isinstance(outcome, Measured):
            # A structure that crashed or hung once is not tried again at another size.
            possible &= plan.space.structure_index != plan.space.structure_index[row]
    return possible


def _normal_cdf(z: Floats) -> Floats:
    cdf: Floats = 0.5 * (1 + np.vectorize(math.erf, otypes=[float])(z / math.sqrt(2)))
    return cdf
