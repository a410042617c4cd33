"""What would make a setting fit: each remedy does by the estimate, and no smaller change would."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from records import LENGTHS, make_cluster, make_job, make_profile, plan_for

from autotune.devices import GPUS, find_gpu
from autotune.hardware import Cluster
from autotune.memory import estimate_memory
from autotune.remedy import MEMORY_RULES, near_misses
from autotune.setting import Setting
from autotune.space import Space, micro_batch_sizes
from autotune.units import GIB

LONGEST = int(LENGTHS.max())
budgets = st.integers(3, 40)


def fits(setting: Setting, cluster: Cluster, longest: int = LONGEST) -> bool:
    """Estimate one setting alone; hosts come with their devices."""
    space = Space(
        structures=(setting.structure,),
        structure_index=np.zeros(1, dtype=np.int64),
        micro_batch_size=np.array([setting.micro_batch_size]),
        gradient_accumulation_steps=np.array([setting.gradient_accumulation_steps]),
        ranks=cluster.num_devices,
    )
    memory = estimate_memory(space, make_profile(), make_job(), cluster, longest)
    return bool(memory.device_bytes[0] <= cluster.device_memory_bytes)


def misses(cluster: Cluster) -> list[tuple[Setting, dict[str, Any]]]:
    """Return for each near miss its setting and what each change takes."""
    found = near_misses(plan_for(cluster), make_profile(), make_job(), cluster, LONGEST)
    return [
        (
            Setting.from_json(miss["setting"]),
            {remedy["change"]: remedy["value"] for remedy in miss["remedies"]},
        )
        for miss in found
    ]


@given(budgets, st.sampled_from([1, 2, 8]))
def test_with_each_remedy_the_setting_fits(gib: int, gpus: int) -> None:
    cluster = make_cluster(gpus=gpus, memory_bytes=gib * GIB)
    for setting, remedies in misses(cluster):
        assert not fits(setting, cluster)
        for change, value in remedies.items():
            changed, on, longest = setting, cluster, LONGEST
            match change:
                case "seq_length":
                    longest = value
                case "devices":
                    on = replace(cluster, num_devices=value)
                case "device":
                    on = replace(cluster, device_memory_bytes=find_gpu(value).memory_bytes)
                case "micro_batch_size":
                    changed = replace(setting, micro_batch_size=value)
                case _:
                    structure = replace(setting.structure, **{change: value})
                    changed = replace(setting, structure=structure)
            assert fits(changed, on, longest), (change, value)


@given(budgets, st.sampled_from([1, 2, 8]))
def test_no_smaller_change_is_enough(gib: int, gpus: int) -> None:
    cluster = make_cluster(gpus=gpus, memory_bytes=gib * GIB)
    for setting, remedies in misses(cluster):
        if "seq_length" in remedies:
            assert not fits(setting, cluster, remedies["seq_length"] + 1)
        else:
            assert not fits(setting, cluster, 1)
        if "devices" in remedies:
            fewer = replace(cluster, num_devices=remedies["devices"] - 1)
            assert not fits(setting, fewer)
        if "device" in remedies:
            chosen = find_gpu(remedies["device"]).memory_bytes
            smaller = [gpu.memory_bytes for gpu in GPUS if gpu.memory_bytes < chosen]
            for memory_bytes in smaller:
                assert not fits(setting, replace(cluster, device_memory_bytes=memory_bytes))
        rows = setting.micro_batch_size * setting.gradient_accumulation_steps
        smaller_sizes = [
            size for size in micro_batch_sizes(rows, 1) if size < setting.micro_batch_size
        ]
        larger_than_said = [
            size for size in smaller_sizes if size > remedies.get("micro_batch_size", 0)
        ]
        for size in larger_than_said:
            assert not fits(setting.structure.with_micro_batch(size, 1, rows), cluster)


@given(budgets)
def test_there_is_a_nearest_miss_for_each_rule(gib: int) -> None:
    cluster = make_cluster(gpus=2, memory_bytes=gib * GIB)
    plan = plan_for(cluster)
    found = near_misses(plan, make_profile(), make_job(), cluster, LONGEST)
    assert {miss["rejected_by"]["rule"] for miss in found} == set(
        plan.rejected_by_rule()
    ) & MEMORY_RULES
    for miss in found:
        rows = plan.rule() == miss["rejected_by"]["rule"]
        needed = miss["memory"]["device_bytes"]
        assert needed == pytest.approx(plan.memory.device_bytes[rows].min(), rel=1e-6)


def test_devices_that_cannot_share_the_global_batch_come_with_one_that_they_can() -> None:
    asked = make_job().global_batch_size
    batches = set()
    for gib in range(3, 12):
        cluster = make_cluster(gpus=4, memory_bytes=gib * GIB)
        found = near_misses(plan_for(cluster), make_profile(), make_job(), cluster, LONGEST)
        for miss in found:
            size = miss["setting"]["micro_batch_size"]
            for remedy in miss["remedies"]:
                if remedy["change"] == "devices":
                    batch = remedy["global_batch_size"] or asked
                    assert batch >= asked
                    assert batch % (remedy["value"] * size) == 0
                    batches.add(remedy["global_batch_size"])
    assert batches - {None}


def test_a_cpu_is_offered_no_gpu() -> None:
    (_, remedies), *_ = misses(make_cluster(cpu_ranks=2, memory_bytes=4 * GIB))
    assert "device" not in remedies
    assert "offload_optimizer" not in remedies
