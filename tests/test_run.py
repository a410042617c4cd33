"""Whole runs of the command: real data, real DeepSpeed on two ranks, a real training."""

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import autotune, write_rows

from autotune.events import KINDS

CONTRACT = {
    "run.json",
    "hardware.json",
    "profile.json",
    "dataset.json",
    "plan.json",
    "probes.jsonl",
    "study.db",
    "logs",
    "ds_config.json",
    "launch.sh",
    "train_args.json",
    "fallbacks.json",
    "dataset",
    "training",
    "model",
    "events.jsonl",
    "status.json",
    "result.json",
    "report.html",
}
JOB = ("--devices", "2", "--global-batch-size", "16", "--max-probes", "3", "--max-steps", "6")
SMALL = (*JOB, "--no-cache")
LIMIT_S = 280


def read(path: Path) -> Any:  # noqa: ANN401 - JSON
    return json.loads(path.read_text())


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def losses(metrics: Path) -> list[float]:
    return [line["loss"] for line in lines(metrics)]


@pytest.fixture(scope="module")
def command(short_rows: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str | Path]:
    # Rows that no other test has had tokenised: what is stored already is passed over.
    data = write_rows(tmp_path_factory.mktemp("own") / "short.jsonl", [("Whose rows?", "Mine.")])
    data.write_bytes(data.read_bytes() + short_rows.read_bytes())
    return ["run", "--dataset", data, "--run-dir", "the run's directory", *SMALL]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("run")


@pytest.fixture(scope="module")
def run_dir(workplace: Path, command: list[str | Path]) -> Path:
    """Return the directory of a run that is through; a space and a quote are in its name."""
    done = autotune(*command, "--json", cwd=workplace, timeout=LIMIT_S)
    assert done.returncode == 0, done.stderr
    root = workplace / "the run's directory"
    assert json.loads(done.stdout) == read(root / "result.json")
    return root


def test_every_file_of_the_contract_is_there(run_dir: Path) -> None:
    assert {path.name for path in run_dir.iterdir()} >= CONTRACT


def test_the_report_says_that_it_is_done(run_dir: Path) -> None:
    assert "Tuned and trained" in (run_dir / "report.html").read_text()


def test_every_setting_of_the_plan_keeps_the_global_batch(run_dir: Path) -> None:
    settings = [entry["setting"] for entry in read(run_dir / "plan.json")["settings"]]

    assert len(settings) > 10
    for setting in settings:
        assert setting["micro_batch_size"] * setting["gradient_accumulation_steps"] * 2 == 16


def test_every_rung_is_a_line_and_the_default_is_the_first(run_dir: Path) -> None:
    rungs = lines(run_dir / "probes.jsonl")

    first = rungs[0]
    assert (first["micro_batch_size"], first["structure"]["zero_stage"]) == (1, 0)
    assert first["structure"]["checkpointing"] == "none"
    for rung in rungs:
        assert rung["ranks"] == 2
        assert rung["outcome"]["kind"] == "measured"
        assert rung["outcome"]["tokens_per_s"] > 0
        assert rung["outcome"]["peak_bytes"] > 2**20
    tried = [(str(rung["structure"]), rung["micro_batch_size"]) for rung in rungs]
    assert len(tried) == len(set(tried))


def test_the_result_says_what_was_chosen_and_gained(run_dir: Path) -> None:
    result = read(run_dir / "result.json")
    speeds = [rung["outcome"]["tokens_per_s"] for rung in lines(run_dir / "probes.jsonl")]

    assert (result["exit_reason"], result["exit_code"]) == ("trained", 0)
    assert result["tokens_per_s"] == max(speeds)
    assert result["gain_over_default"] == pytest.approx(max(speeds) / speeds[0])
    assert result["gain_over_default"] >= 1
    memory = result["memory"]
    assert 0 < memory["measured_bytes"] < memory["budget_bytes"]
    assert memory["predicted_bytes"] == pytest.approx(memory["measured_bytes"], rel=0.5)
    assert result["tuning_seconds"] > 0
    assert result["training_seconds"] > 0
    assert read(run_dir / "status.json")["phase"] == "done"


