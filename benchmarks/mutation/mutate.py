"""Changes what decides about memory and devices, and counts the changes that no test notices.

    python benchmarks/mutation/mutate.py [--only classify]

Each mutant is one change to one module: a comparison turned or moved by one, an operator exchanged,
a condition negated, a number or a text altered, a result dropped. Its tests run against a copy of
the package; a mutant is killed if they fail or hang. Texts of documentation are left alone.
Writes benchmarks/results/mutation.json.
"""

import argparse
import ast
import copy
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).parent.parent.parent

TARGETS = {
    "classify": ("autotune/probe/classify.py", ("tests/test_classify.py",)),
    "masks": ("autotune/detect/masks.py", ("tests/test_detect_nvidia.py",)),
    "budget": ("autotune/detect/budget.py", ("tests/test_gpu_budget.py",)),
}
"""The OOM classifier, the parser of CUDA_VISIBLE_DEVICES, the headroom rule, and their tests."""

PATIENCE_S = 120

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
    tree = ast.parse(source)
    places = [node for node in ast.walk(tree) if not _is_documentation(node, tree)]
    for place, node in enumerate(places):
        for way in range(len(list(changes(copy.deepcopy(node))))):
            changed = ast.parse(source)
            spot = [one for one in ast.walk(changed) if not _is_documentation(one, changed)][place]
            before = ast.unparse(spot)
            apply = list(changes(spot))[way]
            apply()
            text = ast.unparse(ast.fix_missing_locations(changed))
            yield Mutant(getattr(spot, "lineno", 0), f"{before} -> {ast.unparse(spot)}", text)


def _is_documentation(node: ast.AST, tree: ast.AST) -> bool:
    """Tell whether a node is a text that stands alone as a statement, or part of an annotation."""
    if not isinstance(node, ast.Constant):
        return False
    for parent in ast.walk(tree):
        if isinstance(parent, ast.Expr) and parent.value is node:
            return True
        annotation = getattr(parent, "annotation", None) or getattr(parent, "returns", None)
        if isinstance(annotation, ast.AST) and node in ast.walk(annotation):
            return True
    return False


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
            yield Change(node, "value", f"XX{value}")
        case ast.Name(id=name) if name in NAMES:
            yield Change(node, "id", NAMES[name])
        case ast.Attribute(attr=name) if name in NAMES:
            yield Change(node, "attr", NAMES[name])
        case ast.Return(value=value) if value is not None and not _is_none(value):
            yield Change(node, "value", ast.Constant(value=None))
        case _:
            return


def _is_none(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and node.value is None


@dataclass(frozen=True, slots=True)
class Change:
    node: ast.AST
    field: str
    value: object

    def __call__(self) -> None:
        setattr(self.node, self.field, self.value)


def survives(mutant: Mutant, module: Path, tests: tuple[str, ...], package: Path) -> bool:
    """Run the tests against the changed module; returns whether they pass all the same."""
    target = package / module
    original = target.read_text()
    target.write_text(mutant.source)
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
    try:
        done = subprocess.run(
            command,
            cwd=REPOSITORY,
            env=os.environ | {"PYTHONPATH": str(package), "PYTHONDONTWRITEBYTECODE": "1"},
            capture_output=True,
            timeout=PATIENCE_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return False
    finally:
        target.write_text(original)
    return done.returncode == 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=TARGETS, action="append")
    options = parser.parse_args()
    results = {}
    with tempfile.TemporaryDirectory(prefix="autotune-mutants-") as scratch:
        package = Path(scratch)
        shutil.copytree(REPOSITORY / "autotune", package / "autotune")
        for name in options.only or TARGETS:
            path, tests = TARGETS[name]
            source = (REPOSITORY / path).read_text()
            unchanged = Mutant(0, "nothing", ast.unparse(ast.parse(source)))
            assert survives(unchanged, Path(path), tests, package), "tests fail without a change"
            made = list(mutants(source))
            survivors = []
            for number, mutant in enumerate(made, 1):
                if survives(mutant, Path(path), tests, package):
                    survivors.append({"line": mutant.line, "change": mutant.change})
                    print(f"survived: {path}:{mutant.line}: {mutant.change}", flush=True)
                print(f"{name} {number}/{len(made)}", file=sys.stderr, end="\r")
            killed = len(made) - len(survivors)
            results[name] = {
                "module": path,
                "mutants": len(made),
                "killed": killed,
                "score": killed / len(made),
                "survivors": survivors,
            }
            print(f"{path}: {killed} of {len(made)} killed ({killed / len(made):.1%})", flush=True)
    if options.only is None:
        out = REPOSITORY / "benchmarks" / "results" / "mutation.json"
        out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
