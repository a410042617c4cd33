"""Writes what follows from the source: docs/reference/ and the JSON Schema of configurations.

`make docs-reference` runs it; a test tells when it has to be run.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
from click.testing import CliRunner

from autotune import cli, errors
from autotune.config import OPTIONS, Option, json_schema
from autotune.knobs import KNOBS
from autotune.rundir import RunDir

REPOSITORY = Path(__file__).parent.parent
REFERENCE = REPOSITORY / "docs" / "reference"

MADE = "<!-- Made by docs/make_reference.py: change the source, then `make docs-reference`. -->"

COMMANDS = """
# Commands

Results go to stdout, everything else to stderr. `--json` prints one JSON document on stdout. No
command asks anything. What options are keys of a configuration file too is in
[configuration.md](configuration.md), what the commands exit with in
[exit-codes.md](exit-codes.md).

{blocks}
"""

CONFIGURATION = """
# Configuration

Each of these is a key of a YAML file, and with dashes a flag of the commands that have it:
`global_batch_size` is `--global-batch-size`. A flag goes before the file that `--config` names,
that before `./autotune.yaml`, and that before the default. An unknown key is refused with the
nearest one (exit code 78). What may be repeated on the command line is a list in YAML, and
`KEY=VALUE` a mapping. A default in brackets follows from other facts.

`configs/autotune.schema.json` is a JSON Schema of such files: an editor with the YAML language
server completes and checks keys by it in a file that begins with

```yaml
# yaml-language-server: $schema=configs/autotune.schema.json
```

{options}

## Knobs

What `set` pins; [knobs.md](../knobs.md) says what each does.

{knobs}
"""

RUN_DIRECTORY = r"""
# The run directory

`runs/<dataset>-<model>-<first 8 of the fingerprint>/` below the working directory, or
`--run-dir`. Files are the user's alone, and are whole or not there. The same command goes on with
what is in it; nothing is deleted. JSON documents have a field `schema`.

{files}

What can be used again by other runs is in `$AUTOTUNE_CACHE`, else in `autotune/` of the user's
cache directory: tokenised data, profiles, built ops, measured outcomes, translated models.
"""

EXIT_CODES = """
# Exit codes

An error is one sentence on stderr: what was found, what was needed, what to do next.
`result.json` has its name and the code. A script of your own (`run --script`) that fails passes
its code on where that is 1 to 63.

{codes}

`plan` and `estimate` answer 0 also when nothing fits.
"""

RESULTS = """
# Measured results

Of the machine that each file names, and of nothing else. The scripts beside the files measure
them again.

{results}

More, each beside what it is about: how far estimates are to be believed in
[accuracy.md](accuracy.md), plans in [planning.md](planning.md), the search in
[search.md](search.md), data in [data.md](data.md).
"""

TOOLS = """
# Tools that exports were given to

Of each tool what installed on that day, in an environment of its own on a CPU: a tiny model with
all parameters at ZeRO 3 with checkpointing, and with adapters at ZeRO 2. "Read" says that the
tool's own parser took the file, nothing more. `make exports-check` tries them all, and trains.
[other-tools.md](../how-to/other-tools.md) says what is exported.

