"""The command as a user types it: options, errors and their exit codes, JSON on stdout."""

import importlib
import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from conftest import autotune

from autotune import builtin
from autotune.cli import COMMANDS

if TYPE_CHECKING:
    import click

DATA_OPTIONS = {
    "--format",
    "--map",
    "--train-on-prompt",
    "--on-bad-line",
    "--max-bad-lines",
    "--overlong",
    "--packing",
}
JOB_OPTIONS = DATA_OPTIONS | {
    "--model",
    "--dataset",
    "--run-dir",
    "--method",
    "--lora-rank",
    "--lora-alpha",
    "--lora-dropout",
    "--lora-targets",
    "--merge",
    "--precision",
    "--global-batch-size",
    "--max-seq-length",
    "--epochs",
    "--max-steps",
    "--optimizer",
    "--learning-rate",
    "--lr-scheduler",
    "--warmup-ratio",
    "--weight-decay",
    "--max-grad-norm",
    "--seed",
    "--devices",
    "--device-memory",
    "--set",
    "--ds-config",
    "--max-probes",
    "--tune-budget",
    "--sampler",
    "--no-cache",
    "--eval-share",
    "--save-every",
    "--trainer",
    "--strict-handoff",
    "--trust-remote-code",
    "--nvme-path",
    "--storage",
    "--on-event",
    "--config",
    "--json",
}
SCRIPT_OPTIONS = {"--script", "--arg-map", "script_arguments"}
OPTIONS = {
    "run": JOB_OPTIONS | SCRIPT_OPTIONS | {"--dry-run", "--quiet"},
    "tune": JOB_OPTIONS | SCRIPT_OPTIONS | {"--dry-run", "--quiet"},
    "train": {"run_dir", "--dry-run", "--quiet", "--json"},
    "status": {"run_dir", "--watch", "--json"},
    "plan": JOB_OPTIONS
    | {
        *("--seq-length", "--rows", "--all", "--exact", "--gpus", "--nodes", "--node-network"),
        *("--matrix", "--counts", "--price-per-gpu-hour"),
    },
    "estimate": JOB_OPTIONS
    | {
        *("--micro-batch-size", "--zero-stage", "--offload-optimizer", "--offload-param"),
        *("--checkpointing", "--attention", "--seq-length", "--exact", "--gpus", "--nodes"),
        "--node-network",
    },
    "report": {"run_dir", "--open", "--json"},
    "explain": {"run_dir", "--json"},
    "compare": {"run_a", "run_b", "--json"},
    "dashboard": {"run_dir", "--host", "--port"},
    "rehearse": JOB_OPTIONS
    | {"--seq-length", "--rows", "--noise", "--gpus", "--nodes", "--node-network"},
    "export": {"run_dir", "--to", "--output", "--json"},
    "submit": {
        *("words", "--to", "--dry-run", "--json", "--array", "--job-name", "--sbatch"),
        *("--nodes", "--gpus-per-node", "--cpus-per-node", "--memory-per-node", "--time"),
        *("--partition", "--account", "--qos", "--warning"),
        *("--image", "--namespace", "--volume", "--max-restarts"),
    },
    "data": DATA_OPTIONS
    | {
        *("files", "--model", "--max-seq-length", "--trust-remote-code"),
        *("--show", "--config", "--json"),
    },
    "detect": {"--devices", "--device-memory", "--bench", "--no-cache", "--json"},
    "doctor": {"--devices", "--device-memory", "--run-dir", "--no-build", "--json"},
}
"""Commands and options are used from scripts: what is in here stays."""

TWO_RANKS = ("--devices", "2")


@pytest.fixture(scope="module", autouse=True)
def plan_document(tmp_path_factory: pytest.TempPathFactory, short_rows: Path) -> dict[str, Any]:
    """Return what `plan --json` says; it fills the cache for the calls that follow."""
    done = autotune(
        *("plan", "--dataset", short_rows, *TWO_RANKS, "--global-batch-size", 16, "--json"),
        cwd=tmp_path_factory.mktemp("plan"),
    )
    assert done.returncode == 0, done.stderr
    document: dict[str, Any] = json.loads(done.stdout)
    return document


