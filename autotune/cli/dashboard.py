"""`autotune dashboard`."""

from pathlib import Path

import click

from autotune.rundir import RunDir


@click.command(name="dashboard")
@click.argument("run_dir", type=click.Path(path_type=Path))
@click.option("--host", default="127.0.0.1", metavar="ADDRESS", help="Where to serve [127.0.0.1].")
@click.option(
    "--port",
    type=click.IntRange(min=0, max=65535),
    default=8080,
    metavar="N",
    help="Port; 0 takes a free one [8080].",
)
def command(run_dir: Path, host: str, port: int) -> None:
    """Show the study of a run in optuna-dashboard until it is interrupted."""
    from autotune.tune.dashboard import serve

    directory = RunDir(run_dir.absolute())
    serve(
        directory.study,
        host,
        port,
        ready=lambda address: click.echo(f"the study of {directory.root} is at {address}"),
    )
