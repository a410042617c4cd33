"""Writes report.html: one file that needs no network and no script, in light and dark."""

import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from autotune import __version__
from autotune.report.diagnosis import Diagnosis, diagnose
from autotune.report.drawing import Figure, Table
from autotune.report.figures import figures
from autotune.report.reasons import Alternative, Explanation, explain
from autotune.report.record import RunRecord
from autotune.rundir import RunDir, write_text
from autotune.setting import Setting
from autotune.units import format_bytes, format_count, format_duration

_SHAPES = {
    "circle": "M-4 0a4 4 0 1 0 8 0a4 4 0 1 0-8 0z",
    "square": "M-3.5-3.5h7v7h-7z",
    "diamond": "M0-4.6L4.6 0L0 4.6L-4.6 0z",
    "cross": "M-4-4L4 4M-4 4L4-4",
}
"""Outlines of the symbols around their place."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """What the template writes out.

    Attributes:
        answer: names and figures of what came out, most important first.
        asked: what was asked for, on what.
    """

    title: str
    diagnosis: Diagnosis
    answer: tuple[tuple[str, str], ...]
    explanation: Explanation | None
    alternatives: Table | None
    figures: tuple[Figure, ...]
    asked: tuple[tuple[str, str], ...]
    options: Table
    warnings: tuple[str, ...]
    root: str
    version: str = __version__


def write_report(run_dir: RunDir) -> None:
    """Write report.html of what is in the run directory so far.

    Raises:
        InputMissingError: no run was ever started there.
        CannotWriteError: it cannot be written.
    """
    write_text(run_dir.report, render(RunRecord.read(run_dir)))


def render(record: RunRecord) -> str:
    """Return the report as HTML; whatever comes from outside is escaped."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("autotune.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_printable,
    )
    environment.globals["shapes"] = _SHAPES
    template = environment.get_template("report.html.j2")
    return template.render(page=make_page(record))


def _printable(value: Any) -> Any:  # noqa: ANN401 - whatever a template writes
    """Replace what cannot be printed or turns text around: names of files may hold any bytes."""
    if type(value) is not str:
        return value
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in value)


def make_page(record: RunRecord) -> Page:
    """Put together what the page says."""
    explanation = explain(record)
    model = record.plan.get("model", {}).get("name") or record.option("model") or "a model"
    return Page(
        title=f"{model} on {_names_of_data(record)}",
        diagnosis=diagnose(record),
        answer=tuple(_answer(record)),
        explanation=explanation,
        alternatives=_alternatives(explanation.alternatives) if explanation else None,
        figures=tuple(figures(record)),
        asked=tuple(_asked(record)),
        options=_options(record),
        warnings=tuple(record.dataset.get("warnings", ())),
        root=str(record.root),
    )


def _names_of_data(record: RunRecord) -> str:
    named = record.option("dataset")
    return ", ".join(map(str, named)) if named else str(record.dataset.get("path", "its data"))


def _answer(record: RunRecord) -> Iterator[tuple[str, str]]:
    result = record.result
    if record.chosen is None:
        yield from _so_far(record)
        return
    yield "setting", record.chosen.label()
    speeds = f"{result['tokens_per_s']:.0f} tokens/s, {result['samples_per_s']:.2f} samples/s"
    yield "speed", speeds
    yield "gain", _gain(record)
    measured, estimated, budget = (
        format_bytes(result["memory"][f"{name}_bytes"])
        for name in ("measured", "predicted", "budget")
    )
    yield "memory a rank", f"{measured} measured, {estimated} estimated, of {budget}"
    yield "cost", _cost(record)
    yield from _training(record)
    yield "by hand", f"bash {shlex.quote(str(record.root / 'launch.sh'))}"


def _so_far(record: RunRecord) -> Iterator[tuple[str, str]]:
    if record.measured:
        setting, outcome = next(iter(record.measured.items()))
        yield "best so far", f"{setting.label()}, {outcome.tokens_per_s:.0f} tokens/s"
    if record.rungs:
        structures = len({rung.setting.structure for rung in record.rungs})
        spent = format_duration(sum(rung.seconds for rung in record.rungs if not rung.cached))
        yield "probed", f"{structures} structures, {len(record.rungs)} rungs, {spent}"


