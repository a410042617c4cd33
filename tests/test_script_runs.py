"""Scripts as users have them, unedited, on two real ranks: tuned, and trained to their end."""

import json
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
from conftest import autotune
from records import make_cluster

from autotune.script.errand import ScriptErrand, shimmed
from autotune.script.launch import Script, script_environment
from autotune.script.training import TunedCommand

SCRIPTS = Path(__file__).parent / "scripts"
OPTIMIZER = {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}}
GLOBAL_BATCH = 16
"""Of each script as it is: two ranks of two rows, four micro-steps."""

FEW_PROBES = ("--devices", "2", "--max-probes", "3")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


def tuned(tmp_path: Path, script: str, *arguments: object, flags: tuple[str, ...] = ()) -> Any:  # noqa: ANN401 - JSON
    """Tune and train a script; returns its result, the files of which are held against it."""
    run_dir = tmp_path / "run"
    done = autotune(
        *("run", *FEW_PROBES, *flags, "--json", "--run-dir", run_dir),
        *("--script", SCRIPTS / script, "--", *arguments),
        cwd=tmp_path,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["exit_reason"] == "trained"
    setting = result["setting"]
    config = json.loads((run_dir / "ds_config.json").read_text())
    assert config["train_micro_batch_size_per_gpu"] == setting["micro_batch_size"]
    assert config["gradient_accumulation_steps"] == setting["gradient_accumulation_steps"]
    assert config["train_batch_size"] == result["global_batch_size"] == GLOBAL_BATCH
    assert config["zero_optimization"]["stage"] == setting["zero_stage"]
    assert "autotuning" not in config
    return result


def require_trained(result: Any, report: Path, steps: int) -> None:  # noqa: ANN401 - JSON
    """Hold what the script itself says of its training against what was tuned."""
    said = json.loads(report.read_text())
    assert said["steps"] == steps
    assert said["global_batch_size"] == GLOBAL_BATCH
    assert said["micro_batch_size"] == result["setting"]["micro_batch_size"]
    assert said["zero_stage"] == result["setting"]["zero_stage"]
    # Two micro-batch sizes at least were really measured, and the chosen one is the fastest.
    lines = (Path(result["run_dir"]) / "probes.jsonl").read_text().splitlines()
    rungs = [json.loads(line) for line in lines]
    measured = [rung for rung in rungs if rung["outcome"]["kind"] == "measured"]
    assert len(measured) >= 2
    fastest = max(measured, key=lambda rung: rung["outcome"]["samples_per_s"])
    assert fastest["micro_batch_size"] == said["micro_batch_size"]


def test_plain_deepspeed_with_a_config_of_its_autotuner(tmp_path: Path) -> None:
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 4,
        "optimizer": OPTIMIZER,
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": [1, 2]},
        "autotuning": {"enabled": True, "max_train_batch_size": 16, "fast": True},
    }
    (tmp_path / "ds.json").write_text(json.dumps(config))

    result = tuned(tmp_path, "plain.py", "--ds-config=ds.json", "--out", "done.json")

    require_trained(result, tmp_path / "done.json", 8)
    assert result["setting"]["zero_stage"] in (1, 2)
    assert any("max_train_batch_size" in note for note in result["notes"])
    assert json.loads((tmp_path / "ds.json").read_text()) == config
    # Everything is in its arguments, so that the training has no shim.
    assert "sitecustomize" not in (tmp_path / "run" / "launch.sh").read_text()
    assert not (tmp_path / "run" / "errand.json").exists()
    assert "Tuned and trained" in (tmp_path / "run" / "report.html").read_text()
    (tmp_path / "done.json").unlink()
    by_hand = subprocess.run(
        [str(tmp_path / "run" / "launch.sh")],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert by_hand.returncode == 0, by_hand.stderr
    assert "trained to the end" in by_hand.stdout
    require_trained(result, tmp_path / "done.json", 8)


def test_a_trainer_with_a_config_of_autos(tmp_path: Path) -> None:
    (tmp_path / "ds.json").write_text(
        json.dumps(
            {
                "train_batch_size": "auto",
                "train_micro_batch_size_per_gpu": "auto",
                "gradient_accumulation_steps": "auto",
                "gradient_clipping": "auto",
                "zero_optimization": {"stage": 1, "reduce_bucket_size": "auto"},
            }
        )
    )

    result = tuned(
        *(tmp_path, "trainer.py", "--deepspeed", "ds.json", "--output_dir", "out"),
        *("--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "4"),
        *("--max_steps", "8", "--save_strategy", "no", "--use_cpu", "--optim", "adamw_torch"),
    )

    require_trained(result, tmp_path / "out" / "done.json", 8)
    config = json.loads((tmp_path / "run" / "ds_config.json").read_text())
    assert config["zero_optimization"]["reduce_bucket_size"] == 64 * 64
    assert config["gradient_clipping"] == 1.0


@pytest.mark.long
def test_accelerate_with_a_plugin_of_the_scripts_own(tmp_path: Path) -> None:
    result = tuned(tmp_path, "accelerated.py", "--steps", "8", "--out", "done.json")

    require_trained(result, tmp_path / "done.json", 8)


@pytest.mark.long
def test_arguments_as_deepspeeds_examples_have_them(tmp_path: Path) -> None:
    result = tuned(
        *(tmp_path, "examples_style.py", "--per_device_train_batch_size", "2"),
        *("--gradient_accumulation_steps", "4", "--zero_stage", "2", "--deepspeed"),
        *("--output_dir", "an output"),
    )

    require_trained(result, tmp_path / "an output" / "done.json", 256 // GLOBAL_BATCH)
    arguments = json.loads((tmp_path / "run" / "train_args.json").read_text())["arguments"]
    stage = str(result["setting"]["zero_stage"])
    assert arguments[arguments.index("--zero_stage") + 1] == stage
    assert shlex.quote("an output") in (tmp_path / "run" / "launch.sh").read_text()


@pytest.mark.long
def test_a_training_is_told_what_its_arguments_do_not_carry(tmp_path: Path) -> None:
    errand = tmp_path / "errand.json"
    told = ScriptErrand(device_kind="cpu", overrides={"zero_optimization": {"stage": 3}})
    errand.write_text(json.dumps(told.to_json()))
    arguments = ("--steps", "2", "--out", "done.json", "--gradient_accumulation_steps", "1")

    TunedCommand(
        script=Script(path=SCRIPTS / "accelerated.py", directory=tmp_path, arguments=()),
        arguments=arguments,
        ranks=2,
        environment=script_environment(make_cluster(cpu_ranks=2)),
        shim=shimmed({}, errand),
        gives_local_rank=False,
    ).run()

    said = json.loads((tmp_path / "done.json").read_text())
    assert (said["steps"], said["zero_stage"]) == (2, 3)
