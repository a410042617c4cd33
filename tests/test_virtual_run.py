"""The virtual run against DeepSpeed on real gloo ranks: the same bytes, the same collectives."""

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from gloo_ranks import real_runs

from autotune import builtin, emit
from autotune.errors import VirtualRunUnavailableError
from autotune.hardware import Cluster, Host
from autotune.memory import gpu_runtime_bytes
from autotune.profile.request import TraceRequest
from autotune.profile.virtual import (
    VirtualRequest,
    virtual_run,
)
from autotune.setting import Offload, Structure
from autotune.workload import ALL_LINEAR, Job, Lora, ModelProfile, Precision

RANKS = 2
_TINY: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": 2, "intermediate_size": 160},
    "qwen2": {"num_key_value_heads": 2, "intermediate_size": 160},
    "gpt2": {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 512},
    "gemma": {"num_key_value_heads": 1, "intermediate_size": 160, "head_dim": 16},
    "gpt_neox": {"intermediate_size": 256},
    "opt": {"ffn_dim": 160, "word_embed_proj_dim": 64},
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    model: str
    stage: int
    attention: str = "eager"
    checkpointing: str = "none"
    precision: Precision = "fp32"
    seq_length: int = 64
    ranks: int = RANKS
    lora: Lora | None = None

    def __str__(self) -> str:
        method = "full" if self.lora is None else "lora"
        return "-".join(
            (
                *(self.model, f"zero{self.stage}", self.attention, self.checkpointing),
                *(self.precision, method),
            )
        )


LORA = Lora(rank=8, alpha=16, dropout=0.0, targets=(ALL_LINEAR,))
FAST = [Case(model="glm-tiny", stage=3), Case(model="llama", stage=2, lora=LORA)]
GRID = [
    *(Case(model="llama", stage=stage) for stage in (0, 1, 2, 3)),
    *(
        Case(model="glm-tiny", stage=stage, attention="sdpa", checkpointing="full")
        for stage in (0, 1, 2, 3)
    ),
    *(Case(model="llama", stage=stage, precision="bf16") for stage in (1, 3)),
    Case(model="llama", stage=2, attention="sdpa", seq_length=500),
    Case(model="qwen2", stage=3, attention="sdpa"),
    Case(model="gpt2", stage=2),
    Case(model="gemma", stage=3),
    Case(model="gpt_neox", stage=2, attention="sdpa"),
    Case(model="opt", stage=3),
    *(Case(model="llama", stage=stage, lora=LORA) for stage in (0, 1)),
    *(
        Case(model="llama", stage=stage, precision="bf16", checkpointing="full", lora=LORA)
        for stage in (1, 3)
    ),
    Case(model="gpt2", stage=3, lora=replace(LORA, dropout=0.1)),
    Case(model="qwen2", stage=2, lora=replace(LORA, targets=("q_proj", "v_proj"))),
    Case(model="llama", stage=3, checkpointing="every-2"),
]

pytestmark = pytest.mark.usefixtures("server")

CLUSTER = Cluster(
    kind="cpu",
    device_name="CPU",
    num_devices=RANKS,
    device_memory_bytes=10**12,
    device_memory_source="test",
    threads_per_rank=1,
    compute_capability=None,
    visible_devices=(),
    host=Host(
        cpu_name="CPU",
        sockets=1,
        physical_cores=1,
        usable_cores=1,
        memory_bytes=10**12,
        memory_source="test",
        available_bytes=10**12,
    ),
)


def model_directory(model: str, parent: Path) -> Path:
    if model == "glm-tiny":
        return builtin.directory(model)
    from transformers import AutoConfig

    sizes = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = AutoConfig.for_model(
        model, **(sizes | {"vocab_size": 512, "max_position_embeddings": 512} | _TINY[model])
    )
    config.save_pretrained(parent / model)
    return parent / model


def make_request(
    case: Case, directory: Path, cluster: Cluster = CLUSTER, offload: Offload = "none"
) -> VirtualRequest:
    """Two rows a micro-batch, two micro-steps an update, through the configs that are emitted."""
    parameters, trainable = count_parameters(directory, case.lora)
    job = Job(
        model=case.model,
        model_dir=str(directory),
        from_scratch=True,
        trust_remote_code=False,
        method="full" if case.lora is None else "lora",
        lora=case.lora,
        precision=case.precision,
        max_seq_length=512,
        global_batch_size=4 * case.ranks,
        epochs=1,
        max_steps=None,
        learning_rate=1e-3,
        lr_scheduler="cosine",
        warmup_ratio=0.03,
        weight_decay=0.0,
        max_grad_norm=1.0,
        seed=42,
    )
    profile = ModelProfile(
        architecture="",
        parameters=parameters,
        trainable_parameters=trainable,
        largest_layer_parameters=parameters // 4,
        largest_parameter=parameters // 4,
        trained_sizes=(trainable,),
        frozen_sizes=(parameters - trainable,),
        num_layers=3,
        hidden_size=64,
        vocab_size=512,
        max_position_embeddings=512,
        attention=case.attention,
        precision=case.precision,
        traces=(),
    )
    structure = Structure(
        zero_stage=case.stage,
        checkpointing=case.checkpointing,
        attention=case.attention,
        offload_optimizer=offload,
    )
    setting = structure.with_micro_batch(2, case.ranks, job.global_batch_size)
    return VirtualRequest(
        spec=emit.train_spec(
            job, setting, cluster, dataset_dir="", output_dir="", model_output_dir=""
        ),
        ds_config=emit.ds_config(job, setting, profile, cluster),
        ranks=case.ranks,
        micro_batch_size=2,
        gradient_accumulation_steps=2,
        seq_length=case.seq_length,
    )