def refused(done: "subprocess.CompletedProcess[str]", exit_code: int) -> str:
    """Check that a command ended with one sentence on stderr, the last line; returns it."""
    lines = done.stderr.splitlines()
    sentences = [line for line in lines if line.startswith(("autotune: ", "Error: "))]
    assert done.returncode == exit_code, done.stderr
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    assert sentences == lines[-1:], done.stderr
    return sentences[0]


def model_directory(path: Path, **changes: object) -> Path:
    """Copy the demo model and change its configuration."""
    shutil.copytree(builtin.directory("glm-tiny"), path)
    config = path / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | changes))
    return path


def test_commands_and_options_are_those_that_scripts_use() -> None:
    found = {}
    for name in COMMANDS:
        command: click.Command = importlib.import_module(f"autotune.cli.{name}").command
        found[name] = {parameter.opts[0] for parameter in command.params}

    assert found == OPTIONS


@pytest.mark.parametrize("command", ["", *OPTIONS])
def test_help_loads_no_heavy_library(command: str) -> None:
    program = (
        "import sys\n"
        "from autotune.cli import main\n"
        "try:\n    main()\nexcept SystemExit as end:\n    code = end.code\n"
        "heavy = {'torch', 'transformers', 'deepspeed', 'optuna', 'numpy'} & set(sys.modules)\n"
        "sys.exit(f'loaded {heavy}' if heavy else code)"
    )
    arguments = [command, "--help"] if command else ["--help"]

    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=False
    )

    assert done.returncode == 0, done.stderr
    assert "Usage:" in done.stdout


def test_help_takes_at_most_three_times_an_import_of_click(tmp_path: Path) -> None:
    def quickest(*argv: str) -> float:
        seconds = []
        for _ in range(7):
            started = time.perf_counter()
            subprocess.run([sys.executable, *argv], cwd=tmp_path, capture_output=True, check=True)
            seconds.append(time.perf_counter() - started)
        return min(seconds)

    click_s = quickest("-c", "import click")
    help_s = quickest("-c", "from autotune.cli import main; main()", "--help")

    assert help_s <= 3 * click_s


def test_version_is_printed(tmp_path: Path) -> None:
    done = autotune("--version", cwd=tmp_path)

    assert re.fullmatch(r"autotune, version \d+\.\d+\S*\n", done.stdout)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["run", "--nonsense"], "--nonsense"),
        (["nonsense"], "nonsense"),
        (["run", "--devices", "0"], "at least 1"),
        (["run", "--devices", "many"], "cpu:N"),
        (["run", "--learning-rate", "-1"], "-1"),
        (["run", "--learning-rate", "nan"], "nan"),
        (["run", "--epochs", "0"], "above zero"),
        (["run", "--max-steps", "1.5"], "whole number"),
        (["run", "--max-steps", "inf"], "inf"),
        (["run", "--seed", "nan"], "nan"),
        (["run", "--tune-budget", "soon"], "soon"),
        (["run", "--device-memory", "much"], "much"),
        (["run", "--device-memory", "0"], "0"),
        (["run", "--precision", "int8"], "bf16"),
        (["run", "--method", "magic"], "full"),
        (["run", "--model", "builtin:nope"], "builtin:glm-tiny"),
        (["run", "--global-batch-size", "7", *TWO_RANKS], "6 or 8"),
        (["run", "--global-batch-size", "1", *TWO_RANKS], "--global-batch-size 2"),
        (["run", "--max-seq-length", "100000"], "--max-seq-length 100000"),
        (["plan", "--seq-length", "0"], "0"),
        (["train"], "RUN_DIR"),
    ],
    ids=" ".join,
)
def test_an_option_that_cannot_be_meant_exits_2(
    tmp_path: Path, short_rows: Path, arguments: list[str], says: str
) -> None:
    dataset = ["--dataset", short_rows] if arguments[0] == "run" else []

    done = autotune(*arguments, *dataset, cwd=tmp_path)

    assert says in refused(done, 2)


