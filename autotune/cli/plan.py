"""`autotune plan`."""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
from autotune.cli.summary import matrix_text, plan_text
from autotune.config import Options
from autotune.errors import UsageError

if TYPE_CHECKING:
    from autotune.intake import ImaginedRows, Question
    from autotune.prices import Prices

_COUNTS = (1, 2, 4, 8)


def _read_counts(
    ctx: click.Context,
    parameter: click.Parameter,
    text: str | None,
) -> tuple[int, ...] | None:
    if text is None:
        return None
    counts = text.split(",")
    if not all(count.strip().isdecimal() and int(count) for count in counts):
        msg = f"{text!r} are no counts of devices: write whole numbers above zero, 1,2,4,8 for one"
        raise click.BadParameter(msg, ctx, parameter)
    return tuple(dict.fromkeys(map(int, counts)))


@click.command(name="plan")
@shared()
@seq_length
@rows
@click.option("--all", "everything", is_flag=True, help="Every setting in the JSON document.")
@click.option(
    "--exact",
    is_flag=True,
    help="Memory of the three best from the real DeepSpeed engine, stepped over fake tensors.",
)
@click.option(
    "--matrix",
    is_flag=True,
    help="The best setting, or what is lacking, for each of --gpus (A,B,...) by --counts.",
)
@click.option(
    "--counts",
    callback=_read_counts,
    metavar="N,N,...",
    help="Numbers of devices of --matrix, more than eight in nodes of eight [1,2,4,8].",
)
@click.option(
    "--price-per-gpu-hour",
    "price_per_gpu_hour",
    multiple=True,
    metavar="[NAME=]X",
    help="Price of a device and hour, for the cost of the training; repeated for several kinds.",
)
@gpus
@nodes
@node_network
@config_file
@as_json
def command(  # noqa: PLR0913 - hardware, rows, prices and forms of the answer
    config: Path | None,
    seq_length: int | None,
    rows: int | None,
    gpus: tuple[str, ...],
    nodes: int,
    *,
    node_network: int | None,
    counts: tuple[int, ...] | None,
    price_per_gpu_hour: tuple[str, ...],
    everything: bool,
    exact: bool,
    matrix: bool,
    as_json: bool,
    **flags: Any,  # noqa: ANN401
) -> None:
    """Show which settings fit and how fast they may be, without probing."""
    from autotune import intake
    from autotune.devices import NODE_NETWORK_BYTES_PER_S
    from autotune.prices import Prices

    options = resolve_options(flags, config)
    prices = Prices.parse(price_per_gpu_hour)
    imagined = intake.ImaginedRows(seq_length=seq_length, rows=rows)
    if matrix:
        if exact or everything or nodes > 1:
            msg = "--matrix goes with neither --exact nor --all nor --nodes"
            raise UsageError(msg)
        network = node_network or NODE_NETWORK_BYTES_PER_S
        document = _matrix(options, gpus, counts or _COUNTS, imagined, prices, network)
        if as_json:
            echo_json(document)
        else:
            click.echo(matrix_text(document))
        return
    if counts is not None:
        msg = "--counts goes with --matrix; without it write --gpus COUNTxNAME"
        raise UsageError(msg)
    question = intake.ask(options, named_hardware(gpus, nodes, node_network))
    show_plan(
        question,
        as_json=as_json,
        everything=everything,
        imagined=imagined,
        prices=prices,
        exact=exact,
    )


def show_plan(
    question: "Question",
    *,
    as_json: bool,
    everything: bool = False,
    imagined: "ImaginedRows | None" = None,
    prices: "Prices | None" = None,
    exact: bool = False,
) -> None:
    """Estimate every setting and print them."""
    from autotune import intake
    from autotune.documents import plan_document
    from autotune.prices import NO_PRICES

    for note in (*question.cluster.notes, *question.notes):
        click.echo(note, err=True)
    intake.start_processes(question)
    with tempfile.TemporaryDirectory(prefix="autotune-plan-") as scratch:
        workload = intake.look_into(
            question,
            dataset_dir=Path(scratch) / "dataset",
            logs=Path(scratch),
            imagined=imagined or intake.ImaginedRows(),
        )
        exactly = intake.run_best_virtually(workload, Path(scratch)) if exact else {}
    document = plan_document(
        workload, everything=everything, prices=prices or NO_PRICES, exactly=exactly
    )
    if as_json:
        echo_json(document)
    else:
        click.echo(plan_text(document))


def _matrix(
    options: Options,
    gpus: Sequence[str],
    counts: Sequence[int],
    imagined: "ImaginedRows",
    prices: "Prices",
    network_bytes_per_s: float,
) -> dict[str, Any]:
    from autotune import intake
    from autotune.devices import COMPARED, in_nodes, parse_kinds
    from autotune.documents import matrix_document

    kinds = dict.fromkeys(kind for text in gpus or COMPARED for kind in parse_kinds(text))
    hardware = [
        intake.NamedHardware(gpus=in_nodes(kind, count), network_bytes_per_s=network_bytes_per_s)
        for kind in kinds
        for count in counts
    ]
    # One device takes any global batch, so that each cell speaks for itself.
    one = intake.NamedHardware(gpus=in_nodes(hardware[0].gpus[0].gpu, 1))
    question = intake.ask(options, one)
    intake.start_processes(question)
    with tempfile.TemporaryDirectory(prefix="autotune-plan-") as scratch:
        found = intake.compare(
            question,
            hardware,
            dataset_dir=Path(scratch) / "dataset",
            logs=Path(scratch),
            imagined=imagined,
        )
    return matrix_document(list(zip(hardware, found, strict=True)), prices)
