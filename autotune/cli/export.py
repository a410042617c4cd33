"""`autotune export`."""

from pathlib import Path

import click

from autotune.cli.options import as_json, echo_json
from autotune.exports import EXPORTERS


@click.command(name="export")
@click.argument("run_dir", type=click.Path(path_type=Path))
@click.option(
    "--to",
    "tool",
    type=click.Choice(list(EXPORTERS)),
    required=True,
    help="The tool that goes on.",
)
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="A directory that is not there yet [RUN_DIR/exports/<tool>].",
)
@as_json
def command(run_dir: Path, tool: str, output: Path | None, *, as_json: bool) -> None:
    """Write what a run has tuned as the configuration of another tool, with its rows."""
    from autotune.exporting import RUN_SCRIPT, export_run
    from autotune.rundir import RunDir

    exported = export_run(RunDir(run_dir.absolute()), tool, output)
    script = exported.directory / RUN_SCRIPT
    if as_json:
        echo_json(
            {
                "schema": 1,
                "tool": tool,
                "directory": str(exported.directory),
                "files": list(exported.files),
                "rows": exported.rows,
                "notes": list(exported.notes),
                "command": f"bash {script}",
            }
        )
        return
    for note in exported.notes:
        click.echo(f"note: {note}", err=True)
    rows = "" if exported.rows is None else f", {exported.rows} rows"
    click.echo(f"{', '.join(exported.files)}{rows}, in {exported.directory}")
    click.echo(f"bash {script}")
