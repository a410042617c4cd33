"""Small builders of the records that tests share: each takes what a test cares about."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

from autotune.emit import train_spec
from autotune.hardware import Cluster, Host, Rates
from autotune.outcome import Measured, Outcome, OutOfMemory, Rung
from autotune.plan import Plan, make_plan
from autotune.probe.protocol import ProbeRequest, RungFailure, RungMeasurement, RungPlan
from autotune.setting import ZERO_STAGES, Setting, Structure
from autotune.space import CHECKPOINTING_MODES, enumerate_space
from autotune.throughput import DrawnRows, Floats, Ints
from autotune.units import GIB
from autotune.workload import Job, ModelProfile, Moment, Polynomial, Trace

LENGTHS: Ints = np.arange(100, 1124, dtype=np.int64)


def make_cluster(*, gpus: int = 0, cpu_ranks: int = 2, memory_bytes: int = 8 * GIB) -> Cluster:
    """Return so many GPUs, or a CPU with so many ranks, each with this memory to use."""
    host = Host(
        cpu_name="Example CPU",
        sockets=1,
        physical_cores=8,
        usable_cores=8,
        memory_bytes=512 * GIB,
        memory_source="/proc/meminfo MemTotal",
        available_bytes=500 * GIB,
    )
    return Cluster(
        kind="cuda" if gpus else "cpu",
        device_name="Example GPU" if gpus else "Example CPU",
        num_devices=gpus or cpu_ranks,
        device_memory_bytes=memory_bytes,
        device_memory_source="free memory",
        threads_per_rank=4,
        compute_capability=(8, 0) if gpus else None,
        visible_devices=tuple(map(str, range(gpus))),
        host=host,
    )


def make_job(**changes: Any) -> Job:  # noqa: ANN401 - fields of a Job
    job = Job(
        model="example",
        model_dir="/models/example",
        from_scratch=False,
        trust_remote_code=False,
        method="full",
        precision="bf16",
        max_seq_length=2048,
        global_batch_size=32,
        epochs=1.0,
        max_steps=None,
        learning_rate=2e-5,
        lr_scheduler="cosine",
        warmup_ratio=0.03,
        weight_decay=0.01,
        max_grad_norm=1.0,
        seed=42,
    )
    return replace(job, **changes)


def make_moment(c0: float, c1: float, c2: float, *, logits: float = 0.0) -> Moment:
    """Return a moment of a pass at which no gradient has been made yet, each byte a row's."""
    return Moment(
        rows_bytes=Polynomial(c0=c0, c1=c1, c2=c2),
        batch_bytes=Polynomial(c0=0.0, c1=0.0, c2=0.0),
        logits_bytes=Polynomial(c0=0.0, c1=logits, c2=0.0),
        gradients=0.0,
        hands_over=False,
        lengths=(1, 2**20),
    )


def make_profile(**changes: Any) -> ModelProfile:  # noqa: ANN401 - fields of a ModelProfile
    """Return a model of a billion parameters; checkpointing trades memory for a third of time."""
    flops = Polynomial(c0=0.0, c1=6e9, c2=1e5)
    plain = Trace(
        one_row=(make_moment(1e6, 4e6, 300.0, logits=4e5),),
        more_rows=(make_moment(1e6, 4e6, 300.0, logits=4e5),),
        flops=flops,
        operators=2000.0,
    )
    full = Trace(
        one_row=(make_moment(1e6, 6e5, 30.0, logits=4e5),),
        more_rows=(make_moment(1e6, 6e5, 30.0, logits=4e5),),
        flops=Polynomial(c0=0.0, c1=flops.c1 * 4 / 3, c2=flops.c2 * 4 / 3),
        operators=2700.0,
    )
    profile = ModelProfile(
        architecture="ExampleForCausalLM",
        parameters=1_000_000_000,
        trainable_parameters=1_000_000_000,
        largest_layer_parameters=40_000_000,
        largest_parameter=60_000_000,
        trained_sizes=(60_000_000, *(20_000_000,) * 44, 60_000_000),
        frozen_sizes=(),
        num_layers=20,
        hidden_size=2048,
        vocab_size=32_000,
        max_position_embeddings=4096,
        attention="sdpa",
        precision="bf16",
        traces=(("none", plain), ("full", full)),
    )
    return replace(profile, **changes)


RATES = Rates(
    host_link_bytes_per_s=2e10,
    host_memory_bytes_per_s=5e10,
    matmul_flops_per_s=1e14,
    memory_bytes_per_s=1e12,
    link_bytes_per_s=1e11,
    operator_overhead_s=1e-5,
    collective_overhead_s=5e-5,
)


def plan_for(
    cluster: Cluster, *, job: Job | None = None, profile: ModelProfile | None = None
) -> Plan:
    """Plan the example job (or the given one) on a cluster, over the example's lengths."""
    job, profile = job or make_job(), profile or make_profile()
    space = enumerate_space(cluster, job.global_batch_size)
    return make_plan(space, profile, job, cluster, RATES, DrawnRows.draw(LENGTHS, 42))