def test_events_tell_what_happened_and_the_status_follows(run_dir: Path) -> None:
    events = lines(run_dir / "events.jsonl")
    kinds = [event["event"] for event in events]

    assert (kinds[0], kinds[-1]) == ("run_started", "run_ended")
    phases = [event["phase"] for event in events if event["event"] == "phase"]
    assert phases == ["detect", "profile", "tune", "emit", "train"]
    assert set(kinds) <= set(KINDS)
    assert kinds.count("rung") == len(lines(run_dir / "probes.jsonl"))
    assert kinds.count("probe_started") == kinds.count("probe_ended") >= 3
    assert kinds.count("step") == 6
    assert "checkpoint" in kinds
    over = {event["what"] for event in events if event["event"] == "progress"}
    assert over >= {"data", "ops", "model"}
    told = [event for event in events if event["event"] == "chosen"]
    assert [event["setting"] for event in told] == [read(run_dir / "result.json")["setting"]]
    status = read(run_dir / "status.json")
    assert (status["exit_code"], status["exit_reason"]) == (0, "trained")
    assert status["training"]["step"] == 6


def test_the_training_lowers_the_loss(run_dir: Path) -> None:
    training = read(run_dir / "result.json")["training"]

    assert training["steps"] == 6
    assert training["loss_end"] < training["loss_start"]
    assert losses(run_dir / "training" / "metrics.jsonl")[-1] == training["loss_end"]


def test_the_emitted_config_is_the_chosen_setting_in_literal_values(run_dir: Path) -> None:
    config = read(run_dir / "ds_config.json")
    setting = read(run_dir / "result.json")["setting"]

    assert config["train_batch_size"] == 16
    assert config["train_micro_batch_size_per_gpu"] == setting["micro_batch_size"]
    assert config["gradient_accumulation_steps"] == setting["gradient_accumulation_steps"]
    assert config["zero_optimization"]["stage"] == setting["zero_stage"]
    text = (run_dir / "ds_config.json").read_text()
    assert '"auto"' not in text
    assert "autotuning" not in text


def test_everything_is_private_to_the_user(run_dir: Path) -> None:
    open_to_others = [
        path for path in [run_dir, *run_dir.rglob("*")] if path.stat().st_mode & 0o077
    ]

    assert open_to_others == []


