"""Settings that were rejected before any probe, by rule."""

from collections.abc import Mapping

from autotune.remedy import in_words
from autotune.report.drawing import BarRow, Bars, Figure, Legend, Table, Track, stack
from autotune.report.record import Document, RunRecord
from autotune.setting import Setting


def rejected(record: RunRecord) -> Figure | None:
    """Count the settings that were rejected before any probe, by rule, and name the nearest."""
    counts = record.plan.get("counts")
    if not counts:
        return None
    by_rule = counts["rejected_by_rule"]
    total = counts["kept"] + sum(by_rule.values())
    misses = {miss["rejected_by"]["rule"]: miss for miss in record.plan.get("near_misses", [])}
    rows = [_rule_row("kept", counts["kept"], total, "kept")]
    rows += [_rule_row(rule, count, total, "pruned-bar") for rule, count in by_rule.items()]
    return Figure(
        key="rejected",
        title="Settings that were rejected before any probe",
        says=(
            f"Of {total} settings {counts['kept']} were kept to choose from, "
            f"{sum(by_rule.values())} rejected by arithmetic alone."
        ),
        bars=Bars(rows=tuple(rows)),
        legend=(
            Legend(look="kept", words="kept"),
            Legend(look="pruned-bar", words="rejected"),
        ),
        table=Table(
            caption="Rules, and the setting nearest to passing each",
            columns=("rule", "settings", "nearest", "why", "would fit with"),
            numbers=frozenset({1}),
            rows=tuple(
                (rule, str(count), *_nearest_cells(record, rule, misses))
                for rule, count in by_rule.items()
            ),
        ),
    )


def _rule_row(rule: str, count: int, total: int, look: str) -> BarRow:
    segments = stack([(look, f"{rule}: {count}", float(count))], float(total or 1))
    return BarRow(
        label=rule, tracks=(Track(name="settings", amount=str(count), segments=segments),)
    )


def _nearest_cells(record: RunRecord, rule: str, misses: Mapping[str, Document]) -> tuple[str, ...]:
    miss = misses.get(rule)
    if miss is None:
        listed = (entry for entry in record.entries.values() if entry["rejected_by"])
        miss = next((one for one in listed if one["rejected_by"]["rule"] == rule), None)
    if miss is None:
        return ("", "", "")
    remedies = "; or ".join(map(in_words, miss.get("remedies", [])))
    return (Setting.from_json(miss["setting"]).label(), miss["rejected_by"]["detail"], remedies)
