"""The house rules, read off the source: who imports whom, and what may be imported where."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "autotune"

LAYERS = (
    ("errors", "units", "optimizer"),
    ("hardware", "workload", "setting", "outcome", "knobs"),
    (
        "slurm",
        "sbatch",
        "standing",
        "kubernetes",
        "space",
        "zero",
        "prune",
        "memory",
        "throughput",
        "plan",
        "partial_checkpointing",
        "variants",
        "remedy",
        "emit",
        "exports",
        "config",
        "user_config",
        "devices",
        "prices",
        "recovery",
        "verify",
    ),
    (
        "lease",
        "rundir",
        "environment",
        "processes",
        "session",
        "time_limit",
        "model_source",
        "builtin",
        "chatglm3",
    ),
    ("events", "status"),
    ("detect", "dataset", "engine", "profile", "probe", "tune", "train"),
    ("nodes",),
    (
        "intake",
        "documents",
        "handoff",
        "script",
        "virtual_judge",
        "outcome_cache",
        "report",
        "exporting",
        "doctor",
        "chronicle",
        "staged",
    ),
    ("pipeline", "rehearse"),
    ("cli",),
)
"""From the bottom to the top; a part imports only from below."""

BESIDE = {
    "outcome": {"setting"},
    "workload": {"setting"},
    "knobs": {"setting"},
    "memory": {"space", "zero"},
    "emit": {"zero"},
    "prune": {"space"},
    "plan": {"memory", "prune", "space", "throughput"},
    "partial_checkpointing": {"memory", "plan", "prune", "space", "throughput"},
    "variants": {"plan", "prune", "space", "throughput"},
    "remedy": {"devices", "memory", "plan", "space", "throughput"},
    "prices": {"devices"},
    "recovery": {"zero"},
    "user_config": {"config"},
    "model_source": {"builtin", "chatglm3", "environment", "rundir"},
    "chatglm3": {"rundir"},
    "rundir": {"lease"},
    "status": {"events"},
    "processes": {"session"},
    "engine": {"dataset"},
    "profile": {"engine"},
    "probe": {"engine", "detect"},
    "tune": {"probe"},
    "train": {"engine", "dataset"},
    "documents": {"intake", "tune"},
    "handoff": {"intake"},
    "staged": {"intake", "chronicle", "report"},
    "script": {"intake", "documents", "staged"},
    "virtual_judge": {"intake"},
    "outcome_cache": {"intake"},
    "chronicle": {"intake"},
    "rehearse": {"pipeline"},
}
"""What a part may import from its own layer."""

ENGINE_ROOMS = (
    *("engine", "profile", "probe.worker"),
    *("train.entry", "train.adapters", "train.metrics", "train.state", "train.eight_bit"),
    *("train.stopping", "train.trainer", "train.weights", "train.progress"),
    *("script.watching", "script.torchrun"),
)
HOMES = {
    "torch": ENGINE_ROOMS,
    "deepspeed": ENGINE_ROOMS,
    "transformers": (*ENGINE_ROOMS, "dataset"),
    "accelerate": ENGINE_ROOMS,
    "peft": ENGINE_ROOMS,
    "bitsandbytes": ENGINE_ROOMS,
    "pynvml": ("detect",),
    "optuna": ("tune",),
    "optuna_dashboard": ("tune",),
    "jinja2": ("dataset", "report"),
    "sqlalchemy": ("tune",),
    "click": ("cli",),
}
"""Libraries that are imported only in these parts, at the top of a module or inside a function."""

HEAVY = ("torch", "transformers", "deepspeed", "bitsandbytes", "optuna", "sqlalchemy")


def _name_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


MODULES = {_name_of(path): ast.parse(path.read_text()) for path in sorted(PACKAGE.rglob("*.py"))}
RANK = {part: rank for rank, layer in enumerate(LAYERS) for part in layer}


def _imports(tree: ast.Module) -> Iterator[str]:
    """Yield the full dotted name of all that is imported anywhere in a module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _is_in(module: str, home: str) -> bool:
    return module == home or module.startswith(home + ".")