def test_a_run_without_a_dataset_exits_2(tmp_path: Path) -> None:
    assert "--dataset" in refused(autotune("run", cwd=tmp_path), 2)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        pytest.param(b"", "holds no rows", id="empty"),
        pytest.param(b"\xff\xfe\n", "byte 0xff", id="not UTF-8"),
    ],
)
def test_data_that_cannot_be_used_exits_65(tmp_path: Path, content: bytes, says: str) -> None:
    (tmp_path / "data.jsonl").write_bytes(content)

    sentence = refused(autotune("run", "--dataset", "data.jsonl", cwd=tmp_path), 65)

    assert "data.jsonl" in sentence
    assert says in sentence


def test_invalid_json_on_line_7_is_named(tmp_path: Path, short_rows: Path) -> None:
    lines = short_rows.read_text().splitlines()
    lines[6] = lines[6][:-1]
    (tmp_path / "data.jsonl").write_text("\n".join(lines))

    sentence = refused(autotune("run", "--dataset", "data.jsonl", cwd=tmp_path), 65)

    assert "data.jsonl, line 7 (" in sentence


def test_a_missing_dataset_exits_66(tmp_path: Path) -> None:
    done = autotune("run", "--dataset", "nowhere.jsonl", cwd=tmp_path)

    assert "nowhere.jsonl" in refused(done, 66)


def test_a_directory_as_dataset_exits_66(tmp_path: Path) -> None:
    done = autotune("run", "--dataset", ".", cwd=tmp_path)

    assert "directory" in refused(done, 66)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        pytest.param(b"epocs: 2\n", "'epochs'", id="an unknown key names the nearest"),
        pytest.param(b"epochs: [1\n", "options.yaml", id="no YAML"),
        pytest.param(b"\xff\n", "options.yaml", id="no UTF-8"),
        pytest.param(b"- epochs\n", "mapping", id="a list"),
        pytest.param(b"epochs: many\n", "'many'", id="no number"),
        pytest.param(b"tune_budget: soon\n", "'soon'", id="no duration"),
        pytest.param(b"max_steps: .inf\n", "max_steps", id="infinite steps"),
        pytest.param(b"seed: .nan\n", "seed", id="no seed"),
        pytest.param(b"trust_remote_code: 1\n", "trust_remote_code", id="no flag"),
        pytest.param(b"1: 2\n", "1", id="a number as key"),
    ],
)
def test_a_configuration_file_that_cannot_be_meant_exits_78(
    tmp_path: Path, short_rows: Path, content: bytes, says: str
) -> None:
    (tmp_path / "options.yaml").write_bytes(content)

    done = autotune("run", "--dataset", short_rows, "--config", "options.yaml", cwd=tmp_path)

    assert says in refused(done, 78)


def test_a_missing_configuration_file_exits_66(tmp_path: Path) -> None:
    done = autotune("run", "--config", "nowhere.yaml", cwd=tmp_path)

    assert "nowhere.yaml" in refused(done, 66)


def test_a_model_directory_without_configuration_exits_66(tmp_path: Path, short_rows: Path) -> None:
    (tmp_path / "model").mkdir()

    done = autotune("run", "--dataset", short_rows, "--model", "model", cwd=tmp_path)

    assert "model has no config.json" in refused(done, 66)


def test_a_model_that_is_nowhere_exits_66(tmp_path: Path, short_rows: Path) -> None:
    done = autotune("run", "--dataset", short_rows, "--model", "./nowhere", cwd=tmp_path)

    assert "./nowhere" in refused(done, 66)


def test_a_model_that_transformers_cannot_build_exits_78(tmp_path: Path, short_rows: Path) -> None:
    model = model_directory(tmp_path / "model", num_attention_heads=0)

    done = autotune("run", "--dataset", short_rows, "--model", model, cwd=tmp_path)

    assert str(model) in refused(done, 78)


def test_weights_that_are_pickles_are_refused(tmp_path: Path, short_rows: Path) -> None:
    model = model_directory(tmp_path / "model")
    (model / "pytorch_model.bin").write_bytes(b"")

    done = autotune("run", "--dataset", short_rows, "--model", model, cwd=tmp_path)

    assert "safetensors" in refused(done, 78)


