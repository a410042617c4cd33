"""What needs torch before the first probe, asked of a process of its own."""

import difflib
import json
import logging
import signal
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from autotune import processes
from autotune.errors import AutotuneError, ConfigError, SetupFaultError
from autotune.hardware import Bench
from autotune.optimizer import Optimizer
from autotune.profile.request import TraceRequest
from autotune.rundir import read_json, write_json
from autotune.throughput import Ints, Rebalanced
from autotune.workload import ModelProfile, Moment, Polynomial, Trace

_ERROR_CHARACTERS = 500
_POLL_S = 1.0


def traced(request: TraceRequest, log: Path) -> dict[str, Any]:
    """Trace a model, each checkpointing mode in a process of its own; returns the profile as JSON.

    Raises:
        ConfigError: transformers cannot build the model.
    """
    answers = _ask_each(
        _trace,
        [(replace(request, checkpointing=(mode,)),) for mode in request.checkpointing],
        [log.with_stem(f"{log.stem}-{mode}") for mode in request.checkpointing],
    )
    for answer in answers:
        if "error" in answer:
            msg = f"the model in {request.model_dir}: {answer['error']}"
            raise ConfigError(msg)
    # A model without checkpointing answers each with the same.
    traces = dict(trace for answer in answers for trace in answer["traces"])
    return answers[0] | {"traces": list(traces.items())}


def benched(device_kind: str, threads: int, ranks: int, logs: Path) -> dict[str, Any]:
    """Measure the ranks of the machine, each in a process of its own; returns the bench as JSON.

    Raises:
        SetupFaultError: torch cannot use the devices, or the ranks do not meet.
    """
    store = logs / "bench-store"
    store.unlink(missing_ok=True)
    answers = _ask_each(
        _bench,
        [(device_kind, threads, rank, ranks, str(store)) for rank in range(ranks)],
        [logs / f"bench-{rank}.log" for rank in range(ranks)],
    )
    return asdict(
        Bench.slowest(
            [Bench.from_json(_checked(answer, "measure the devices")) for answer in answers]
        )
    )


def build_ops(
    names: Sequence[str], log: Path, watch: Callable[[int, str], None] = lambda *_: None
) -> None:
    """Build DeepSpeed ops, named by their builders, once, each in a process of its own.

    Another run that builds them in the same cache is waited for. `watch` is told how many are
    there and which is built next.

    Raises:
        SetupFaultError: an op cannot be built.
    """
    for place, name in enumerate(names):
        watch(place, name)
        _checked(_ask(_build_ops, (name,), log=log), "build DeepSpeed's ops")
    watch(len(names), "")


def rebalanced(
    lengths: Ints,
    log: Path,
    **split: Any,  # noqa: ANN401 - as of engine.sampling
) -> dict[int, Rebalanced]:
    """Have transformers' sampler split the rows of steps by length, in a process of its own.

    Raises:
        SetupFaultError: it cannot.
    """
    answer = _checked(_ask(_rebalance, lengths, split, log=log), "split the rows by length")
    return {
        int(accumulation): Rebalanced(**{name: np.array(value) for name, value in drawn.items()})
        for accumulation, drawn in answer.items()
    }


def check_trainer_arguments(arguments: Mapping[str, Any], device_kind: str, log: Path) -> None:
    """Have transformers read the arguments of a training before anything is spent on it.

    Raises:
        ConfigError: there is no such argument (the nearest is named), it cannot have that value,
            or a tracker is not installed.
    """
    answer = _ask(_read_trainer_arguments, dict(arguments), device_kind, log=log)
    if "error" in answer:
        msg = f"--trainer: {answer['error']}"
        raise ConfigError(msg)


def check_quantising(
    needs: Sequence[str], optimizer: Optimizer, precision: str, device_kind: str, log: Path
) -> None:
    """Take a step of an optimizer and multiply by a layer in 4 bits, in a process of its own.

    Args:
        needs: the options that it is for, as a user says them.
        optimizer: what updates the weights.
        precision: what is computed in.
        device_kind: where.
        log: of the process.

    Raises:
        ConfigError: it does not work there.
    """
    answer = _ask(_quantise, optimizer, precision, device_kind, log=log)
    if "error" in answer:
        msg = f"{' and '.join(needs)} does not work on this device: {answer['error']}"
        raise ConfigError(msg)


def _checked(answer: dict[str, Any], what: str) -> dict[str, Any]:
    if "error" in answer:
        msg = f"cannot {what}: {answer['error']}"
        raise SetupFaultError(msg)
    return answer


def _ask(function: Callable[..., None], *args: Any, log: Path) -> dict[str, Any]:  # noqa: ANN401
    return _ask_each(function, [args], [log])[0]


def _ask_each(
    function: Callable[..., None], calls: Sequence[tuple[Any, ...]], logs: Sequence[Path]
) -> list[dict[str, Any]]:
    """Call a function in a process a call, until all have answered or one ends without.

    The others are ended then, and their answer is why that one has none.
    """
    paths = [log.with_suffix(".json") for log in logs]
    for path in paths:
        path.unlink(missing_ok=True)
    started = [
        processes.start(function, *args, str(path), log=log)
        for args, path, log in zip(calls, paths, logs, strict=True)
    ]
    try:
        running = started
        while running and all(one.exitcode in {None, 0} for one in started):
            processes.wait_for_any(running, _POLL_S)
            running = [one for one in running if one.exitcode is None]
        ended = [one.exitcode for one in started]
    finally:
        processes.end(started)
    answers = [read_json(path) for path in paths]
    failures = [
        {"error": _without_answer(exit_code, log)}
        for answer, exit_code, log in zip(answers, ended, logs, strict=True)
        if exit_code is not None and (answer is None or exit_code)
    ]
    return [dict(answer) if answer is not None else failures[0] for answer in answers]


