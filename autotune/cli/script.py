"""`run` and `tune` of a user's own script: --script and --arg-map."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click

from autotune.cli.live import view
from autotune.cli.options import echo_json, resolve_options
from autotune.config import OPTIONS
from autotune.errors import UsageError

_Function = TypeVar("_Function", bound=Callable[..., Any])

_OF_SCRIPTS = (
    *("devices", "device_memory", "run_dir", "max_probes", "tune_budget", "on_event", "seed"),
    *("no_cache", "sampler"),
)
"""Options of the table that mean something where a script is tuned; the rest is its own."""


def of_script(function: _Function) -> _Function:
    """Add the options and arguments of a user's script to a command."""
    for add in (
        click.argument("script_arguments", nargs=-1, type=click.UNPROCESSED, metavar="[-- ARGS]"),
        click.option(
            "--arg-map",
            "arg_maps",
            multiple=True,
            metavar="KEY=--ARG",
            help="The script's own option that carries a key of its DeepSpeed config; repeatable.",
        ),
        click.option(
            "--script",
            type=click.Path(path_type=Path, dir_okay=False),
            metavar="FILE",
            help="Tune this training script of your own; its arguments follow after --.",
        ),
    ):
        function = add(function)
    return function


def refuse_arguments(script_arguments: Sequence[str], arg_maps: Sequence[str]) -> None:
    """Refuse what is of a script where there is none.

    Raises:
        UsageError: there are arguments or mappings.
    """
    if script_arguments:
        msg = f"unexpected arguments {' '.join(script_arguments)}: a script's come after --script"
        raise UsageError(msg)
    if arg_maps:
        msg = "--arg-map is of a script: name it with --script"
        raise UsageError(msg)


def execute_script(
    script: Path,
    script_arguments: Sequence[str],
    arg_maps: Sequence[str],
    flags: dict[str, Any],
    config: Path | None,
    *,
    with_training: bool,
) -> None:
    """Tune a script, train if that is asked for, and print the result."""
    dry_run, quiet, as_json = (flags.pop(name) for name in ("dry_run", "quiet", "as_json"))
    _refuse_foreign(flags)
    from autotune.script.arguments import parse_maps
    from autotune.script.run import ScriptRun, ask_script, script_run_dir

    options = resolve_options(flags, config)
    question = ask_script(options, script, script_arguments, parse_maps(arg_maps))
    stdout = sys.stderr.fileno() if as_json else None
    run = ScriptRun(question, script_run_dir(question), stdout=stdout)
    for note in () if quiet else (*question.cluster.notes, *question.wishes.notes):
        click.echo(note, err=True)
    if (done := run.finished(with_training=with_training)) is not None:
        if not quiet:
            click.echo(f"{run.dir.root} is finished; this is its result", err=True)
        result = done
    elif dry_run:
        click.echo(_intended(question, run.dir.root))
        return
    else:
        if not quiet:
            click.echo(f"run directory {run.dir.root}", err=True)
        with view(quiet=quiet) as listeners:
            result = run.execute(with_training=with_training, listeners=listeners)
    if as_json:
        echo_json(result)
    else:
        click.echo(_result_text(result))


def _refuse_foreign(flags: dict[str, Any]) -> None:
    foreign = [
        one.flag
        for one in OPTIONS
        if one.name not in _OF_SCRIPTS and flags.get(one.name) is not None
    ]
    if foreign:
        msg = (
            f"{', '.join(foreign)} is of autotune's own training: a script has it in its own "
            "arguments, after --"
        )
        raise UsageError(msg)


def _intended(question: Any, run_dir: Path) -> str:  # noqa: ANN401 - a ScriptQuestion
    from autotune.script.arguments import find_carriers

    script = question.script
    maps = {**question.wishes.mappings, **question.maps}
    carriers = find_carriers(script.arguments, {}, maps, script.directory)
    return "\n".join(
        [
            f"{script.path} on {question.cluster.num_devices} x {question.cluster.device_name}",
            f"carried by its arguments: {carriers.label() or 'nothing'}",
            f"ZeRO {', '.join(map(str, question.wishes.stages))} are tried, a process a setting",
            f"run directory {run_dir}",
        ]
    )


def _result_text(result: dict[str, Any]) -> str:
    from autotune.setting import Setting

    gain = result["gain_over_default"]
    lines = [
        f"{result['exit_reason']}: {Setting.from_json(result['setting']).label()}",
        f"{result['samples_per_s']:.2f} samples/s"
        + (f", {gain:.2f} times the script as it was" if gain else ""),
        f"{result['rungs']} settings tried in {result['tuning_seconds']:.0f} s",
        f"the global batch is {result['global_batch_size']} as before",
        f"files in {result['run_dir']}",
    ]
    return "\n".join(lines)
