"""Two runs side by side: what was asked, what came out, what both have measured."""

from collections.abc import Iterator
from typing import Any

from autotune.report.diagnosis import diagnose
from autotune.report.record import Document, RunRecord

SCHEMA = 1

_WORK = ("method", "precision", "optimizer", "global_batch_size", "max_seq_length")
"""What of a job makes a token another amount of work."""

_DATA = ("rows_used", "sequences", "tokens", "trained_tokens", "mean_length", "max_length")
_DEVICES = ("device_name", "num_devices", "device_memory_bytes", "threads_per_rank")
_PLACES = frozenset({"run_dir"})
"""Options that only say where."""


def compare(first: RunRecord, second: RunRecord) -> Document:
    """Return what differs between two runs, and the figures of both."""
    differences = list(_differences(first, second))
    return {
        "schema": SCHEMA,
        "runs": [_figures(first), _figures(second)],
        "same_work": not any(one["of"] in {"model", "data", "job"} for one in differences),
        "same_devices": not any(one["of"] == "devices" for one in differences),
        "differences": differences,
        "settings": list(_in_both(first, second)),
    }


def _figures(record: RunRecord) -> Document:
    result = record.result
    memory, training = result.get("memory", {}), result.get("training", {})
    return {
        "run_dir": str(record.root),
        "state": diagnose(record).state,
        "setting": record.chosen.to_json() if record.chosen else None,
        **{
            name: result.get(name)
            for name in (
                *("tokens_per_s", "samples_per_s", "step_time_s", "gain_over_default"),
                *("tuning_seconds", "probes", "rungs", "stopped_by", "training_seconds"),
            )
        },
        **{name: memory.get(name) for name in ("measured_bytes", "predicted_bytes")},
        "budget_bytes": memory.get("budget_bytes"),
        **{name: training.get(name) for name in ("steps", "loss_start", "loss_end")},
    }


def _differences(first: RunRecord, second: RunRecord) -> Iterator[Document]:
    both = bool(first.plan and second.plan)
    for of, (mine, theirs) in {
        "model": (_model(first), _model(second)),
        "data": (_some(first.dataset, _DATA), _some(second.dataset, _DATA)),
        "job": tuple(_some(one.plan.get("job", {}), _WORK) for one in (first, second)),
        "devices": tuple(_some(one.hardware, _DEVICES) for one in (first, second)),
        "options": tuple(_options(one, both_planned=both) for one in (first, second)),
        "versions": tuple(one.run.get("versions", {}) for one in (first, second)),
    }.items():
        # A run that did not get so far does not differ for it.
        for name in mine | theirs if mine and theirs else ():
            if mine.get(name) != theirs.get(name):
                yield {"of": of, "name": name, "runs": [mine.get(name), theirs.get(name)]}


def _model(record: RunRecord) -> Document:
    names = ("name", "architecture", "parameters", "trainable_parameters")
    return _some(record.plan.get("model", {}), names)


def _some(document: Document, names: tuple[str, ...]) -> Document:
    return {name: document[name] for name in names if name in document}


def _options(record: RunRecord, *, both_planned: bool) -> dict[str, Any]:
    """Return the options, but for those that the jobs of both have as they were resolved."""
    known = _PLACES | (frozenset(_WORK) if both_planned else frozenset())
    options = record.run.get("options", {})
    return {name: entry["value"] for name, entry in options.items() if name not in known}


def _in_both(first: RunRecord, second: RunRecord) -> Iterator[Document]:
    for setting, mine in first.measured.items():
        theirs = second.measured.get(setting)
        if theirs is not None:
            yield {
                "setting": setting.to_json(),
                "tokens_per_s": [mine.tokens_per_s, theirs.tokens_per_s],
                "peak_bytes": [mine.peak_bytes, theirs.peak_bytes],
                "ratio": theirs.tokens_per_s / mine.tokens_per_s,
            }
