"""Reports of real runs in a real browser: nothing is fetched, nothing overlaps, all can be read."""

import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from conftest import autotune

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
DRIVERS = ("playwright", "axe_playwright_python")

pytestmark = [
    pytest.mark.browser,
    pytest.mark.timeout(900),
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed"),
    pytest.mark.skipif(
        not all(map(importlib.util.find_spec, DRIVERS)), reason="make test-browser installs these"
    ),
]

JOB = ("--devices", "2", "--global-batch-size", "16", "--no-cache")
RUNS = ("finished", "failed", "resumed")
WIDTHS = (1400, 390)
HOSTILE = '<img src=x onerror=alert(1)> & "rows".jsonl'


@pytest.fixture(scope="module")
def reports(short_rows: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Run three times in earnest: to the end, to where nothing fits, and with a stop between."""
    workplace = tmp_path_factory.mktemp("runs")
    data = shutil.copyfile(short_rows, workplace / HOSTILE)
    command: list[object] = ["run", "--dataset", data, *JOB, "--max-probes", 3]

    done = autotune(
        *(*command, "--max-steps", 6, "--run-dir", "finished"), cwd=workplace, timeout=800
    )
    assert done.returncode == 0, done.stderr
    done = autotune(
        *(*command, "--device-memory", "64MiB", "--run-dir", "failed"), cwd=workplace, timeout=800
    )
    assert done.returncode == 71, done.stderr
    resumed = [*command, "--max-steps", 3, "--run-dir", "resumed"]
    _stop_while_tuning(resumed, workplace)
    done = autotune(*resumed, cwd=workplace, timeout=800)
    assert done.returncode == 0, done.stderr
    return {name: workplace / name / "report.html" for name in RUNS}


def _stop_while_tuning(command: list[object], workplace: Path) -> None:
    """Start a run and ask it to stop when its first outcome is there; its report says so."""
    process = subprocess.Popen(
        [str(Path(sys.executable).parent / "autotune"), *map(str, command)],
        cwd=workplace,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    probes = workplace / "resumed" / "probes.jsonl"
    deadline = time.monotonic() + 600
    while not probes.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=120) == 75
    assert "Stopped; the same command goes on" in (workplace / "resumed/report.html").read_text()


@dataclass
class Seen:
    """What a browser says of a page besides showing it."""

    page: "Page"
    complaints: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)


@pytest.fixture(scope="module")
def browser() -> Iterator["Browser"]:
    from playwright.sync_api import sync_playwright

    # The sandbox of chromium refuses root, whom containers run tests as.
    arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield chromium
        chromium.close()


def shown(browser: "Browser", report: Path, width: int = 1400, scheme: str = "light") -> Seen:
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    seen = Seen(context.new_page())
    seen.page.on("console", lambda message: seen.complaints.append(message.text))
    seen.page.on("pageerror", lambda error: seen.complaints.append(str(error)))
    seen.page.on("dialog", lambda dialog: seen.complaints.append(dialog.message))
    seen.page.on("request", lambda request: seen.requests.append(request.url))
    seen.page.goto(report.as_uri())
    return seen


OPEN_ALL = "document.querySelectorAll('details').forEach(one => { one.open = true; })"

OVERLAPS = """() => {
  const visible = (element, box) => {
    let {left, top, right, bottom} = box;
    for (let up = element; up; up = up.parentElement) {
      if (up.matches('.scroll, pre')) {
        const clip = up.getBoundingClientRect();
        left = Math.max(left, clip.left); right = Math.min(right, clip.right);
        top = Math.max(top, clip.top); bottom = Math.min(bottom, clip.bottom);
      }
    }
    return {left, top, right, bottom};
  };
  const boxes = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const node = walker.currentNode, parent = node.parentElement;
    if (!node.data.trim() || parent.closest('title, desc, style, .skip')) continue;
    const range = document.createRange();
    range.selectNodeContents(node);
    for (const rectangle of range.getClientRects()) {
      const box = visible(parent, rectangle);
      if (box.right - box.left > 1 && box.bottom - box.top > 1) {
        boxes.push({...box, node, text: node.data.trim().slice(0, 60)});
      }
    }
  }
  const meet = (a, b, slack) => Math.min(a.right, b.right) - Math.max(a.left, b.left) > slack
    && Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > slack;
  const found = [];
  boxes.sort((a, b) => a.top - b.top);
  for (let i = 0; i < boxes.length; i++) {
    for (let j = i + 1; j < boxes.length && boxes[j].top < boxes[i].bottom; j++) {
      // Lines of one paragraph share half of their leading.
      if (boxes[i].node !== boxes[j].node && meet(boxes[i], boxes[j], 2.5)) {
        found.push(`${boxes[i].text} | ${boxes[j].text}`);
      }
    }
  }
  const blocks = 'main > *, section > *, .charts > *, .bars > li, .track > *, nav li, .legend li, '
    + 'dl > div, dl > div > *';
  const siblings = new Map();
  for (const element of document.querySelectorAll(blocks)) {
    const key = element.parentElement;
    if (!siblings.has(key)) siblings.set(key, []);
    siblings.get(key).push(element);
  }
  for (const group of siblings.values()) {
    for (let i = 0; i < group.length; i++) {
      for (let j = i + 1; j < group.length; j++) {
        if (meet(group[i].getBoundingClientRect(), group[j].getBoundingClientRect(), 0.5)) {
          found.push(`${group[i].outerHTML.slice(0, 60)} | ${group[j].outerHTML.slice(0, 60)}`);
        }
      }
    }
  }
  return found;
}"""


@pytest.mark.parametrize("name", RUNS)
def test_it_is_shown_without_a_complaint_or_a_request(
    reports: dict[str, Path],
    browser: "Browser",
    name: str,
) -> None:
    seen = shown(browser, reports[name])
    seen.page.evaluate(OPEN_ALL)
    seen.page.wait_for_load_state("networkidle")

    assert seen.complaints == []
    assert seen.requests == [reports[name].as_uri()]
    assert reports[name].stat().st_size < 2_000_000


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", RUNS)
def test_nothing_overlaps_or_sticks_out(
    reports: dict[str, Path],
    browser: "Browser",
    name: str,
    width: int,
    tmp_path: Path,
) -> None:
    page = shown(browser, reports[name], width).page
    page.evaluate(OPEN_ALL)
    page.screenshot(path=tmp_path / f"{name}-{width}.png", full_page=True)

    assert page.evaluate(OVERLAPS) == []
    assert page.evaluate("document.scrollingElement.scrollWidth") <= width


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", RUNS)
def test_axe_finds_nothing_serious(
    reports: dict[str, Path],
    browser: "Browser",
    name: str,
    scheme: str,
) -> None:
    from axe_playwright_python.sync_playwright import Axe

    page = shown(browser, reports[name], scheme=scheme).page
    page.evaluate(OPEN_ALL)
    found = Axe().run(page).response

    assert found["passes"]
    serious = [
        (one["id"], [node["html"][:120] for node in one["nodes"]])
        for one in found["violations"]
        if one["impact"] in {"serious", "critical"}
    ]
    assert serious == []


def test_dark_is_dark_and_light_is_light(reports: dict[str, Path], browser: "Browser") -> None:
    def brightness(scheme: str) -> int:
        page = shown(browser, reports["finished"], scheme=scheme).page
        colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
        return sum(map(int, colour.removeprefix("rgb(").removesuffix(")").split(",")))

    assert brightness("light") > 3 * 200
    assert brightness("dark") < 3 * 60


def test_a_keyboard_reaches_the_answer_and_opens_tables(
    reports: dict[str, Path],
    browser: "Browser",
) -> None:
    page = shown(browser, reports["finished"]).page
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.keyboard.press("Enter")
    assert page.url.endswith("#answer")
    page.focus("#search summary")
    before = page.evaluate("document.querySelector('#search details').open")
    page.keyboard.press("Enter")
    assert page.evaluate("document.querySelector('#search details').open") is not before


def test_each_run_says_what_it_came_to(reports: dict[str, Path], browser: "Browser") -> None:
    headlines = {
        name: shown(browser, report).page.inner_text(".state") for name, report in reports.items()
    }

    assert headlines["finished"] == headlines["resumed"] == "Tuned and trained"
    assert headlines["failed"] == "Failed: nothing fits the devices"
    resumed = shown(browser, reports["resumed"]).page
    resumed.evaluate(OPEN_ALL)
    assert "interrupted" in resumed.inner_text("#search")
