"""The script that `sbatch` takes: what is asked of Slurm, and the command that runs there."""

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass

_PLAIN = re.compile(r"[A-Za-z0-9_@%+=:,./~^!-]+")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchJob:
    """What is asked of Slurm; what is None is left to the site.

    Attributes:
        name: of the job.
        log: where output goes, as a file name pattern of sbatch.
        nodes: how many.
        warning_s: seconds before the time limit at which the job is told to save its state.
        gpus_per_node, cpus_per_node, memory_per_node: of each.
        time: limit as Slurm writes it.
        partition, account, qos: of the job.
        more: further options of sbatch, each a name, or a name and a value joined by `=`.
    """

    name: str
    log: str
    nodes: int
    warning_s: int
    gpus_per_node: int | None = None
    cpus_per_node: int | None = None
    memory_per_node: str | None = None
    time: str | None = None
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    more: tuple[str, ...] = ()


def batch_script(job: BatchJob, command: Sequence[str], tasks: Sequence[Sequence[str]] = ()) -> str:
    """Return the script that runs a command, whose state is saved before the time limit.

    Args:
        job: what is asked of Slurm.
        command: what runs on the first node; it starts what runs on the others.
        tasks: of an array, what each of its jobs adds to the command.
    """
    lines = [
        "#!/usr/bin/env bash",
        *(f"#SBATCH {directive}" for directive in _directives(job, len(tasks))),
        "# Written by `autotune submit`. After a requeue Slurm runs it from its start again, where",
        "# the same command goes on from what was saved.",
        "set -euo pipefail",
        "# What fails on one node ends the step on all of them.",
        "export SLURM_KILL_BAD_EXIT=1",
    ]
    if job.cpus_per_node is not None:
        lines += [
            "# srun does not take this over from sbatch by itself.",
            f"export SRUN_CPUS_PER_TASK={job.cpus_per_node}",
        ]
    added = ""
    if tasks:
        lines.append('case "$SLURM_ARRAY_TASK_ID" in')
        lines += [f"{place}) set -- {_words(task)} ;;" for place, task in enumerate(tasks)]
        lines.append("esac")
        added = ' "$@"'
    lines += [
        "# In place of this shell, so that the signal before the time limit reaches it.",
        f"exec {_words(command)}{added}",
    ]
    return "\n".join(lines) + "\n"


def _directives(job: BatchJob, tasks: int) -> list[str]:
    asked: list[tuple[str, object]] = [
        ("job-name", job.name),
        ("nodes", job.nodes),
        # One launcher a node, which starts the ranks there.
        ("ntasks-per-node", 1),
        ("gpus-per-node", job.gpus_per_node),
        ("cpus-per-task", job.cpus_per_node),
        ("mem", job.memory_per_node),
        ("time", job.time),
        ("partition", job.partition),
        ("account", job.account),
        ("qos", job.qos),
        ("array", f"0-{tasks - 1}" if tasks else None),
        ("signal", f"B:USR1@{job.warning_s}"),
        ("requeue", True),
        ("open-mode", "append"),
        ("output", job.log),
    ]
    directives = [
        f"--{name}" if value is True else f"--{name}={_directive_value(str(value))}"
        for name, value in asked
        if value is not None
    ]
    for option in job.more:
        name, equals, value = option.partition("=")
        directives.append(f"--{name}{equals}{_directive_value(value) if equals else ''}")
    return directives


def _directive_value(text: str) -> str:
    """Quote a value as sbatch reads it: within quotes, what a backslash stands before is itself.

    Raises:
        ValueError: it has a character that no directive can hold.
    """
    if _CONTROL.search(text):
        msg = f"{text!r} has a character that cannot be in an option of sbatch"
        raise ValueError(msg)
    if _PLAIN.fullmatch(text):
        return text
    return '"' + re.sub(r'(["\\])', r"\\\1", text) + '"'


def _words(words: Sequence[str]) -> str:
    """Quote words for bash; line breaks are written as escapes, as sbatch refuses some of them."""
    return " ".join(
        "$'" + "".join(map(_escaped, word)) + "'" if _CONTROL.search(word) else shlex.quote(word)
        for word in words
    )


def _escaped(character: str) -> str:
    if _CONTROL.match(character):
        return f"\\x{ord(character):02x}"
    return f"\\{character}" if character in "\\'" else character
