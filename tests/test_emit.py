"""What is emitted: literal values, in agreement with the trainer's, and a script that runs."""

import json
import os
import shlex
import subprocess
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from records import make_cluster, make_job, make_profile

from autotune.emit import ds_config, entry_arguments, launch_script, torchrun_command, train_spec
from autotune.hardware import Cluster
from autotune.setting import Setting, Structure
from autotune.space import enumerate_space
from autotune.workload import Job, TrainSpec

GOLDEN = Path(__file__).parent / "golden"
HOSTILE = "a 'b' \"c\" $HOME `id` \\ ; & *\n#d"

clusters = st.sampled_from(
    [
        make_cluster(cpu_ranks=1),
        make_cluster(cpu_ranks=2),
        make_cluster(gpus=1),
        make_cluster(gpus=8),
    ]
)
jobs = st.builds(
    make_job,
    precision=st.sampled_from(["bf16", "fp16", "fp32"]),
    global_batch_size=st.sampled_from([8, 24, 64]),
    learning_rate=st.floats(1e-8, 1.0),
    weight_decay=st.floats(0, 1),
    max_grad_norm=st.floats(0, 10),
    warmup_ratio=st.floats(0, 1, exclude_max=True),
    max_steps=st.none() | st.integers(1, 10**6),
)


@st.composite
def emitted(draw: st.DrawFn) -> tuple[dict[str, Any], TrainSpec, Job, Setting, Cluster]:
    job, cluster = draw(jobs), draw(clusters)
    space = enumerate_space(cluster, job.global_batch_size)
    setting = space.setting(draw(st.integers(0, len(space) - 1)))
    config = ds_config(job, setting, make_profile(), cluster)
    return config, spec_of(job, setting, cluster), job, setting, cluster


def spec_of(job: Job, setting: Setting, cluster: Cluster) -> TrainSpec:
    return train_spec(
        job,
        setting,
        cluster,
        dataset_dir="dataset",
        output_dir="training",
        model_output_dir="model",
    )


def values_and_keys(node: object) -> Iterator[object]:
    if isinstance(node, dict):
        yield from node
        for value in node.values():
            yield from values_and_keys(value)
    elif isinstance(node, list):
        for value in node:
            yield from values_and_keys(value)
    else:
        yield node


@given(emitted())
def test_the_batch_is_micro_batch_times_accumulation_times_ranks(
    made: tuple[dict[str, Any], TrainSpec, Job, Setting, Cluster],
) -> None:
    config, _, job, _, cluster = made
    assert config["train_batch_size"] == job.global_batch_size
    assert config["train_batch_size"] == (
        config["train_micro_batch_size_per_gpu"]
        * config["gradient_accumulation_steps"]
        * cluster.num_devices
    )


@given(emitted())
def test_every_value_is_literal(
    made: tuple[dict[str, Any], TrainSpec, Job, Setting, Cluster],
) -> None:
    config, spec, *_ = made
    assert json.loads(json.dumps(config, allow_nan=False)) == config
    words = set(values_and_keys(config)) | set(values_and_keys(spec.trainer))
    assert "auto" not in words
    assert "autotuning" not in words


@given(emitted())
def test_train_args_come_back_from_json(
    made: tuple[dict[str, Any], TrainSpec, Job, Setting, Cluster],
) -> None:
    spec = made[1]
    assert TrainSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec


@given(emitted())
def test_transformers_finds_no_mismatch_between_config_and_arguments(
    made: tuple[dict[str, Any], TrainSpec, Job, Setting, Cluster],
) -> None:
    from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig

    config, spec, _, _, cluster = made
    trainer = spec.trainer
    arguments = SimpleNamespace(
        **trainer,
        world_size=cluster.num_devices,
        save_on_each_node=False,
        fp16_full_eval=False,
        bf16_full_eval=False,
        get_warmup_steps=lambda steps: int(steps * trainer["warmup_steps"]),
    )
    judge = HfTrainerDeepSpeedConfig(config)
    judge.trainer_config_process(arguments)
    judge.trainer_config_finalize(arguments, None, 100)
    assert judge.mismatches == []
    assert judge.config == config


def test_a_mismatch_would_be_found() -> None:
    from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig

    setting = Structure(zero_stage=1).with_micro_batch(4, 2, 32)
    judge = HfTrainerDeepSpeedConfig(
        ds_config(make_job(), setting, make_profile(), make_cluster(gpus=2))
    )
    judge.fill_match("optimizer.params.lr", 1.0, "learning_rate")
    assert len(judge.mismatches) == 1


@given(emitted())
def test_the_trainer_gets_what_the_setting_says(
    made: tuple[dict[str, Any], TrainSpec, Job, Setting, Cluster],
) -> None:
    _, spec, job, setting, cluster = made
    assert spec.trainer["per_device_train_batch_size"] == setting.micro_batch_size
    assert spec.trainer["max_steps"] == (job.max_steps or -1)
    assert spec.trainer["data_seed"] == spec.trainer["seed"] == spec.seed == job.seed
    assert (spec.checkpointing, spec.attention) == (
        setting.structure.checkpointing,
        setting.structure.attention,
    )
    assert spec.device_memory_bytes == cluster.device_memory_bytes


@given(emitted())
def test_only_an_optimizer_that_is_offloaded_from_a_device_needs_a_compiler(
    made: tuple[dict[str, Any], TrainSpec, Job, Setting, Cluster],
) -> None:
    config, _, _, setting, cluster = made
    offloaded = setting.structure.offload_optimizer == "cpu" and cluster.kind != "cpu"
    assert config["optimizer"]["params"].get("torch_adam", False) is not offloaded