def _gain(record: RunRecord) -> str:
    gain, default = record.result.get("gain_over_default"), record.result.get("default", {})
    if not gain:
        return "unknown, as the default setting could not be measured"
    label = Setting.from_json(default["setting"]).label()
    return f"{gain:.2f} x the default ({label}, {default['tokens_per_s']:.0f} tokens/s)"


def _cost(record: RunRecord) -> str:
    result = record.result
    text = (
        f"{format_duration(result['tuning_seconds'])} of tuning, {result['probes']} structures, "
        f"{result['rungs']} rungs"
    )
    saved_by = result.get("break_even_step")
    return f"{text}; saved again by step {saved_by} of the training" if saved_by else text


def _training(record: RunRecord) -> Iterator[tuple[str, str]]:
    trained = record.result.get("training")
    if trained:
        took = format_duration(record.result["training_seconds"])
        losses = f"loss {trained['loss_start']:.3f} to {trained['loss_end']:.3f}"
        yield "training", f"{took}, {trained['steps']} steps, {losses}"
        yield "model", str(record.result["model_dir"])
    elif record.steps:
        last = record.steps[-1]
        yield "training", f"step {last['step']} of {last.get('max_steps', 'an unknown number')}"
    for recovery in record.recoveries:
        setting = recovery.get("setting")
        went_on = Setting.from_json(setting).label() if setting else "the same setting"
        cause = str(recovery["cause"]).replace("_", " ")
        yield f"from step {recovery['from_step']}", f"after {cause} with {went_on}"


def _asked(record: RunRecord) -> Iterator[tuple[str, str]]:
    model, job, cluster = (record.plan.get(name, {}) for name in ("model", "job", "cluster"))
    data, versions = record.dataset, record.run.get("versions", {})
    if model:
        counts = (model["parameters"], model["trainable_parameters"])
        total, trained = map(format_count, counts)
        named = f"{model['name']}: {model['architecture']}"
        yield "model", f"{named}, {total} parameters, {trained} of them trained"
    yield "data", _names_of_data(record)
    if data:
        tokens, trained = map(format_count, (data["tokens"], data["trained_tokens"]))
        rows = f"{data['rows']} in {data['format']} form, {data['rows_used']} used"
        yield "rows", f"{rows}, {tokens} tokens, {trained} of them trained on"
    if job:
        how = ", ".join(str(job[name]) for name in ("method", "precision", "optimizer"))
        batch, limit = job["global_batch_size"], job["max_seq_length"]
        yield "job", f"{how}, global batch of {batch}, at most {limit} tokens a row"
    if cluster:
        memory = format_bytes(cluster["device_memory_bytes"])
        devices = f"{cluster['num_devices']} x {cluster['device_name']}"
        yield "devices", f"{devices}, {memory} each ({cluster['device_memory_source']})"
    if versions:
        yield "versions", ", ".join(f"{name} {version}" for name, version in versions.items())
    yield "run directory", str(record.root)


def _options(record: RunRecord) -> Table:
    """Return the options that were given, with where each comes from."""
    given = {
        name: entry
        for name, entry in record.run.get("options", {}).items()
        if entry["source"] != "default"
    }
    return Table(
        caption="Options that are not at their defaults",
        columns=("option", "value", "from"),
        rows=tuple(
            (name, _value(entry["value"]), entry["source"]) for name, entry in given.items()
        ),
    )


def _value(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _alternatives(alternatives: tuple[Alternative, ...]) -> Table:
    return Table(
        caption="The nearest alternatives, and what each lost by",
        columns=("with", "stands", "tokens/s", "lost by", "why"),
        numbers=frozenset({2}),
        rows=tuple(
            (
                ", ".join(one.differs),
                one.standing,
                f"{one.tokens_per_s:.0f}" if one.tokens_per_s is not None else "",
                one.term or "",
                one.reason,
            )
            for one in alternatives
        ),
    )