def test_the_model_loads_with_its_tokenizer_and_generates(run_dir: Path, tmp_path: Path) -> None:
    program = (
        "import sys\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])\n"
        "chat = [{'role': 'user', 'content': 'What is 3 plus 3?'}]\n"
        "batch = tokenizer.apply_chat_template(\n"
        "    chat, add_generation_prompt=True, return_tensors='pt', return_dict=True)\n"
        "tokens = model.generate(**batch, max_new_tokens=4, do_sample=False)\n"
        "assert tokens.shape[1] > batch['input_ids'].shape[1]\n"
    )

    done = subprocess.run(
        [sys.executable, "-c", program, run_dir / "model"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )

    assert done.returncode == 0, done.stderr


def _children(process: psutil.Process) -> Iterator[psutil.Process]:
    try:
        yield from process.children(recursive=True)
    except psutil.NoSuchProcess:
        return


def test_the_same_command_again_is_done_at_once_and_starts_nothing(
    run_dir: Path, workplace: Path, command: list[str | Path]
) -> None:
    result, logs = read(run_dir / "result.json"), sorted(run_dir.rglob("*.log"))
    started = time.monotonic()
    seen: set[int] = set()

    again = subprocess.Popen(
        [Path(sys.executable).parent / "autotune", *map(str, command), "--json"],
        cwd=workplace,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while again.poll() is None:
        seen |= {child.pid for child in _children(psutil.Process(again.pid))}
        time.sleep(0.01)
    stdout, stderr = again.communicate()

    assert again.returncode == 0, stderr
    assert json.loads(stdout) == result
    assert seen == set()
    assert sorted(run_dir.rglob("*.log")) == logs
    assert time.monotonic() - started < 20


def test_another_question_is_refused_in_the_same_directory(
    run_dir: Path, workplace: Path, command: list[str | Path]
) -> None:
    result = read(run_dir / "result.json")

    done = autotune(*command, "--seed", 7, cwd=workplace)

    assert done.returncode == 2
    assert "--run-dir" in done.stderr.splitlines()[-1]
    assert read(run_dir / "result.json") == result


def test_launched_by_hand_it_trains_the_same_steps(run_dir: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        ["/bin/bash", run_dir / "launch.sh"],
        cwd=tmp_path,
        env={"PATH": "/usr/bin:/bin", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
        timeout=LIMIT_S,
    )

    assert done.returncode == 0, done.stderr
    by_hand = losses(run_dir / "by-hand" / "metrics.jsonl")
    assert by_hand == pytest.approx(losses(run_dir / "training" / "metrics.jsonl"), abs=1e-4)
    assert (run_dir / "by-hand" / "model" / "model.safetensors").exists()


@pytest.fixture(scope="module")
def long_rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return 16 rows of some 300 tokens, of which activations are most of the memory."""
    pairs = [
        (f"Count on from {first}.", " ".join(map(str, range(first, first + 110))))
        for first in range(100, 116)
    ]
    return write_rows(tmp_path_factory.mktemp("data") / "long.jsonl", pairs)


@pytest.mark.slow
def test_with_a_cap_that_half_of_the_ladder_exceeds_it_runs_within_the_cap(
    tmp_path: Path, long_rows: Path
) -> None:
    job = ("--dataset", long_rows, "--devices", 2, "--global-batch-size", 16)
    plan = json.loads(autotune("plan", *job, "--json", cwd=tmp_path).stdout)
    plain = {
        entry["setting"]["micro_batch_size"]: entry["memory"]["device_bytes"]
        for entry in plan["settings"]
        if (entry["setting"]["zero_stage"], entry["setting"]["checkpointing"]) == (0, "none")
    }
    cap = (plain[2] + plain[4]) // 2

    done = autotune(
        *("run", *job, "--device-memory", cap, "--max-probes", 2, "--max-steps", 2),
        *("--run-dir", "run"),
        cwd=tmp_path,
        timeout=LIMIT_S,
    )

    assert done.returncode == 0, done.stderr
    rungs = lines(tmp_path / "run" / "probes.jsonl")
    kinds = {rung["outcome"]["kind"] for rung in rungs}
    result = read(tmp_path / "run" / "result.json")
    assert kinds == {"measured", "out_of_memory"}
    assert result["memory"]["measured_bytes"] <= cap
    assert result["training"]["steps"] == 2
    chosen = [
        rung["outcome"]["kind"]
        for rung in rungs
        if rung["structure"].items() <= result["setting"].items()
        and rung["micro_batch_size"] == result["setting"]["micro_batch_size"]
    ]
    assert chosen == ["measured"]


@pytest.mark.slow
def test_a_second_run_of_the_job_begins_with_what_the_first_has_found(
    tmp_path: Path, short_rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AUTOTUNE_CACHE", str(tmp_path / "cache"))
    for name in ("first", "second"):
        done = autotune(
            *("tune", "--dataset", short_rows, *JOB, "--run-dir", name),
            cwd=tmp_path,
            timeout=LIMIT_S,
        )
        assert done.returncode == 0, done.stderr

    before, after = (lines(tmp_path / name / "probes.jsonl") for name in ("first", "second"))
    taken_over = [rung for rung in after if rung["outcome"]["cached"]]
    own = [rung for rung in after if not rung["outcome"]["cached"]]
    assert [rung["at"] for rung in taken_over] == [rung["at"] for rung in before]
    assert own[0]["outcome"]["purpose"] == "verification"
    best = max(before, key=lambda rung: rung["outcome"]["tokens_per_s"])
    assert own[0]["structure"] == best["structure"]
    assert own[0]["micro_batch_size"] == best["micro_batch_size"]


def test_where_nothing_fits_the_shortfall_is_told(tmp_path: Path, short_rows: Path) -> None:
    done = autotune(
        *("run", "--dataset", short_rows, *SMALL, "--device-memory", "20MiB", "--run-dir", "run"),
        cwd=tmp_path,
    )

    assert done.returncode == 71
    assert "20.0 MiB are there" in done.stderr.splitlines()[-1]
    assert read(tmp_path / "run" / "result.json")["exit_code"] == 71
    assert read(tmp_path / "run" / "status.json")["phase"] == "stopped"
    assert "Failed: nothing fits the devices" in (tmp_path / "run" / "report.html").read_text()


@pytest.mark.slow
def test_what_was_tuned_is_trained_later_from_another_directory(
    tmp_path: Path, short_rows: Path
) -> None:
    (tmp_path / "data.jsonl").write_bytes(short_rows.read_bytes())
    tune = ("tune", "--dataset", "data.jsonl", *SMALL)
    (tmp_path / "elsewhere").mkdir()

    tuned = autotune(*tune, cwd=tmp_path, timeout=LIMIT_S)
    again = autotune(*tune, cwd=tmp_path, timeout=LIMIT_S)

    assert tuned.returncode == 0, tuned.stderr
    assert (again.returncode, again.stdout) == (0, tuned.stdout)
    (run_dir,) = (tmp_path / "runs").iterdir()
    assert run_dir.name.startswith("data-glm-tiny-")
    assert read(run_dir / "result.json")["exit_reason"] == "tuned"
    emitted = (run_dir / "ds_config.json").read_bytes()
    probes = (run_dir / "probes.jsonl").read_bytes()
    trained = autotune("train", run_dir, cwd=tmp_path / "elsewhere", timeout=LIMIT_S)
    assert trained.returncode == 0, trained.stderr
    assert read(run_dir / "result.json")["training"]["steps"] == 6
    assert (run_dir / "ds_config.json").read_bytes() == emitted
    assert (run_dir / "probes.jsonl").read_bytes() == probes
    assert (run_dir / "model" / "model.safetensors").exists()


@pytest.fixture
def tuned(run_dir: Path, tmp_path: Path) -> Path:
    """Return a copy of the run that was tuned and has not been trained yet."""
    copy = tmp_path / "tuned"
    shutil.copytree(run_dir, copy, ignore=shutil.ignore_patterns("training", "model", "by-hand"))
    result = read(copy / "result.json")
    (copy / "result.json").write_text(json.dumps(result | {"exit_reason": "tuned"}))
    return copy


@pytest.mark.slow
def test_a_training_that_fails_exits_72_and_goes_on_when_mended(tuned: Path) -> None:
    train_args = (tuned / "train_args.json").read_text()
    (tuned / "train_args.json").write_text(train_args.replace('"dataset"', '"nowhere"'))

    failed = autotune("train", tuned, cwd=tuned, timeout=LIMIT_S)

    result = read(tuned / "result.json")
    assert failed.returncode == 72
    assert "nowhere" in result["message"]
    assert (result["exit_code"], result["exit_reason"]) == (72, "TrainingFailedError")
    assert read(tuned / "status.json")["phase"] == "stopped"
    (tuned / "train_args.json").write_text(train_args)
    assert autotune("train", tuned, cwd=tuned, timeout=LIMIT_S).returncode == 0
    assert read(tuned / "result.json")["exit_reason"] == "trained"


@pytest.mark.slow
@pytest.mark.parametrize(
    "zero_stage", [*(pytest.param(stage, marks=pytest.mark.long) for stage in (0, 2)), 3]
)
def test_a_checkpoint_that_was_cut_short_is_passed_over(tuned: Path, zero_stage: int) -> None:
    config = read(tuned / "ds_config.json")
    config["zero_optimization"]["stage"] = zero_stage
    (tuned / "ds_config.json").write_text(json.dumps(config))
    tuned_result = (tuned / "result.json").read_text()
    assert autotune("train", tuned, cwd=tuned, timeout=LIMIT_S).returncode == 0
    metrics = tuned / "training" / "metrics.jsonl"
    uninterrupted = losses(metrics)
    last = tuned / "training" / "checkpoint-6"
    (last / "complete").unlink()
    (last / "trainer_state.json").write_text("")
    (tuned / "result.json").write_text(tuned_result)

    done = autotune("train", tuned, cwd=tuned, timeout=LIMIT_S)

    assert done.returncode == 0, done.stderr
    assert "step 6/6" in done.stderr
    assert "step 1/6" not in done.stderr
    assert losses(metrics) == pytest.approx(uninterrupted, abs=1e-3)
