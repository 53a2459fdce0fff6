"""The schedule drawn with characters."""

from __future__ import annotations

from pipecompile.compiler.report.charts import schedule_chart
from support.timelines import planned


def test_stages_of_a_rank_stand_in_its_line() -> None:
    _, timeline = planned(2, 2, 2)
    text = schedule_chart(timeline, 2, 100)
    first, second = text.plain.splitlines()[1:3]
    assert first.startswith("stages 0,2 a")
    assert second.startswith("stages 1,3 ·")
    assert len(first) <= 100
    styles = {str(span.style) for span in text.spans}
    assert {"cyan", "cyan underline", "green", "green underline"} <= styles
    line = first.split()[2]
    at = text.plain.index(first) + first.index(line)
    (*_, last) = [s for s in text.spans if s.start < at + len(line.rstrip("·")) <= s.end]
    assert str(last.style) == "green"  # its first stage's backward is what it ends with


def test_one_stage_per_rank_is_drawn_as_before() -> None:
    _, timeline = planned(2, 1, 2)
    text = schedule_chart(timeline, 2, 100)
    assert text.plain.splitlines()[1].startswith("stage 0 a")
    assert not any("underline" in str(span.style) for span in text.spans)
