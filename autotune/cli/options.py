"""Options that commands share, made from the table in config."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
import yaml
from click.shell_completion import CompletionItem

from autotune.config import OPTIONS, Layer, Option, Options, resolve
from autotune.errors import ConfigError, InputMissingError, UsageError
from autotune.units import parse_bytes

if TYPE_CHECKING:
    from autotune.intake import NamedHardware

_Function = TypeVar("_Function", bound=Callable[..., Any])
_LOCAL_CONFIG = Path("autotune.yaml")

as_json = click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
config_file = click.option(
    "--config",
    "config",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="YAML file with options [./autotune.yaml].",
)
dry_run = click.option(
    "--dry-run", is_flag=True, help="Say what would be done: no probe, no training."
)


quiet = click.option(
    "--quiet", "-q", is_flag=True, help="Nothing on the way: only the result, and errors."
)


gpus = click.option(
    "--gpus",
    "gpus",
    multiple=True,
    metavar="COUNTxNAME",
    help="Plan for these GPUs, 8xRTX3090-24GB for instance; repeated for unlike nodes.",
)
nodes = click.option(
    "--nodes",
    type=click.IntRange(min=1),
    default=1,
    metavar="N",
    help="So many nodes alike of --gpus [1].",
)


def _read_rate(
    ctx: click.Context,
    parameter: click.Parameter,
    text: str | None,
) -> int | None:
    try:
        return None if text is None else parse_bytes(text)
    except ValueError as error:
        raise click.BadParameter(str(error), ctx, parameter) from None


node_network = click.option(
    "--node-network",
    callback=_read_rate,
    metavar="SIZE",
    help="Bytes a second that a node of --gpus sends to others at most, 200GB for instance [25GB, "
    "which is one port of 200 Gbit/s].",
)


seq_length = click.option(
    "--seq-length",
    type=click.IntRange(min=1),
    metavar="N",
    help="Tokens of every row, where no dataset is named [the limit].",
)


rows = click.option(
    "--rows",
    type=click.IntRange(min=1),
    metavar="N",
    help="Rows of an epoch, where no dataset is named: for how long the training is.",
)


def named_hardware(
    gpus: Sequence[str], nodes: int, network: int | None = None
) -> "NamedHardware | None":
    """Read --gpus, --nodes and --node-network.

    Raises:
        UsageError: a GPU is not known, a count is none, or the two do not go together.
    """
    from autotune.devices import parse_gpus
    from autotune.intake import NamedHardware

    if nodes > 1 and len(gpus) != 1:
        msg = "--nodes takes one --gpus, which says what a node has"
        raise UsageError(msg)
    if not gpus:
        if network is not None:
            msg = "--node-network is of the nodes that --gpus names"
            raise UsageError(msg)
        return None
    hardware = NamedHardware(gpus=tuple(map(parse_gpus, gpus)), nodes=nodes)
    return hardware if network is None else replace(hardware, network_bytes_per_s=network)


def shared(*names: str) -> Callable[[_Function], _Function]:
    """Add the named options of the table (all if none is named) to a command."""

    def decorate(function: _Function) -> _Function:
        for option in reversed(OPTIONS):
            if not names or option.name in names:
                function = _click_option(option)(function)
        return function

    return decorate


def _click_option(option: Option) -> Callable[[_Function], _Function]:
    shown = "" if option.default in (None, False) else f" [{option.default}]"
    if option.default is False:
        return click.option(option.flag, option.name, is_flag=True, default=None, help=option.help)
    return click.option(
        option.flag,
        option.name,
        callback=_read_value(option),
        metavar=option.metavar,
        help=option.help + shown,
        multiple=option.multiple,
        shell_complete=_completer(option),
    )


def _completer(option: Option) -> Callable[..., list[CompletionItem]]:
    """Return what completes a value in a shell: one of its choices, or a path."""

    def complete(ctx: click.Context, parameter: click.Parameter, text: str) -> list[CompletionItem]:  # noqa: ARG001 - click's signature
        for word, kind in (("FILE", "file"), ("DIR", "dir"), ("MODEL", "dir")):
            if word in option.metavar:
                return [CompletionItem(text, type=kind)]
        return [CompletionItem(choice) for choice in option.choices if choice.startswith(text)]

    return complete


def _read_value(option: Option) -> Callable[..., Any]:
    """Return a callback that reads the text, so that a bad value is a usage error."""

    def callback(ctx: click.Context, parameter: click.Parameter, text: Any) -> Any:  # noqa: ANN401 - text or texts
        if text == ():
            return None
        if text is not None and not option.is_config:
            try:
                option.parse(text)
            except ValueError as error:
                raise click.BadParameter(str(error), ctx, parameter) from None
        return text

    return callback


def resolve_options(flags: dict[str, Any], config: Path | None) -> Options:
    """Resolve flags over the named file over ./autotune.yaml over the defaults.

    Raises:
        InputMissingError: the named file is not there.
        ConfigError: a file is no YAML mapping, or has an unknown key or a value that cannot be.
    """
    given = {name: value for name, value in flags.items() if value is not None}
    layers = [Layer("command line", given)]
    if config is not None:
        layers.append(_read_layer(config))
    if _LOCAL_CONFIG.is_file():
        layers.append(_read_layer(_LOCAL_CONFIG))
    return resolve(layers)


def recorded_options(recorded: dict[str, dict[str, Any]]) -> Options:
    """Return the options as run.json has them."""
    return Options(
        values={one.name: one.default for one in OPTIONS}
        | {name: entry["value"] for name, entry in recorded.items()},
        sources={one.name: "default" for one in OPTIONS}
        | {name: entry["source"] for name, entry in recorded.items()},
    )


def _read_layer(path: Path) -> Layer:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        msg = f"the configuration file {path} cannot be read: {error.strerror}"
        raise InputMissingError(msg) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        msg = f"{path} is not YAML: {' '.join(str(error).split())}"
        raise ConfigError(msg) from None
    if content is None:
        content = {}
    if not isinstance(content, dict):
        msg = f"{path} holds no mapping of option names to values"
        raise ConfigError(msg)
    return Layer(str(path), content)


def require_dataset(options: Options) -> None:
    """Refuse to go on without a dataset.

    Raises:
        UsageError: none was named.
    """
    if options["dataset"] is None:
        msg = "no dataset: name a JSONL file with --dataset"
        raise UsageError(msg)


def echo_json(document: Any) -> None:  # noqa: ANN401 - JSON
    click.echo(json.dumps(document, indent=2))


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lay out text in columns; all but the first are aligned on the right."""
    widths = [max(len(row[place]) for row in (columns, *rows)) for place in range(len(columns))]

    def line(cells: Sequence[str]) -> str:
        first = cells[0].ljust(widths[0])
        rest = (cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True))
        return "  ".join([first, *rest]).rstrip()

    return "\n".join(line(cells) for cells in (columns, *rows))
