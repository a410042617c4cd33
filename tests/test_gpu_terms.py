"""What differs by the kind of GPU: precision, links, affinity, the host's update, fp16."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import nvml_standin
import pytest
from records import RATES, as_rung, make_cluster, make_job, make_profile, measured, plan_for

from autotune.detect.affinity import near_cpus, threads_near
from autotune.detect.links import has_ring
from autotune.detect.nvidia import NvidiaDevice
from autotune.devices import named_rates, parse_gpus
from autotune.emit import ds_config, train_spec, without_overflow
from autotune.engine.ops import needed_ops
from autotune.errors import NoUsableDeviceError, SetupFaultError
from autotune.hardware import Cluster, Host, Links
from autotune.intake import Question, Workload, bench, choose_precision, why_precision
from autotune.knobs import Pins
from autotune.memory import GPU_FRAGMENTATION, estimate_memory
from autotune.outcome import Rung
from autotune.pipeline import Run, with_built_ops
from autotune.plan import Plan
from autotune.rundir import RunDir
from autotune.setting import Setting, Structure
from autotune.space import enumerate_space
from autotune.throughput import DrawnRows
from autotune.tune.beliefs import fragmentation, update
from autotune.units import GIB
from autotune.workload import TrainSpec
from autotune.zero import Engine, Shards, looking_for_overflow, updating

TURING = replace(make_cluster(gpus=2), compute_capability=(7, 5), device_name="T4")
AMPERE = replace(make_cluster(gpus=2), compute_capability=(8, 6), device_name="A10")


@pytest.mark.parametrize(
    ("asked", "cluster", "chosen", "why"),
    [
        ("auto", AMPERE, "bf16", None),
        ("auto", TURING, "fp16", "fp16 with loss scaling, as T4 has compute capability 7.5"),
        ("bf16", TURING, "bf16", "emulated and slow, as T4"),
        ("fp16", TURING, "fp16", None),
        ("fp32", TURING, "fp32", None),
        ("auto", replace(TURING, compute_capability=None), "bf16", None),
        ("auto", make_cluster(), "fp32", None),
    ],
)
def test_the_precision_is_what_the_device_is_made_for_and_why_is_told(
    asked: str, cluster: Cluster, chosen: str, why: str | None
) -> None:
    said = why_precision(asked, cluster)

    assert choose_precision(asked, cluster) == chosen
    assert said is None if why is None else why in (said or "")


SETTING = Setting(
    structure=Structure(zero_stage=2), micro_batch_size=1, gradient_accumulation_steps=16
)
OFFLOADED = replace(SETTING, structure=Structure(zero_stage=2, offload_optimizer="cpu"))


def config_of(setting: Setting, **job: object) -> dict[str, object]:
    return ds_config(make_job(**job), setting, make_profile(), AMPERE)


def test_fp16_scales_its_loss_by_literal_values_and_bf16_does_not() -> None:
    fp16 = config_of(SETTING, precision="fp16")["fp16"]

    assert isinstance(fp16, dict)
    assert (fp16["enabled"], fp16["loss_scale"], fp16["initial_scale_power"]) == (True, 0, 16)
    assert config_of(SETTING)["fp16"] == {"enabled": False}


def test_no_update_of_a_probe_is_skipped_for_an_overflow_of_the_first_scales() -> None:
    emitted = config_of(SETTING, precision="fp16")
    probed = without_overflow(emitted)

    assert probed["fp16"] == emitted["fp16"] | {"initial_scale_power": 0}  # type: ignore[operator]
    assert {**probed, "fp16": None} == {**emitted, "fp16": None}
    assert without_overflow(config_of(SETTING)) == config_of(SETTING)


def test_without_a_built_adam_the_host_updates_by_torch_s() -> None:
    built, slower = config_of(OFFLOADED), config_of(OFFLOADED, host_adam="torch")

    assert needed_ops("cuda", built) == ("CPUAdamBuilder",)
    assert needed_ops("cuda", slower) == ()
    assert slower["zero_force_ds_cpu_optimizer"] is False
    assert "zero_force_ds_cpu_optimizer" not in built
    assert config_of(SETTING, host_adam="torch") == config_of(SETTING)


def engine_of(stage: int, *, scales_loss: bool = True, offloads: bool = False) -> Engine:
    shards = Shards(
        trained=np.array([3_000_000_000]),
        frozen=np.array([], dtype=np.int64),
        ranks=1,
        bucket=500_000_000,
        persistence=0,
    )
    return Engine(
        shards=shards,
        zero_stage=stage,
        compute_bytes=2,
        accumulates=True,
        gloo=False,
        offloads=offloads,
        scales_loss=scales_loss,
    )


def test_stage_3_looks_through_gradients_of_fp16_beside_copies_of_them() -> None:
    psi, bucket = 3_000_000_000, 500_000_000

    assert looking_for_overflow(engine_of(3)) == 2 * (psi + bucket) + 3 * psi
    # A sub-group is updated at a time, so that of large shards this is the peak.
    assert looking_for_overflow(engine_of(3)) > updating(engine_of(3), 0)
    assert looking_for_overflow(engine_of(2)) == 0
    assert looking_for_overflow(engine_of(3, scales_loss=False)) == 0
    assert looking_for_overflow(engine_of(3, offloads=True)) == 0


def test_fp16_needs_no_less_than_bf16_and_more_only_at_stage_3() -> None:
    cluster = make_cluster(gpus=1)
    profile = make_profile(
        parameters=3_000_000_000,
        trainable_parameters=3_000_000_000,
        trained_sizes=(60_000_000,) * 50,
    )
    space = enumerate_space(cluster, 4)
    bf16, fp16 = (
        estimate_memory(space, profile, make_job(precision=precision), cluster, 128)
        for precision in ("bf16", "fp16")
    )
    more = fp16.device_bytes - bf16.device_bytes
    stages = np.asarray(space.column("zero_stage"), dtype=np.int64)

    assert (more >= 0).all()
    assert (more[stages < 3] == 0).all()
    assert more.max() > 0


def links(kind: str, peer: float | None, host: float | None = 32e9) -> Links:
    return Links(kind=kind, peer_bytes_per_s=peer, host_bytes_per_s=host)  # type: ignore[arg-type]


def test_links_that_were_found_go_before_the_table() -> None:
    eight = [parse_gpus("8xA100-80GB")]
    table = named_rates(eight, 1, "bf16")
    alike = named_rates(eight, 1, "bf16", links=links("nvlink", 300e9))
    by_slot = named_rates(eight, 1, "bf16", links=links("pcie", 32e9))

    assert alike == table
    assert by_slot.link_bytes_per_s == pytest.approx(0.8 * 32e9)
    assert by_slot.host_link_bytes_per_s == table.host_link_bytes_per_s
    assert named_rates(eight, 1, "bf16", links=links("nvlink", None, None)) == table


def test_a_narrow_slot_slows_peers_that_have_no_link_of_their_own() -> None:
    narrow = named_rates([parse_gpus("2xRTX3090-24GB")], 1, "bf16", links=links("pcie", None, 8e9))

    assert narrow.link_bytes_per_s == narrow.host_link_bytes_per_s == pytest.approx(0.8 * 8e9)
    wide = named_rates([parse_gpus("2xA100-80GB")], 1, "bf16", links=links("nvlink", None, 8e9))
    assert wide.link_bytes_per_s == pytest.approx(0.8 * 300e9)


def pairs(*named: str) -> set[frozenset[int]]:
    return {frozenset(map(int, pair.split("-"))) for pair in named}


@pytest.mark.parametrize(
    ("count", "linked", "ring"),
    [
        (2, pairs("0-1"), True),
        (2, pairs(), False),
        (3, pairs("0-1", "1-2"), False),
        (3, pairs("0-1", "1-2", "0-2"), True),
        (4, pairs("0-1", "2-3"), False),
        (4, pairs("0-1", "1-2", "2-3", "0-3"), True),
        (4, pairs("0-1", "1-2", "2-3"), False),
        (5, pairs("0-1", "0-2", "1-2", "2-3", "2-4", "3-4"), False),
    ],
)
def test_a_ring_is_a_round_of_linked_neighbours(
    count: int, linked: set[frozenset[int]], *, ring: bool
) -> None:
    assert has_ring(count, linked) is ring


def gpu(index: int, cpus: tuple[int, ...] | None) -> NvidiaDevice:
    return NvidiaDevice(
        index=index,
        uuid=f"GPU-{index}",
        name="A100",
        memory_total_bytes=80 * GIB,
        memory_free_bytes=80 * GIB,
        compute_capability=(8, 0),
        cpus=cpus,
    )


LEFT, RIGHT = tuple(range(8)), tuple(range(8, 16))


def test_ranks_stay_near_their_gpus_as_far_as_they_may() -> None:
    both = [gpu(0, LEFT), gpu(1, RIGHT)]

    assert near_cpus(both, range(16)) == (LEFT, RIGHT)
    assert near_cpus(both, range(4, 12)) == ((4, 5, 6, 7), (8, 9, 10, 11))


def test_ranks_are_free_where_nothing_is_near_or_all_is() -> None:
    assert near_cpus([gpu(0, LEFT), gpu(1, None)], range(16)) == ()
    assert near_cpus([gpu(0, LEFT), gpu(1, RIGHT)], LEFT) == ()
    assert near_cpus([gpu(0, LEFT + RIGHT)] * 2, range(16)) == ()


def host(physical: int, usable: int) -> Host:
    return Host(
        cpu_name="CPU",
        sockets=2,
        physical_cores=physical,
        usable_cores=usable,
        memory_bytes=GIB,
        memory_source="",
        available_bytes=GIB,
    )


def test_threads_are_physical_cores_of_those_nearby() -> None:
    # Sixteen logical CPUs on eight cores, half of them near each of two ranks.
    assert threads_near((LEFT, RIGHT), host(8, 16), 2) == 4
    # Both ranks near one half: they share its four cores.
    assert threads_near((LEFT, LEFT), host(8, 16), 2) == 2
    assert threads_near((), host(8, 16), 2) == 4
    assert threads_near((), host(8, 2), 2) == 1
    assert threads_near((LEFT, LEFT, LEFT), host(2, 16), 3) == 1


def test_what_a_rank_is_told_of_its_cpus_and_allocator_survives_the_file() -> None:
    cluster = replace(AMPERE, rank_cpus=(LEFT, RIGHT))
    structure = Structure(zero_stage=2, expandable_segments=True)
    spec = train_spec(
        make_job(),
        replace(SETTING, structure=structure),
        cluster,
        dataset_dir="",
        output_dir="",
        model_output_dir="",
    )

    assert spec.rank_cpus == (LEFT, RIGHT)
    assert spec.expandable_segments
    assert TrainSpec.from_json(spec.to_json()) == spec


def test_segments_that_grow_are_a_knob_of_gpus() -> None:
    pins = Pins.of({"expandable_segments": [True]})

    assert all(
        structure.expandable_segments
        for structure in enumerate_space(AMPERE, 32, pins=pins).structures
    )
    unpinned = enumerate_space(AMPERE, 32).structures
    assert not any(structure.expandable_segments for structure in unpinned)
    assert "expandable-segments" in Structure(zero_stage=1, expandable_segments=True).label()


PLAN = plan_for(make_cluster(gpus=2, memory_bytes=20 * GIB))


def rung_of(plan: Plan, row: int, *, share: float, context: int | None = None) -> Rung:
    """Return what a probe would say if the allocator held this share beyond tensors."""
    allocated = int(plan.memory.allocated_bytes[row])
    reserved = allocated + int(share * plan.memory.fleeting_bytes[row])
    outcome = replace(
        measured(1000.0, peak_bytes=reserved),
        allocated_bytes=allocated,
        device_used_bytes=None if context is None else reserved + context,
    )
    return as_rung(plan.space.setting(row), outcome)


def test_fragmentation_is_what_was_reserved_beyond_tensors() -> None:
    rung = rung_of(PLAN, 0, share=0.1)
    assert fragmentation(PLAN, 0, rung.outcome) == pytest.approx(0.1, abs=1e-6)  # type: ignore[arg-type]
    assert fragmentation(PLAN, 0, measured(1.0)) is None


def test_what_was_measured_of_fragmentation_goes_before_what_was_assumed() -> None:
    row = int(PLAN.ranking()[0])
    context = round(float(PLAN.memory.runtime_bytes[row])) - round(
        GPU_FRAGMENTATION * float(PLAN.memory.fleeting_bytes[row])
    )
    little = update(PLAN, [rung_of(PLAN, row, share=0.0, context=context)])
    much = update(PLAN, [rung_of(PLAN, row, share=1.0, context=context)])

    assert (little.fit_probability >= much.fit_probability - 1e-9).all()
    assert little.open_rows.sum() > much.open_rows.sum()


def test_a_rank_stays_where_its_gpu_is_and_is_free_where_it_may_not() -> None:
    code = """
