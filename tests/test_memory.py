"""The memory estimate: its parts, and what may never make it smaller."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from records import make_cluster, make_job, make_moment, make_profile

from autotune.memory import PARTS, STATES, Floats, MemoryEstimate, estimate_memory
from autotune.setting import Structure
from autotune.space import Space, enumerate_space, space_of
from autotune.units import GIB
from autotune.workload import ModelProfile, Moment, Polynomial, Precision, Trace

MIB = 1024 * 1024


def estimate(
    *,
    gpus: int = 4,
    precision: Precision = "bf16",
    longest: int = 512,
    profile: ModelProfile | None = None,
) -> tuple[Space, MemoryEstimate]:
    cluster = make_cluster(gpus=gpus)
    space = enumerate_space(cluster, 16 * cluster.num_devices)
    job = make_job(precision=precision)
    return space, estimate_memory(space, profile or make_profile(), job, cluster, longest)


def states_of(space: Space, memory: MemoryEstimate, stage: int, *, offload: str = "none") -> float:
    """Return the resident model states of a stage while it accumulates, at any micro-batch size."""
    rows = (space.column("zero_stage") == stage) & (space.column("offload_optimizer") == offload)
    rows &= space.gradient_accumulation_steps > 1
    states: Floats = sum(getattr(memory, name) for name in STATES)
    (one,) = set(states[rows].tolist())
    return float(one)


def test_a_node_that_has_all_weights_has_a_second_shard_of_them() -> None:
    cluster, job, profile = make_cluster(gpus=8), make_job(), make_profile()
    whole = 2.0 * profile.parameters
    weights = {}
    for group in (1, 4, 8):
        structure = Structure(zero_stage=3, zero_hpz_partition_size=group)
        space = space_of((structure,), (1, 2), 32, 8)
        (weights[group], _) = estimate_memory(space, profile, job, cluster, 512).weights_bytes
    assert weights[1] == pytest.approx(whole / 8)
    assert weights[4] == pytest.approx(whole / 8 + whole / 4)
    assert weights[8] == pytest.approx(whole / 8 + whole / 8)


coefficients = st.floats(0, 1e7)
polynomials = st.builds(Polynomial, c0=coefficients, c1=coefficients, c2=st.floats(0, 1e4))
moments = st.lists(
    st.builds(
        Moment,
        rows_bytes=polynomials,
        batch_bytes=polynomials,
        logits_bytes=polynomials,
        gradients=st.floats(0, 1e9),
        lengths=st.just((1, 2**20)),
    ),
    min_size=1,
    max_size=4,
).map(tuple)
traces = st.builds(
    # torch spares a single row some copies, and takes none besides.
    lambda several, flops: Trace(one_row=several, more_rows=several, flops=flops, operators=1.0),
    moments,
    polynomials,
)
profiles = st.builds(
    lambda plain, full, parameters: make_profile(
        parameters=parameters,
        trainable_parameters=parameters,
        trained_sizes=(parameters // 3, parameters - parameters // 3),
        traces=(("none", plain), ("full", full)),
    ),
    traces,
    traces,
    st.integers(1, 10**11),
)


@given(profiles, st.integers(1, 8), st.integers(1, 8192))
def test_the_parts_sum_to_what_is_allocated(profile: ModelProfile, gpus: int, longest: int) -> None:
    space, memory = estimate(gpus=gpus, longest=longest, profile=profile)
    for row in range(len(space)):
        entry = memory.row(row)
        assert sum(entry[part] for part in PARTS) == entry["allocated_bytes"]
        assert entry["allocated_bytes"] + entry["runtime_bytes"] == entry["device_bytes"]
        assert entry["device_bytes"] == pytest.approx(memory.device_bytes[row], abs=10, rel=1e-9)


@given(profiles, st.integers(1, 8))
def test_memory_never_falls_with_the_micro_batch(profile: ModelProfile, gpus: int) -> None:
    space, memory = estimate(gpus=gpus, profile=profile)
    for place in range(len(space.structures)):
        # Without accumulation no gradients wait for others, which may be more than rows add.
        rows = (space.structure_index == place) & (space.gradient_accumulation_steps > 1)
        assert (np.diff(space.micro_batch_size[rows]) > 0).all()
        # What is subtracted and added again is rounded.
        assert (np.diff(memory.device_bytes[rows]) >= -1e-12 * memory.device_bytes.max()).all()


@given(profiles, st.integers(1, 4096), st.integers(0, 4096))
def test_memory_never_falls_with_the_longest_row(
    profile: ModelProfile, longest: int, more: int
) -> None:
    _, shorter = estimate(longest=longest, profile=profile)
    _, longer = estimate(longest=longest + more, profile=profile)
    # What is subtracted and added again is rounded.
    assert (longer.device_bytes >= shorter.device_bytes * (1 - 1e-12)).all()


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@given(gpus=st.integers(2, 64))
def test_resident_states_never_grow_from_stage_1_to_3(gpus: int, precision: Precision) -> None:
    space, memory = estimate(gpus=gpus, precision=precision)
    states = [states_of(space, memory, stage) for stage in (1, 2, 3)]
    assert states == sorted(states, reverse=True)
    assert states[2] < states[0]


def test_mixed_precision_holds_sixteen_bytes_a_parameter_shared_out_by_stage() -> None:
    space, memory = estimate(gpus=4)
    a_parameter = [states_of(space, memory, stage) / 10**9 for stage in range(4)]
    # ZeRO 2 keeps whole parameters of which its partition has a part.
    assert a_parameter == [16.0, 4 + 12 / 4, pytest.approx(2 + 14 / 4, rel=0.02), 16 / 4]


def test_fp32_keeps_a_copy_of_the_weights_only_from_stage_1_on() -> None:
    space, memory = estimate(gpus=4, precision="fp32")
    a_parameter = [states_of(space, memory, stage) / 10**9 for stage in range(3)]
    assert a_parameter == [16.0, 8 + 12 / 4, pytest.approx(4 + 16 / 4, rel=0.02)]


def test_an_offloaded_optimizer_is_in_host_memory_instead() -> None:
    space, memory = estimate(gpus=4)
    offloaded = space.column("offload_optimizer") == "cpu"
    assert (memory.optimizer_bytes[offloaded] == 0).all()
    assert (memory.host_bytes[~offloaded] == 0).all()
    rows = offloaded & (space.column("offload_param") == "none")
    # States, and gradients as they come and in fp32.
    least = (12 + 2 + 4) * 1e9 / 4
    at_stage_3 = space.column("zero_stage")[rows] == 3
    assert memory.host_bytes[rows][at_stage_3] == pytest.approx(least)
    # Before that the largest gradient besides, and those of earlier micro-steps.
    accumulates = space.gradient_accumulation_steps[rows] > 1
    more = 2 * 60e6 + accumulates * 2e9 / 4
    assert memory.host_bytes[rows][~at_stage_3] == pytest.approx((least + more)[~at_stage_3])


def test_activations_are_those_of_the_longest_row_in_every_place_of_the_micro_batch() -> None:
    space, memory = estimate(longest=2000)
    row = next(
        row
        for row in range(len(space))
        if space.setting(row).micro_batch_size == 4
        and space.setting(row).structure.checkpointing == "none"
    )
    total = memory.activations_bytes[row] + memory.logits_bytes[row]
    assert total == pytest.approx(4 * (1e6 + 4e6 * 2000 + 300 * 2000**2))
    assert memory.logits_bytes[row] == pytest.approx(4 * 4e5 * 2000)


def test_checkpointing_takes_less_where_the_trace_says_so() -> None:
    space, memory = estimate()
    full = space.column("checkpointing") == "full"
    assert (memory.activations_bytes[full] < memory.activations_bytes[~full]).all()


def test_a_checkpointing_mode_that_was_not_traced_is_no_free_lunch() -> None:
    plain_only = make_profile(traces=make_profile().traces[:1])
    with pytest.raises(KeyError, match="full"):
        estimate(profile=plain_only)


def test_what_is_frozen_has_neither_gradients_nor_optimizer_states() -> None:
    frozen = make_profile(trained_sizes=(), frozen_sizes=(10**9,), trainable_parameters=0)
    _, memory = estimate(profile=frozen)
    assert memory.gradients_bytes.max() == memory.optimizer_bytes.max() == 0
    assert memory.weights_bytes.min() > 0


def test_a_gpu_needs_memory_that_is_no_tensor_and_a_cpu_much_less() -> None:
    cpu = make_cluster()
    space = enumerate_space(cpu, 32)
    on_cpu = estimate_memory(space, make_profile(), make_job(), cpu, 512)
    _, on_gpu = estimate(gpus=2)
    assert on_gpu.runtime_bytes.min() > 2048 * MIB
    assert on_cpu.runtime_bytes.min() > 48 * MIB
    assert on_cpu.runtime_bytes[0] < on_gpu.runtime_bytes[0]


@pytest.mark.parametrize(("memory_gib", "factor"), [(5, 1), (6, 2)])
def test_weights_are_flattened_beside_themselves_where_the_device_has_room(
    memory_gib: int, factor: int
) -> None:
    # A billion parameters in bf16 are 1.9 GiB, twice that 3.7, and the runtime takes 2.
    cluster = make_cluster(gpus=64, memory_bytes=memory_gib * GIB)
    nothing = (make_moment(0.0, 1.0, 0.0),)
    traces = tuple(
        (mode, replace(trace, one_row=nothing, more_rows=nothing))
        for mode, trace in make_profile().traces
    )
    # Few are trained, so that reducing and updating take little.
    profile = make_profile(traces=traces)
    space = enumerate_space(cluster, 64)
    memory = estimate_memory(space, profile, make_job(), cluster, 1)
    row = next(
        row
        for row in range(len(space))
        if space.setting(row).structure == Structure(zero_stage=2, offload_optimizer="cpu")
    )
    states = 2e9
    reducing = 2 * (2 * profile.bucket_elements + profile.largest_parameter)
    expected = max(states + reducing, 2e9 * factor)
    assert memory.allocated_bytes[row] == pytest.approx(expected, rel=1e-3)
