"""Jobs of a cluster: the batch script and the manifests, as text and as what others make of it."""

import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import QUICKSTART, REPOSITORY, autotune
from hypothesis import given, settings
from hypothesis import strategies as st
from kubeflow_trainer_api import models

from autotune import errors
from autotune.kubernetes import FINAL_EXIT_CODES, PodJob, dns_label, manifests
from autotune.sbatch import BatchJob, batch_script

GOLDEN = Path(__file__).parent / "golden"

JOB = BatchJob(
    name="autotune-data-llama",
    log="runs/submitted/autotune-data-llama-%j.log",
    nodes=2,
    warning_s=300,
    gpus_per_node=8,
    cpus_per_node=64,
    memory_per_node="500G",
    time="12:00:00",
    partition="p",
    account="team 7",
    qos='"high"',
    more=("constraint=a100&ib", "exclusive"),
)
COMMAND = ("/opt/venv/bin/autotune", "run", "--epochs", "2")
TASKS = (
    ("--dataset", "a.jsonl", "--model", "m"),
    ("--dataset", "it's $HOME; rm -rf .jsonl", "--model", "m"),
)
hostile = st.text(
    st.characters(codec="utf-8", exclude_characters="\x00"), min_size=0, max_size=20
) | st.sampled_from(["'", '"', "$(id)", "`id`", "a\r\nb", "\\", "-n", "#SBATCH --x", "é ü", "!!"])


@pytest.mark.parametrize(
    ("name", "script"),
    [
        ("submit.sbatch", batch_script(JOB, COMMAND)),
        ("submit-array.sbatch", batch_script(JOB, COMMAND, TASKS)),
        (
            "submit-plain.sbatch",
            batch_script(BatchJob(name="n", log="n-%j.log", nodes=1, warning_s=60), COMMAND),
        ),
    ],
)
def test_the_script_is_the_golden_one(name: str, script: str) -> None:
    if os.environ.get("ACCEPT_GOLDEN"):
        (GOLDEN / name).write_text(script)
    assert script == (GOLDEN / name).read_text(), (
        f"tests/golden/{name} differs; if the change is meant, accept it with "
        "ACCEPT_GOLDEN=1 python -m pytest tests/test_submit.py -k golden"
    )


PROCESSES = settings(max_examples=15, derandomize=True, deadline=None)
"""Each example starts some."""

ECHO = [sys.executable, "-c", "import json, sys; print(json.dumps(sys.argv[1:]))"]


def said_by(script: str, tmp_path: Path, task: int | None = None) -> Any:  # noqa: ANN401 - JSON
    """Run a script as Slurm does, and return what its command was called with."""
    path = tmp_path / "script"
    path.write_text(script, newline="")
    environment = {"PATH": os.environ["PATH"]}
    if task is not None:
        environment["SLURM_ARRAY_TASK_ID"] = str(task)
    subprocess.run(["bash", "-n", str(path)], check=True)
    done = subprocess.run(
        ["bash", str(path)], env=environment, capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout)


