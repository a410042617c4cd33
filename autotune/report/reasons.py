"""Why a setting was chosen, and why not the nearest others: the term that each of them lost by."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from autotune.memory import PARTS
from autotune.outcome import Crashed, Measured, Outcome, OutOfMemory, TimedOut, Unknown
from autotune.report.belief import Belief, beliefs
from autotune.report.record import Document, RunRecord
from autotune.setting import Setting, checkpointing_period
from autotune.units import format_bytes, format_duration

Standing = Literal["measured", "failed", "rejected", "not measured"]

_MOST_SHOWN = 8
_FEW = 4
_ALIKE = 0.01
"""Settings whose speeds differ by no more are equal; that which needs less memory is taken."""

_LIKELY = 0.5
_SHORT_S = 1.0
_MORE_PADDING = 0.01

_PARTS = (*PARTS, "runtime_bytes")
_TIMES = {
    "computing_s": "computing",
    "communication_s": "communication",
    "offload_s": "copies between device and host",
    "update_s": "the optimizer's update",
}
_IN_MICRO_STEPS = ("computing_s", "communication_s", "offload_s")
_IN_UPDATES = ("communication_s", "offload_s", "update_s")

_STOPPED_BY = {
    "nothing to gain": "It ended because nothing else was expected to gain more than noise, or"
    " more of the training than a probe takes.",
    "max_probes": "It ended at --max-probes, so that faster settings may have been left untried.",
    "tune_budget": "It ended when --tune-budget was spent, so that faster settings may have been"
    " left untried.",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Alternative:
    """A setting that was not chosen.

    Attributes:
        differs: in what, a few words each.
        tokens_per_s: measured; else what is believed after all that was measured; None of what
            failed or was rejected.
        term: what it lost by: a term of the memory or of the step's time; None where nothing was
            lost, or that is not known.
        reason: a sentence.
    """

    setting: Setting
    differs: tuple[str, ...]
    standing: Standing
    tokens_per_s: float | None
    term: str | None
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """Why this setting, a sentence each, and why not the nearest others."""

    chosen: Setting
    why: tuple[str, ...]
    alternatives: tuple[Alternative, ...]


def explain(record: RunRecord) -> Explanation | None:
    """Return why the chosen setting was chosen; None if none was."""
    chosen = record.chosen
    if chosen is None or chosen not in record.measured:
        return None
    judge = _Judge(record, chosen, beliefs(record))
    return Explanation(
        chosen=chosen,
        why=tuple(_why(record, chosen)),
        alternatives=tuple(judge.alternative(one) for one in _nearest(record, chosen)),
    )


def _why(record: RunRecord, chosen: Setting) -> Iterator[str]:
    speed = record.measured[chosen].tokens_per_s
    count, fastest = len(record.measured), next(iter(record.measured))
    structures = len({setting.structure for setting in record.measured})
    among = f"{count} settings of {structures} structures that were measured"
    if fastest == chosen:
        yield f"It is the fastest of {among}: {speed:.0f} tokens/s."
    else:
        yield (
            f"Of {among} it is as fast as any, {speed:.0f} tokens/s, as measuring them again in "
            "turn has shown; of equal ones that which needs the least memory is taken."
        )
    yield _gain(record.result)
    memory = record.result.get("memory", {})
    if memory:
        yield (
            f"It takes {format_bytes(memory['measured_bytes'])} of the "
            f"{format_bytes(memory['budget_bytes'])} of a device; "
            f"{format_bytes(memory['predicted_bytes'])} had been estimated."
        )
    yield from _sieves(record)
    stopped_by = record.result.get("stopped_by")
    if stopped_by:
        yield _STOPPED_BY.get(stopped_by, f"It ended because of: {stopped_by}.")


def _gain(result: Document) -> str:
    gain = result.get("gain_over_default")
    if not gain:
        return "The setting that one would start with could not be measured."
    default = result["default"]
    if default["setting"] == result["setting"]:
        return "It is also the setting that one would start with."
    return (
        f"It is {gain:.2f} x as fast as what one would start with: "
        f"{Setting.from_json(default['setting']).label()}, {default['tokens_per_s']:.0f} tokens/s."
    )


def _sieves(record: RunRecord) -> Iterator[str]:
    counts = record.plan.get("counts")
    if not counts:
        return
    rejected = counts["rejected_by_rule"]
    total = counts["kept"] + sum(rejected.values())
    rules = ", ".join(f"{count} by {rule}" for rule, count in rejected.items())
    yield (
        f"{total} settings were estimated, {sum(rejected.values())} of them rejected before any "
        f"probe{f' ({rules})' if rules else ''}; the search tried {len(record.tried)} of the rest."
    )


def _nearest(record: RunRecord, chosen: Setting) -> list[Setting]:
    """Return the next fastest, the default, and what differs from the chosen in the fewest steps.

    A knob is a step, and so is each doubling of the micro-batch size.
    """
    known = dict.fromkeys([*record.tried, *record.entries])
    known.pop(chosen, None)
    steps = {one: _distance(chosen, one) for one in known}
    near = sorted(
        known, key=lambda one: (steps[one], one not in record.tried, -_speed(record, one))
    )
    default = record.result.get("default", {}).get("setting")
    first = [one for one in record.measured if one != chosen][:1]
    first += [Setting.from_json(default)] if default else []
    next_to = [one for one in near if steps[one] <= 1]
    shown = dict.fromkeys([*first, *next_to, *near[:_FEW]])
    return [one for one in shown if one in known][:_MOST_SHOWN]


def _distance(chosen: Setting, other: Setting) -> float:
    knobs = len(_differing(chosen, other))
    return knobs + abs(math.log2(other.micro_batch_size / chosen.micro_batch_size))


def _differing(chosen: Setting, other: Setting) -> list[str]:
    """Name the knobs of the structure that differ, but for what follows from another."""
    mine, theirs = chosen.structure.to_json(), other.structure.to_json()
    return [name for name in mine | theirs if mine.get(name) != theirs.get(name)]


def _speed(record: RunRecord, setting: Setting) -> float:
    if setting in record.measured:
        return record.measured[setting].tokens_per_s
    return float(record.entries.get(setting, {}).get("tokens_per_s", 0.0))


def differences(chosen: Setting, other: Setting) -> tuple[str, ...]:
    """Return in what another setting differs, a few words each."""
    words = []
    if other.micro_batch_size != chosen.micro_batch_size:
        words.append(f"micro-batch {other.micro_batch_size} in place of {chosen.micro_batch_size}")
    for name in _differing(chosen, other):
        theirs, mine = (getattr(one.structure, name) for one in (other, chosen))
        words.append(f"{_KNOBS.get(name, name)} {_place(theirs)} in place of {_place(mine)}")
    return tuple(words)


_KNOBS = {
    "zero_stage": "ZeRO",
    "offload_optimizer": "optimizer on",
    "offload_param": "parameters on",
}


def _place(value: object) -> str:
    return {"none": "none", "True": "on", "False": "off"}.get(str(value), str(value))


class _Judge:
    """Holds other settings against the chosen one."""

    def __init__(
        self, record: RunRecord, chosen: Setting, believed: Mapping[Setting, Belief]
    ) -> None:
        self._record = record
        self._chosen = chosen
        self._best = record.measured[chosen]
        self._believed = believed

    def alternative(self, other: Setting) -> Alternative:
        outcome = self._record.tried.get(other)
        rejection = self._record.entries.get(other, {}).get("rejected_by")
        tokens_per_s: float | None = None
        standing: Standing = "measured"
        if isinstance(outcome, Measured):
            tokens_per_s = outcome.tokens_per_s
            term, reason = self._slower(other, outcome)
        elif outcome is not None and outcome.kind != "interrupted":
            standing = "failed"
            term, reason = self._failed(other, outcome)
        elif rejection:
            standing = "rejected"
            term, reason = self._rejected(other, rejection)
        else:
            standing = "not measured"
            tokens_per_s, term, reason = self._left(other)
        return Alternative(
            setting=other,
            differs=differences(self._chosen, other),
            standing=standing,
            tokens_per_s=tokens_per_s,
            term=term,
            reason=reason,
        )

    def _slower(self, other: Setting, outcome: Measured) -> tuple[str | None, str]:
        share = outcome.tokens_per_s / self._best.tokens_per_s
        said = f"{outcome.tokens_per_s:.0f} tokens/s were measured, {share:.2f} x the chosen one's"
        if share >= 1 - _ALIKE:
            needs, mine = format_bytes(outcome.peak_bytes), format_bytes(self._best.peak_bytes)
            return None, f"{said}, which is no difference; it needs {needs}, the chosen one {mine}."
        longer_s = outcome.step_time_s - self._best.step_time_s
        updates_s = outcome.boundary_extra_s - self._best.boundary_extra_s
        in_updates = updates_s > longer_s - updates_s
        where = "synchronisation and update" if in_updates else "micro-steps"
        lost_s = updates_s if in_updates else longer_s - updates_s
        term, why = self._lost_time(other, _IN_UPDATES if in_updates else _IN_MICRO_STEPS)
        return term, (
            f"{said}: a step takes {_span(longer_s)} more, {_span(lost_s)} of them in its {where}; "
            f"{why}."
        )

    def _lost_time(self, other: Setting, names: Sequence[str]) -> tuple[str | None, str]:
        """Return the term of the time that the estimate says is more, and words for it."""
        mine, theirs = self._terms(self._chosen), self._terms(other)
        if not mine or not theirs:
            return None, "the plan does not say which term"
        more = {name: theirs[name] - mine[name] for name in names}
        most = max(more, key=lambda name: more[name])
        if more[most] <= 0:
            return None, "the estimate had it no slower there, and what was measured decides"
        term = _TIMES[most]
        cause = self._cause(other, mine, theirs) if most == "computing_s" else ""
        by = f"{_span(more[most])} more a step"
        return term, f"the term that lost is {term}, estimated at {by}{cause}"

    def _cause(self, other: Setting, mine: Document, theirs: Document) -> str:
        ours, its = self._chosen.structure, other.structure
        if _recomputed(its.checkpointing) > _recomputed(ours.checkpointing):
            return ", for recomputing activations"
        if theirs["padding_share"] > mine["padding_share"] + _MORE_PADDING:
            shares = (
                f"{theirs['padding_share']:.0%} of its tokens against {mine['padding_share']:.0%}"
            )
            return f", for padding ({shares})"
        if other.micro_batch_size < self._chosen.micro_batch_size:
            return ", for starting more and smaller micro-steps"
        if its.attention != ours.attention:
            return f", for {its.attention} attention"
        return ""

    def _terms(self, setting: Setting) -> Document:
        terms: Document = self._record.entries.get(setting, {}).get("terms", {})
        return terms

    def _failed(self, other: Setting, outcome: Outcome) -> tuple[str | None, str]:
        match outcome:
            case OutOfMemory(where=where):
                term, more = self._lost_memory(other)
                estimate = self._estimate(other)
                said = f"it ran out of {where} memory when it was tried"
                return term, f"{said}; {estimate}{more}." if estimate else f"{said}."
            case TimedOut(phase=phase, seconds=seconds):
                said = f"it gave no sign of life for {format_duration(seconds)} in phase {phase}"
                return None, f"{said}."
            case Crashed(reason=reason):
                return None, f"it crashed: {reason.splitlines()[0] if reason else 'no reason'}."
            case Unknown(exit_code=code):
                return None, f"it ended with exit code {code} and without a word."
            case _:
                return None, "it was stopped from outside."

    def _estimate(self, other: Setting) -> str:
        entry = self._record.entries.get(other)
        if entry is None:
            return ""
        needs, budget = entry["memory"]["device_bytes"], entry["budget_bytes"]
        return f"{format_bytes(needs)} of {format_bytes(budget)} had been estimated"

    def _lost_memory(self, other: Setting) -> tuple[str | None, str]:
        """Return the part of the memory that is most above the chosen setting's, and words."""
        entries = self._record.entries
        if other not in entries or self._chosen not in entries:
            return None, ""
        mine, theirs = (entries[one]["memory"] for one in (self._chosen, other))
        more = {name: theirs[name] - mine[name] for name in _PARTS}
        most = max(more, key=lambda name: more[name])
        if more[most] <= 0:
            return None, ""
        term = most.removesuffix("_bytes")
        return term, f"; the term that lost is {term}, {format_bytes(more[most])} more"

    def _rejected(self, other: Setting, rejection: Document) -> tuple[str | None, str]:
        rule, detail = rejection["rule"], rejection["detail"]
        said = f"rejected by {rule} before any probe: {detail}"
        if rule == "device_memory":
            term, more = self._lost_memory(other)
            return term, f"{said}{more}."
        if rule == "host_memory":
            return "host memory", f"{said}."
        return "computing", f"{said}."

    def _left(self, other: Setting) -> tuple[float | None, str | None, str]:
        belief = self._believed.get(other)
        if belief is None:
            return None, None, "it was not tried."
        if belief.fit_probability < _LIKELY:
            term, more = self._lost_memory(other)
            odds = f"{belief.fit_probability:.0%}"
            return None, term, f"not tried, as it fits with a probability of {odds}{more}."
        share = belief.tokens_per_s / self._best.tokens_per_s
        said = (
            f"not tried; after all that was measured {belief.tokens_per_s:.0f} tokens/s are "
            f"expected, {share:.2f} x the chosen one's, give or take {belief.error:.0%}"
        )
        if share >= 1:
            return belief.tokens_per_s, None, f"{said}, so that it may be faster."
        term, why = self._lost_time(other, tuple(_TIMES))
        return belief.tokens_per_s, term, f"{said}; {why}."


def _span(seconds: float) -> str:
    """Write a difference of times, which may be far below a second."""
    return f"{1000 * seconds:.3g} ms" if seconds < _SHORT_S else format_duration(seconds)


def _recomputed(checkpointing: str) -> float:
    """Return the share of the layers that recompute their activations."""
    return 0.0 if checkpointing == "none" else 1 / checkpointing_period(checkpointing)