def _without_answer(exit_code: int, log: Path) -> str:
    """Say how a process ended: by an exception, whose line is its last, or by a signal."""
    lines = log.read_text(errors="replace").strip().splitlines() or ["it left no output"]
    if exit_code >= 0:
        return f"the process ended with exit code {exit_code}: {lines[-1]}"
    return f"the process ended with {signal.Signals(-exit_code).name}: {lines[0]}"


def _answer(path: str, make: Callable[[], dict[str, Any]]) -> None:
    try:
        answer = make()
    except Exception as error:
        logging.getLogger(__name__).exception("no answer")
        kind = "" if isinstance(error, AutotuneError) else f"{type(error).__name__}: "
        # Libraries write paragraphs; the log has them whole.
        answer = {"error": kind + textwrap.shorten(str(error), _ERROR_CHARACTERS)}
    write_json(Path(path), answer)


def _trace(request: TraceRequest, path: str) -> None:
    def trace() -> dict[str, Any]:
        from autotune.profile.trace import trace_model

        _require_known(request)
        return asdict(trace_model(request))

    _answer(path, trace)


def _require_known(request: TraceRequest) -> None:
    """Refuse a type of model that transformers has no causal language model of.

    Raises:
        ConfigError: it has none, and the model brings no code of its own; the nearest is named.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    config = json.loads((Path(request.model_dir) / "config.json").read_text(encoding="utf-8"))
    model_type = str(config["model_type"])
    if model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or "auto_map" in config:
        return
    nearest = difflib.get_close_matches(
        model_type, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, n=3, cutoff=0.0
    )
    msg = (
        f"transformers {version('transformers')} has no causal language model of type "
        f"{model_type!r}; the nearest are {', '.join(nearest)}"
    )
    raise ConfigError(msg)


def _bench(device_kind: str, threads: int, rank: int, ranks: int, store: str, path: str) -> None:
    from autotune.profile.rates import bench_rank

    _answer(path, lambda: asdict(bench_rank(device_kind, threads, rank, ranks, store)))


def _build_ops(names: Sequence[str], path: str) -> None:
    def build() -> dict[str, Any]:
        from autotune.engine.ops import load_ops

        # A compiler that outlived a killed build would write beside that of the next.
        processes.end_session_with_this_process()
        load_ops(names)
        return {}

    _answer(path, build)


def _rebalance(lengths: Ints, split: dict[str, Any], path: str) -> None:
    def rebalance() -> dict[str, Any]:
        from autotune.engine.sampling import rebalanced

        return {
            str(accumulation): {name: value.tolist() for name, value in asdict(drawn).items()}
            for accumulation, drawn in rebalanced(lengths, **split).items()
        }

    _answer(path, rebalance)


def _quantise(optimizer: Optimizer, precision: str, device_kind: str, path: str) -> None:
    def compute() -> dict[str, Any]:
        from autotune.engine.model import DTYPES
        from autotune.engine.quantised import try_optimizer, try_quantised

        try_optimizer(optimizer, device_kind)
        try_quantised(DTYPES[precision])
        return {}

    _answer(path, compute)


def _read_trainer_arguments(arguments: dict[str, Any], device_kind: str, path: str) -> None:
    def read() -> dict[str, Any]:
        from transformers import TrainingArguments
        from transformers.integrations import get_reporting_integration_callbacks

        known = {field.name for field in fields(TrainingArguments) if field.init}
        for name in arguments:
            if name not in known:
                nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
                msg = f"transformers knows no argument {name!r}; the nearest is {nearest!r}"
                raise ConfigError(msg)
        made = TrainingArguments(use_cpu=device_kind == "cpu", **arguments)
        for tracker in get_reporting_integration_callbacks(made.report_to):
            # Which says what is not installed.
            tracker()
        return {}

    _answer(path, read)


def profile_from_json(document: dict[str, Any]) -> ModelProfile:
    """Read what `traced` returned."""
    traces = tuple((mode, _trace_from_json(trace)) for mode, trace in document["traces"])
    sizes = {
        name: tuple(document[name]) for name in ("trained_sizes", "frozen_sizes", "quantised_sizes")
    }
    return ModelProfile(**{**document, **sizes, "traces": traces})


def _trace_from_json(document: dict[str, Any]) -> Trace:
    return Trace(
        one_row=tuple(map(_moment_from_json, document["one_row"])),
        more_rows=tuple(map(_moment_from_json, document["more_rows"])),
        flops=Polynomial(**document["flops"]),
        operators=document["operators"],
    )


def _moment_from_json(document: dict[str, Any]) -> Moment:
    polynomials = {
        name: Polynomial(**document[name]) for name in ("rows_bytes", "batch_bytes", "logits_bytes")
    }
    return Moment(**{**document, **polynomials, "lengths": tuple(document["lengths"])})
