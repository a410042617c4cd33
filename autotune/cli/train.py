"""`autotune train`."""

from pathlib import Path

import click

from autotune.cli.launched import launched, within_time_limit
from autotune.cli.live import view
from autotune.cli.options import as_json, dry_run, echo_json, quiet, recorded_options
from autotune.cli.summary import result_text


@click.command(name="train")
@click.argument("run_dir", type=click.Path(path_type=Path))
@dry_run
@quiet
@as_json
def command(run_dir: Path, *, dry_run: bool, quiet: bool, as_json: bool) -> None:
    """Train with the setting that a run found; goes on from the last checkpoint."""
    from autotune import pipeline
    from autotune.rundir import RunDir

    with launched(run_dir) as nodes:
        run = pipeline.reopen(RunDir(run_dir.absolute()), recorded_options, nodes)
        if dry_run:
            click.echo(f"bash {run.dir.launch_script}")
            return
        if (result := run.finished(with_training=True)) is None:
            with within_time_limit(run), view(quiet=quiet) as listeners:
                result = run.execute(with_training=True, listeners=listeners)
        if as_json:
            echo_json(result)
        else:
            click.echo(result_text(result))
