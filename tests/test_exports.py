"""Exports say what was tuned, in the words of each tool; benchmarks/exports asks the tools."""

import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml
from conftest import autotune, write_rows
from hypothesis import given
from hypothesis import strategies as st
from records import make_cluster, make_job, make_profile
from trainings import small_model

from autotune import builtin
from autotune.dataset import Rows, Rules, Source, prepare
from autotune.dataset.written import write_messages, write_sequences, write_tokens
from autotune.emit import ds_config, train_spec
from autotune.errors import InputMissingError, UsageError
from autotune.exporting import export_run
from autotune.exports import EXPORTERS, TunedRun
from autotune.exports.deepspeed import with_autos, without_optimizer
from autotune.rundir import RunDir, write_json
from autotune.setting import Setting, Structure
from autotune.workload import Lora

HOSTILE = "a 'b' \"c\" $HOME `id` #d: [e]"
CONFIG_OF = {
    "accelerate": "accelerate.yaml",
    "trl": "trl.yaml",
    "llama-factory": "llama_factory.yaml",
    "axolotl": "axolotl.yaml",
    "ms-swift": "swift.yaml",
}
ADAPTERS = Lora(rank=8, alpha=16, dropout=0.05, targets=("all-linear",))


def tuned_run(
    structure: Structure | None = None,
    *,
    gpus: int = 2,
    micro_batch_size: int = 2,
    packing: bool = False,
    **job_changes: Any,  # noqa: ANN401 - fields of a Job
) -> TunedRun:
    structure = structure or Structure(zero_stage=2, checkpointing="full")
    cluster, job = make_cluster(gpus=gpus), make_job(**job_changes)
    ranks = cluster.num_devices
    setting = structure.with_micro_batch(micro_batch_size, ranks, job.global_batch_size)
    return TunedRun(
        name="run",
        directory="/exports/tool",
        model="example/model",
        setting=setting,
        ds_config=ds_config(job, setting, make_profile(), cluster),
        spec=train_spec(
            job, setting, cluster, dataset_dir="dataset", output_dir="t", model_output_dir="m"
        ),
        ranks=ranks,
        max_seq_length=job.max_seq_length,
        packing=packing,
        optimizer=job.optimizer,
        measured="1000 tokens/s, measured",
    )


structures = st.builds(
    Structure,
    zero_stage=st.sampled_from([0, 1, 2, 3]),
    checkpointing=st.sampled_from(["none", "full", "every-2"]),
    sampling=st.sampled_from(["random", "batch_rebalance"]),
    attention=st.sampled_from(["sdpa", "eager", "flash_attention_2"]),
    loss=st.sampled_from(["whole", "chunked"]),
)
runs = st.builds(
    tuned_run,
    structures,
    gpus=st.sampled_from([0, 1, 8]),
    micro_batch_size=st.sampled_from([1, 2, 4]),
    packing=st.booleans(),
    precision=st.sampled_from(["bf16", "fp16", "fp32"]),
    optimizer=st.sampled_from(["adamw", "adamw-8bit"]),
    lora=st.sampled_from([None, ADAPTERS, replace(ADAPTERS, quantised=True)]),
    eval_share=st.sampled_from([0.0, 0.1]),
    learning_rate=st.floats(1e-8, 1.0),
    weight_decay=st.floats(0, 1),
    max_steps=st.none() | st.integers(1, 10**6),
)


def content_of(tool: str, tuned: TunedRun) -> dict[str, Any]:
    content = yaml.safe_load(EXPORTERS[tool](tuned).files[CONFIG_OF[tool]])
    assert isinstance(content, dict)
    return content


def filled_by_transformers(text: str, tuned: TunedRun) -> dict[str, Any]:
    """Have transformers put the arguments of a training into a config, as its Trainer does."""
    from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig

    judge = HfTrainerDeepSpeedConfig(json.loads(text))
    arguments = SimpleNamespace(
        **tuned.trainer,
        world_size=tuned.ranks,
        save_on_each_node=False,
        fp16_full_eval=False,
        bf16_full_eval=False,
        get_warmup_steps=lambda steps: int(steps * tuned.trainer["warmup_steps"]),
    )
    judge.trainer_config_process(arguments)
    judge.trainer_config_finalize(arguments, None, 100)
    assert judge.mismatches == []
    config: dict[str, Any] = judge.config
    return config


@given(runs)
def test_transformers_fills_the_form_with_autos_with_what_was_tuned(tuned: TunedRun) -> None:
    text = with_autos(tuned.ds_config)

    assert json.loads(text)["train_micro_batch_size_per_gpu"] == "auto"
    assert filled_by_transformers(text, tuned) == tuned.ds_config


@given(runs)
def test_what_was_tuned_and_is_no_argument_stays_literal(tuned: TunedRun) -> None:
    config = json.loads(with_autos(tuned.ds_config))

    assert config["zero_optimization"] == tuned.ds_config["zero_optimization"]