def count_parameters(directory: Path, lora: Lora | None = None) -> tuple[int, int]:
    """Return all parameters, and the trainable ones."""
    import torch
    from transformers import AutoConfig

    from autotune.engine.model import from_config

    recipe = TraceRequest(
        model_dir="",
        trust_remote_code=False,
        attention="eager",
        precision="fp32",
        device_kind="cpu",
        lora=lora,
    )
    with torch.device("meta"):
        model = from_config(AutoConfig.from_pretrained(directory), recipe)
    parameters = list(model.parameters())
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    return sum(one.numel() for one in parameters), sum(one.numel() for one in trained)


def assert_same(case: Case, directory: Path, ranks: range) -> None:
    request = make_request(case, model_directory(case.model, directory))
    reals = real_runs(request, directory)
    for rank in ranks:
        virtual = virtual_run(replace(request, rank=rank), directory / "virtual.log")
        assert virtual.peak_device_bytes == reals[rank]["peak"]
        assert virtual.flops == reals[rank]["flops"]
        assert moved(virtual.collectives) == moved(reals[rank]["collectives"])
        assert sum(virtual.parts.values()) == virtual.peak_device_bytes


def moved(collectives: dict[str, int]) -> dict[str, int]:
    """Leave out the broadcasts with which ZeRO 3 compares the ranks' order of layers."""
    return {name: size for name, size in collectives.items() if size and "broadcast" not in name}


@pytest.mark.parametrize("case", FAST, ids=str)
def test_a_virtual_rank_has_the_bytes_of_a_real_one(case: Case, tmp_path: Path) -> None:
    assert_same(case, tmp_path, range(1))


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [
        *GRID[::3],
        *(pytest.param(case, marks=pytest.mark.long) for case in GRID if case not in GRID[::3]),
    ],
    ids=str,
)
def test_every_virtual_rank_has_the_bytes_of_the_real_one(case: Case, tmp_path: Path) -> None:
    assert_same(case, tmp_path, range(RANKS))


@pytest.mark.slow
def test_a_thousand_ranks_take_no_other_rank(tmp_path: Path) -> None:
    case = Case(model="llama", stage=1, ranks=1024, precision="bf16", checkpointing="full")
    request = make_request(case, model_directory(case.model, tmp_path))

    run = virtual_run(replace(request, steps=1), tmp_path / "virtual.log")

    assert run.parameters == count_parameters(Path(request.spec.model_dir))[0]
    assert run.parts["optimizer"] < run.parts["weights"] / 10


def test_offloading_the_optimizer_moves_its_states_to_the_host(tmp_path: Path) -> None:
    case = Case(model="llama", stage=2, precision="bf16", attention="sdpa")
    directory = model_directory(case.model, tmp_path)
    gpus = replace(CLUSTER, kind="cuda")

    run = virtual_run(make_request(case, directory, gpus, offload="cpu"), tmp_path / "offload.log")

    assert "optimizer" not in run.parts
    # Weights and two moments in fp32, of this rank's half of the parameters.
    assert run.peak_host_bytes > 12 * run.parameters // RANKS
    assert sum(run.parts.values()) == run.peak_device_bytes


@pytest.mark.parametrize(("room_for_tensors", "copies"), [(10**9, 2), (500_000, 1)])
def test_zero_2_flattens_the_weights_where_there_is_room(
    room_for_tensors: int, copies: int, tmp_path: Path
) -> None:
    case = Case(model="llama", stage=2, precision="bf16", attention="sdpa", seq_length=16)
    room = gpu_runtime_bytes(RANKS) + room_for_tensors
    gpus = replace(CLUSTER, kind="cuda", device_memory_bytes=room)
    request = make_request(case, model_directory(case.model, tmp_path), gpus, offload="cpu")

    run = virtual_run(replace(request, steps=0), tmp_path / "virtual.log")

    assert run.peak_device_bytes // (2 * run.parameters) == copies


def test_a_child_that_fails_says_why(tmp_path: Path) -> None:
    request = make_request(FAST[0], model_directory("llama", tmp_path))
    nowhere = replace(request, spec=replace(request.spec, model_dir=str(tmp_path / "nowhere")))

    with pytest.raises(VirtualRunUnavailableError, match="nowhere"):
        virtual_run(nowhere, tmp_path / "virtual.log")


def test_a_name_that_a_library_lost_is_named() -> None:
    from autotune.profile.fakery import replaced

    with (
        pytest.raises(VirtualRunUnavailableError, match=r"torch\.nn\.Module\.no_such_name"),
        replaced("torch.nn.Module.no_such_name", None),
    ):
        pass


def test_what_gave_way_comes_back() -> None:
    import torch

    from autotune.profile.fakery import faked

    before = (torch.nn.Module.to, dict(os.environ))
    with faked("cpu", rank=0, ranks=4):
        assert torch.distributed.get_world_size() == 4
        assert torch.nn.Module.to is not before[0]
    assert (torch.nn.Module.to, dict(os.environ)) == before
    assert not torch.distributed.is_initialized()