{tools}
"""


def documents() -> dict[Path, str]:
    """Return the text of every file that is made, by its path."""
    return {
        REFERENCE / "commands.md": commands(),
        REFERENCE / "configuration.md": configuration(),
        REFERENCE / "run-directory.md": run_directory(),
        REFERENCE / "exit-codes.md": exit_codes(),
        REFERENCE / "tools.md": tools(),
        REPOSITORY / "docs" / "results.md": results(),
        REPOSITORY / "configs" / "autotune.schema.json": json.dumps(json_schema(), indent=2) + "\n",
    }


def help_of(*words: str) -> str:
    """Return what a command prints for --help where the terminal is 80 columns wide or wider."""
    shown = CliRunner(env={"COLUMNS": "80"}).invoke(
        cli.group, [*words, "--help"], prog_name="autotune"
    )
    assert shown.exit_code == 0, shown.output
    return shown.output


def commands() -> str:
    blocks = [_help_block()]
    for name in cli.COMMANDS:
        blocks += [f"## autotune {name}", _help_block(name)]
    return _page(COMMANDS.format(blocks="\n\n".join(blocks)))


def _help_block(*words: str) -> str:
    return f"```text\n$ {' '.join(['autotune', *words])} --help\n{help_of(*words)}```"


def configuration() -> str:
    options = [(_code(one.name), _values(one), _default(one), one.help) for one in OPTIONS]
    knobs = [(_code(one.name), one.values, ", ".join(map(str, one.stages))) for one in KNOBS]
    return _page(
        CONFIGURATION.format(
            options=_table(("key", "value", "default", "what it is"), options),
            knobs=_table(("knob", "values", "ZeRO stages that have it"), knobs),
        )
    )


def _values(option: Option) -> str:
    return _code(option.metavar) if option.metavar else "`true` or `false`"


def _default(option: Option) -> str:
    if option.default is None:
        return ""
    return _code(option.default if isinstance(option.default, str) else json.dumps(option.default))


def run_directory() -> str:
    run_dir = RunDir(Path("/"))
    rows = []
    for name, value in vars(RunDir).items():
        if isinstance(value, property):
            path: Path = getattr(run_dir, name)
            meaning = " ".join((value.__doc__ or "").split())
            rows.append((_code(f"{path.name}{'' if path.suffix else '/'}"), meaning))
    return _page(RUN_DIRECTORY.format(files=_table(("file", "what it is"), rows)))


def exit_codes() -> str:
    tree = re.findall(r"(\w+Error) +(\d+) +(.+)", errors.__doc__ or "")
    rows = [("0", "done", ""), ("1", "a bug; its traceback is on stderr", "")]
    rows += [(code, meaning, _code(name)) for name, code, meaning in tree]
    rows.sort(key=lambda row: int(row[0]))
    return _page(EXIT_CODES.format(codes=_table(("code", "what it means", "`exit_reason`"), rows)))


def results() -> str:
    planned = _result("many_settings")
    steps = _result("predicted_against_trained")
    by_hand = _result("throughput_against_hand_written")
    probes = _result("warm_against_cold")
    published = _result("published")
    rows = [
        (
            f"{planned['settings']:,} settings estimated and ranked, the profile being there",
            f"{planned['estimate_and_rank']['wall_s']:.2f} s",
            "many_settings.json",
        ),
        (
            "step time predicted by a probe over the trained one, at accumulation "
            + ", ".join(str(one["gradient_accumulation_steps"]) for one in steps["settings"]),
            ", ".join(f"{one['ratio']['median']:.2f}" for one in steps["settings"]),
            "predicted_against_trained.json",
        ),
        (
            "speed of the training over that of a loop written by hand, the same setting",
            f"{by_hand['ratio']:.2f}",
            "throughput_against_hand_written.json",
        ),
        (
            "a probe of four rungs by warm ranks over one by cold ranks",
            f"{probes['ratio']['median']:.2f} of the time",
            "warm_against_cold.json",
        ),
        (
            "published settings that ran and are said to fit",
            f"{published['ran']['said_to_fit']} of {published['ran']['rows']}",
            "published.json",
        ),
        (
            "published settings that ran out of memory and are said to fit",
            "{said_to_fit} of {rows}".format(**published["ran_out_of_memory"]),
            "published.json",
        ),
    ]
    table = _table(
        ("what", "figure", "`benchmarks/results/`"),
        [(what, figure, _code(file)) for what, figure, file in rows],
    )
    return _page(RESULTS.format(results=table))


def tools() -> str:
    rows = [
        (
            _code(name),
            ", ".join(f"{package} {version}" for package, version in found["versions"].items()),
            *(_taken(found["exports"].get(variant)) for variant in ("full", "lora")),
            found["date"],
        )
        for name, found in _result("exports")["tools"].items()
    ]
    columns = ("`--to`", "versions", "all parameters", "adapters", "date")
    return _page(TOOLS.format(tools=_table(columns, rows)))


def _taken(tried: dict[str, Any] | None) -> str:
    if tried is None:
        return "not tried"
    if not tried["accepted"]:
        return "refused"
    return f"read, {tried['steps']} steps trained" if tried["trained"] else "read"


def _result(name: str) -> Any:  # noqa: ANN401 - JSON
    return json.loads((REPOSITORY / "benchmarks" / "results" / f"{name}.json").read_text())


def _code(text: str) -> str:
    return f"`{text}`"


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines)


def _cell(text: str) -> str:
    """Return a text in which nothing ends the cell or is taken for HTML."""
    text = text.replace("|", r"\|")
    return text if text.startswith("`") else text.replace("<", r"\<")


def _page(text: str) -> str:
    return f"{MADE}\n{text}"


def main() -> None:
    for path, text in documents().items():
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        click.echo(path.relative_to(REPOSITORY))


if __name__ == "__main__":
    main()
