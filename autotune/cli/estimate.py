"""`autotune estimate`."""

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from autotune.cli.options import (
    as_json,
    config_file,
    echo_json,
    gpus,
    named_hardware,
    node_network,
    nodes,
    resolve_options,
    seq_length,
    shared,
)
from autotune.cli.summary import estimate_text
from autotune.errors import UsageError, VirtualRunUnavailableError
from autotune.setting import (
    FLASH_ATTENTION,
    ZERO_STAGES,
    Setting,
    Structure,
    checkpointing_period,
)

if TYPE_CHECKING:
    from autotune.intake import Question


def _checkpointing(ctx: click.Context, parameter: click.Parameter, text: str) -> str:
    try:
        checkpointing_period(text)
    except ValueError as error:
        raise click.BadParameter(str(error), ctx, parameter) from None
    return text


@click.command(name="estimate")
@shared()
@click.option(
    "--micro-batch-size",
    type=click.IntRange(min=1),
    default=1,
    metavar="N",
    help="Rows a micro-step and rank [1].",
)
@click.option(
    "--zero-stage",
    type=click.IntRange(min=ZERO_STAGES[0], max=ZERO_STAGES[-1]),
    default=0,
    metavar="0-3",
    help="ZeRO stage [0].",
)
@click.option(
    "--offload-optimizer",
    type=click.Choice(["none", "cpu"]),
    default="none",
    help="Where the optimizer's states are [none: on the device].",
)
@click.option(
    "--offload-param",
    type=click.Choice(["none", "cpu"]),
    default="none",
    help="Where ZeRO 3 keeps the parameters [none: on the device].",
)
@click.option(
    "--checkpointing",
    callback=_checkpointing,
    default="none",
    metavar="none|full|every-N",
    help="Which layers recompute their activations: every one, or every N-th of them [none].",
)
@click.option(
    "--attention",
    type=click.Choice(["sdpa", "eager", FLASH_ATTENTION]),
    default="sdpa",
    help="Attention implementation that the model has [sdpa].",
)
@seq_length
@click.option(
    "--exact",
    is_flag=True,
    help="Step the real DeepSpeed engine over fake tensors instead of doing arithmetic.",
)
@gpus
@nodes
@node_network
@config_file
@as_json
def command(  # noqa: PLR0913 - the fields of a setting
    config: Path | None,
    micro_batch_size: int,
    seq_length: int | None,
    gpus: tuple[str, ...],
    nodes: int,
    *,
    node_network: int | None,
    exact: bool,
    as_json: bool,
    zero_stage: int,
    offload_optimizer: Any,  # noqa: ANN401 - an Offload
    offload_param: Any,  # noqa: ANN401 - an Offload
    checkpointing: str,
    attention: str,
    **flags: Any,  # noqa: ANN401
) -> None:
    """Estimate memory and speed of one setting, with the DeepSpeed config it would get."""
    from autotune import intake

    named = named_hardware(gpus, nodes, node_network)
    question = intake.ask(resolve_options(flags, config), named)
    for note in question.notes:
        click.echo(note, err=True)
    knobs: dict[str, Any] = {
        "micro_batch_size": micro_batch_size,
        "zero_stage": zero_stage,
        "offload_optimizer": offload_optimizer,
        "offload_param": offload_param,
        "checkpointing": checkpointing,
        "attention": attention,
    }
    knobs |= _pinned(question, knobs)
    micro_batch_size = knobs.pop("micro_batch_size")
    setting = _setting(question, Structure(**knobs), micro_batch_size)
    document = _estimate(question, setting, seq_length, exact)
    if as_json:
        echo_json(document)
    else:
        click.echo(estimate_text(document))


