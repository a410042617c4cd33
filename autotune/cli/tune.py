"""`autotune tune`."""

from pathlib import Path
from typing import Any

import click

from autotune.cli.options import as_json, config_file, dry_run, shared
from autotune.cli.run import execute


@click.command(name="tune")
@shared()
@config_file
@dry_run
@as_json
def command(config: Path | None, *, dry_run: bool, as_json: bool, **flags: Any) -> None:  # noqa: ANN401
    """Find the fastest setting that fits and emit its DeepSpeed config; train later with it."""
    execute(flags, config, dry_run=dry_run, as_json=as_json, with_training=False)