@given(runs)
def test_a_script_of_the_users_own_brings_its_optimizer(tuned: TunedRun) -> None:
    config = json.loads(without_optimizer(tuned.ds_config))

    assert "optimizer" not in config
    assert "auto" not in json.dumps(config)
    assert config["train_batch_size"] == tuned.ds_config["train_batch_size"]


@given(runs)
@pytest.mark.parametrize(
    ("tool", "micro"),
    [
        ("trl", "per_device_train_batch_size"),
        ("llama-factory", "per_device_train_batch_size"),
        ("axolotl", "micro_batch_size"),
        ("ms-swift", "per_device_train_batch_size"),
    ],
)
def test_each_tool_gets_setting_and_job(tool: str, micro: str, tuned: TunedRun) -> None:
    content = content_of(tool, tuned)

    assert content[micro] == tuned.setting.micro_batch_size
    assert content["gradient_accumulation_steps"] == tuned.setting.gradient_accumulation_steps
    assert content["learning_rate"] == tuned.trainer["learning_rate"]
    assert content["weight_decay"] == tuned.trainer["weight_decay"]
    assert content["bf16"] is (tuned.spec.precision == "bf16")
    assert "example/model" in content.values()
    assert json.loads(EXPORTERS[tool](tuned).files["ds_config.json"])


@given(runs)
def test_trl_and_accelerate_start_as_many_ranks(tuned: TunedRun) -> None:
    for tool in ("trl", "accelerate"):
        launch = yaml.safe_load(EXPORTERS[tool](tuned).files["accelerate.yaml"])
        assert launch["num_processes"] == tuned.ranks


@given(runs)
def test_accelerate_reads_its_config(tuned: TunedRun) -> None:
    from accelerate.commands.config.config_args import ClusterConfig

    launch = yaml.safe_load(EXPORTERS["accelerate"](tuned).files["accelerate.yaml"])
    config = ClusterConfig(**ClusterConfig.process_config(launch))

    assert config.distributed_type.value == "DEEPSPEED"
    assert config.deepspeed_config["deepspeed_config_file"] == "/exports/tool/ds_config.json"


@given(runs)
def test_the_script_is_python_with_the_arguments_of_the_training(tuned: TunedRun) -> None:
    script = EXPORTERS["transformers"](tuned).files["train.py"]

    compile(script, "train.py", "exec")
    assert repr(tuned.trainer["learning_rate"]) in script
    assert ("activation_checkpointing" in script) is tuned.checkpoints
    assert ("get_peft_model" in script) is (tuned.spec.lora is not None)


@pytest.mark.parametrize("tool", ["llama-factory", "ms-swift"])
def test_a_tool_that_lacks_a_knob_says_what_that_does(tool: str) -> None:
    tuned = tuned_run(
        Structure(zero_stage=1, checkpointing="every-2", sampling="batch_rebalance", loss="chunked")
    )

    notes = EXPORTERS[tool](tuned).notes

    assert sum("than measured" in note for note in notes) == 3


@pytest.mark.parametrize("tool", ["accelerate", "trl", "llama-factory", "axolotl", "ms-swift"])
def test_what_is_compiled_is_compiled_by_the_tool_too(tool: str) -> None:
    def compiles(*, asked: bool) -> bool:
        structure = Structure(zero_stage=2, torch_compile=asked)
        files = EXPORTERS[tool](tuned_run(structure)).files.values()
        return any("torch_compile: true" in f or "dynamo_backend: INDUCTOR" in f for f in files)

    assert compiles(asked=True)
    assert not compiles(asked=False)


def test_names_from_outside_end_no_comment() -> None:
    tuned = replace(tuned_run(), name="run\nlearning_rate: 7", measured="x\ny: 1")

    for tool in CONFIG_OF:
        assert "y" not in content_of(tool, tuned)
        assert content_of(tool, tuned).get("learning_rate") != 7


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_model(tmp_path_factory.mktemp("models") / "small")


def prepared(data: Path, directory: Path, *, packing: bool) -> Rows:
    prepare(
        data,
        model_dir=builtin.directory("glm-tiny"),
        max_seq_length=256,
        output=directory,
        trust_remote_code=False,
        vocab_size=4096,
        rules=Rules(packing=packing),
    )
    return Rows.open(directory)


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_tokens_are_those_of_the_training(short_rows: Path, tmp_path: Path) -> None:
    rows = prepared(short_rows, tmp_path / "rows", packing=False)

    assert write_tokens(rows, np.arange(len(rows)), tmp_path / "out.jsonl") == len(rows)

    for place, line in enumerate(lines_of(tmp_path / "out.jsonl")):
        ids, trained = rows[place]
        assert line["input_ids"] == ids.tolist()
        assert line["labels"] == [i if t else -100 for i, t in zip(ids, trained, strict=True)]
        assert line["attention_mask"] == [1] * len(ids)


