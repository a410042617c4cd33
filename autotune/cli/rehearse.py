"""`autotune rehearse`."""

import tempfile
from pathlib import Path
from typing import Any

import click

from autotune.cli.options import (
    as_json,
    config_file,
    echo_json,
    gpus,
    named_hardware,
    node_network,
    nodes,
    resolve_options,
    rows,
    seq_length,
    shared,
)
from autotune.cli.summary import rehearsal_text


@click.command(name="rehearse")
@shared()
@seq_length
@rows
@click.option(
    "--noise",
    type=click.FloatRange(min=0, max=1),
    default=0.0,
    metavar="X",
    help="How noisy measured times are: standard deviation of their logarithm [0].",
)
@gpus
@nodes
@node_network
@config_file
@as_json
def command(
    config: Path | None,
    seq_length: int | None,
    rows: int | None,
    noise: float,
    gpus: tuple[str, ...],
    nodes: int,
    *,
    node_network: int | None,
    as_json: bool,
    **flags: Any,  # noqa: ANN401
) -> None:
    """Show how a search would go on hardware that need not be there."""
    from autotune import intake
    from autotune.rehearse import rehearse

    question = intake.ask(resolve_options(flags, config), named_hardware(gpus, nodes, node_network))
    for note in question.cluster.notes:
        click.echo(note, err=True)
    intake.start_processes(question)
    with tempfile.TemporaryDirectory(prefix="autotune-rehearse-") as scratch:
        workload = intake.look_into(
            question,
            dataset_dir=Path(scratch) / "dataset",
            logs=Path(scratch),
            imagined=intake.ImaginedRows(seq_length=seq_length, rows=rows),
        )
        document = rehearse(workload, Path(scratch), noise=noise)
    if as_json:
        echo_json(document)
    else:
        click.echo(rehearsal_text(document))
