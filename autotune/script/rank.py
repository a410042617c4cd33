"""What is done inside a rank of a user's script.

Its DeepSpeed engine is given another config and watched, and it ends when enough is known.
"""

import atexit
import functools
import inspect
import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from types import ModuleType, TracebackType
from typing import TYPE_CHECKING, Any

import psutil

from autotune.errors import raised_in
from autotune.probe.worker import Answer, answer_path
from autotune.script.errand import OWNER, ScriptErrand, merged

if TYPE_CHECKING:
    from autotune.script.watching import Watched

_STEPS_WITHOUT_ENGINE = 3
_MESSAGE_CHARACTERS = 600
_IDLE_S = 0.2


class Rank:
    """A rank, from its interpreter's start on.

    Args:
        errand: what it is told.
        rank: its number.
        options: where what its parser knows is written to as it is found.
        is_started: whether this process is the rank, and none that it has started.
    """

    def __init__(
        self, errand: ScriptErrand, rank: int, options: dict[str, Any], *, is_started: bool
    ) -> None:
        self._errand = errand
        self._rank = rank
        self._options = options
        self._is_started = is_started
        self._answer: Answer | None = None
        if errand.answers is not None:
            self._answer = Answer(str(answer_path(Path(errand.answers), rank)))
        self._facts: dict[str, Any] = {"options": options}
        self._watched: Watched | None = None
        self._raised = False

    def begin(self) -> None:
        """Answer from now on, exceptions that nobody catches included."""
        if self._answer is None:
            return
        self._answer.write("phase", phase="start")
        self._answer.beat(_Work())
        self._note()
        before = sys.excepthook

        def on_exception(
            kind: type[BaseException], error: BaseException, trace: TracebackType | None
        ) -> None:
            if self._is_here():
                self._raised = True
                before(kind, error, trace)
                self._die(error)
            before(kind, error, trace)

        sys.excepthook = on_exception
        atexit.register(self._at_exit)

    def _is_here(self) -> bool:
        """Whether this process is the rank, and none that was forked from it."""
        return self._is_started and os.environ.get(OWNER) == str(os.getpid())

    def _die(self, error: BaseException) -> None:
        self._end_with(
            f"{type(error).__module__}.{type(error).__qualname__}",
            str(error),
            raised_in=raised_in(error),
            errno=getattr(error, "errno", None),
        )

    def _end_with(self, exception: str, message: str, **more: Any) -> None:  # noqa: ANN401 - JSON
        """Say why the rank cannot go on, and end it with all that it would do at its end."""
        assert self._answer is not None
        sys.stdout.flush()
        sys.stderr.flush()
        text = message.strip()[:_MESSAGE_CHARACTERS]
        self._answer.write("death", exception=exception, message=text, **more)
        os._exit(1)

    def _at_exit(self) -> None:
        if not self._is_here() or self._raised or self._watched is None:
            return
        assert self._answer is not None
        if not self._watched.finish():
            self._end_with(
                "TooFewSteps",
                f"the script ended after {self._watched.steps} optimizer steps, and a probe needs "
                "3: give it more rows or steps",
            )
        self._note()
        self._answer.write("done")

    def wrap_torch(self, module: ModuleType) -> None:
        """Look out for a training that goes on without DeepSpeed."""
        if self._answer is None or not self._is_started:
            return
        steps = [0]

        def stepped(*_: Any) -> None:  # noqa: ANN401 - torch's hook
            steps[0] += 1
            if steps[0] >= _STEPS_WITHOUT_ENGINE and self._watched is None and self._is_here():
                self._end_with(
                    "NoDeepSpeed",
                    f"the script has taken {steps[0]} optimizer steps and not called "
                    "deepspeed.initialize, which is what is tuned",
                )

        module.register_optimizer_step_post_hook(stepped)

    def wrap_accelerate(self, module: ModuleType) -> None:
        """Give transformers' Trainer and accelerate's plugin the config as it will be."""
        config_class: Any = module.HfDeepSpeedConfig
        make = config_class.__init__

        @functools.wraps(make)
        def make_merged(self_: Any, config_file_or_dict: Any) -> None:  # noqa: ANN401 - as theirs
            given = _read(config_file_or_dict)
            if given is not None:
                config_file_or_dict = merged(given, self._errand.overrides)
            make(self_, config_file_or_dict)

        config_class.__init__ = make_merged

    def wrap_deepspeed(self, module: ModuleType) -> None:
        """Have engines made with the config as it will be, and the first of them watched."""
        initialize = module.initialize
        signature = inspect.signature(initialize)

        @functools.wraps(initialize)
        def initialize_merged(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - as deepspeed's
            bound = signature.bind(*args, **kwargs)
            if self._watched is not None or not _trains(bound.arguments):
                return initialize(*args, **kwargs)
            return self._initialize(initialize, bound)

        module.initialize = initialize_merged  # type: ignore[attr-defined] # deepspeed's

    def _initialize(self, initialize: Callable[..., Any], bound: inspect.BoundArguments) -> Any:  # noqa: ANN401
        if self._answer is not None and not self._is_here():
            self._end_with(
                "StartsItsOwnRanks",
                "the script calls deepspeed.initialize in a process that it has started itself: "
                "autotune starts a process a rank, as torchrun does, so leave that to it",
            )
        given = _put_in(bound.arguments, self._errand.overrides)
        if self._answer is None:
            return initialize(*bound.args, **bound.kwargs)
        from autotune.script.watching import Watched, hold

        self._facts["given"] = given
        self._facts["merged"] = merged(given, self._errand.overrides)
        self._note()
        self._answer.write("phase", phase="build")
        meter = hold(bound.arguments["model"], self._errand)
        made = initialize(*bound.args, **bound.kwargs)
        engine = made[0]
        if not hasattr(engine, "module") or type(engine).__name__ == "PipelineEngine":
            self._end_with("PipelineEngine", "pipelines of DeepSpeed cannot be tuned")
        self._watched = Watched(engine, meter, self._errand, self._answer, self._fail, self._ended)
        if self._rank == 0:
            self._facts |= self._watched.model_facts()
        self._note()
        return made

    def _fail(self, message: str) -> None:
        self._end_with("NotHonoured", message)

    def _ended(self) -> None:
        """End here and now: enough is known, and the script must not go on to its end."""
        assert self._answer is not None
        self._note()
        self._answer.write("done")
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)

    def _note(self) -> None:
        """Write down what is known of the script so far."""
        if self._errand.facts is None or self._rank:
            return
        seen = self._watched.facts() if self._watched is not None else {}
        path = Path(self._errand.facts)
        fresh = path.with_suffix(".new")
        fresh.write_text(json.dumps({**self._facts, **seen}, default=str))
        fresh.replace(path)


