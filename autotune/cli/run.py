"""`autotune run`, and what `tune` shares with it."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from autotune.cli.launched import launched, within_time_limit
from autotune.cli.live import view
from autotune.cli.options import (
    as_json,
    config_file,
    dry_run,
    echo_json,
    quiet,
    require_dataset,
    resolve_options,
    shared,
)
from autotune.cli.script import execute_script, of_script, refuse_arguments
from autotune.cli.summary import result_text

if TYPE_CHECKING:
    from autotune.config import Options
    from autotune.intake import Question
    from autotune.nodes.control import Nodes

_OF_OUTPUT = ("dry_run", "quiet", "as_json")


@click.command(name="run")
@shared()
@config_file
@dry_run
@quiet
@as_json
@of_script
def command(config: Path | None, **flags: Any) -> None:  # noqa: ANN401
    """Find the fastest setting that fits, emit its DeepSpeed config, and train with it."""
    execute(flags, config, with_training=True)


def execute(flags: dict[str, Any], config: Path | None, *, with_training: bool) -> None:
    """Run the stages and print the result."""
    script, script_arguments, arg_maps = (
        flags.pop(name) for name in ("script", "script_arguments", "arg_maps")
    )
    if script is not None:
        execute_script(
            script, script_arguments, arg_maps, flags, config, with_training=with_training
        )
        return
    refuse_arguments(script_arguments, arg_maps)
    options = resolve_options(
        {name: value for name, value in flags.items() if name not in _OF_OUTPUT}, config
    )
    require_dataset(options)
    with launched(options["run_dir"]) as nodes:
        _execute(options, nodes, with_training=with_training, **{n: flags[n] for n in _OF_OUTPUT})


def _execute(
    options: "Options",
    nodes: "Nodes",
    *,
    with_training: bool,
    dry_run: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    from autotune import intake, pipeline
    from autotune.cli.plan import show_plan

    question = intake.ask(options, nodes=nodes)
    run = pipeline.Run(question, pipeline.choose_run_dir(question))
    if (done := run.finished(with_training=with_training)) is not None:
        if not quiet:
            click.echo(f"{run.dir.root} is finished; this is its result", err=True)
        result = done
    elif dry_run:
        show_plan(question, as_json=as_json)
        return
    else:
        for note in () if quiet else _notes(question, run.dir.root):
            click.echo(note, err=True)
        with within_time_limit(run), view(quiet=quiet) as listeners:
            result = run.execute(with_training=with_training, listeners=listeners)
    if as_json:
        echo_json(result)
    else:
        click.echo(result_text(result))


def _notes(question: "Question", run_dir: Path) -> Iterator[str]:
    """Yield what a user should know before it begins."""
    yield from (*question.cluster.notes, *question.notes)
    if question.source.name.startswith("builtin:"):
        yield (
            f"{question.source.name} is a small demo model with random weights, trained from "
            "scratch: name another with --model"
        )
    yield f"run directory {run_dir}"
