"""What needs torch before the first probe, asked of a process of its own."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from autotune import processes
from autotune.errors import AutotuneError, ConfigError, SetupFaultError
from autotune.hardware import Rates
from autotune.profile.request import TraceRequest
from autotune.rundir import read_json, write_json
from autotune.workload import ModelProfile, Moment, Polynomial, Trace

_TAIL_BYTES = 2000


def traced(request: TraceRequest, log: Path) -> dict[str, Any]:
    """Trace a model in a process of its own; returns the profile as JSON.

    Raises:
        ConfigError: transformers cannot build the model.
    """
    answer = _ask(_trace, request, log=log)
    if "error" in answer:
        msg = f"the model in {request.model_dir}: {answer['error']}"
        raise ConfigError(msg)
    return answer


def measured_rates(device_kind: str, precision: str, threads: int, log: Path) -> dict[str, Any]:
    """Measure the machine in a process of its own; returns the rates as JSON.

    Raises:
        SetupFaultError: torch cannot use the device.
    """
    return _checked(_ask(_measure, device_kind, precision, threads, log=log), "measure the device")


def build_ops(names: Sequence[str], log: Path) -> None:
    """Build DeepSpeed ops, named by their builders, once, in a process of its own.

    Another run that builds them in the same cache is waited for.

    Raises:
        SetupFaultError: an op cannot be built.
    """
    _checked(_ask(_build_ops, tuple(names), log=log), "build DeepSpeed's ops")


def _checked(answer: dict[str, Any], what: str) -> dict[str, Any]:
    if "error" in answer:
        msg = f"cannot {what}: {answer['error']}"
        raise SetupFaultError(msg)
    return answer


def _ask(function: Callable[..., None], *args: Any, log: Path) -> dict[str, Any]:  # noqa: ANN401
    answer_path = log.with_suffix(".json")
    answer_path.unlink(missing_ok=True)
    process = processes.start(function, *args, str(answer_path), log=log)
    try:
        process.join()
    finally:
        processes.end([process])
    answer = read_json(answer_path)
    if answer is None:
        tail = log.read_bytes()[-_TAIL_BYTES:].decode(errors="replace")
        return {"error": f"the process ended with exit code {process.exitcode}:\n{tail}"}
    return dict(answer)


def _answer(path: str, make: Callable[[], dict[str, Any]]) -> None:
    try:
        answer = make()
    except AutotuneError as error:
        answer = {"error": str(error)}
    except Exception as error:
        logging.getLogger(__name__).exception("no answer")
        answer = {"error": f"{type(error).__name__}: {error}"}
    write_json(Path(path), answer)


def _trace(request: TraceRequest, path: str) -> None:
    from autotune.profile.trace import trace_model

    _answer(path, lambda: asdict(trace_model(request)))


def _measure(device_kind: str, precision: str, threads: int, path: str) -> None:
    from autotune.profile.rates import measure_rates

    _answer(path, lambda: asdict(measure_rates(device_kind, precision, threads)))


def _build_ops(names: Sequence[str], path: str) -> None:
    def build() -> dict[str, Any]:
        from autotune.engine.ops import load_ops

        # A compiler that outlived a killed build would write beside that of the next.
        processes.end_session_with_this_process()
        load_ops(names)
        return {}

    _answer(path, build)


def profile_from_json(fields: dict[str, Any]) -> ModelProfile:
    """Read what `traced` returned."""
    traces = tuple((mode, _trace_from_json(trace)) for mode, trace in fields["traces"])
    sizes = {name: tuple(fields[name]) for name in ("trained_sizes", "frozen_sizes")}
    return ModelProfile(**{**fields, **sizes, "traces": traces})


def _trace_from_json(fields: dict[str, Any]) -> Trace:
    return Trace(
        one_row=tuple(map(_moment_from_json, fields["one_row"])),
        more_rows=tuple(map(_moment_from_json, fields["more_rows"])),
        flops=Polynomial(**fields["flops"]),
        operators=fields["operators"],
    )


def _moment_from_json(fields: dict[str, Any]) -> Moment:
    polynomials = {
        name: Polynomial(**fields[name]) for name in ("rows_bytes", "batch_bytes", "logits_bytes")
    }
    return Moment(**{**fields, **polynomials, "lengths": tuple(fields["lengths"])})


def rates_from_json(fields: dict[str, Any]) -> Rates:
    """Read what `measured_rates` returned."""
    return Rates(**fields)
