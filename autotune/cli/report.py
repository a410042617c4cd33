"""`autotune report`."""

import webbrowser
from pathlib import Path

import click

from autotune.cli.options import as_json, echo_json
from autotune.rundir import RunDir


@click.command(name="report")
@click.argument("run_dir", type=click.Path(path_type=Path))
@click.option("--open", "in_browser", is_flag=True, help="Show it in the browser.")
@as_json
def command(run_dir: Path, *, in_browser: bool, as_json: bool) -> None:
    """Write report.html of a run, finished or not, and print where it is."""
    from autotune.report.page import write_report

    directory = RunDir(run_dir.absolute())
    write_report(directory)
    if as_json:
        echo_json({"schema": 1, "report": str(directory.report)})
    else:
        click.echo(directory.report)
    if in_browser and not webbrowser.open(directory.report.as_uri()):
        click.echo("no browser was found here: copy the file, it needs nothing else", err=True)
