"""Adapters beside frozen weights: built, traced, trained, resumed, saved, merged."""

import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from conftest import autotune
from records import make_cluster
from test_trace import model

from autotune import emit, environment
from autotune.profile.child import profile_from_json
from autotune.profile.request import TraceRequest
from autotune.setting import Setting, Structure
from autotune.workload import ALL_LINEAR, Job, Lora, ModelProfile

LORA = Lora(rank=8, alpha=16, dropout=0.0, targets=(ALL_LINEAR,))
FEW_LINEAR = replace(LORA, targets=("q_proj", "self_attn.v_proj"))
LIMIT_S = 280


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model("llama", tmp_path_factory.mktemp("llama"))


def recipe(directory: Path, **changes: Any) -> TraceRequest:  # noqa: ANN401 - fields of a request
    request = TraceRequest(
        model_dir=str(directory),
        trust_remote_code=False,
        attention="eager",
        precision="bf16",
        device_kind="cpu",
        lora=LORA,
    )
    return replace(request, **changes)


def build(request: TraceRequest, checkpointing: str = "none") -> Any:  # noqa: ANN401 - PeftModel
    from transformers import AutoConfig

    from autotune.engine.model import from_config

    return from_config(AutoConfig.from_pretrained(request.model_dir), request, checkpointing)


def test_adapters_are_trained_in_the_compute_type_and_nothing_else(llama: Path) -> None:
    import torch

    parameters = dict(build(recipe(llama)).named_parameters())

    trained = {name for name, one in parameters.items() if one.requires_grad}
    # Four projections of attention and three of the feed-forward network, in three layers.
    assert len(trained) == 2 * 7 * 3
    assert trained == {name for name in parameters if ".lora_" in name}
    assert {one.dtype for one in parameters.values()} == {torch.bfloat16}


@pytest.mark.parametrize("checkpointing", ["none", "full", "every-2"])
def test_gradients_reach_the_adapters_of_the_first_layer(llama: Path, checkpointing: str) -> None:
    import torch

    built = build(recipe(llama, precision="fp32"), checkpointing)
    ids = torch.arange(12).reshape(2, 6)
    built.train()
    built(input_ids=ids, labels=ids).loss.backward()

    reached = {name for name, one in built.named_parameters() if one.grad is not None}
    # What an adapter adds is nothing at first, so that its inner matrix has no slope yet.
    moved = {name for name, one in built.named_parameters() if name in reached and one.grad.any()}
    assert reached == {name for name, one in built.named_parameters() if one.requires_grad}
    assert moved == {name for name in reached if "lora_B" in name}


def test_some_layers_can_be_named_by_the_end_of_their_name(llama: Path) -> None:
    names = [name for name, one in build(recipe(llama, lora=FEW_LINEAR)).named_parameters()]
    adapted = {name.split(".")[-4] for name in names if ".lora_" in name}
    assert adapted == {"q_proj", "v_proj"}


def test_a_layer_that_is_not_there_is_refused_with_those_that_are(llama: Path) -> None:
    with pytest.raises(ValueError, match=r"no linear layer called query: .*down_proj.*q_proj"):
        build(recipe(llama, lora=replace(LORA, targets=("query", "q_proj"))))


@pytest.fixture(scope="module")
def profile(llama: Path) -> ModelProfile:
    from autotune.profile.trace import trace_model

    return trace_model(recipe(llama, precision="fp32", checkpointing=("none", "every-2")))


def test_the_profile_counts_adapters_and_weights(llama: Path, profile: ModelProfile) -> None:
    config = json.loads((llama / "config.json").read_text())
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    # An adapter has rank x (inputs + outputs) parameters (arXiv:2106.09685, section 4.1).
    attention = 2 * (hidden + hidden) + 2 * (hidden + hidden // 2)
    a_layer = LORA.rank * (attention + 3 * (hidden + inner))
    assert profile.trainable_parameters == 3 * a_layer
    assert profile.parameters == sum(one.numel() for one in build(recipe(llama)).parameters())


def test_frozen_weights_take_four_operations_where_trained_ones_take_six(
    llama: Path, profile: ModelProfile
) -> None:
    config = json.loads((llama / "config.json").read_text())
    embedding = config["vocab_size"] * config["hidden_size"]
    frozen = profile.parameters - profile.trainable_parameters - embedding
    expected = 4 * frozen + 6 * profile.trainable_parameters
    assert profile.trace("none").flops.c1 == pytest.approx(expected, rel=0.05)


def test_every_second_layer_recomputes_its_part(profile: ModelProfile) -> None:
    # Of three layers the first and the third.
    every, none = profile.trace("every-2"), profile.trace("none")
    assert none.flops.c1 < every.flops.c1 < none.flops.c1 * 3 / 2


def read(path: Path) -> Any:  # noqa: ANN401 - JSON
    return json.loads(path.read_text())


def losses(directory: Path) -> list[float]:
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory, short_rows: Path) -> Path:
    """Return the directory of a run on two ranks whose adapters are trained."""
    root = tmp_path_factory.mktemp("lora")
    done = autotune(
        *("run", "--dataset", short_rows, "--run-dir", "run", "--devices", "cpu:2"),
        *("--method", "lora", "--lora-rank", "8", "--learning-rate", "1e-2"),
        *("--global-batch-size", "16", "--max-probes", "1", "--max-steps", "6"),
        cwd=root,
        timeout=LIMIT_S,
    )
    assert done.returncode == 0, done.stderr
    return root / "run"