import json, os
from autotune.engine.device import _stay_near
allowed = sorted(os.sched_getaffinity(0))
_stay_near([[allowed[0]], [10**6]], 1)
free = sorted(os.sched_getaffinity(0)) == allowed
_stay_near([[10**6], [allowed[0], 10**6]], 1)
print(json.dumps([free, sorted(os.sched_getaffinity(0)) == allowed[:1]]))
"""
    assert nvml_standin.run(code, environ=os.environ) == [True, True]


def workload_of(cluster: Cluster) -> Workload:
    question = Question(
        named=None,
        options=cast("Any", None),
        cluster=cluster,
        source=cast("Any", None),
        dataset=(),
        fingerprint="",
    )
    plan = plan_for(cluster)
    return Workload(
        question=question,
        job=make_job(),
        profile=make_profile(),
        rates=RATES,
        dataset=None,
        drawn=DrawnRows.draw(np.array([128]), 0),
        rows=None,
        plan=plan,
    )


def test_an_adam_that_does_not_build_gives_way_to_torch_s_with_a_word(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    asked: list[list[str]] = []

    def build_ops(names: list[str], log: Path, watch: object) -> None:
        del log, watch
        asked.append(names)
        if "CPUAdamBuilder" in names:
            msg = "cannot build DeepSpeed's ops: CUDA_HOME does not exist"
            raise SetupFaultError(msg)

    monkeypatch.setattr("autotune.profile.child.build_ops", build_ops)
    workload = workload_of(make_cluster(gpus=2, memory_bytes=80 * GIB))
    built = with_built_ops(workload, Path("ops.log"))

    assert asked == [["CPUAdamBuilder"], []]
    assert built.job == replace(workload.job, host_adam="torch")
    assert "torch's AdamW, which is slower: cannot build" in caplog.text


def test_an_op_that_nothing_stands_in_for_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def build_ops(names: list[str], log: Path, watch: object) -> None:
        del watch
        msg = f"{names} {log}"
        raise SetupFaultError(msg)

    monkeypatch.setattr("autotune.profile.child.build_ops", build_ops)
    with pytest.raises(SetupFaultError, match="ShareMemCommBuilder"):
        with_built_ops(workload_of(make_cluster(memory_bytes=80 * GIB)), Path("ops.log"))


def test_what_torch_cannot_open_is_measured_by_no_bench_and_run_by_nothing() -> None:
    cluster = replace(make_cluster(gpus=2), unusable="torch is built without CUDA")

    with pytest.raises(NoUsableDeviceError, match="without CUDA"):
        bench(cluster)
    with pytest.raises(NoUsableDeviceError, match="without CUDA"):
        Run(workload_of(cluster).question, RunDir(Path("nowhere"))).execute(with_training=False)
    assert not Path("nowhere").exists()
