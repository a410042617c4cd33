"""`autotune submit`: the command that follows, as a job of a cluster."""

import importlib
import itertools
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import yaml

from autotune.cli.options import as_json, echo_json, require_dataset, resolve_options
from autotune.config import OPTIONS, Option
from autotune.errors import InputMissingError, NoUsableDeviceError, UsageError
from autotune.kubernetes import Kind, PodJob, dns_label, manifests
from autotune.rundir import write_text, writing
from autotune.sbatch import BatchJob, batch_script
from autotune.slurm import read_time_limit

_SUBMITTED = Path("runs") / "submitted"
_OF_JOBS = ("run", "tune", "train")
_SLURM, _KUBERNETES, _JOBSET = "slurm", "kubernetes", "jobset"

_WARNING_S = 300
_LONGEST_WARNING_S = 65535
"""What sbatch takes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Wish:
    """What the command line asks for, whatever the cluster is.

    Attributes:
        tasks: of an array, what each of its jobs adds to the command.
    """

    command: tuple[str, ...]
    tasks: tuple[tuple[str, ...], ...]
    name: str
    time: str | None
    warning_s: int


def _slurm_only(function: Callable[..., Any]) -> Callable[..., Any]:
    for option in (
        click.option("--partition", metavar="NAME", help="Slurm: partition [the site's default]."),
        click.option("--account", metavar="NAME", help="Slurm: account that is charged."),
        click.option("--qos", metavar="NAME", help="Slurm: quality of service."),
        click.option(
            "--sbatch",
            "sbatch_options",
            multiple=True,
            metavar="NAME[=VALUE]",
            help="Slurm: a further option of sbatch, constraint=a100 for instance; repeated.",
        ),
    ):
        function = option(function)
    return function


def _kubernetes_only(function: Callable[..., Any]) -> Callable[..., Any]:
    for option in (
        click.option("--image", metavar="IMAGE", help="Kubernetes: image with autotune in it."),
        click.option("--namespace", metavar="NAME", help="Kubernetes: where the job goes."),
        click.option(
            "--volume",
            "volumes",
            multiple=True,
            metavar="CLAIM:PATH",
            help="Kubernetes: a volume claim that every node mounts; repeated. The path of the "
            "first is the working directory.",
        ),
        click.option(
            "--max-restarts",
            type=click.IntRange(min=0),
            default=20,
            metavar="N",
            help="Kubernetes: how often all nodes are started anew [20].",
        ),
    ):
        function = option(function)
    return function


@click.command(
    name="submit",
    # Options of the command that is submitted are its own, with and without -- before it.
    context_settings={"allow_interspersed_args": False},
)
@click.option(
    "--to",
    "target",
    type=click.Choice([_SLURM, _KUBERNETES, _JOBSET]),
    default=_SLURM,
    help="Submit to Slurm, or print a manifest: a Kubeflow TrainJob with its runtime, or a JobSet.",
)
@click.option("--nodes", type=click.IntRange(min=1), default=1, metavar="N", help="Nodes [1].")
@click.option("--gpus-per-node", type=click.IntRange(min=1), metavar="N", help="GPUs of each node.")
@click.option("--cpus-per-node", type=click.IntRange(min=1), metavar="N", help="CPUs of each node.")
@click.option("--memory-per-node", metavar="SIZE", help="Host memory of each node, as the cluster "
              "writes it: 200G in Slurm, 200Gi in Kubernetes.")  # fmt: skip
@click.option(
    "--time", "time", metavar="TIME", help="Time limit: 12:00:00, 1-12:00:00, or minutes."
)
@click.option(
    "--warning",
    "warning_s",
    type=click.IntRange(min=1, max=_LONGEST_WARNING_S),
    default=_WARNING_S,
    metavar="SECONDS",
    help="How long before its end a job is told to save its state [300].",
)
@click.option("--job-name", metavar="NAME", help="Name of the job [by dataset and model].")
@click.option(
    "--array",
    multiple=True,
    metavar="OPTION=VALUE",
    help="A job for each value of an option of the command, dataset=a.jsonl or model=NAME for "
    "instance; repeated, of several options all combinations.",
)
@_slurm_only
@_kubernetes_only
@click.option("--dry-run", is_flag=True, help="Print what would be submitted, and submit nothing.")
@as_json
@click.argument("words", nargs=-1, type=click.UNPROCESSED, metavar="-- COMMAND [ARGUMENTS]...")
def command(
    target: str,
    *,
    dry_run: bool,
    as_json: bool,
    words: tuple[str, ...],
    **asked: Any,  # noqa: ANN401
) -> None:
    """Submit `run`, `tune` or `train` as a job that saves its state before its time is over."""
    wish = _read(words, asked, here=target == _SLURM)
    if target != _SLURM:
        _print_manifests("trainjob" if target == _KUBERNETES else "jobset", wish, asked, as_json)
        return
    _refuse(asked, ("image", "namespace", "volumes"), "--to kubernetes")
    log = f"{_SUBMITTED / _file_name(wish.name)}-{'%A_%a' if wish.tasks else '%j'}.log"
    script = _script(wish, asked, log)
    document: dict[str, Any] = {"schema": 1, "job_id": None, "log": log, "script": script}
    if not dry_run:
        path = _SUBMITTED / f"{_file_name(wish.name)}.sbatch"
        document |= {"job_id": _submit(path, script), "script_file": str(path)}
    if as_json:
        echo_json(document)
    elif dry_run:
        click.echo(script, nl=False)
    else:
        click.echo(f"submitted job {document['job_id']}: {document['script_file']}, log {log}")


def _read(words: tuple[str, ...], asked: Mapping[str, Any], *, here: bool) -> _Wish:
    """Check the command as far as it can be before it runs, so that no job waits to fail.

    Files are looked for where the job will see the same ones.
    """
    if not words or words[0] not in _OF_JOBS:
        what = f"{words[0]!r} is no command of a job" if words else "there is nothing to submit"
        msg = f"{what}: write one of {', '.join(_OF_JOBS)} behind --, with its options"
        raise UsageError(msg)
    tasks = _tasks(asked["array"], words)
    names = {_checked(words[0], [*words[1:], *task], here=here) for task in tasks or [()]}
    warning_s, limit_s = asked["warning_s"], _limit_s(asked["time"])
    if limit_s is not None and limit_s <= warning_s:
        msg = f"--time {asked['time']} leaves nothing before the --warning of {warning_s} s"
        raise UsageError(msg)
    return _Wish(
        command=words,
        tasks=tasks,
        name=asked["job_name"] or ("autotune-array" if len(names) > 1 else names.pop()),
        time=asked["time"],
        warning_s=warning_s,
    )


def _limit_s(time: str | None) -> int | None:
    try:
        return None if time is None else read_time_limit(time)
    except ValueError as error:
        msg = f"--time: {error}"
        raise UsageError(msg) from None


def _tasks(array: Sequence[str], words: Sequence[str]) -> tuple[tuple[str, ...], ...]:
    """Return the arguments of each job of an array: every combination of the values.

    Raises:
        UsageError: an entry names no option that takes a value, or one that jobs cannot differ in.
    """
    values: dict[str, list[tuple[str, str]]] = {}
    for text in array:
        name, equals, value = text.partition("=")
        option = {one.name: one for one in OPTIONS}.get(name.strip().replace("-", "_"))
        if not equals or option is None or option.default is False:
            msg = f"--array {text!r} is no OPTION=VALUE of an option that takes a value"
            raise UsageError(msg)
        _require_apart(option, words)
        values.setdefault(option.name, []).append((option.flag, value))
    if not values:
        return ()
    return tuple(tuple(itertools.chain(*one)) for one in itertools.product(*values.values()))


def _require_apart(option: Option, words: Sequence[str]) -> None:
    if words[0] == "train":
        msg = "--array goes with run and tune: a training takes the options of its run directory"
        raise UsageError(msg)
    if any(word == option.flag or word.startswith(f"{option.flag}=") for word in words):
        msg = f"{option.flag} is in --array and in the command: leave it in one of them"
        raise UsageError(msg)
    if "--run-dir" in words or any(word.startswith("--run-dir=") for word in words):
        msg = "--run-dir is one, and every job of an --array needs its own: leave it out"
        raise UsageError(msg)


def _checked(name: str, arguments: list[str], *, here: bool) -> str:
    """Refuse a command that could not run, and return a name for its job."""
    module = importlib.import_module(f"autotune.cli.{name}")
    with module.command.make_context(f"autotune {name}", list(arguments)) as context:
        given = dict(context.params)
    if name == "train":
        return _file_name(f"autotune-{given['run_dir'].name}")
    flags = {option.name: given[option.name] for option in OPTIONS}
    if here:
        options = resolve_options(flags, given["config"])
        require_dataset(options)
        for text in options["dataset"]:
            _require_file(text)
        flags = {"dataset": options["dataset"], "model": options["model"]}
    stems = [Path(text.partition("@")[0]).stem for text in flags["dataset"] or ()]
    parts = [*stems[:1], Path(flags["model"] or "").name.removeprefix("builtin:")]
    return _file_name("-".join(["autotune", *filter(None, parts)]))


def _require_file(text: str) -> None:
    from autotune.dataset import Source

    path = Source.parse(text).path
    if not path.exists():
        msg = f"the dataset {path} is not there, so that the job could not read it"
        raise InputMissingError(msg)


def _refuse(asked: Mapping[str, Any], names: Sequence[str], whose: str) -> None:
    for name in names:
        if asked[name]:
            flag = {"sbatch_options": "sbatch", "volumes": "volume"}.get(name, name)
            msg = f"--{flag.replace('_', '-')} is for {whose}"
            raise UsageError(msg)


def _file_name(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.") or "autotune"


def _script(wish: _Wish, asked: Mapping[str, Any], log: str) -> str:
    job = BatchJob(
        name=wish.name,
        log=log,
        nodes=asked["nodes"],
        warning_s=wish.warning_s,
        gpus_per_node=asked["gpus_per_node"],
        cpus_per_node=asked["cpus_per_node"],
        memory_per_node=asked["memory_per_node"],
        time=wish.time,
        partition=asked["partition"],
        account=asked["account"],
        qos=asked["qos"],
        more=tuple(text.lstrip("-") for text in asked["sbatch_options"]),
    )
    program = str(Path(sys.executable).with_name("autotune"))
    try:
        return batch_script(job, [program, *wish.command], wish.tasks)
    except ValueError as error:
        raise UsageError(str(error)) from None


def _submit(path: Path, script: str) -> str:
    """Write the script, give it to sbatch, and return the number of the job.

    Raises:
        NoUsableDeviceError: there is no Slurm here.
        UsageError: Slurm refuses the job; the text has what it says.
    """
    sbatch = shutil.which("sbatch")
    if sbatch is None:
        msg = "sbatch is not here: submit where Slurm is, or see the script with --dry-run"
        raise NoUsableDeviceError(msg)
    with writing(path):
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    write_text(path, script, mode=0o700)
    done = subprocess.run(
        [sbatch, "--parsable", str(path)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        said = " ".join(done.stderr.split()) or f"exit code {done.returncode}"
        msg = f"Slurm refuses the job: {said}. The script is {path}"
        raise UsageError(msg)
    # Behind a semicolon is the cluster's name.
    return done.stdout.strip().partition(";")[0]


def _print_manifests(kind: Kind, wish: _Wish, asked: Mapping[str, Any], as_json: bool) -> None:  # noqa: FBT001 - one of the command's own
    """Print what `kubectl apply -f -` takes; of an array the documents of each job."""
    _refuse(asked, ("partition", "account", "qos", "sbatch_options"), "Slurm")
    if not asked["image"]:
        msg = "--image is lacking: name a container image that has autotune in it"
        raise UsageError(msg)
    documents = []
    for place, task in enumerate(wish.tasks or [()]):
        name = f"{wish.name[:30]}-{place}" if wish.tasks else wish.name
        command = ["autotune", *wish.command, *task]
        documents += manifests(kind, _pod_job(name, wish, asked), command)
    if as_json:
        echo_json({"schema": 1, "manifests": documents})
        return
    try:
        text = yaml.safe_dump_all(documents, sort_keys=False, allow_unicode=True)
        text.encode()
    except UnicodeEncodeError:
        msg = "the command has bytes that are no UTF-8, which no manifest can hold"
        raise UsageError(msg) from None
    click.echo(text, nl=False)


def _pod_job(name: str, wish: _Wish, asked: Mapping[str, Any]) -> PodJob:
    try:
        label = dns_label(name)
    except ValueError as error:
        msg = f"--job-name: {error}"
        raise UsageError(msg) from None
    volumes = tuple(map(_volume, asked["volumes"]))
    return PodJob(
        name=label,
        image=asked["image"],
        nodes=asked["nodes"],
        grace_s=wish.warning_s,
        max_restarts=asked["max_restarts"],
        namespace=asked["namespace"],
        gpus_per_node=asked["gpus_per_node"],
        cpus_per_node=asked["cpus_per_node"],
        memory_per_node=asked["memory_per_node"],
        limit_s=_limit_s(wish.time),
        volumes=volumes,
        directory=volumes[0][1] if volumes else None,
    )


def _volume(text: str) -> tuple[str, str]:
    claim, colon, path = text.partition(":")
    if not claim or not colon or not path.startswith("/"):
        msg = f"--volume {text!r} is no CLAIM:PATH with a path from the root on"
        raise UsageError(msg)
    return claim, path