def test_a_run_directory_that_cannot_be_made_exits_73(tmp_path: Path, short_rows: Path) -> None:
    (tmp_path / "file").write_text("")

    done = autotune("run", "--dataset", short_rows, "--run-dir", "file/run", cwd=tmp_path)

    assert "file/run" in refused(done, 73)


def test_training_of_a_directory_that_holds_no_run_exits_66(tmp_path: Path) -> None:
    assert "autotune tune" in refused(autotune("train", ".", cwd=tmp_path), 66)


def test_the_nearer_source_of_an_option_wins(tmp_path: Path, short_rows: Path) -> None:
    (tmp_path / "autotune.yaml").write_text("seed: 1\nepochs: 3\ndevices: 2\nmax-steps: 5\n")
    (tmp_path / "options.yaml").write_text("seed: 2\nepochs: 4\n")

    done = autotune(
        *("plan", "--dataset", short_rows, "--config", "options.yaml", "--seed", 3, "--json"),
        cwd=tmp_path,
    )

    job = json.loads(done.stdout)["job"]
    assert (job["seed"], job["epochs"], job["max_steps"]) == (3, 4.0, 5)


def test_plan_json_is_one_document(plan_document: dict[str, Any]) -> None:
    assert plan_document["schema"] == 1
    assert {"model", "cluster", "job", "settings"} <= set(plan_document)
    assert plan_document["model"]["name"] == "builtin:glm-tiny"
    assert plan_document["model"]["parameters"] > 2_000_000


def test_plan_keeps_the_global_batch_in_every_setting(plan_document: dict[str, Any]) -> None:
    products = {
        entry["setting"]["micro_batch_size"]
        * entry["setting"]["gradient_accumulation_steps"]
        * plan_document["cluster"]["num_devices"]
        for entry in plan_document["settings"]
    }

    assert products == {16}


def test_plan_entries_have_the_fields_of_the_contract(plan_document: dict[str, Any]) -> None:
    parts = ("weights", "gradients", "optimizer", "activations", "logits", "buffers", "other")
    for entry in plan_document["settings"]:
        memory = entry["memory"]
        assert memory["allocated_bytes"] == sum(memory[f"{part}_bytes"] for part in parts)
        assert memory["device_bytes"] == memory["allocated_bytes"] + memory["runtime_bytes"]
        assert entry["step_time_s"] > 0
        assert entry["samples_per_s"] * entry["step_time_s"] == pytest.approx(16, rel=0.1)
        assert {"budget_bytes", "fits", "tokens_per_s", "rejected_by"} <= set(entry)


def test_plan_without_a_dataset_takes_rows_of_one_length(tmp_path: Path) -> None:
    done = autotune("plan", "--seq-length", 64, *TWO_RANKS, "--json", cwd=tmp_path)

    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["settings"]


def test_plan_exits_0_when_nothing_fits(tmp_path: Path) -> None:
    done = autotune("plan", "--seq-length", 64, "--device-memory", "8MiB", cwd=tmp_path)

    assert done.returncode == 0, done.stderr
    assert "0 settings may fit" in done.stdout


def test_detect_json_is_one_document(tmp_path: Path) -> None:
    done = autotune(
        "detect", "--json", "--devices", "cpu:2", "--device-memory", "1GiB", cwd=tmp_path
    )

    document = json.loads(done.stdout)
    assert (done.returncode, done.stderr) == (0, "")
    assert document["num_devices"] == 2
    assert document["device_memory_bytes"] == 1 << 30


def test_a_dry_run_plans_and_leaves_nothing(tmp_path: Path, short_rows: Path) -> None:
    done = autotune("run", "--dry-run", "--json", "--dataset", short_rows, *TWO_RANKS, cwd=tmp_path)

    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["settings"]
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_for_people_shows_the_settings(tmp_path: Path, short_rows: Path) -> None:
    done = autotune("run", "--dry-run", "--dataset", short_rows, *TWO_RANKS, cwd=tmp_path)

    assert done.returncode == 0, done.stderr
    assert "micro-batch" in done.stdout
    assert "\x1b" not in done.stdout + done.stderr
