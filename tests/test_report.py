"""The report: all of a run in one file that needs nothing else, whatever the run came to."""

import html.parser
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from run_directories import PLAN, Example, failed, fastest, plan_json, row_of, rungs_of, steps

from autotune.errors import InputMissingError
from autotune.outcome import Crashed, Measured
from autotune.report.drawing import Box, Line, Point
from autotune.report.figures import figures
from autotune.report.page import render, write_report
from autotune.report.record import RunRecord
from autotune.rundir import RunDir, write_json
from autotune.units import format_bytes

FIGURES = {
    *("memory", "throughput", "search", "accuracy", "lengths", "rejected", "training"),
}
HOSTILE = "/data/</title><script>alert('x')</script>\"'&\x1b[31m\u202e.jsonl"


class Elements(html.parser.HTMLParser):
    """Counts elements, and keeps text and what would be loaded."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.opened: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.opened.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.opened if name == tag]

    @property
    def words(self) -> str:
        return " ".join(" ".join(self.text).split())


def page_of(example: Example, root: Path) -> Elements:
    run_dir = example.write(root / "run")
    write_report(run_dir)
    return Elements(run_dir.report.read_text())


def test_a_finished_run_has_every_figure_with_its_table(tmp_path: Path) -> None:
    page = page_of(Example(), tmp_path)

    sections = {attributes.get("id") for attributes in page.of("section")}
    assert sections == FIGURES | {"answer", "why", "asked"}
    # One table a figure, the alternatives and the options.
    assert len(page.of("table")) == len(FIGURES) + 2
    assert len(page.of("figure")) == len(FIGURES)


def test_the_answer_is_first_and_says_setting_gain_and_cost(tmp_path: Path) -> None:
    example = Example()
    page = page_of(example, tmp_path)

    best = example.rungs[0]
    assert isinstance(best.outcome, Measured)
    answer = page.words[
        page.words.index("The answer setting") : page.words.index("Why this setting")
    ]
    assert best.setting.label() in answer
    assert f"{best.outcome.tokens_per_s:.0f} tokens/s" in answer
    assert "x the default" in answer
    assert "5 min 00 s of tuning" in answer
    assert "saved again by step 17" in answer


def test_the_file_needs_nothing_else(tmp_path: Path) -> None:
    page = page_of(Example(), tmp_path)

    loading = {"script", "link", "img", "iframe", "object", "embed", "video", "audio", "source"}
    assert not loading & {tag for tag, _ in page.opened}
    references = [
        value
        for _, attributes in page.opened
        for name, value in attributes.items()
        if name in {"href", "src", "xlink:href", "action", "srcset"}
    ]
    assert references
    assert all(value is not None and value.startswith("#") for value in references)
    assert not re.search(r"url\(|@import", (tmp_path / "run" / "report.html").read_text())


def test_a_link_of_the_contents_leads_to_each_section(tmp_path: Path) -> None:
    page = page_of(Example(), tmp_path)

    identifiers = [attributes["id"] for _, attributes in page.opened if "id" in attributes]
    assert len(identifiers) == len(set(identifiers))
    for link in page.of("a"):
        assert (link["href"] or "").removeprefix("#") in identifiers


def test_pictures_have_names_and_tables_have_headers(tmp_path: Path) -> None:
    page = page_of(Example(), tmp_path)

    identifiers = {attributes.get("id") for _, attributes in page.opened}
    for picture in page.of("svg"):
        if picture.get("role") == "img":
            assert set((picture["aria-labelledby"] or "").split()) <= identifiers
        else:
            assert picture["aria-hidden"] == "true"
    assert all(header.get("scope") for header in page.of("th"))


@pytest.mark.parametrize("where", ["data", "model", "evidence", "run directory"])
def test_names_of_users_are_text_and_nothing_else(tmp_path: Path, where: str) -> None:
    example, root = Example(), tmp_path
    if where == "data":
        example.dataset = HOSTILE
    elif where == "model":
        plan = plan_json()
        example.plan = plan | {"model": plan["model"] | {"name": HOSTILE}}
    elif where == "evidence":
        example.rungs = [
            replace(rung, outcome=Crashed(reason=HOSTILE, evidence=HOSTILE))
            for rung in example.rungs
        ]
        example.end = {"exit_reason": "SetupFaultError", "exit_code": 70, "message": HOSTILE}
        example.phase = "stopped"
    else:
        root = tmp_path / "<script>alert('x')<" / "script>"
    page = page_of(example, root)

    assert "script" not in {tag for tag, _ in page.opened}
    assert "alert('x')" in page.words
    text = (root / "run" / "report.html").read_text()
    assert "\x1b" not in text
    assert "\u202e" not in text


def test_a_name_that_is_no_unicode_is_written_as_such(tmp_path: Path) -> None:
    page = page_of(Example(dataset="/data/\udcff.jsonl"), tmp_path)

    assert "/data/\ufffd.jsonl" in page.words


@pytest.mark.parametrize(
    ("code", "reason", "says"),
    [
        (65, "DatasetError", "autotune data FILE"),
        (66, "InputMissingError", "path or name"),
        (69, "NoUsableDeviceError", "autotune detect"),
        (70, "SetupFaultError", "ranks' logs"),
        (71, "NothingFitsError", "would fit with"),
        (72, "TrainingFailedError", "training's log"),
        (73, "CannotWriteError", "Make room"),
        (78, "ConfigError", "names the key"),
    ],
)
def test_a_failed_run_says_why_and_what_to_try(
    tmp_path: Path, code: int, reason: str, says: str
) -> None:
    end = {"exit_reason": reason, "exit_code": code, "message": "what was found & needed"}
    page = page_of(Example(phase="stopped", end=end, rungs=(), steps=(), is_tuned=False), tmp_path)

    assert "Failed" in page.words
    assert "what was found & needed" in page.words
    assert "What to try" in page.words
    assert says in page.words


def test_a_failed_run_shows_what_its_probes_left(tmp_path: Path) -> None:
    rungs = [
        failed(rung, f"evidence of {place}") for place, rung in enumerate(rungs_of(fastest(5)))
    ]
    end = {"exit_reason": "NothingFitsError", "exit_code": 71, "message": "no setting fits"}
    page = page_of(
        Example(phase="stopped", end=end, rungs=rungs, steps=(), is_tuned=False), tmp_path
    )

    assert "evidence of 4" in page.words
    assert "out of device memory" in page.words


def test_a_failed_training_shows_the_end_of_its_log(tmp_path: Path) -> None:
    end = {"exit_reason": "TrainingFailedError", "exit_code": 72, "message": "it ended badly"}
    run_dir = Example(phase="stopped", end=end).write(tmp_path / "run")
    (run_dir.logs / "training.log").write_text("first line\n" * 500 + "RuntimeError: <boom>\n")
    write_report(run_dir)

    page = Elements(run_dir.report.read_text())
    assert "RuntimeError: <boom>" in page.words
    assert f"autotune train {run_dir.root}" in page.words


def test_a_stopped_run_goes_on_and_says_so(tmp_path: Path) -> None:
    end = {"exit_reason": "InterruptedRunError", "exit_code": 75, "message": "stopped by SIGTERM"}
    page = page_of(Example(phase="stopped", end=end, steps=(), is_tuned=False), tmp_path)

    assert "Stopped; the same command goes on" in page.words
    assert "best so far" in page.words


@pytest.mark.parametrize("phase", ["detect", "profile", "tune", "emit", "train"])
def test_there_is_a_report_at_every_stage(tmp_path: Path, phase: str) -> None:
    run_dir = RunDir(tmp_path / "run")
    run_dir.create()
    write_json(run_dir.status, {"schema": 1, "phase": phase, "heartbeat": "2026-01-01T01:00:00"})
    write_report(run_dir)

    page = Elements(run_dir.report.read_text())
    assert "Under way" in page.words
    assert "2026-01-01T01:00:00" in page.words
    assert page.of("figure") == []


def test_a_result_of_before_is_not_that_of_a_run_under_way(tmp_path: Path) -> None:
    end = {"exit_reason": "InterruptedRunError", "exit_code": 75, "message": "stopped by SIGTERM"}
    page = page_of(Example(phase="tune", end=end, is_tuned=False), tmp_path)

    assert "Under way: probing settings" in page.words
    assert "SIGTERM" not in page.words


def test_files_that_are_torn_leave_their_figures_out(tmp_path: Path) -> None:
    run_dir = Example().write(tmp_path / "run")
    run_dir.plan.write_bytes(run_dir.plan.read_bytes()[:200])
    with (run_dir.training / "metrics.jsonl").open("a") as file:
        file.write('{"step": 41, "loss": NaN, "tokens_per_s": 1.0}\n{"step": 42, "lo')
    write_report(run_dir)

    shown = {figure.key for figure in figures(RunRecord.read(run_dir))}
    assert shown == {"search", "lengths", "training", "throughput"}
    assert "40 of 40 steps" in Elements(run_dir.report.read_text()).words


def test_where_no_run_was_there_is_nothing_to_report(tmp_path: Path) -> None:
    with pytest.raises(InputMissingError, match="holds no run"):
        write_report(RunDir(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_a_long_run_stays_below_two_megabytes(tmp_path: Path) -> None:
    settings = fastest(60)
    rungs = [rung for _ in range(12) for rung in rungs_of(settings)]
    run_dir = Example(rungs=rungs, steps=steps(20_000)).write(tmp_path / "run")
    write_report(run_dir)

    assert run_dir.report.stat().st_size < 2_000_000
    words = Elements(run_dir.report.read_text()).words
    assert "200 of 20000 steps" in words
    assert "more are in the files of the run directory" in words


def test_memory_is_that_of_plan_and_probe(tmp_path: Path) -> None:
    example = Example()
    record = RunRecord.read(example.write(tmp_path / "run"))
    (memory,) = (figure for figure in figures(record) if figure.key == "memory")

    assert memory.bars is not None
    for rung, row, cells in zip(example.rungs, memory.bars.rows, memory.table.rows, strict=True):
        terms = PLAN.memory.row(row_of(rung.setting))
        assert isinstance(rung.outcome, Measured)
        estimated, measured = row.tracks
        assert row.label == cells[0] == rung.setting.label()
        assert estimated.amount == format_bytes(terms["device_bytes"]) == cells[-3]
        assert measured.amount == format_bytes(rung.outcome.peak_bytes) == cells[-2]
        # Parts lie end to end, and are as long as they are large; the limit is on the same scale.
        ends = [0.0, *(part.start + part.length for part in estimated.segments)]
        assert [part.start for part in estimated.segments] == pytest.approx(ends[:-1])
        assert memory.bars.limit is not None
        share = terms["device_bytes"] / PLAN.budget_bytes
        assert ends[-1] / memory.bars.limit == pytest.approx(share)


def test_a_limit_far_above_is_said_and_not_drawn(tmp_path: Path) -> None:
    plan = plan_json()
    for entry in plan["settings"]:
        entry["budget_bytes"] *= 100
    record = RunRecord.read(Example(plan=plan).write(tmp_path / "run"))
    (memory,) = (figure for figure in figures(record) if figure.key == "memory")

    assert memory.bars is not None
    assert memory.bars.limit is None
    assert "far to the right" in memory.says


def test_the_best_so_far_never_falls(tmp_path: Path) -> None:
    rungs = rungs_of(list(reversed(fastest(6))))
    rungs[2] = failed(rungs[2])
    record = RunRecord.read(Example(rungs=rungs).write(tmp_path / "run"))
    (search,) = (figure for figure in figures(record) if figure.key == "search")

    best = [float(row[4]) for row in search.table.rows]
    assert best == sorted(best)
    assert search.table.rows[2][3] == "out of device memory"
    (line,) = (
        mark for mark in search.charts[0].marks if isinstance(mark, Line) and mark.look == "best"
    )
    heights = [y for _, y in line.points]
    assert heights == sorted(heights, reverse=True)


def test_what_no_plan_kept_is_shaded_as_pruned(tmp_path: Path) -> None:
    record = RunRecord.read(Example().write(tmp_path / "run"))
    (throughput,) = (figure for figure in figures(record) if figure.key == "throughput")

    for chart in throughput.charts:
        shaded = {
            int(re.findall(r"\d+", mark.note)[0])
            for mark in chart.marks
            if isinstance(mark, Box) and mark.look == "pruned"
        }
        kept = {
            setting.micro_batch_size
            for setting, entry in record.entries.items()
            if setting.structure.label() == chart.title and entry["rejected_by"] is None
        }
        assert shaded == {1, 2, 4, 8} - kept


def test_points_of_the_scatter_are_where_estimate_and_measurement_say(tmp_path: Path) -> None:
    record = RunRecord.read(Example(rungs=rungs_of(fastest(6), slower=1.5)).write(tmp_path / "run"))
    (accuracy,) = (figure for figure in figures(record) if figure.key == "accuracy")

    assert "Steps: 1.50 x the estimate in the median" in accuracy.says
    assert "Memory: 0.97 x the estimate" in accuracy.says
    for row in accuracy.table.rows:
        assert row[3] == "1.50"
    marks = accuracy.charts[0].marks
    (line,) = (mark for mark in marks if isinstance(mark, Line) and mark.look == "limit")
    (left, bottom), (right, top) = line.points
    above = [
        bottom + (mark.x - left) / (right - left) * (top - bottom) - mark.y
        for mark in marks
        if isinstance(mark, Point)
    ]
    # The axes are logarithmic and all are off by the same factor.
    assert len(above) == 6
    assert above == pytest.approx([above[0]] * 6)
    assert above[0] > 0


def test_lengths_say_what_is_cut_off_and_what_is_padding(tmp_path: Path) -> None:
    record = RunRecord.read(Example().write(tmp_path / "run"))
    (lengths,) = (figure for figure in figures(record) if figure.key == "lengths")

    rows = {row[0]: row[1:] for row in lengths.table.rows}
    assert rows["rows cut off at the limit"] == ("30", "2.7%")
    assert rows["tokens lost by the limit"][0] == "12345"
    assert rows["padding at micro-batch 1, random sampling"][1] == "0.0%"
    padding = float(rows["padding at micro-batch 8, random sampling"][1].removesuffix("%"))
    setting = next(one for one in record.entries if one.micro_batch_size == 8)
    share = float(PLAN.terms.padding_share[row_of(setting)])
    assert padding == pytest.approx(100 * share, abs=0.06)
    assert len(lengths.charts) == 2


def test_rejected_settings_are_counted_by_rule_with_the_nearest(tmp_path: Path) -> None:
    plan = plan_json()
    record = RunRecord.read(Example(plan=plan).write(tmp_path / "run"))
    (rejected,) = (figure for figure in figures(record) if figure.key == "rejected")

    assert rejected.table.rows
    for rule, count, nearest, detail, remedies in rejected.table.rows:
        assert int(count) == plan["counts"]["rejected_by_rule"][rule]
        assert nearest
        assert detail.startswith("needs ")
        assert "micro-batch" in remedies or "checkpointing" in remedies


def test_the_steps_of_a_long_training_are_thinned_and_keep_their_ends(tmp_path: Path) -> None:
    taken = steps(1000)
    record = RunRecord.read(Example(steps=taken).write(tmp_path / "run"))
    (training,) = (figure for figure in figures(record) if figure.key == "training")

    rows = training.table.rows
    assert (rows[0][0], rows[-1][0]) == ("1", "1000")
    assert rows[-1][1] == f"{taken[-1]['loss']:.4f}"
    points = [mark for mark in training.charts[0].marks if isinstance(mark, Point)]
    assert len(points) <= 300


def test_rendering_is_the_same_twice(tmp_path: Path) -> None:
    record = RunRecord.read(Example().write(tmp_path / "run"))

    assert render(record) == render(record)
    assert json.dumps(record.result)
