"""`autotune plan`."""

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from autotune.cli.options import (
    as_json,
    config_file,
    echo_json,
    gpus,
    named_hardware,
    nodes,
    resolve_options,
    shared,
)
from autotune.cli.summary import plan_text

if TYPE_CHECKING:
    from autotune.intake import Question


@click.command(name="plan")
@shared()
@click.option(
    "--seq-length",
    type=click.IntRange(min=1),
    metavar="N",
    help="Tokens of every row, where no dataset is named [the limit].",
)
@click.option("--all", "everything", is_flag=True, help="Every setting in the JSON document.")
@gpus
@nodes
@config_file
@as_json
def command(
    config: Path | None,
    seq_length: int | None,
    gpus: tuple[str, ...],
    nodes: int,
    *,
    everything: bool,
    as_json: bool,
    **flags: Any,  # noqa: ANN401
) -> None:
    """Show which settings fit and how fast they may be, without probing."""
    from autotune import intake

    named = named_hardware(gpus, nodes)
    question = intake.ask(resolve_options(flags, config), named)
    show_plan(question, as_json=as_json, everything=everything, seq_length=seq_length)


def show_plan(
    question: "Question", *, as_json: bool, everything: bool, seq_length: int | None
) -> None:
    """Estimate every setting and print them."""
    from autotune import intake
    from autotune.documents import plan_document

    for note in question.cluster.notes:
        click.echo(note, err=True)
    intake.start_processes(question)
    with tempfile.TemporaryDirectory(prefix="autotune-plan-") as scratch:
        workload = intake.look_into(
            question,
            dataset_dir=Path(scratch) / "dataset",
            logs=Path(scratch),
            seq_length=seq_length,
        )
    document = plan_document(workload, everything=everything)
    if as_json:
        echo_json(document)
    else:
        click.echo(plan_text(document))