def measured(tokens_per_s: float, *, peak_bytes: int = GIB) -> Measured:
    return Measured(
        step_time_s=1.0,
        samples_per_s=1.0,
        tokens_per_s=tokens_per_s,
        accumulate_s=((128, 0.5),),
        boundary_extra_s=0.1,
        spread=0.01,
        peak_bytes=peak_bytes,
    )


def as_rung(setting: Setting, outcome: Outcome) -> Rung:
    return Rung(
        setting=setting,
        ranks=2,
        lengths={"longest": 128, "timed": [64, 128]},
        outcome=outcome,
        at="2026-01-01T00:00:00+00:00",
        seconds=2.5,
    )


def structures() -> st.SearchStrategy[Structure]:
    places = st.sampled_from(["none", "cpu"])
    return st.builds(
        Structure,
        zero_stage=st.sampled_from(ZERO_STAGES),
        offload_optimizer=places,
        offload_param=places,
        checkpointing=st.sampled_from(CHECKPOINTING_MODES),
        attention=st.sampled_from(["sdpa", "eager"]),
        sampling=st.sampled_from(["random", "group_by_length"]),
    )


def settings() -> st.SearchStrategy[Setting]:
    return st.builds(
        Setting,
        structure=structures(),
        micro_batch_size=st.integers(1, 512),
        gradient_accumulation_steps=st.integers(1, 512),
    )


@dataclass(frozen=True, slots=True)
class Surface:
    """The truth behind a plan: what each of its settings would really do."""

    plan: Plan
    tokens_per_s: Floats
    device_bytes: Floats

    @property
    def fits(self) -> NDArray[np.bool_]:
        fits: NDArray[np.bool_] = self.device_bytes <= self.plan.budget_bytes
        return fits

    @property
    def best(self) -> float:
        return float(self.tokens_per_s[self.fits].max(initial=0.0))

    def row(self, request: ProbeRequest, rung: RungPlan) -> int:
        fields = json.loads(request.label) | {
            "micro_batch_size": rung.micro_batch_size,
            "gradient_accumulation_steps": rung.gradient_accumulation_steps,
        }
        row = self.plan.row_of(Setting.from_json(fields))
        assert row is not None
        return row

    def answer(self, request: ProbeRequest, rung: RungPlan) -> RungMeasurement | RungFailure:
        row = self.row(request, rung)
        if not self.fits[row]:
            outcome = OutOfMemory(where="device", evidence="torch.OutOfMemoryError")
            return RungFailure(micro_batch_size=rung.micro_batch_size, outcome=outcome, seconds=1.0)
        return RungMeasurement(
            micro_batch_size=rung.micro_batch_size,
            accumulate_s=((1, (1 / float(self.tokens_per_s[row]),)),),
            boundary_s=(),
            peak_bytes=int(self.device_bytes[row]),
            seconds=1.0,
        )


def exact(plan: Plan) -> Surface:
    """Return the surface on which every estimate is right."""
    return Surface(plan, plan.tokens_per_s, plan.memory.device_bytes)


def perturbed(plan: Plan, seed: int, *, memory_factor: float = 1.0) -> Surface:
    """Return a surface off the estimates: by machine, by knob, by size, and by noise."""
    random, space = np.random.default_rng(seed), plan.space
    off = random.normal(0, 0.5) + random.normal(0, 0.1) * np.log2(space.micro_batch_size)
    for knob in ("zero_stage", "offload_optimizer", "checkpointing"):
        _, place = np.unique(space.column(knob), return_inverse=True)
        off = off + random.normal(0, 0.25, place.max() + 1)[place]
    off = off + random.normal(0, 0.03, len(space))
    memory = np.exp(random.normal(0, 0.05, len(space.structures)))[space.structure_index]
    return Surface(
        plan,
        plan.tokens_per_s * np.exp(off),
        plan.memory.device_bytes * memory * memory_factor,
    )


class SurfaceSite:
    """Asks for a structure by its key, and reads a speed out of a time."""

    def request(self, ladder: Sequence[Setting]) -> ProbeRequest:
        cluster = make_cluster(gpus=2)
        return ProbeRequest(
            label=ladder[0].structure.key(),
            ranks=cluster.num_devices,
            spec=train_spec(
                make_job(),
                ladder[0],
                cluster,
                dataset_dir="dataset",
                output_dir="training",
                model_output_dir="model",
            ),
            ds_config={},
            total_steps=10,
            rungs=tuple(
                RungPlan(
                    micro_batch_size=setting.micro_batch_size,
                    gradient_accumulation_steps=setting.gradient_accumulation_steps,
                    memory_rows=(),
                    timed_rows=(),
                )
                for setting in ladder
            ),
        )

    def outcome(self, setting: Setting, measured_rung: RungMeasurement) -> Measured:
        del setting
        return measured(
            1 / measured_rung.accumulate_s[0][1][0], peak_bytes=measured_rung.peak_bytes
        )

    def lengths(self, setting: Setting) -> dict[str, object]:
        del setting
        return {"longest": 128, "timed": [128]}
