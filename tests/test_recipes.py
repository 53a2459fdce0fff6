"""docs/design.md says how to add things: here each of them is added."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pipecompile
import pytest
from pipecompile.compiler.driver import passes
from pipecompile.compiler.driver.passes import Pass
from pipecompile.compiler.driver.record import Texts
from pipecompile.compiler.driver.work import Work
from pipecompile.compiler.ir.actions import Action, Kind, Schedule
from pipecompile.compiler.ir.graph import phase_of, viewed
from pipecompile.passes.graph.verify import verify_graph, verify_placement
from pipecompile.passes.schedule.registry import SCHEDULES, ScheduleKind
from support import jobs, models, plain
from support.commands import SMALL_GPT2, plan_of
from torch import fx

# -- a pass ---------------------------------------------------------------------------------------


def merge_equal_views(work: Work) -> str:
    """Views of one value that are equal, on one stage and in one phase, become one."""
    first: dict[tuple[Any, ...], fx.Node] = {}
    merged: dict[fx.Node, fx.Node] = {}
    for node in work.locality.staged:
        if viewed(node) is None or node.kwargs:
            continue
        key = (node.target, node.args, work.stage[node], phase_of(node))
        twin = first.setdefault(key, node)
        if twin is not node and not node.meta.get("recomputes"):
            node.replace_all_uses_with(twin)
            merged[node] = twin
    work.locality = replace(
        work.locality, staged=tuple(n for n in work.locality.staged if n not in merged)
    )
    for node in merged:
        del work.stage[node]
        work.graph.graph.erase_node(node)
    return f"{len(merged)} equal views merged"


def test_how_to_add_a_pass(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    added = Pass("merge_views", merge_equal_views, verify=(verify_placed,), dump=_texts)
    monkeypatch.setattr(passes, "PLACED", (*passes.PLACED, added))
    batch = models.batches("gpt2", 8, 2)
    pipe = jobs.pipeline("gpt2", 2, 1, 4, dump_dir=tmp_path)
    found = plain.train_pipeline(pipe, batch)
    plain.assert_equal(found, jobs.train_plainly("gpt2", 1, 4, "adamw", 2))
    order = [record.name for record in pipe.compiled.records]
    assert order.index("remat") < order.index("merge_views") < order.index("lower")
    assert re.fullmatch(r"\d+ equal views merged", dict(pipe.plan.notes)["merge_views"])
    assert any(path.name.endswith("merge_views.py") for path in tmp_path.rglob("*"))


def verify_placed(work: Work) -> None:
    verify_graph(work.graph)
    verify_placement(work.graph, work.stage)


def _texts(work: Work) -> Texts:
    return {".py": work.graph.text}


# -- a schedule -----------------------------------------------------------------------------------


def gpipe(n_stages: int, microbatches: int, splits: Sequence[bool]) -> Schedule:
    """All forwards, then all backwards (Huang et al., 2019)."""
    del splits
    return tuple(
        tuple(Action(s, kind, i) for kind in (Kind.F, Kind.B) for i in range(microbatches))
        for s in range(n_stages)
    )


GPIPE = ScheduleKind("gpipe", "all forwards first", gpipe, lambda stage, stages, split: MANY)
MANY = 1 << 20  # microbatches: as many as there are


def test_how_to_add_a_schedule(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(cast(dict[str, ScheduleKind], SCHEDULES), "gpipe", GPIPE)
    batch = models.batches("gpt2", 8, 2)
    pipe = jobs.pipeline("gpt2", 2, 1, 4, schedule="gpipe")
    found = plain.train_pipeline(pipe, batch)
    plain.assert_equal(found, jobs.train_plainly("gpt2", 1, 4, "adamw", 2))
    assert [stage.in_flight for stage in pipe.plan.stages] == [4, 4]
    assert dict(pipe.plan.notes)["schedule"] == "gpipe, 4 microbatches"
    usual = jobs.pipeline("gpt2", 2, 1, 4, example_batch=batch[0])
    held = [p.plan.stages[1].memory.peak for p in (pipe, usual)]
    assert held[0] > held[1]  # the last stage holds one microbatch in 1F1B, and four here
    plan = plan_of(f"{SMALL_GPT2} --stages 2 --schedule gpipe", capsys)
    assert plan["options"]["schedule"] == "gpipe"
    with pytest.raises(pipecompile.errors.OptionError, match="'1f1b' or 'zb_h1' or 'gpipe'"):
        jobs.pipeline("gpt2", 2, 1, 4, schedule="gpip")