def test_packed_rows_come_out_whole_or_as_their_sequences(short_rows: Path, tmp_path: Path) -> None:
    packed = prepared(short_rows, tmp_path / "packed", packing=True)
    plain = prepared(short_rows, tmp_path / "plain", packing=False)
    everything = np.arange(len(packed))

    write_tokens(packed, everything, tmp_path / "whole.jsonl")
    count = write_sequences(packed, everything, tmp_path / "sequences.jsonl")

    assert count == len(plain) > len(packed)
    whole = lines_of(tmp_path / "whole.jsonl")
    for line in whole:
        starts = [i for i, position in enumerate(line["position_ids"]) if position == 0]
        assert all(line["labels"][start] == -100 for start in starts)
    sequences = lines_of(tmp_path / "sequences.jsonl")
    assert sum(len(line["input_ids"]) for line in sequences) == sum(
        len(line["input_ids"]) for line in whole
    )
    assert sorted(line["input_ids"] for line in sequences) == sorted(
        plain[row][0].tolist() for row in range(len(plain))
    )


def test_messages_keep_weights_and_what_is_not_trained_on(tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text(
        '{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b", '
        '"weight": 0}, {"from": "human", "value": "c"}, {"from": "gpt", "value": "d"}]}\n'
        "no JSON\n"
        '{"conversations": [{"from": "human", "value": "e"}, {"from": "gpt", "value": "f"}]}\n'
    )

    count = write_messages(
        [Source(data, 1.5)], Rules(format="sharegpt"), tmp_path / "messages.jsonl"
    )

    assert count == 3
    first = lines_of(tmp_path / "messages.jsonl")[0]["messages"]
    assert [turn["role"] for turn in first] == ["user", "assistant", "user", "assistant"]
    assert first[1] == {"role": "assistant", "content": "b", "loss": False}
    assert "loss" not in first[3]


def test_rows_of_tokens_are_no_messages(tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text('{"input_ids": [1, 2], "labels": [1, 2]}\n')

    with pytest.raises(UsageError, match="no conversations"):
        write_messages([Source(data)], Rules(), tmp_path / "messages.jsonl")


@pytest.fixture
def run_dir(tmp_path: Path, model_dir: Path, short_rows: Path) -> RunDir:
    return tuned_directory(tmp_path / HOSTILE, model_dir, short_rows)


@pytest.fixture(scope="module")
def exported_runs(
    tmp_path_factory: pytest.TempPathFactory, model_dir: Path, short_rows: Path
) -> Path:
    """Return a directory with an export for each tool, in one whose name a shell would act on."""
    directory = tmp_path_factory.mktemp("exports")
    run_dir = tuned_directory(directory / HOSTILE, model_dir, short_rows)
    for tool in EXPORTERS:
        export_run(run_dir, tool, None)
    return run_dir.exports


def tuned_directory(root: Path, model_dir: Path, short_rows: Path) -> RunDir:
    """Make a run directory as a tuning leaves it, the probes aside."""
    directory = RunDir(root)
    directory.create()
    prepared(short_rows, directory.dataset, packing=False)
    cluster = make_cluster(cpu_ranks=2)
    job = make_job(
        model=str(model_dir),
        model_dir=str(model_dir),
        precision="fp32",
        global_batch_size=8,
        max_steps=2,
        max_seq_length=256,
    )
    setting = Structure(zero_stage=1, checkpointing="full").with_micro_batch(2, 2, 8)
    spec = train_spec(
        job, setting, cluster, dataset_dir="dataset", output_dir="t", model_output_dir="m"
    )
    options: dict[str, Any] = dict.fromkeys(("format", "map", "max_bad_lines"))
    options |= {"overlong": "truncate", "on_bad_line": "fail", "train_on_prompt": False}
    options |= {"packing": False, "dataset": [f"{short_rows}@1.0"]}
    write_json(directory.run, {"options": {k: {"value": v} for k, v in options.items()}})
    write_json(directory.hardware, asdict(cluster))
    write_json(directory.ds_config, ds_config(job, setting, make_profile(), cluster))
    write_json(directory.train_args, replace(spec, threads_per_rank=1).to_json())
    write_json(directory.result, result_of(setting) | {"job": asdict(job)})
    return directory


def result_of(setting: Setting) -> dict[str, Any]:
    return {
        "setting": setting.to_json(),
        "tokens_per_s": 1000.0,
        "memory": {"measured_bytes": 2**20},
    }


def test_an_export_is_complete(exported_runs: Path) -> None:
    assert {path.name for path in exported_runs.iterdir()} == set(EXPORTERS)
    for directory in exported_runs.iterdir():
        assert json.loads((directory / "ds_config.json").read_text())
        if directory.name != "accelerate":
            assert len(lines_of(directory / "train.jsonl")) == 48


PROGRAMS = ("torchrun", "accelerate", "trl", "llamafactory-cli", "axolotl", "swift", "python")


@pytest.mark.parametrize(
    ("tool", "started"),
    [
        ("transformers", "torchrun --standalone --nproc-per-node=2 train.py"),
        ("accelerate", "accelerate launch --config_file {here}/accelerate.yaml"),
        ("trl", "trl sft --config trl.yaml"),
        ("llama-factory", "llamafactory-cli train llama_factory.yaml"),
        (
            "axolotl",
            "axolotl train axolotl.yaml --launcher torchrun -- --standalone --nproc-per-node=2",
        ),
        ("ms-swift", "swift sft swift.yaml"),
    ],
)
def test_the_script_starts_the_tool_with_what_it_is_given(
    tool: str, started: str, exported_runs: Path, tmp_path: Path
) -> None:
    directory = exported_runs / tool
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in PROGRAMS:
        program = programs / name
        program.write_text(
            "#!/bin/sh\n"
            f'echo "{name} $*" > {programs}/started\npwd > {programs}/place\nenv > {programs}/env\n'
        )
        program.chmod(0o700)

    subprocess.run(
        ["bash", directory / "run.sh", "--more", "a b"],
        cwd=tmp_path,
        env={"PATH": f"{programs}:{os.environ['PATH']}"},
        check=True,
    )

    words = (programs / "started").read_text().strip()
    assert words == f"{started.format(here=directory)} --more a b"
    place = Path((programs / "place").read_text().strip())
    assert place == (tmp_path if tool == "accelerate" else directory)
    environment = (programs / "env").read_text()
    assert "DS_ACCELERATOR=cpu" in environment
    if tool == "llama-factory":
        assert "FORCE_TORCHRUN=1" in environment
        assert "NPROC_PER_NODE=2" in environment


def test_what_is_there_is_not_overwritten(run_dir: RunDir, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()

    with pytest.raises(UsageError, match="is there already"):
        export_run(run_dir, "accelerate", tmp_path / "mine")


def test_only_a_tuned_run_is_exported(tmp_path: Path) -> None:
    with pytest.raises(InputMissingError, match="no tuned run"):
        export_run(RunDir(tmp_path), "trl", None)


def test_a_failed_export_leaves_nothing(run_dir: RunDir, tmp_path: Path) -> None:
    (run_dir.dataset / "meta.json").unlink()

    with pytest.raises(InputMissingError):
        export_run(run_dir, "trl", tmp_path / "there")

    assert not list(tmp_path.glob("*there*"))


def test_the_command_answers_in_json(run_dir: RunDir, tmp_path: Path) -> None:
    done = autotune("export", run_dir.root, "--to", "accelerate", "--json", cwd=tmp_path)

    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["tool"] == "accelerate"
    assert Path(answer["directory"], "accelerate.yaml").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("zero_stage", "method"),
    [
        (3, "full"),
        pytest.param(1, "lora", marks=pytest.mark.long),
        pytest.param(1, "full", marks=pytest.mark.long),
        pytest.param(3, "lora", marks=pytest.mark.long),
    ],
)
def test_the_script_trains_without_autotune(
    method: str, zero_stage: int, model_dir: Path, tmp_path: Path
) -> None:
    data = write_rows(tmp_path / "data.jsonl", [("What?", f"It is {n}.") for n in range(32)])
    options = ["--devices", "cpu:2", "--max-steps", 3, "--global-batch-size", 8]
    options += ["--method", method, "--set", f"zero_stage={zero_stage}", "--max-probes", 1]
    options += ["--eval-share", 0.2, "--run-dir", tmp_path / "run"]
    tuned = autotune("tune", "--dataset", data, "--model", model_dir, *options, cwd=tmp_path)
    assert tuned.returncode == 0, tuned.stderr
    done = autotune("export", tmp_path / "run", "--to", "transformers", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    directory = tmp_path / "run" / "exports" / "transformers"
    # The model has none, so that it got some.
    assert (directory / "model" / "model.safetensors").exists()
    assert "autotune" not in "".join(
        line
        for line in (directory / "train.py").read_text().splitlines()
        if line.startswith(("import", "from"))
    )

    trained = subprocess.run(
        ["bash", directory / "run.sh"],
        env=script_environment(),
        text=True,
        capture_output=True,
        timeout=280,
        check=False,
    )

    assert trained.returncode == 0, trained.stderr[-3000:]
    assert trained.stdout.count("'loss'") >= 3
    weights = "adapter_model" if method == "lora" else "model"
    assert (directory / "output" / f"{weights}.safetensors").exists()


def script_environment() -> dict[str, str]:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return {**os.environ, "PATH": path}
