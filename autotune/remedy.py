"""What would make a setting fit that does not: one change at a time, by the memory model."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from autotune.devices import GPUS
from autotune.hardware import Cluster
from autotune.memory import estimate_memory
from autotune.optimizer import limits_of
from autotune.plan import Bools, Plan, host_budget_bytes
from autotune.setting import ZERO_STAGES, Setting, Structure
from autotune.space import Space, micro_batch_sizes
from autotune.throughput import Floats
from autotune.workload import Job, ModelProfile

MEMORY_RULES = frozenset({"device_memory", "host_memory"})

_MOST_DEVICES = 2**16


@dataclass(frozen=True, slots=True, kw_only=True)
class Remedy:
    """One change with which a setting fits by the estimate.

    Attributes:
        change: the field of the setting; or devices, seq_length, device.
        value: the least change that is enough: the largest micro-batch size or length that fits,
            the fewest devices, the smallest known device.
        device_bytes: what a device must have free then.
        global_batch_size: the next that so many devices can share, where that of the job is none.
    """

    change: str
    value: int | str
    device_bytes: int
    global_batch_size: int | None = None


def near_misses(
    plan: Plan, profile: ModelProfile, job: Job, cluster: Cluster, longest: int
) -> list[dict[str, Any]]:
    """Return for each kind of memory the rejected setting nearest to fitting, and its remedies."""
    rules, ranking = plan.rule(), plan.ranking()
    # What was not traced, only put between, has no estimate at other lengths.
    traced = [mode for mode, _ in profile.traces]
    ranking = ranking[np.isin(plan.space.column("checkpointing")[ranking], traced)]
    misses = []
    for rule in sorted(MEMORY_RULES & set(rules[ranking].tolist())):
        row = int(ranking[rules[ranking] == rule][0])
        remedies = _Search(profile, job, cluster, longest).remedies(plan.space.setting(row))
        misses.append(plan.entry(row) | {"remedies": [asdict(remedy) for remedy in remedies]})
    return misses


def in_words(remedy: dict[str, Any]) -> str:
    """Return the change of a remedy in words."""
    value = remedy["value"]
    words = {
        "micro_batch_size": f"micro-batch {value}",
        "checkpointing": f"checkpointing {value}",
        "offload_optimizer": f"the optimizer on the {value}",
        "offload_param": f"the parameters on the {value}",
        "zero_stage": f"ZeRO {value}",
        "seq_length": f"rows of at most {value} tokens",
        "devices": f"{value} devices",
        "device": f"devices like {value}",
    }
    batch = remedy["global_batch_size"]
    return words[remedy["change"]] + (f" and a global batch of {batch}" if batch else "")


class _Search:
    """Looks for changes of one setting that fit."""

    def __init__(self, profile: ModelProfile, job: Job, cluster: Cluster, longest: int) -> None:
        self._profile = profile
        self._job = job
        self._cluster = cluster
        self._longest = longest
        self._limits = limits_of(
            job.optimizer,
            profile.trainable_parameters,
            cluster.num_devices,
            in_4_bits=bool(profile.quantised_sizes),
        )

    def _can_be(self, knob: str, value: int | str) -> bool:
        return knob not in self._limits or value in self._limits[knob].values

    def remedies(self, setting: Setting) -> list[Remedy]:
        found = [
            self._first("micro_batch_size", self._smaller_micro_batches(setting)),
            self._first("checkpointing", self._other_checkpointing(setting)),
            self._first("offload_optimizer", self._offloaded(setting, "offload_optimizer", 1)),
            self._first("offload_param", self._offloaded(setting, "offload_param", 3)),
            self._first("zero_stage", self._later_stages(setting)),
            self._longest_rows(setting),
            self._fewest_devices(setting),
            self._smallest_device(setting),
        ]
        return [remedy for remedy in found if remedy is not None]

    def _smaller_micro_batches(self, setting: Setting) -> list[tuple[int, Setting]]:
        rows = setting.micro_batch_size * setting.gradient_accumulation_steps
        return [
            (size, setting.structure.with_micro_batch(size, 1, rows))
            for size in reversed(micro_batch_sizes(rows, 1))
            if size < setting.micro_batch_size
        ]

    def _other_checkpointing(self, setting: Setting) -> list[tuple[str, Setting]]:
        return [
            (mode, _with(setting, checkpointing=mode))
            for mode, _ in self._profile.traces
            if mode != setting.structure.checkpointing
        ]

    def _offloaded(
        self, setting: Setting, field: str, from_stage: int
    ) -> list[tuple[str, Setting]]:
        possible = (
            self._cluster.has_separate_memory
            and setting.structure.zero_stage >= from_stage
            and getattr(setting.structure, field) == "none"
            and self._can_be(field, "cpu")
        )
        return [("cpu", _with(setting, **{field: "cpu"}))] if possible else []

    def _later_stages(self, setting: Setting) -> list[tuple[int, Setting]]:
        return [
            (stage, _with(setting, zero_stage=stage))
            for stage in ZERO_STAGES
            if stage > setting.structure.zero_stage and self._can_be("zero_stage", stage)
        ]

    def _first(self, change: str, choices: Sequence[tuple[int | str, Setting]]) -> Remedy | None:
        """Return the first choice that fits."""
        if not choices:
            return None
        values, settings = zip(*choices, strict=True)
        device_bytes, fits = self._needs(settings)
        if not fits.any():
            return None
        first = int(fits.argmax())
        return Remedy(
            change=change, value=values[first], device_bytes=round(float(device_bytes[first]))
        )

    def _longest_rows(self, setting: Setting) -> Remedy | None:
        if not self._fits(setting, length=1):
            return None
        length = _last(lambda length: self._fits(setting, length=length), 1, self._longest)
        return Remedy(
            change="seq_length", value=length, device_bytes=self._need(setting, length=length)
        )

    def _fewest_devices(self, setting: Setting) -> Remedy | None:
        def lacks(devices: int) -> bool:
            return not self._fits(setting, replace(self._cluster, num_devices=devices))

        if lacks(_MOST_DEVICES):
            return None
        devices = _last(lacks, self._cluster.num_devices, _MOST_DEVICES) + 1
        together, asked = devices * setting.micro_batch_size, self._job.global_batch_size
        return Remedy(
            change="devices",
            value=devices,
            device_bytes=self._need(setting, replace(self._cluster, num_devices=devices)),
            global_batch_size=-(-asked // together) * together if asked % together else None,
        )

    def _smallest_device(self, setting: Setting) -> Remedy | None:
        if not self._cluster.has_separate_memory:
            return None
        for gpu in sorted(GPUS, key=lambda gpu: gpu.memory_bytes):
            larger = replace(self._cluster, device_memory_bytes=gpu.memory_bytes)
            if self._fits(setting, larger):
                needed = self._need(setting, larger)
                return Remedy(change="device", value=gpu.name, device_bytes=needed)
        return None

    def _fits(
        self, setting: Setting, cluster: Cluster | None = None, *, length: int | None = None
    ) -> bool:
        return bool(self._needs([setting], cluster, length=length)[1][0])

    def _need(
        self, setting: Setting, cluster: Cluster | None = None, *, length: int | None = None
    ) -> int:
        return round(float(self._needs([setting], cluster, length=length)[0][0]))

    def _needs(
        self,
        settings: Sequence[Setting],
        cluster: Cluster | None = None,
        *,
        length: int | None = None,
    ) -> tuple[Floats, Bools]:
        """Return bytes of a device that settings need, and whether they fit."""
        cluster = cluster or self._cluster
        space = Space(
            structures=tuple(setting.structure for setting in settings),
            structure_index=np.arange(len(settings)),
            micro_batch_size=np.array([setting.micro_batch_size for setting in settings]),
            gradient_accumulation_steps=np.array(
                [setting.gradient_accumulation_steps for setting in settings]
            ),
            ranks=cluster.num_devices,
        )
        memory = estimate_memory(space, self._profile, self._job, cluster, length or self._longest)
        # More devices come with hosts of their own.
        ranks_of_a_host = min(cluster.num_devices, self._cluster.num_devices)
        fits: Bools = (memory.device_bytes <= cluster.device_memory_bytes) & (
            memory.host_bytes * ranks_of_a_host <= host_budget_bytes(cluster)
        )
        return memory.device_bytes, fits


def _with(setting: Setting, **fields: Any) -> Setting:  # noqa: ANN401 - those of a structure
    structure: Structure = replace(setting.structure, **fields)
    return replace(setting, structure=structure)


def _last(holds: Callable[[int], bool], low: int, high: int) -> int:
    """Return the last number for which it holds: at `low` it does, at `high` it does not."""
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low
