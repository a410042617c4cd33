"""The documentation says what is so: its blocks are parsed or run, its reference is made."""

import ast
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import click
import jsonschema
import make_reference
import pytest
import yaml
from conftest import REPOSITORY

from autotune import cli, errors
from autotune.config import OPTIONS, Layer, json_schema, resolve
from autotune.errors import ConfigError
from autotune.rundir import RunDir

DOCS = REPOSITORY / "docs"
PAGES = [
    REPOSITORY / "README.md",
    REPOSITORY / "CONTRIBUTING.md",
    *sorted(DOCS.rglob("*.md")),
    REPOSITORY / "configs" / "README.md",
    REPOSITORY / "configs" / "models" / "README.md",
    REPOSITORY / "examples" / "quickstart" / "README.md",
]
SCHEMA = json.loads((REPOSITORY / "configs" / "autotune.schema.json").read_text())

_FENCE = re.compile(r"^```([\w{}]*)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_INDENTED = re.compile(r"(?:^ {4}.*\n)+", re.MULTILINE)
_LINK = re.compile(r"\]\(([^)#\s]*)(#[^)\s]*)?\)")
_OF_THE_SYSTEM = {
    *("bash", "cat", "cd", "done", "eval", "exec", "exit", "export", "if", "mkdir"),
    *("scontrol", "test", "while", "wait"),
}
"""What blocks may start besides autotune, make and pip: `bash -n` reads them."""


@dataclass(frozen=True)
class Block:
    """A block of code; an indented one is in no language unless it starts autotune or pip."""

    page: Path
    language: str
    text: str

    def __str__(self) -> str:
        first = self.text.strip().splitlines()[0] if self.text.strip() else ""
        return f"{self.page.relative_to(REPOSITORY)}: {first[:50]}"


def blocks_of(page: Path) -> Iterator[Block]:
    text = page.read_text()
    for language, content in _FENCE.findall(text):
        yield Block(page, language, content)
    for content in _INDENTED.findall(_FENCE.sub("", text)):
        lines = [line[4:] for line in content.splitlines()]
        if any(re.match(r"(\S*/)?(autotune|pip) ", line) for line in lines):
            yield Block(page, "sh", "\n".join(lines))


BLOCKS = [block for page in PAGES for block in blocks_of(page)]


def of_language(*languages: str) -> pytest.MarkDecorator:
    blocks = [block for block in BLOCKS if block.language in languages]
    assert blocks, languages
    return pytest.mark.parametrize("block", blocks, ids=str)


def test_every_block_is_in_a_language_that_is_tested() -> None:
    known = {"sh", "bash", "text", "yaml", "json", "python", "{toctree}"}
    assert {block.language for block in BLOCKS} <= known


def commands_of(script: str) -> Iterator[list[str]]:
    """Yield the words of each simple command of a script, assignments before it left out."""
    joined = script.replace("\\\n", " ")
    for line in joined.splitlines():
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        words = shlex.split(line, comments=True)
        while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
            words = words[1:]
        if words:
            yield words


def parse_command_line(words: list[str]) -> None:
    """Read a command line as autotune does, without running it."""
    context = click.Context(cli.group, info_name="autotune")
    name, command, arguments = cli.group.resolve_command(context, list(words))
    assert command is not None
    command.make_context(name, arguments, parent=context)


@of_language("sh", "bash")
def test_the_commands_of_a_block_are_ones_that_there_are(block: Block) -> None:
    subprocess.run(["bash", "-n"], input=block.text, text=True, check=True)
    targets = re.findall(r"^([\w-]+):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE)
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    for words in commands_of(block.text):
        program = Path(words[0]).name
        arguments = [word for word in words[1:] if word not in {"&", "|", "||", "&&"}]
        if program == "autotune":
            parse_command_line(arguments)
        elif program == "make":
            assert {word for word in arguments if "=" not in word} <= set(targets)
        elif program == "pip":
            for extra in re.findall(r"^([\w-]+)\[([\w-]+)\]$", arguments[-1]):
                assert extra[0] == project["name"]
                assert extra[1] in project["optional-dependencies"]
        else:
            assert program in _OF_THE_SYSTEM, words


def test_a_command_that_there_is_not_would_be_found() -> None:
    with pytest.raises(click.UsageError):
        parse_command_line(["plan", "--no-such-option"])
    with pytest.raises(click.UsageError):
        parse_command_line(["plan", "--global-batch-size", "none"])


@of_language("yaml")
def test_a_yaml_block_is_a_configuration(block: Block) -> None:
    content = yaml.safe_load(block.text) or {}
    resolve([Layer(str(block), content)])
    jsonschema.validate(content, SCHEMA)


@of_language("python")
def test_a_python_block_is_python(block: Block) -> None:
    ast.parse(block.text)


def test_a_help_block_is_the_real_help() -> None:
    shown = [block for block in BLOCKS if block.text.startswith("$ autotune")]
    assert {block.text.split()[2] for block in shown} == {"--help", *cli.COMMANDS}
    for block in shown:
        command, _, text = block.text.partition("\n")
        words = command.split()[2:-1]
        assert command.endswith(" --help")
        assert text == make_reference.help_of(*words), f"{block}: run `make docs-reference`"


def test_the_help_of_the_documentation_is_that_of_the_program() -> None:
    done = subprocess.run(
        [str(Path(sys.executable).parent / "autotune"), "export", "--help"],
        env={**os.environ, "COLUMNS": "80"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == make_reference.help_of("export")


@pytest.mark.parametrize("path", make_reference.documents(), ids=lambda path: path.name)
def test_what_is_made_of_the_source_is_current(path: Path) -> None:
    assert path.read_text() == make_reference.documents()[path], "run `make docs-reference`"


def test_every_key_has_its_line() -> None:
    text = (DOCS / "reference" / "configuration.md").read_text()
    for option in OPTIONS:
        assert f"| `{option.name}` |" in text


def test_every_option_is_in_the_help_that_is_shown() -> None:
    text = (DOCS / "reference" / "commands.md").read_text()
    context = click.Context(cli.group)
    for name in cli.COMMANDS:
        command = cli.group.get_command(context, name)
        assert command is not None
        section = text.split(f"$ autotune {name} --help")[1].split("```")[0]
        for parameter in command.params:
            for flag in parameter.opts if isinstance(parameter, click.Option) else ():
                assert flag in section, (name, flag)


def test_every_exit_code_is_there() -> None:
    codes = {error.exit_code for error in vars(errors).values() if hasattr(error, "exit_code")}
    text = (DOCS / "reference" / "exit-codes.md").read_text()
    assert {int(code) for code in re.findall(r"^\| (\d+) \|", text, re.MULTILINE)} == codes | {0}


def test_every_file_of_the_run_directory_is_said_to_be_something() -> None:
    text = (DOCS / "reference" / "run-directory.md").read_text()
    for name, value in vars(RunDir).items():
        if isinstance(value, property):
            assert value.__doc__, f"RunDir.{name} needs a docstring: what is in the file"
            assert f"| `{getattr(RunDir(Path('/')), name).name}" in text


def test_every_page_is_in_the_table_of_contents() -> None:
    index = (DOCS / "index.md").read_text()
    listed = set(re.findall(r"^[\w/-]+$", index, re.MULTILINE))
    pages = {str(page.relative_to(DOCS).with_suffix("")) for page in DOCS.rglob("*.md")}
    assert pages - {"index"} <= listed


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_links_lead_somewhere(page: Path) -> None:
    for target, _ in _LINK.findall(_FENCE.sub("", page.read_text())):
        if target and not target.startswith(("http:", "https:", "mailto:")):
            assert (page.parent / target).exists(), target


@pytest.mark.slow
def test_the_site_is_built_without_a_warning(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "sphinx", "-q", "-W", "-E", "-b", "html", DOCS, tmp_path],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "reference" / "commands.html").exists()


@pytest.mark.slow
def test_the_tutorial_runs_from_its_first_block_to_its_last(tmp_path: Path) -> None:
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "--quiet", REPOSITORY, clone], check=True)
    (clone / ".venv").symlink_to(REPOSITORY / ".venv")
    # Older than the environment, so that `make install` leaves that alone.
    for asked_by_make in ("pyproject.toml", "constraints.txt"):
        os.utime(clone / asked_by_make, (0, 0))
    blocks = [block for block in BLOCKS if block.page.name == "tutorial.md"]
    for block in blocks:
        done = subprocess.run(
            ["bash", "-e"], input=block.text, cwd=clone, text=True, capture_output=True, check=False
        )
        assert done.returncode == 0, done.stderr
    assert (clone / "runs" / "tutorial" / "model" / "model.safetensors").exists()


def test_every_option_says_what_an_editor_may_offer() -> None:
    for option in OPTIONS:
        assert option.schema["anyOf"][0], f"{option.name}: say what its reader takes with @_takes"


def test_the_schema_is_one() -> None:
    jsonschema.Draft202012Validator.check_schema(json_schema())


@pytest.mark.parametrize("path", sorted((REPOSITORY / "configs").glob("*.yaml")), ids=str)
def test_the_shipped_configurations_follow_the_schema(path: Path) -> None:
    jsonschema.validate(yaml.safe_load(path.read_text()), SCHEMA)


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("learning_rate", [2e-5, "2e-5", 0, -1, "fast", None]),
        ("global_batch_size", [32, "32", 0, 1.5, "many"]),
        ("max_seq_length", [2048, "auto", 0, "long"]),
        ("method", ["lora", "both", 1]),
        ("packing", [True, False, "yes", 1]),
        ("lora_dropout", [0.0, 0.5, 1.0, -0.1]),
        ("tune_budget", ["20m", "auto", 90, "soon"]),
        ("device_memory", ["2GiB", 1024, "much"]),
        ("dataset", ["a.jsonl", ["a.jsonl", "b.jsonl@2"], [True]]),
        ("trainer", [{"save_steps": 5}, "save_steps=5", ["a=1", "b=2"], "save_steps", 5]),
        ("set", [{"zero_stage": [2, 3]}, "zero_stage=2", {"zero_stages": 2}, "zero_stage"]),
        ("max_bad_lines", [5, "2%", -1, "few"]),
        ("lora_targets", ["q_proj", ["q_proj", "v_proj"]]),
        ("optimizer", ["adafactor", "adamw_torch", 7]),
        ("no_such_key", [1]),
    ],
)
def test_the_schema_takes_what_is_taken_and_refuses_what_is_refused(
    key: str, values: list[object]
) -> None:
    method = {"method": "lora"} if key.startswith("lora_") else {}
    for value in values:
        content = {key: value, **method}
        try:
            resolve([Layer("test", content)])
            taken = True
        except ConfigError:
            taken = False
        assert jsonschema.Draft202012Validator(SCHEMA).is_valid(content) is taken, (key, value)


