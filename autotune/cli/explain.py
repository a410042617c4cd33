"""`autotune explain`."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from autotune.cli.options import as_json, echo_json
from autotune.rundir import RunDir

if TYPE_CHECKING:
    from autotune.report.diagnosis import Diagnosis
    from autotune.report.reasons import Alternative, Explanation

_WIDTH = 100


@click.command(name="explain")
@click.argument("run_dir", type=click.Path(path_type=Path))
@as_json
def command(run_dir: Path, *, as_json: bool) -> None:
    """Say in words why this setting was chosen, and why not the nearest others."""
    from autotune.report.diagnosis import diagnose
    from autotune.report.reasons import explain
    from autotune.report.record import RunRecord

    record = RunRecord.read(RunDir(run_dir.absolute()))
    diagnosis, explanation = diagnose(record), explain(record)
    if as_json:
        echo_json(_document(diagnosis, explanation))
        return
    parts = [] if diagnosis.state in {"tuned", "trained"} else [_diagnosis_text(diagnosis)]
    if explanation is not None:
        parts.append(_explanation_text(explanation))
    click.echo("\n\n".join(parts or [f"{record.root} does not hold the outcomes of its choice"]))


def _document(diagnosis: "Diagnosis", explanation: "Explanation | None") -> dict[str, Any]:
    document: dict[str, Any] = {"schema": 1, **asdict(diagnosis)}
    if explanation is None:
        return document | {"chosen": None, "reasons": [], "alternatives": []}
    return document | {
        "chosen": explanation.chosen.to_json(),
        "reasons": list(explanation.why),
        "alternatives": [
            {
                "setting": one.setting.to_json(),
                "differs": list(one.differs),
                "standing": one.standing,
                "tokens_per_s": one.tokens_per_s,
                "term": one.term,
                "reason": one.reason,
            }
            for one in explanation.alternatives
        ],
    }


def _diagnosis_text(diagnosis: "Diagnosis") -> str:
    parts = [diagnosis.headline, diagnosis.why]
    for one in diagnosis.evidence:
        parts += [f"{one.title}:", *(f"    {line}" for line in one.text.splitlines())]
    if diagnosis.advice:
        parts.append("What to try:")
        parts += [_wrapped(f"- {sentence}", "  ") for sentence in diagnosis.advice]
    return "\n".join(filter(None, parts))


def _explanation_text(explanation: "Explanation") -> str:
    head = f"Why {explanation.chosen.label()}"
    parts = [head, *map(_wrapped, explanation.why)]
    if explanation.alternatives:
        parts += ["", "Why not"]
        parts += [_alternative(one) for one in explanation.alternatives]
    return "\n".join(parts)


def _alternative(one: "Alternative") -> str:
    name = ", ".join(one.differs) or one.setting.label()
    return f"- {name}\n{_wrapped(one.reason, '  ', '  ')}"


def _wrapped(text: str, later: str = "", first: str = "") -> str:
    return click.wrap_text(text, _WIDTH, initial_indent=first, subsequent_indent=later)
