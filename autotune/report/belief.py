"""What was believed of the settings that were not measured, from the files that a run leaves."""

from dataclasses import dataclass, fields

import numpy as np

from autotune.memory import PARTS, MemoryEstimate
from autotune.plan import Plan, StepTerms
from autotune.report.record import Document, RunRecord
from autotune.setting import Setting
from autotune.space import Space
from autotune.throughput import Floats
from autotune.tune.beliefs import update
from autotune.tune.earlier import trustworthy
from autotune.tune.faults import worth_knowing

_NO_LIMIT = 2**62
"""Host memory is no reason against a listed setting but where its rule says so."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Belief:
    """Of one setting, after all outcomes.

    Attributes:
        tokens_per_s: expected.
        error: standard deviation of its logarithm, so about a share.
        fit_probability: how likely it is to fit its device.
    """

    tokens_per_s: float
    error: float
    fit_probability: float


def beliefs(record: RunRecord) -> dict[Setting, Belief]:
    """Return what the search believed in the end; empty without a plan or its terms.

    The same outcomes lead to the same beliefs, so that nothing of them has to be kept. What is
    believed of a setting does not depend on which others a plan lists.
    """
    entries = record.plan.get("settings", [])
    if not entries or not all("terms" in entry for entry in entries):
        return {}
    plan = _listed_plan(record.plan)
    found = update(plan, trustworthy(worth_knowing(record.rungs)))
    columns = (np.exp(found.log_tokens_per_s), found.log_sd, found.fit_probability)
    return {
        plan.space.setting(row): Belief(
            tokens_per_s=tokens_per_s, error=error, fit_probability=fit_probability
        )
        for row, (tokens_per_s, error, fit_probability) in enumerate(
            zip(*(column.tolist() for column in columns), strict=True)
        )
    }


def _listed_plan(document: Document) -> Plan:
    """Return the plan that has the settings which plan.json lists."""
    entries = document["settings"]
    settings = [Setting.from_json(entry["setting"]) for entry in entries]
    structures = tuple(dict.fromkeys(setting.structure for setting in settings))
    place = {structure: index for index, structure in enumerate(structures)}

    def column(part: str, name: str) -> Floats:
        return np.array([float(entry[part][name]) for entry in entries])

    def figure(name: str) -> Floats:
        return np.array([float(entry[name]) for entry in entries])

    return Plan(
        space=Space(
            structures=structures,
            structure_index=np.array([place[setting.structure] for setting in settings]),
            micro_batch_size=np.array([setting.micro_batch_size for setting in settings]),
            gradient_accumulation_steps=np.array(
                [setting.gradient_accumulation_steps for setting in settings]
            ),
            ranks=document["cluster"]["num_devices"],
        ),
        memory=MemoryEstimate(
            **{name: column("memory", name) for name in (*PARTS, "runtime_bytes", "host_bytes")}
        ),
        terms=StepTerms(**{one.name: column("terms", one.name) for one in fields(StepTerms)}),
        step_time_s=figure("step_time_s"),
        samples_per_s=figure("samples_per_s"),
        tokens_per_s=figure("tokens_per_s"),
        budget_bytes=entries[0]["budget_bytes"],
        host_budget_bytes=_NO_LIMIT,
    )
