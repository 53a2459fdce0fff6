"""`inspect --html`: one page with everything in it, that a browser opens and paper takes."""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from pipecompile.compiler.page.gantt import COLUMNS, MOST_RECTS, gantt_of, ticks_of
from pipecompile.compiler.page.memory import MOST_RANKS, curves_of
from pipecompile.compiler.page.page import Page, html_of, write_page
from pipecompile.compiler.plan.plan import Plan
from pipecompile.passes.schedule.simulate import Timeline
from support.browser import opened
from support.commands import SMALL_GPT2, inspect
from support.matrix import quickly
from support.plans import EXTRAS, hand_made
from support.timelines import planned

VOID = {"meta", "link", "br", "img", "input", "hr"}


class Elements(HTMLParser):
    """What stands in a page; elements must close in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def page(ranks: int = 2, virtual: int = 2, microbatches: int = 3, model: str = "Net") -> Page:
    return Page(*planned(ranks, virtual, microbatches, model), EXTRAS)


def drawn(text: str) -> list[dict[str, str | None]]:
    """The rectangles of actions."""
    return [r for r in Elements(text).all("rect") if re.match("[FBW] s", r.get("class") or "")]


def test_everything_is_in_the_page_and_nothing_outside() -> None:
    text = html_of(page())
    elements = Elements(text)
    for _, attributes in elements.tags:
        for name in ("src", "href", "action", "data"):
            assert (attributes.get(name) or "data:").startswith(("data:", "#"))
    assert not re.search(r"(?:https?:)?//\w", text.replace("http-equiv", ""))
    assert not re.search(r"@import|url\(", text)
    (policy,) = (m for m in elements.all("meta") if m.get("http-equiv"))
    assert str(policy["content"]).startswith("default-src 'none'")
    for heading in ("Schedule", "Memory over the step", "Stages", "What would help", "How it was"):
        assert f">{heading}" in text
    for said in ("Computed again", "attention of 2 units", "--microbatches 60", "uniform", "1.319"):
        assert said in text
    for said in ("45.25 s", "needs 9.00 GiB of 8.00 GiB"):
        assert said in text
    assert "blocks.0 is pinned to stage 1" in text
    assert "7 operators" in text


def test_names_of_users_are_text() -> None:
    """Models, modules and units are named by users."""
    evil = "<img src=x onerror=alert(1)>&</script>"
    made = page(model=evil)
    stages = tuple(replace(stage, modules=(evil,)) for stage in made.plan.stages)
    made = replace(made, plan=replace(made.plan, stages=stages), units=(evil,) * 8)
    text = html_of(made)
    assert "<img" not in text
    assert not Elements(text).all("img")
    assert text.count("</script>") == 2
    assert "&lt;img src=x onerror=alert(1)&gt;&amp;&lt;/script&gt;" in text


def test_every_action_is_drawn_where_it_happens() -> None:
    made = page(2, 2, 3)
    rects = drawn(html_of(made))
    intervals = [x for row in made.timeline.ranks for x in row]
    assert len(rects) == len(intervals) == 2 * 2 * 2 * 3
    span = max(x.end_s for x in intervals)
    for rect, x in zip(rects, intervals, strict=True):
        left, width = (float(str(rect[name]).rstrip("%")) for name in ("x", "width"))
        assert left == pytest.approx(100 * x.start_s / span, abs=0.01)
        assert width == pytest.approx(100 * (x.end_s - x.start_s) / span, abs=0.01)
        assert str(rect["class"]).startswith(str(x.action.kind))


def test_stages_of_a_rank_share_its_lane_at_different_heights() -> None:
    gantt = gantt_of(page(2, 3, 2).timeline)
    for lane in gantt.lanes:
        tops = [rect.top for rect in lane.rects]
        assert len(set(tops)) == len(lane.stages) == 3
        for rect, action in zip(lane.rects, lane.actions, strict=True):
            assert lane.top <= rect.top
            assert rect.top + rect.height <= lane.top + lane.height + 1e-9
            stage = lane.stages.index(action[1])
            assert stage == sorted(set(tops)).index(rect.top)


@pytest.mark.parametrize("span", [1e-6, 0.0123, 1.0, 59.9, 86400.0])
def test_ticks_are_round_and_few(span: float) -> None:
    ticks = list(ticks_of(span))
    assert 4 <= len(ticks) <= 10
    assert ticks[-1].left <= 100


def test_a_large_schedule_makes_no_large_page() -> None:
    plan, timeline = planned(32, 2, 200)
    assert sum(map(len, timeline.ranks)) > 4 * MOST_RECTS
    text = html_of(Page(plan, timeline, EXTRAS))
    assert len(text) < 900_000
    gantt = gantt_of(timeline)
    assert gantt.coarse
    assert gantt.count <= max(2 * MOST_RECTS, 32 * COLUMNS[0])
    for lane, row in zip(gantt.lanes, timeline.ranks, strict=True):
        ends = [100 * row[0].start_s / gantt.span_s, 100 * row[-1].end_s / gantt.span_s]
        assert lane.rects[0].left == pytest.approx(ends[0], abs=1)
        assert lane.rects[-1].left + lane.rects[-1].width == pytest.approx(ends[1], abs=1)
        covered = sum(rect.width for rect in lane.rects)
        assert covered >= 99 * lane.busy_s / gantt.span_s
    assert len(curves_of(plan, timeline)) == MOST_RANKS
    assert "more actions than can be drawn one by one" in text


def test_memory_is_drawn_against_the_budget() -> None:
    plan, timeline = planned(2, 1, 3)
    curves = curves_of(plan, timeline)
    for curve in curves:
        assert curve.budget_y is not None
        assert 0 < curve.budget_y < curve.peak_y < 100  # 8 GiB, and 6 at most
    free = curves_of(replace(plan, budget_bytes=None), timeline)
    assert all(curve.budget_y is None for curve in free)
    assert "budget," not in html_of(Page(replace(plan, budget_bytes=None), timeline))


def test_a_plan_without_extras_and_bytes() -> None:
    plan, timeline = hand_made()
    text = html_of(Page(plan, timeline))
    assert "Memory over the step" not in text
    assert "What would help" not in text
    assert "Beside simple strategies" not in text
    assert "Ways that were tried" not in text
    assert "Hand[made]" in text


def test_inspect_writes_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "report.html"
    report = inspect(f"{SMALL_GPT2} --stages 2 --microbatches 4 --html {path}", capsys)
    text = path.read_text()
    assert "transformer.h.1, transformer.ln_f, lm_head" in text
    assert "uniform" in text  # strategies that take no time are compared unasked
    assert "compared at" not in report
    assert len(drawn(text)) == 2 * 2 * 4


@pytest.mark.slow
def test_schedules_are_compared_on_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "report.html"
    given = f"{SMALL_GPT2} --stages 2 --microbatches 2 --compare schedules --html {path}"
    report = inspect(given, capsys)
    text = path.read_text()
    (table,) = re.findall("<caption>schedules</caption>.*?</table>", text, re.DOTALL)
    rows = [re.findall("<td.*?>(.*?)</td>", row) for row in table.split("<tr>")[2:]]
    assert {row[0] for row in rows} >= {"1f1b", "gpipe", "zb_v ×2", "v_min ×2"}
    for row in rows:
        assert re.search(rf"^{row[0]} +{row[1]} .*{re.escape(row[3])}", report, re.MULTILINE)


# -- in a browser ---------------------------------------------------------------------------------


def written(folder: Path, made: tuple[Plan, Timeline]) -> Path:
    path = folder / "report.html"
    write_page(Page(*made, EXTRAS), path)
    return path


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(2, 2, 3), (16, 2, 200)])
def test_a_browser_runs_it(tmp_path: Path, shape: tuple[int, int, int]) -> None:
    path = written(tmp_path, planned(*shape, model="<b>Net</b>"))
    document, console = opened(path, tmp_path / "profile")
    assert not console
    assert 'data-ready="true"' in document
    assert "data-error" not in document
    assert f'data-actions="{24 if shape[0] == 2 else 0}"' in document
    assert "<h1>&lt;b&gt;Net&lt;/b&gt;</h1>" in document


def test_arrow_keys_and_pointers_find_actions(tmp_path: Path) -> None:
    """By a script at the end of the page that does what a person does."""
    path = written(tmp_path, planned(2, 2, 3, model="<b>Net</b>"))
    act = """
    const press = (key) => document.getElementById("gantt")
      .dispatchEvent(new KeyboardEvent("keydown", {key, bubbles: true}));
    const told = [], tip = document.getElementById("tip");
    for (const key of ["ArrowRight", "ArrowRight", "ArrowDown", "Escape"]) {
      press(key); told.push(tip.hidden ? "-" : tip.textContent.split("\\n")[0]);
    }
    const svg = document.querySelector("svg.gantt"), box = svg.getBoundingClientRect();
    const place = {clientX: box.left + 2, clientY: box.top + 4};
    svg.dispatchEvent(new PointerEvent("pointermove", place));
    told.push(tip.textContent.split("\\n")[0]);
    document.querySelector('[data-zoom="4"]').click();
    told.push(String(Math.round(svg.getBoundingClientRect().width / box.width)));
    document.body.dataset.told = told.join(" | ");
    """
    path.write_text(path.read_text().replace("</body>", f"<script>{act}</script></body>"))
    document, console = opened(path, tmp_path / "profile")
    assert not console
    assert 'data-ready="true"' in document
    assert "data-error" not in document
    assert 'data-actions="24"' in document
    assert "<h1>&lt;b&gt;Net&lt;/b&gt;</h1>" in document
    found = re.search('data-told="([^"]*)"', document)
    assert found is not None
    first, second, below, gone, pointed, zoom = found[1].split(" | ")
    assert first == pointed == "0F0: forward of microbatch 0"
    assert second == "0F1: forward of microbatch 1"
    assert below.startswith("1F0")
    assert (gone, zoom) == ("-", "4")


@pytest.mark.slow
@pytest.mark.parametrize("width", quickly([400], [400, 1600]))
def test_no_width_breaks_it(tmp_path: Path, width: int) -> None:
    path = written(tmp_path, planned(4, 2, 8))
    act = "document.body.dataset.over = document.documentElement.scrollWidth - innerWidth"
    path.write_text(path.read_text().replace("</body>", f"<script>{act}</script></body>"))
    document, _ = opened(path, tmp_path / "p", f"--window-size={width},900", "--dump-dom")
    found = re.search('data-over="(-?[0-9]+)"', document)
    assert found is not None
    assert int(found[1]) <= 0


@pytest.mark.slow
def test_it_prints(tmp_path: Path) -> None:
    path = written(tmp_path, planned(4, 2, 8))
    paper = tmp_path / "report.pdf"
    opened(path, tmp_path / "profile", f"--print-to-pdf={paper}", "--no-pdf-header-footer")
    assert paper.read_bytes().startswith(b"%PDF")