def completions(line: str) -> list[str]:
    """Return what bash would offer at the end of a line."""
    done = subprocess.run(
        [str(Path(sys.executable).parent / "autotune")],
        env={
            **os.environ,
            "_AUTOTUNE_COMPLETE": "bash_complete",
            "COMP_WORDS": line,
            "COMP_CWORD": str(len(shlex.split(line)) - (not line.endswith(" "))),
        },
        capture_output=True,
        text=True,
        check=True,
    )
    return [offer.partition(",")[2] or offer for offer in done.stdout.splitlines()]


def test_commands_options_and_choices_complete() -> None:
    assert completions("autotune re") == [name for name in cli.COMMANDS if name.startswith("re")]
    assert "--method" in completions("autotune run --m")
    assert completions("autotune run --method q") == ["qlora"]
    assert completions("autotune export run --to tr") == ["transformers", "trl"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_there_is_a_script_for_each_shell(shell: str) -> None:
    done = subprocess.run(
        [str(Path(sys.executable).parent / "autotune")],
        env={**os.environ, "_AUTOTUNE_COMPLETE": f"{shell}_source"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert f"_AUTOTUNE_COMPLETE={shell}_complete" in done.stdout


def test_the_block_for_bash_makes_it_complete() -> None:
    page = DOCS / "how-to" / "shell-completion.md"
    (block,) = [block for block in BLOCKS if block.page == page and block.language == "bash"]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-c", f"{block.text}\ncomplete -p autotune"],
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "autotune" in done.stdout
