"""`autotune run`, and what `tune` shares with it."""

from pathlib import Path
from typing import Any

import click

from autotune.cli.options import (
    as_json,
    config_file,
    dry_run,
    echo_json,
    require_dataset,
    resolve_options,
    shared,
)
from autotune.cli.summary import result_text


@click.command(name="run")
@shared()
@config_file
@dry_run
@as_json
def command(config: Path | None, *, dry_run: bool, as_json: bool, **flags: Any) -> None:  # noqa: ANN401
    """Find the fastest setting that fits, emit its DeepSpeed config, and train with it."""
    execute(flags, config, dry_run=dry_run, as_json=as_json, with_training=True)


def execute(
    flags: dict[str, Any],
    config: Path | None,
    *,
    dry_run: bool,
    as_json: bool,
    with_training: bool,
) -> None:
    """Run the stages and print the result."""
    from autotune import intake, pipeline
    from autotune.cli.plan import show_plan

    options = resolve_options(flags, config)
    require_dataset(options)
    question = intake.ask(options)
    run = pipeline.Run(question, pipeline.choose_run_dir(question))
    if (done := run.finished(with_training=with_training)) is not None:
        click.echo(f"{run.dir.root} is finished; this is its result", err=True)
        result = done
    elif dry_run:
        show_plan(question, as_json=as_json)
        return
    else:
        for note in (*question.cluster.notes, *question.notes):
            click.echo(note, err=True)
        if question.source.name.startswith("builtin:"):
            click.echo(
                f"{question.source.name} is a small demo model with random weights, trained from "
                "scratch: name another with --model",
                err=True,
            )
        click.echo(f"run directory {run.dir.root}", err=True)
        result = run.execute(with_training=with_training)
    if as_json:
        echo_json(result)
    else:
        click.echo(result_text(result))
