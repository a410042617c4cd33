"""Looks out for what a script imports and wraps it: nothing is imported that it does not import."""

import importlib.machinery
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.abc import Loader, MetaPathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

from autotune.script.errand import ERRAND, OWNER, ScriptErrand

Patch = Callable[[ModuleType], None]

_LOCAL_RANK = ("--local_rank", "--local-rank")


def install() -> None:
    """Have the errand of the environment done, in the rank that it is for.

    Below the rank, as in a worker that it starts, all that is done is to say so where DeepSpeed is
    started there.
    """
    os.environ.setdefault(OWNER, str(os.getpid()))
    errand = ScriptErrand.from_json(json.loads(Path(os.environ[ERRAND]).read_text()))
    is_rank = os.environ[OWNER] == str(os.getpid())
    options: dict[str, Any] = {}
    from autotune.script.rank import Rank

    rank = Rank(errand, int(os.environ.get("RANK", "0")), options, is_started=is_rank)
    patches: dict[str, Patch] = {
        "deepspeed": rank.wrap_deepspeed,
        "accelerate.utils.deepspeed": rank.wrap_accelerate,
        "torch.optim.optimizer": rank.wrap_torch,
    }
    if is_rank:
        patches["argparse"] = lambda module: _watch_options(module, options)
        rank.begin()
    for name in [name for name in patches if name in sys.modules]:
        patches.pop(name)(sys.modules[name])
    sys.meta_path.insert(0, _Lookout(patches))


class _Lookout(MetaPathFinder):
    """Finds modules as the other finders do, and patches some when they have been executed."""

    def __init__(self, patches: Mapping[str, Patch]) -> None:
        self._patches = dict(patches)

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in self._patches:
            return None
        for finder in sys.meta_path:
            find = getattr(finder, "find_spec", None)
            spec = None if finder is self or find is None else find(fullname, path, target)
            if spec is not None:
                # Whoever finds a module need not import it: some only look whether it is there.
                if spec.loader is not None:
                    _after_execution(spec.loader, self._patches[fullname])
                return spec  # type: ignore[no-any-return]
        return None


def _after_execution(loader: Loader, patch: Patch) -> None:
    execute = loader.exec_module

    def execute_and_patch(module: ModuleType) -> None:
        execute(module)
        patch(module)

    loader.exec_module = execute_and_patch  # type: ignore[method-assign]


def _watch_options(module: ModuleType, options: dict[str, Any]) -> None:
    """Take down the options that a script's parser knows, with their values.

    A parser that knows `--local_rank` gets it, as from DeepSpeed's own launcher.
    """
    parser_class: Any = module.ArgumentParser
    parse = parser_class.parse_known_args

    def parse_and_note(self: Any, args: Any = None, *rest: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - as argparse's
        from_command = args is None
        if from_command:
            args = [*sys.argv[1:], *_local_rank(self, sys.argv[1:])]
        known = parse(self, args, *rest, **kwargs)
        if from_command or list(args) == sys.argv[1:]:
            options.update(_options(self, known[0]))
        return known

    parser_class.parse_known_args = parse_and_note


def _local_rank(parser: Any, argv: Sequence[str]) -> list[str]:  # noqa: ANN401 - an ArgumentParser
    names = [name for name in _LOCAL_RANK if name in parser._option_string_actions]  # noqa: SLF001
    given = any(word.partition("=")[0] in _LOCAL_RANK for word in argv)
    rank = os.environ.get("LOCAL_RANK")
    return [f"{names[0]}={rank}"] if names and not given and rank is not None else []


def _options(parser: Any, namespace: Any) -> dict[str, Any]:  # noqa: ANN401 - argparse's
    found = {}
    # argparse has no public way to ask a parser for its options.
    for name, action in parser._option_string_actions.items():  # noqa: SLF001
        value = getattr(namespace, action.dest, None)
        plain = value is None or isinstance(value, str | int | float | bool)
        takes_value = action.nargs != 0
        found[name] = {"value": value if plain else str(value), "takes_value": takes_value}
    return found
