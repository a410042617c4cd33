"""The command line; the only part that prints or exits.

Each command is a module that is imported when the command runs, so that `--help` is instant.
"""

import importlib
import logging
import os
import signal
import sys
import traceback
from types import FrameType

import click

from autotune import __version__
from autotune.errors import STOPPING, AutotuneError, InterruptedRunError

COMMANDS = {
    "run": "Find the fastest setting that fits, and train with it.",
    "tune": "Find the fastest setting that fits, without training.",
    "train": "Train with the setting that was found; goes on from the last checkpoint.",
    "status": "Show where a run is, or watch it until it ends.",
    "plan": "Show which settings fit and how fast they may be, without probing.",
    "estimate": "Estimate memory and speed of one setting.",
    "report": "Write the report of a run and print where it is.",
    "explain": "Say why a setting was chosen, and why not the nearest others.",
    "compare": "Show two runs side by side.",
    "dashboard": "Show the study of a run in optuna-dashboard.",
    "rehearse": "Show how a search would go on hardware that need not be there.",
    "export": "Write what was tuned as the configuration of another tool.",
    "submit": "Submit a run as a job of a cluster: Slurm, or a manifest for Kubernetes.",
    "data": "Show what a data file holds and how it is trained on.",
    "detect": "Show the devices and what of them may be used.",
    "doctor": "Examine this machine: what a run needs, and what is missing.",
}


_AGAIN_S = 0.05


class _Commands(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click's signature
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"autotune.cli.{cmd_name}")
        command: click.Command = module.command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.command(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="autotune")
def group() -> None:
    """Find the fastest DeepSpeed setting that fits your devices, then train with it."""


def main() -> None:
    """Run the command line and exit with the code of what happened."""
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="%(message)s")
    logging.getLogger("autotune").setLevel(logging.INFO)
    # What a run writes is the user's alone.
    os.umask(0o077)
    for number in STOPPING:
        signal.signal(number, _interrupt)
    sys.unraisablehook = _say_or_interrupt_again
    sys.exit(_run())


def _interrupt(number: int, frame: FrameType | None) -> None:  # noqa: ARG001 - a handler's signature
    # Once is enough: what follows is the clearing up, which a second signal must not cut short.
    for again in STOPPING:
        signal.signal(again, signal.SIG_IGN)
    msg = (
        f"stopped by {signal.Signals(number).name}; what is done is saved, "
        "and the same command goes on from there"
    )
    raise InterruptedRunError(msg, warned=number in {signal.SIGUSR1, signal.SIGUSR2})


def _say_or_interrupt_again(unraisable: "sys.UnraisableHookArgs") -> None:
    """Interrupt a moment later what was interrupted where Python drops exceptions.

    A callback of a weak reference is such a place: the stop, which comes once, would be lost.
    """
    dropped = unraisable.exc_value
    if not isinstance(dropped, InterruptedRunError):
        sys.__unraisablehook__(unraisable)
        return
    text, warned = str(dropped), dropped.warned

    def interrupt(number: int, frame: FrameType | None) -> None:  # noqa: ARG001 - as above
        raise InterruptedRunError(text, warned=warned)

    signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, _AGAIN_S)


def _run() -> int:
    try:
        # What a command exits with, if it does so before its end, is what click returns then.
        code = group.main(standalone_mode=False)
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (AutotuneError, InterruptedRunError) as error:
        click.echo(f"autotune: {error}", err=True)
        return error.exit_code
    except Exception:  # noqa: BLE001 - whatever comes here is a bug, and its traceback is the report
        traceback.print_exc()
        click.echo("autotune: this is a bug; please report the lines above", err=True)
        return 1
    return code if isinstance(code, int) else 0
