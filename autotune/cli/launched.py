"""What a command does where several processes of it were started, or have to be."""

import atexit
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from autotune.errors import STOPPING, AutotuneError, InterruptedRunError, SetupFaultError
from autotune.standing import Allocated, Alone, Member, of_launchers, standing, step_command

if TYPE_CHECKING:
    from autotune.nodes.control import Nodes
    from autotune.pipeline import Run


@contextmanager
def launched(run_dir: str | Path | None) -> Iterator["Nodes"]:
    """Give the nodes to the process that controls them; every other ends here, with its code.

    In a Slurm allocation of several nodes this process becomes srun, which starts one on each.

    Raises:
        SetupFaultError: there is no srun for that.
        CannotWriteError: the processes do not see each other beside the run directory.
        click.exceptions.Exit: this was not the controller, and all is over.
    """
    from autotune.nodes.control import alone, gather

    part = standing(os.environ)
    if isinstance(part, Allocated):
        _become_step(part.nodes)
    for name in of_launchers(os.environ):
        del os.environ[name]
    if isinstance(part, Alone):
        yield alone(part.ranks)
        return
    assert isinstance(part, Member), "all standings are there"
    beside = Path(run_dir).absolute().parent if run_dir else Path("runs").absolute()
    directory = beside / f".nodes-{part.launch}"
    if part.rank:
        _follow(directory, part)
    nodes = gather(directory, part.size, part.node, part.host, part.ranks)
    code = 1
    try:
        yield nodes
        code = 0
    except (AutotuneError, InterruptedRunError, click.ClickException) as error:
        code = error.exit_code
        raise
    finally:
        # The launcher may stop this process as soon as another has ended, mpirun within a second:
        # what is done at its exit is done by then.
        for number in STOPPING:
            signal.signal(number, signal.SIG_IGN)
        atexit._run_exitfuncs()  # noqa: SLF001 - what the interpreter does first at its end
        nodes.close(code)


def _follow(directory: Path, part: Member) -> None:
    from autotune.nodes.follow import follow

    raise click.exceptions.Exit(follow(directory, part.rank, part.size, part.node))


def _become_step(nodes: int) -> None:
    if shutil.which("srun") is None:
        msg = (
            f"this Slurm job has {nodes} nodes, and there is no srun here to start a process on "
            "each: start this command with srun --ntasks-per-node=1"
        )
        raise SetupFaultError(msg)
    command = step_command(nodes, [sys.executable, *sys.argv])
    os.execvp(command[0], command)  # noqa: S606 - argv that this process was started with


@contextmanager
def within_time_limit(run: "Run") -> Iterator[None]:
    """Stop in time before the job ends, and have it start again if something was done in it."""
    from autotune.time_limit import ask_slurm, requeue, seconds_left, stopping_in_time

    before = run.progress()
    try:
        with stopping_in_time(seconds_left(time.time())):
            yield
    except InterruptedRunError as error:
        # A job that is too short for anything would be started again for ever.
        if error.warned and run.progress() != before and requeue(os.environ, ask_slurm):
            click.echo("autotune: Slurm starts this job again, which goes on from there", err=True)
        raise
