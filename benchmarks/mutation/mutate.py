"""Changes what decides about memory and devices, and counts the changes that no test notices.

    python benchmarks/mutation/mutate.py [--only classify]

Each mutant is one change to one module: a comparison turned or moved by one, an operator exchanged,
a condition negated, a number or a text altered, a result dropped. Its tests run against it in a
fork of this process; a mutant is killed if they fail or hang. Texts of documentation are left.
Writes benchmarks/results/mutation.json.
"""

import argparse
import ast
import copy
import importlib.abc
import importlib.machinery
import json
import os
import re
import signal
import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# What the tests need besides the package: a fork has it.
import hypothesis
import numpy as np
import psutil
import pytest

REPOSITORY = Path(__file__).parent.parent.parent

TARGETS = {
    "classify": ("autotune/probe/classify.py", ("tests/test_classify.py",)),
    "masks": ("autotune/detect/masks.py", ("tests/test_detect_nvidia.py",)),
    "budget": ("autotune/detect/budget.py", ("tests/test_gpu_budget.py",)),
}
"""The OOM classifier, the parser of CUDA_VISIBLE_DEVICES, the headroom rule, and their tests."""

PATIENCE_S = 60

PREPARED = (hypothesis, np, psutil)

COMPARISONS: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
}
OPERATORS: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Add,
    ast.FloorDiv: ast.Mult,
    ast.BitOr: ast.BitAnd,
    ast.BitAnd: ast.BitOr,
}
NAMES = {"min": "max", "max": "min", "any": "all", "all": "any", "startswith": "endswith"}


@dataclass(frozen=True, slots=True)
class Mutant:
    """A module with one change."""

    line: int
    change: str
    source: str


def mutants(source: str) -> Iterator[Mutant]:
    """Yield every change of a module, one at a time."""
    for place, node in enumerate(_places(ast.parse(source))):
        for way in range(len(list(changes(copy.deepcopy(node))))):
            changed = ast.parse(source)
            spot = _places(changed)[place]
            before = ast.unparse(spot)
            list(changes(spot))[way]()
            text = ast.unparse(ast.fix_missing_locations(changed))
            yield Mutant(getattr(spot, "lineno", 0), f"{before} -> {ast.unparse(spot)}", text)


def _places(tree: ast.Module) -> list[ast.AST]:
    """Return the nodes that do something: no documentation, annotation or decorator."""
    idle: set[ast.AST] = set()
    for node in ast.walk(tree):
        parts = [
            getattr(node, "annotation", None),
            getattr(node, "returns", None),
            *getattr(node, "decorator_list", ()),
        ]
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            parts.append(node.value)
        idle |= {inner for part in parts if part is not None for inner in ast.walk(part)}
    return [node for node in ast.walk(tree) if node not in idle]


def changes(node: ast.AST) -> Iterator["Change"]:  # noqa: C901, PLR0912 - a case a kind
    """Yield what can be changed about a node, as functions that do it."""
    match node:
        case ast.Compare(ops=[op, *_]) if type(op) in COMPARISONS:
            yield Change(node, "ops", [COMPARISONS[type(op)](), *node.ops[1:]])
        case ast.BinOp(op=operator) if type(operator) in OPERATORS:
            yield Change(node, "op", OPERATORS[type(operator)]())
        case ast.BoolOp(op=ast.And()):
            yield Change(node, "op", ast.Or())
        case ast.BoolOp(op=ast.Or()):
            yield Change(node, "op", ast.And())
        case ast.IfExp(test=test):
            yield Change(node, "test", ast.UnaryOp(op=ast.Not(), operand=test))
        case ast.If(test=test):
            yield Change(node, "test", ast.UnaryOp(op=ast.Not(), operand=test))
        case ast.Constant(value=bool(value)):
            yield Change(node, "value", not value)
        case ast.Constant(value=int(value)):
            yield Change(node, "value", value + 1)
        case ast.Constant(value=float(value)):
            yield Change(node, "value", value * 1.5)
        case ast.Constant(value=str(value)):
            fewer = list(without_an_alternative(value))
            yield from (Change(node, "value", text) for text in fewer or [f"XX{value}"])
        case ast.Name(id=name) if name in NAMES:
            yield Change(node, "id", NAMES[name])
        case ast.Attribute(attr=name) if name in NAMES:
            yield Change(node, "attr", NAMES[name])
        case ast.Return(value=value) if value is not None and not _is_none(value):
            yield Change(node, "value", ast.Constant(value=None))
        case _:
            return


def without_an_alternative(pattern: str) -> Iterator[str]:
    """Yield a regular expression of alternatives without each of them, those of a group too."""
    for match in re.finditer(r"\(\?:([^()]*)\)", pattern):
        kinds = match[1].split("|")
        for kind in kinds if len(kinds) > 1 else ():
            left = "|".join(other for other in kinds if other != kind)
            yield f"{pattern[: match.start(1)]}{left}{pattern[match.end(1) :]}"
    whole = re.split(r"\|(?![^()]*\))", pattern)
    for one in whole if len(whole) > 1 else ():
        yield "|".join(other for other in whole if other != one)


def _is_none(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and node.value is None


@dataclass(frozen=True, slots=True)
class Change:
    node: ast.AST
    field: str
    value: object

    def __call__(self) -> None:
        setattr(self.node, self.field, self.value)


class Changed(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports one module from another source than its file."""

    def __init__(self, module: str, source: str) -> None:
        self._module = module
        self._source = source

    def find_spec(
        self, fullname: str, path: object, target: object = None
    ) -> importlib.machinery.ModuleSpec | None:
        del path, target
        if fullname != self._module:
            return None
        return importlib.machinery.ModuleSpec(fullname, self)

    def exec_module(self, module: types.ModuleType) -> None:
        exec(compile(self._source, f"<changed {self._module}>", "exec"), module.__dict__)  # noqa: S102


def survives(mutant: Mutant, module: str, tests: tuple[str, ...]) -> bool:
    """Run the tests against the changed module; returns whether they pass all the same.

    In a fork of this process, which has pytest and what the package needs imported, and nothing of
    the package itself.
    """
    child = os.fork()
    if not child:
        # Its own time counts: a busy machine is no endless loop.
        signal.setitimer(signal.ITIMER_VIRTUAL, PATIENCE_S)
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        sys.meta_path.insert(0, Changed(module, mutant.source))
        os._exit(pytest.main(["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *tests]))
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status) == 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=TARGETS, action="append")
    options = parser.parse_args()
    results = {}
    os.chdir(REPOSITORY)
    for name in options.only or TARGETS:
        path, tests = TARGETS[name]
        module = path.removesuffix(".py").replace("/", ".")
        source = (REPOSITORY / path).read_text()
        unchanged = Mutant(0, "nothing", ast.unparse(ast.parse(source)))
        assert survives(unchanged, module, tests), "tests fail without a change"
        made = list(mutants(source))
        survivors = []
        for mutant in made:
            if survives(mutant, module, tests):
                survivors.append({"line": mutant.line, "change": mutant.change})
                print(f"survived: {path}:{mutant.line}: {mutant.change}", flush=True)
        killed = len(made) - len(survivors)
        results[name] = {
            "module": path,
            "mutants": len(made),
            "killed": killed,
            "score": killed / len(made),
            "survivors": survivors,
        }
        print(f"{path}: {killed} of {len(made)} killed ({killed / len(made):.1%})", flush=True)
    out = REPOSITORY / "benchmarks" / "results" / "mutation.json"
    known = json.loads(out.read_text()) if out.exists() else {}
    out.write_text(json.dumps(known | results, indent=1) + "\n")


if __name__ == "__main__":
    main()