class _Work:
    """The seconds that a process and those below it have computed.

    A rank may leave its work to others: a compiler, or workers that tokenise. They are looked for
    while it does nothing itself, as looking takes time that would be missing in what is measured.
    """

    def __init__(self) -> None:
        self._own_s = self._others_s = 0.0

    def __call__(self) -> float:
        own_s = time.process_time()
        if own_s - self._own_s < _IDLE_S:
            self._others_s = max(self._others_s, _below_s())
        self._own_s = own_s
        return own_s + self._others_s


def _below_s() -> float:
    own = psutil.Process()
    seconds = sum(own.cpu_times()[2:4])
    for child in own.children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            seconds += sum(child.cpu_times()[:4])
    return float(seconds)


def _trains(arguments: Mapping[str, Any]) -> bool:
    """Whether an engine is to be trained: some are made to infer with, as of a reference model."""
    if arguments.get("optimizer") is not None:
        return True
    config = _read(_config_of(arguments)) or {}
    return "optimizer" in config or arguments.get("model_parameters") is not None


def _config_of(arguments: Mapping[str, Any]) -> Any:  # noqa: ANN401 - a dict, or a path
    for name in ("config", "config_params"):
        if arguments.get(name) is not None:
            return arguments[name]
    return getattr(arguments.get("args"), "deepspeed_config", None)


def _read(config: Any) -> dict[str, Any] | None:  # noqa: ANN401 - a dict, or a path
    """Return a DeepSpeed config that is given as a dict or as a file; None if it is neither."""
    if isinstance(config, Mapping):
        return dict(config)
    try:
        content = json.loads(Path(config).read_text())
    except (OSError, TypeError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def _put_in(arguments: dict[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Put the overrides into the config that deepspeed.initialize is given; returns it as it was.

    DeepSpeed takes one config, so that one in `args` is taken from there.
    """
    given = _read(_config_of(arguments))
    if given is None:
        # DeepSpeed itself says what is wrong with it.
        return {}
    if arguments.get("config") is None and arguments.get("config_params") is None:
        arguments["args"].deepspeed_config = None
    arguments.pop("config_params", None)
    arguments["config"] = merged(given, overrides)
    return given