@PROCESSES
@given(words=st.lists(hostile, max_size=5))
def test_words_reach_the_command_as_they_are(
    words: list[str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    script = batch_script(JOB, [*ECHO, *words])
    # sbatch refuses a script with DOS line breaks, and a directive is a line by itself.
    assert "\r" not in script
    assert script.count("\n#SBATCH") == 16
    assert said_by(script, tmp_path_factory.mktemp("script")) == words


@PROCESSES
@given(first=st.lists(hostile, max_size=3), second=st.lists(hostile, max_size=3))
def test_each_job_of_an_array_has_its_own_words(
    first: list[str], second: list[str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    script, place = batch_script(JOB, ECHO, [first, second]), tmp_path_factory.mktemp("script")
    assert "#SBATCH --array=0-1\n" in script
    assert said_by(script, place, task=0) == first
    assert said_by(script, place, task=1) == second


@pytest.mark.parametrize("name", ["a\nb", "a\rb", "\x1b[31m"])
def test_what_no_directive_can_hold_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="cannot be in an option of sbatch"):
        batch_script(replace(JOB, name=name), COMMAND)


PODS = PodJob(
    name="autotune-data",
    image="registry.example/autotune:1",
    nodes=2,
    grace_s=300,
    max_restarts=20,
    namespace="team",
    gpus_per_node=8,
    cpus_per_node=64,
    memory_per_node="500Gi",
    limit_s=43200,
    volumes=(("data", "/data"), ("models", "/models")),
    directory="/data",
)
MODELS = {
    "TrainingRuntime": models.TrainerV1alpha1TrainingRuntime,
    "TrainJob": models.TrainerV1alpha1TrainJob,
    "JobSet": models.JobsetV1alpha2JobSet,
}


@pytest.mark.parametrize("kind", ["trainjob", "jobset"])
@pytest.mark.parametrize(
    "job", [PODS, PodJob(name="n", image="i", nodes=1, grace_s=30, max_restarts=0)]
)
def test_manifests_are_what_the_api_has(kind: Any, job: PodJob) -> None:  # noqa: ANN401 - a Kind
    for document in manifests(kind, job, ["autotune", "run"]):
        model = MODELS[document["kind"]].from_dict(document)
        assert model is not None
        # What the API does not have is not in its model, and so would be missing here.
        assert model.to_dict() == document


def test_the_api_does_not_have_everything() -> None:
    (document,) = manifests("jobset", PODS, ["autotune"])
    document["spec"]["failurePolicy"]["maxRestart"] = 3
    model = models.JobsetV1alpha2JobSet.from_dict(document)
    assert model is not None
    assert model.to_dict() != document


def job_spec(document: dict[str, Any]) -> Any:  # noqa: ANN401 - JSON
    spec = document["spec"]
    return (spec if document["kind"] == "JobSet" else spec["template"]["spec"])["replicatedJobs"][
        0
    ]["template"]["spec"]


def test_exit_codes_say_whether_another_try_is_made() -> None:
    for document in (*manifests("jobset", PODS, ["a"]), manifests("trainjob", PODS, ["a"])[0]):
        (rule,) = job_spec(document)["podFailurePolicy"]["rules"]
        assert rule["action"] == "FailJob"
        final = set(rule["onExitCodes"]["values"])
        # Kubernetes asks for an order.
        assert rule["onExitCodes"]["values"] == sorted(final)
        assert errors.InterruptedRunError.exit_code not in final
        assert errors.NoUsableDeviceError.exit_code not in final
    every = {error.exit_code for error in vars(errors).values() if hasattr(error, "exit_code")}
    again = {errors.InterruptedRunError.exit_code, errors.NoUsableDeviceError.exit_code}
    assert set(FINAL_EXIT_CODES) == every - again


def test_every_node_knows_its_place_and_the_first_ones_name() -> None:
    (document,) = manifests("jobset", PODS, ["autotune", "run"])
    (container,) = job_spec(document)["template"]["spec"]["containers"]
    environment = {entry["name"]: entry.get("value") for entry in container["env"]}
    assert environment["PET_NNODES"] == "2"
    assert environment["PET_NPROC_PER_NODE"] == "8"
    job = document["spec"]["replicatedJobs"][0]["name"]
    assert environment["PET_MASTER_ADDR"] == f"{PODS.name}-{job}-0-0.{PODS.name}"
    assert job_spec(document)["completionMode"] == "Indexed"
    assert job_spec(document)["completions"] == job_spec(document)["parallelism"] == 2


def test_kubernetes_puts_no_variable_into_the_command() -> None:
    (document,) = manifests("jobset", PODS, ["autotune", "run", "--model", "$(PET_NNODES) $x"])
    (container,) = job_spec(document)["template"]["spec"]["containers"]
    assert container["command"][-1] == "$$(PET_NNODES) $x"


@given(st.text(max_size=80))
def test_a_name_is_made_a_dns_label(text: str) -> None:
    try:
        label = dns_label(text)
    except ValueError:
        assert not any(character in "abcdefghijklmnopqrstuvwxyz0123456789" for character in text)
        return
    assert label[0].isalpha()
    assert label[-1].isalnum()
    assert len(label) <= 40
    assert set(label) <= set("abcdefghijklmnopqrstuvwxyz0123456789-")


def test_a_dry_run_prints_the_script_and_leaves_nothing(tmp_path: Path) -> None:
    done = autotune(
        *("submit", "--nodes", 2, "--gpus-per-node", 8, "--time", "12:00:00", "--partition", "p"),
        *("--dry-run", "--", "run", "--dataset", QUICKSTART, "--epochs", 2),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    program = Path(sys.executable).with_name("autotune")
    assert done.stdout.endswith(f"exec {program} run --dataset {QUICKSTART} --epochs 2\n")
    for line in ("--nodes=2", "--gpus-per-node=8", "--time=12:00:00", "--partition=p"):
        assert f"#SBATCH {line}\n" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_an_array_has_a_job_for_each_combination(tmp_path: Path) -> None:
    for name in ("a.jsonl", "b c.jsonl"):
        (tmp_path / name).write_text("")
    done = autotune(
        *("submit", "--dry-run", "--json", "--array", "dataset=a.jsonl"),
        *("--array", "dataset=b c.jsonl", "--array", "learning-rate=1e-4"),
        *("--array", "learning-rate=2e-4", "run", "--epochs", 2),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    script = json.loads(done.stdout)["script"]
    assert "#SBATCH --array=0-3\n" in script
    assert "0) set -- --dataset a.jsonl --learning-rate 1e-4 ;;" in script
    assert "3) set -- --dataset 'b c.jsonl' --learning-rate 2e-4 ;;" in script
    assert script.endswith('run --epochs 2 "$@"\n')


def test_a_manifest_is_yaml_for_each_job_of_an_array(tmp_path: Path) -> None:
    done = autotune(
        *("submit", "--to", "kubernetes", "--image", "i:1", "--nodes", 2, "--array", "model=a"),
        *("--array", "model=b", "--", "run", "--dataset", "/data/é.jsonl"),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    documents = list(yaml.safe_load_all(done.stdout))
    assert [one["kind"] for one in documents] == ["TrainingRuntime", "TrainJob"] * 2
    commands = [one["spec"]["trainer"]["command"] for one in documents[1::2]]
    assert [one[-1] for one in commands] == ["a", "b"]
    assert commands[0][:4] == ["autotune", "run", "--dataset", "/data/é.jsonl"]
    assert len({one["metadata"]["name"] for one in documents}) == 2


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        ((), 2, "nothing to submit"),
        (("--", "plan"), 2, "'plan' is no command of a job"),
        (("run", "--epoch", "2"), 2, "--epochs"),
        (("run",), 2, "no dataset"),
        (("run", "--dataset", "gone.jsonl"), 66, "gone.jsonl is not there"),
        (("--time", "5m", "run", "--dataset", QUICKSTART), 2, "no time limit"),
        (("--time", "4", "run", "--dataset", QUICKSTART), 2, "leaves nothing before"),
        (("--array", "dataset", "run"), 2, "no OPTION=VALUE"),
        (("--array", "datasets=a", "run"), 2, "no OPTION=VALUE"),
        (("--array", "merge=true", "run"), 2, "takes a value"),
        (("--array", "model=a", "run", "--model", "b"), 2, "in one of them"),
        (("--array", "model=a", "run", "--run-dir=x"), 2, "needs its own"),
        (("--array", "epochs=0", "run", "--dataset", QUICKSTART), 2, "above zero"),
        (("--array", "model=a", "train", "runs/x"), 2, "run directory"),
        (("--image", "i", "run", "--dataset", QUICKSTART), 2, "is for --to kubernetes"),
        (("--to", "jobset", "--partition", "p", "run", "--dataset", "d"), 2, "is for Slurm"),
        (("--to", "jobset", "run", "--dataset", "d"), 2, "--image is lacking"),
        (("--to", "jobset", "--image", "i", "--volume", "a", "run", "--dataset", "d"), 2, "CLAIM"),
        (("--job-name", "a\nb", "run", "--dataset", QUICKSTART), 2, "cannot be in an option"),
    ],
)
def test_a_refusal_is_one_sentence(
    arguments: tuple[object, ...], code: int, said: str, tmp_path: Path
) -> None:
    done = autotune("submit", *arguments, cwd=tmp_path)
    assert done.returncode == code, done.stderr
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    assert list(tmp_path.iterdir()) == []


DOCUMENT = (REPOSITORY / "docs" / "submit.md").read_text()
COMMANDS = re.findall(r"^    autotune (submit (?:.*\\\n)*.*)$", DOCUMENT, re.MULTILINE)


@pytest.mark.parametrize("line", COMMANDS)
def test_the_documents_commands_are_taken(line: str, tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.jsonl", "data.jsonl"):
        (tmp_path / name).write_text("")
    words = shlex.split(line.replace("\\\n", " "))
    done = autotune("submit", "--dry-run", *words[1:], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_the_document_has_commands_for_each_cluster() -> None:
    assert len(COMMANDS) >= 3


def test_the_document_says_which_exit_codes_are_final() -> None:
    *first, last = map(str, FINAL_EXIT_CODES)
    assert f"{', '.join(first)} or {last}" in DOCUMENT


def test_without_slurm_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    done = autotune("submit", "run", "--dataset", QUICKSTART, cwd=tmp_path)
    assert done.returncode == 69
    assert "sbatch is not here" in done.stderr
    assert list(tmp_path.iterdir()) == []
