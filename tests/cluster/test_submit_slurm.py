"""Scripts and lists of nodes, held against a real Slurm: two nodes on this machine, as root."""

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from slurm_site import ask, state_of, two_nodes, wait_for

from autotune.sbatch import BatchJob, batch_script
from autotune.slurm import expand_nodelist, read_time_limit

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]

QUICKSTART = Path(__file__).parents[2] / "examples" / "quickstart" / "data.jsonl"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with two_nodes(tmp_path_factory.mktemp("slurm")) as directory:
        yield directory


def submit(*arguments: object, cwd: Path) -> "subprocess.CompletedProcess[str]":
    program = Path(sys.executable).with_name("autotune")
    return subprocess.run(
        [str(program), "submit", *map(str, arguments)],
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


numbers = st.integers(0, 130)
ranges = st.tuples(numbers, st.integers(0, 9), st.integers(1, 4)).map(
    lambda drawn: (
        f"{drawn[0]:0{drawn[2]}}-{drawn[0] + drawn[1]:0{drawn[2]}}"
        if drawn[1]
        else f"{drawn[0]:0{drawn[2]}}"
    )
)
brackets = st.lists(ranges, min_size=1, max_size=3).map(lambda parts: f"[{','.join(parts)}]")
letters = st.text("abcxyz-._019", max_size=5)
prefixes = st.builds(lambda first, rest: first + rest, st.sampled_from("abcn"), letters)
entries = st.one_of(
    prefixes,
    st.builds(lambda prefix, bracket: prefix + bracket, prefixes, brackets),
    st.builds(
        lambda prefix, first, between, second: prefix + first + between + second,
        prefixes,
        brackets,
        letters,
        brackets,
    ),
    st.builds(
        lambda prefix, one, two, three: f"{prefix}{one}n{two}m{three}",
        prefixes,
        brackets,
        brackets,
        brackets,
    ),
)
nodelists = st.builds(
    lambda parts, separator: separator.join(parts),
    st.lists(entries, min_size=1, max_size=4),
    st.sampled_from([",", ", ", " "]),
)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(nodelist=nodelists)
def test_a_list_of_nodes_is_what_scontrol_says(site: Path, nodelist: str) -> None:
    del site
    names = ask("scontrol", "show", "hostnames", nodelist, check=True).split()
    assert list(expand_nodelist(nodelist)) == names


JOB = BatchJob(
    name="submitted",
    log="out-%j.log",
    nodes=2,
    warning_s=60,
    gpus_per_node=2,
    cpus_per_node=2,
    memory_per_node="1000M",
    time="10:00",
    partition="main",
    account="team 7",
    more=('comment=it\'s "here" \\ #1 $x',),
)


def submitted(directory: Path, script: str, *options: str) -> str:
    path = directory / "job.sbatch"
    path.write_text(script, newline="")
    command = ["sbatch", "--parsable", *options, str(path)]
    done = subprocess.run(command, cwd=directory, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_slurm_takes_the_script(site: Path, tmp_path: Path) -> None:
    del site
    hostile = ["it's", '"', "$(id)", "a\r\nb", "#SBATCH --nodes=9", "\\", "é"]
    path = tmp_path / "job.sbatch"
    for tasks in ((), (hostile, ["b"])):
        path.write_text(batch_script(JOB, ["autotune", *hostile], tasks), newline="")
        subprocess.run(["bash", "-n", str(path)], check=True)
        done = subprocess.run(
            ["sbatch", "--test-only", str(path)], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        assert "to start at" in done.stderr


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    name=st.text(
        st.characters(codec="utf-8", categories=["L", "N", "P", "S", "Zs"]), min_size=1, max_size=20
    )
)
def test_a_name_reaches_slurm_as_it_is(
    site: Path, tmp_path_factory: pytest.TempPathFactory, name: str
) -> None:
    del site
    directory = tmp_path_factory.mktemp("named")
    job = submitted(directory, batch_script(replace(JOB, name=name), ["true"]), "--hold")
    seen = ask("squeue", "-h", "-j", job, "-o", "%j").removesuffix("\n")
    ask("scancel", job)
    assert seen == name


def test_what_is_asked_for_is_what_the_job_has(site: Path, tmp_path: Path) -> None:
    del site
    job = submitted(tmp_path, batch_script(JOB, ["true"]), "--hold")
    fields = dict(
        part.partition("=")[::2] for part in ask("scontrol", "show", "job", "-o", job).split()
    )
    ask("scancel", job)
    assert fields["NumNodes"] == "2-2"
    assert fields["Requeue"] == "1"
    assert fields["TimeLimit"] == "00:10:00"
    assert fields["TresPerNode"] == "gres:gpu:2"
    assert read_time_limit(fields["TimeLimit"]) == read_time_limit("10:00") == 600


ECHO = """
import json, os, signal, sys, time
def warned(number, frame):
    print("warned", flush=True)
    raise SystemExit(75)
signal.signal(signal.SIGUSR1, warned)
print(json.dumps([sys.argv[2:], os.environ.get("SLURM_RESTART_COUNT", "0")]), flush=True)
time.sleep(float(sys.argv[1]))
"""


def test_each_job_of_an_array_runs_its_own_words(site: Path, tmp_path: Path) -> None:
    del site
    tasks = [["it's $HOME"], ["a\nb", '"']]
    job = replace(JOB, log="out-%A_%a.log", nodes=1)
    number = submitted(tmp_path, batch_script(job, [sys.executable, "-c", ECHO, "0"], tasks))
    logs = [tmp_path / f"out-{number}_{place}.log" for place in range(2)]
    wait_for(lambda: all(log.exists() and log.read_text() for log in logs))
    assert [json.loads(log.read_text())[0] for log in logs] == tasks


def test_the_warning_reaches_the_command_and_a_requeue_goes_on_in_the_log(
    site: Path, tmp_path: Path
) -> None:
    del site
    number = submitted(tmp_path, batch_script(JOB, [sys.executable, "-c", ECHO, "120"]))
    log = tmp_path / f"out-{number}.log"
    wait_for(lambda: log.exists() and log.read_text().count("\n") == 1)
    ask("scontrol", "requeue", number, check=True)
    wait_for(lambda: state_of(number) == "PENDING")
    ask("scontrol", "update", f"jobid={number}", "StartTime=now", check=True)
    wait_for(lambda: '"1"' in log.read_text(), seconds=150)
    ask("scancel", "--batch", f"--signal={signal.Signals.SIGUSR1.name}", number, check=True)
    wait_for(lambda: state_of(number) in {"FAILED", ""})
    lines = log.read_text().splitlines()
    assert [json.loads(line)[1] for line in lines if line.startswith("[")] == ["0", "1"]
    assert lines[-1] == "warned"


def test_a_command_is_submitted_and_runs(site: Path, tmp_path: Path) -> None:
    del site
    job = ("--nodes", 1, "--cpus-per-node", 2, "--time", 20, "--partition", "main")
    command = ("run", "--dataset", QUICKSTART, "--devices", "cpu:2", "--dry-run")
    done = submit(*job, "--json", "--", *command, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    number = document["job_id"]
    assert Path(tmp_path, document["script_file"]).read_text() == document["script"]
    log = tmp_path / document["log"].replace("%j", number)
    wait_for(lambda: state_of(number) in {"COMPLETED", "FAILED", ""}, seconds=540)
    assert "settings may fit" in log.read_text()


def test_what_slurm_refuses_is_told(site: Path, tmp_path: Path) -> None:
    del site
    done = submit("--partition", "gone", "--", "run", "--dataset", QUICKSTART, cwd=tmp_path)
    assert done.returncode == 2
    assert "invalid partition" in done.stderr
    assert "Traceback" not in done.stderr
