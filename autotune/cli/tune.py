"""`autotune tune`."""

from pathlib import Path
from typing import Any

import click

from autotune.cli.options import as_json, config_file, dry_run, quiet, shared
from autotune.cli.run import execute
from autotune.cli.script import of_script


@click.command(name="tune")
@shared()
@config_file
@dry_run
@quiet
@as_json
@of_script
def command(config: Path | None, **flags: Any) -> None:  # noqa: ANN401
    """Find the fastest setting that fits and emit its DeepSpeed config; train later with it."""
    execute(flags, config, with_training=False)