def _imports_at_the_top(name: str, seen: set[str]) -> set[str]:
    """Return the libraries that importing a module of the package brings, through others too."""
    if name in seen:
        return set()
    seen.add(name)
    libraries: set[str] = set()
    for node in MODULES[name].body:
        if not isinstance(node, ast.Import | ast.ImportFrom):
            continue
        for imported in _imports(ast.Module(body=[node], type_ignores=[])):
            if not _is_in(imported, "autotune"):
                libraries.add(imported.partition(".")[0])
                continue
            inner = imported.removeprefix("autotune").removeprefix(".")
            target = inner if inner in MODULES else inner.rpartition(".")[0]
            ancestors = [target.rsplit(".", cut)[0] for cut in range(target.count(".") + 1)]
            for module in ancestors:
                libraries |= _imports_at_the_top(module, seen)
    return libraries


def _is_heavy(name: str) -> bool:
    return bool(_imports_at_the_top(name, set()) & set(HEAVY))


def _run(program: str, *arguments: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr


def test_every_part_of_the_package_has_its_layer() -> None:
    parts = {name.partition(".")[0] for name in MODULES if name}

    assert parts <= set(RANK), "a new part needs a place in LAYERS"


@pytest.mark.parametrize("module", [name for name in MODULES if name])
def test_a_module_imports_only_from_below(module: str) -> None:
    part = module.partition(".")[0]
    parts = {name.split(".")[1] for name in _imports(MODULES[module]) if _is_in(name, "autotune")}
    allowed = {other for other in RANK if RANK[other] < RANK[part]}
    allowed |= {part, "__version__"} | BESIDE.get(part, set())

    assert parts <= allowed


@pytest.mark.parametrize("library", HOMES)
def test_a_library_is_imported_only_at_its_home(library: str) -> None:
    importers = {
        module
        for module, tree in MODULES.items()
        if any(_is_in(name, library) for name in _imports(tree))
    }

    strangers = {
        module for module in importers if not any(_is_in(module, home) for home in HOMES[library])
    }
    assert strangers == set()


def test_what_is_cuda_s_own_is_named_only_in_one_small_module() -> None:
    names = re.compile(r"torch\.cuda|from torch import .*\bcuda\b|import torch\.cuda")
    users = {_name_of(path) for path in PACKAGE.rglob("*.py") if names.search(path.read_text())}

    assert users == {"engine.cuda"}
    assert len((PACKAGE / "engine" / "cuda.py").read_text().splitlines()) < 100


def test_nothing_is_printed_but_by_click() -> None:
    printers = {
        module
        for module, tree in MODULES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("print", "sys.stdout.write")
    }

    assert printers == set()


def test_only_the_command_line_and_ranks_exit() -> None:
    exits = {
        module
        for module, tree in MODULES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("sys.exit", "exit", "quit")
    }

    assert exits <= {"cli"}


def test_no_module_has_a_name_that_says_nothing() -> None:
    words = {word for name in MODULES for word in name.split(".")}

    assert words.isdisjoint({"utils", "util", "helpers", "common", "misc"})


def test_the_command_line_loads_no_heavy_library() -> None:
    _run(
        "import sys, autotune.cli\n"
        f"loaded = [name for name in {HEAVY!r} if name in sys.modules]\n"
        "assert not loaded, loaded"
    )


IMPORT_EACH_ALONE = """
import importlib, sys
for name in sys.argv[1:]:
    for known in [known for known in sys.modules if known.partition(".")[0] == "autotune"]:
        del sys.modules[known]
    importlib.import_module(name)
"""


def test_light_modules_import_alone_and_bring_nothing_heavy() -> None:
    light = [f"autotune.{name}".rstrip(".") for name in MODULES if not _is_heavy(name)]
    check = f"loaded = [name for name in {HEAVY!r} if name in sys.modules]\nassert not loaded"

    assert {"autotune.plan", "autotune.memory", "autotune.cli", "autotune.rundir"} <= set(light)
    _run(IMPORT_EACH_ALONE + check, *light)


def test_heavy_modules_import_alone() -> None:
    heavy = [f"autotune.{name}" for name in MODULES if _is_heavy(name)]

    assert "autotune.engine.trainer" in heavy
    _run(IMPORT_EACH_ALONE, *heavy)