def test_stage_3_config_is_the_golden_one() -> None:
    structure = Structure(zero_stage=3, offload_optimizer="cpu", checkpointing="full")
    cluster, job = make_cluster(gpus=8), make_job(global_batch_size=64)
    setting = structure.with_micro_batch(4, 8, 64)
    files = {
        "ds_config.json": ds_config(job, setting, make_profile(), cluster),
        "train_args.json": {"schema": 1, **asdict(spec_of(job, setting, cluster))},
    }
    for name, content in files.items():
        text = json.dumps(content, indent=2) + "\n"
        if os.environ.get("ACCEPT_GOLDEN"):
            (GOLDEN / name).write_text(text)
        assert text == (GOLDEN / name).read_text(), (
            f"tests/golden/{name} differs; if the change is meant, accept it with "
            "ACCEPT_GOLDEN=1 python -m pytest tests/test_emit.py -k golden"
        )


def test_only_a_partition_of_some_ranks_is_written() -> None:
    cluster, job, profile = make_cluster(gpus=8), make_job(), make_profile()
    for group, written in ((1, None), (4, 4)):
        structure = Structure(zero_stage=3, zero_hpz_partition_size=group)
        config = ds_config(job, structure.with_micro_batch(1, 8, 32), profile, cluster)
        assert config["zero_optimization"].get("zero_hpz_partition_size") == written


@pytest.fixture
def hostile_dir(tmp_path: Path) -> Path:
    """Return a directory whose name holds what a shell would act on."""
    directory = tmp_path / HOSTILE
    directory.mkdir()
    return directory


def write_script(directory: Path, environment: dict[str, str], num_nodes: int = 1) -> Path:
    """Write launch.sh with a python beside it that only tells how it was started."""
    python = directory / "py thon"
    python.write_text(
        '#!/bin/sh\nprintf "%s\\0" "$@" > arguments\nenv -0 > environment\ntouch "started here"\n'
    )
    python.chmod(0o700)
    script = directory / "launch.sh"
    script.write_text(launch_script(str(python), 4, sorted(environment.items()), num_nodes))
    return script


def run_script(
    script: Path | str, *arguments: str, cwd: Path, environment: dict[str, str] | None = None
) -> None:
    subprocess.run(
        ["/usr/bin/env", "bash", str(script), *arguments],
        cwd=cwd,
        env={"PATH": os.defpath, **(environment or {})},
        check=True,
        capture_output=True,
    )


def test_launch_script_is_valid_bash(hostile_dir: Path) -> None:
    script = write_script(hostile_dir, {"NAME": HOSTILE})
    subprocess.run(["/usr/bin/env", "bash", "-n", str(script)], check=True)


def test_launch_script_gives_the_training_command_to_python_word_by_word(
    hostile_dir: Path, tmp_path: Path
) -> None:
    script = write_script(hostile_dir, {})
    run_script(script, "--output-dir", HOSTILE, cwd=tmp_path)
    words = (hostile_dir / "arguments").read_bytes().decode().split("\0")[:-1]
    command = torchrun_command("python", 4)[1:]
    assert words == [*command, "--output-dir", "by-hand", "--output-dir", HOSTILE]


def test_launch_script_sets_each_variable_to_the_byte(hostile_dir: Path, tmp_path: Path) -> None:
    wanted = {"HOSTILE": HOSTILE, "EMPTY": "", "PATH": f"/opt/a b:{os.defpath}"}
    run_script(write_script(hostile_dir, wanted), cwd=tmp_path)
    lines = (hostile_dir / "environment").read_bytes().decode().split("\0")[:-1]
    found = dict(line.split("=", 1) for line in lines)
    assert {name: found.get(name) for name in wanted} == wanted


def test_launch_script_works_in_its_own_directory_whatever_cdpath_says(
    hostile_dir: Path, tmp_path: Path
) -> None:
    script = write_script(hostile_dir, {})
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / hostile_dir.name).mkdir(parents=True)
    run_script(script.relative_to(tmp_path), cwd=tmp_path, environment={"CDPATH": str(elsewhere)})
    assert (hostile_dir / "started here").exists()


def test_launch_script_makes_files_for_the_user_alone(hostile_dir: Path, tmp_path: Path) -> None:
    run_script(write_script(hostile_dir, {}), cwd=tmp_path)
    assert (hostile_dir / "arguments").stat().st_mode & 0o777 == 0o600


def test_on_several_nodes_the_launch_script_is_started_once_on_each(
    hostile_dir: Path, tmp_path: Path
) -> None:
    script = write_script(hostile_dir, {}, num_nodes=2)
    nodes = {"MASTER_ADDR": "n 1", "SLURM_JOB_ID": "7"}
    run_script(script, "--resume", cwd=tmp_path, environment=nodes)
    words = (hostile_dir / "arguments").read_bytes().decode().split("\0")[:-1]
    assert {"--nnodes=2", "--nproc-per-node=2", "--rdzv-backend=c10d", "--rdzv-id=7"} <= set(words)
    assert "--rdzv-endpoint=n 1:29400" in words
    assert words[-7:] == [*entry_arguments()[-4:], "--output-dir", "by-hand", "--resume"]


def test_the_command_names_the_emitted_files_and_the_ranks() -> None:
    command = shlex.join(torchrun_command("/usr/bin/python3", 4))
    assert command.startswith("/usr/bin/python3 -m torch.distributed.run")
    assert "--nproc-per-node=4" in command
    assert command.endswith("--ds-config ds_config.json --train-args train_args.json")