def _pinned(question: "Question", flags: dict[str, Any]) -> dict[str, Any]:
    """Return the pins that the stage has, each to one value.

    Raises:
        UsageError: a pin has several values, another than the flag of the same knob, or is of other
            stages.
    """
    from autotune.knobs import BY_NAME, as_text

    source = click.get_current_context().get_parameter_source
    pinned: dict[str, Any] = {}
    for knob, values in question.pins.values.items():
        if len(values) > 1:
            several = ", ".join(map(as_text, values))
            msg = f"an estimate is of one setting: pin {knob} to one of {several}"
            raise UsageError(msg)
        pinned[knob] = values[0]
        given = knob in flags and source(knob) == ParameterSource.COMMANDLINE
        if given and flags[knob] != values[0]:
            msg = f"{knob} is {flags[knob]} by its flag and {values[0]} by its pin: drop one"
            raise UsageError(msg)
    stage = pinned.get("zero_stage", flags["zero_stage"])
    for knob in [name for name in pinned if stage not in BY_NAME[name].stages]:
        value = pinned.pop(knob)
        if knob not in question.pins.where_there and value != "none":
            stages = ", ".join(map(str, BY_NAME[knob].stages))
            msg = f"{knob} is of ZeRO {stages}: choose one with --zero-stage"
            raise UsageError(msg)
    return pinned


def _setting(question: "Question", structure: Structure, micro_batch_size: int) -> Setting:
    """Return the setting, if DeepSpeed has it and the global batch can be kept.

    Raises:
        UsageError: not so; the message says what could be chosen.
    """
    from autotune.space import micro_batch_sizes

    ranks = question.cluster.num_devices
    global_batch_size = question.options["global_batch_size"]
    sizes = micro_batch_sizes(global_batch_size, ranks)
    if micro_batch_size not in sizes:
        msg = (
            f"a global batch of {global_batch_size} over {ranks} ranks has no micro-batch of "
            f"{micro_batch_size}: use one of {', '.join(map(str, sizes))}"
        )
        raise UsageError(msg)
    if structure.offload_optimizer != "none" and structure.zero_stage < 1:
        msg = "--offload-optimizer needs --zero-stage 1 or more"
        raise UsageError(msg)
    if structure.offload_param != "none" and structure.zero_stage < ZERO_STAGES[-1]:
        msg = "--offload-param needs --zero-stage 3"
        raise UsageError(msg)
    if ranks % structure.zero_hpz_partition_size:
        msg = f"zero_hpz_partition_size has to divide the {ranks} ranks"
        raise UsageError(msg)
    if structure.attention == FLASH_ATTENTION:
        _require_flash_attention(question)
    return structure.with_micro_batch(micro_batch_size, ranks, global_batch_size)


def _require_flash_attention(question: "Question") -> None:
    """Refuse it where its kernel does not run.

    Raises:
        UsageError: the devices are no GPUs, or the precision has more than 16 bits.
    """
    from autotune.intake import choose_precision

    if not question.cluster.has_separate_memory:
        msg = f"--attention {FLASH_ATTENTION} needs GPUs: name some with --gpus, or use sdpa"
        raise UsageError(msg)
    if choose_precision(question.options["precision"], question.cluster) == "fp32":
        msg = f"--attention {FLASH_ATTENTION} computes in bf16 or fp16: choose one, or use sdpa"
        raise UsageError(msg)


def _estimate(
    question: "Question",
    setting: Setting,
    seq_length: int | None,
    exact: bool,  # noqa: FBT001 - one of the command's flags
) -> dict[str, Any]:
    from autotune import intake
    from autotune.documents import estimate_document
    from autotune.space import require_possible

    intake.start_processes(question)
    with tempfile.TemporaryDirectory(prefix="autotune-estimate-") as scratch:
        workload = intake.look_into(
            question,
            dataset_dir=Path(scratch) / "dataset",
            logs=Path(scratch),
            imagined=intake.ImaginedRows(seq_length=seq_length),
            attention=setting.structure.attention,
            checkpointing=(setting.structure.checkpointing,),
        )
        modes = [mode for mode, _ in workload.profile.traces]
        if setting.structure.checkpointing not in modes:
            msg = "this model's layers cannot be checkpointed: use --checkpointing none"
            raise UsageError(msg)
        require_possible(setting.structure, intake.limits(workload.job, workload.profile, question))
        virtual = None
        if exact:
            try:
                virtual = intake.run_virtually(workload, setting, Path(scratch) / "virtual.log")
            except VirtualRunUnavailableError as error:
                click.echo(f"answered by arithmetic, as {error}", err=True)
    return estimate_document(workload, setting, virtual)