@pytest.mark.slow
def test_what_was_trained_loads_with_peft(run_dir: Path) -> None:
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoTokenizer

    loaded = AutoPeftModelForCausalLM.from_pretrained(run_dir / "model")
    tokenizer = AutoTokenizer.from_pretrained(run_dir / "model")

    result = read(run_dir / "result.json")
    assert result["job"]["lora"] == asdict(LORA) | {"targets": [ALL_LINEAR]}
    assert result["training"]["loss_end"] < result["training"]["loss_start"]
    weights = dict(loaded.named_parameters())
    assert any(one.any() for name, one in weights.items() if "lora_B" in name)
    generated = loaded.generate(**tokenizer("What is", return_tensors="pt"), max_new_tokens=3)
    assert generated.shape[1] > len(tokenizer("What is")["input_ids"])
    recorded = read(run_dir / "run.json")["options"]
    assert recorded["method"] == {"value": "lora", "source": "command line"}
    assert recorded["lora_alpha"] == {"value": 16, "source": "default"}


def emitted(run_dir: Path, directory: Path, setting: Setting, *, merge: bool = False) -> Path:
    """Write the files of another setting of the same run beside its rows."""
    fields = read(run_dir / "result.json")["job"]
    job = Job(**fields | {"lora": Lora.from_json(fields["lora"]), "merge": merge})
    profile = profile_from_json(
        {name: value for name, value in read(run_dir / "profile.json").items() if name != "schema"}
    )
    cluster = replace(make_cluster(cpu_ranks=2), threads_per_rank=1)
    spec = emit.train_spec(
        job,
        setting,
        cluster,
        dataset_dir=str(run_dir / "dataset"),
        output_dir="training",
        model_output_dir="model",
    )
    directory.mkdir()
    (directory / "train_args.json").write_text(json.dumps(spec.to_json()))
    config = emit.ds_config(job, setting, profile, cluster)
    (directory / "ds_config.json").write_text(json.dumps(config))
    return directory


def train(directory: Path, *arguments: str) -> list[float]:
    """Train from the files in a directory on two ranks; returns the losses."""
    done = subprocess.run(
        [*emit.torchrun_command(sys.executable, 2), *arguments],
        cwd=directory,
        env={**os.environ, **environment.rank_environment("cpu", ())},
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return losses(directory / "training")


def setting_of(stage: int, micro_batch_size: int, checkpointing: str = "none") -> Setting:
    structure = Structure(zero_stage=stage, checkpointing=checkpointing)
    return structure.with_micro_batch(micro_batch_size, 2, 16)


@pytest.mark.slow
@pytest.mark.parametrize(
    "setting",
    [
        setting_of(1, 8),
        setting_of(2, 4, "every-2"),
        setting_of(3, 2, "full"),
    ],
    ids=lambda one: f"zero{one.structure.zero_stage}-{one.structure.checkpointing}",
)
def test_the_losses_are_the_same_under_another_setting(
    run_dir: Path, tmp_path: Path, setting: Setting
) -> None:
    other = train(emitted(run_dir, tmp_path / "other", setting))
    assert other == pytest.approx(losses(run_dir / "training"), abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [pytest.param(2, marks=pytest.mark.long), 3])
def test_it_goes_on_from_a_checkpoint_and_merges_in_the_end(
    run_dir: Path, tmp_path: Path, stage: int
) -> None:
    import torch
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoModelForCausalLM

    directory = emitted(run_dir, tmp_path / "merged", setting_of(stage, 4), merge=True)
    through = train(directory)
    for checkpoint in (directory / "training").glob("checkpoint-6"):
        (checkpoint / "complete").unlink()

    resumed = train(directory, "--resume")

    assert len(resumed) == 6
    assert resumed == pytest.approx(through, abs=1e-4)
    merged = AutoModelForCausalLM.from_pretrained(directory / "model").eval()
    apart = AutoPeftModelForCausalLM.from_pretrained(directory / "model" / "adapter").eval()
    ids = torch.arange(3, 40).reshape(1, -1)
    with torch.no_grad():
        difference = merged(input_ids=ids).logits - apart(input_ids=ids).logits
    assert difference.abs().max() < 1e-4
    assert not (directory / "model" / "adapter_config.json").exists()
