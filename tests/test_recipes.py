"""docs/design.md says how to add things: here each of them is added."""

from __future__ import annotations

import inspect
import re
import textwrap
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import pipecompile
import pytest
import torch
from pipecompile.compiler.capture.batch import flatten
from pipecompile.compiler.capture.skeleton import skeleton_of
from pipecompile.compiler.cli.flags import Parser, add_flags
from pipecompile.compiler.costs.hardware import CPU
from pipecompile.compiler.driver import passes
from pipecompile.compiler.driver.builder import Builder
from pipecompile.compiler.driver.compiled import Mode
from pipecompile.compiler.driver.passes import Pass
from pipecompile.compiler.driver.record import Texts
from pipecompile.compiler.driver.work import Work
from pipecompile.compiler.ir.actions import Action, Kind, Schedule
from pipecompile.compiler.ir.errors import OptionError, PlanError, RankMismatchError
from pipecompile.compiler.ir.graph import phase_of, viewed
from pipecompile.compiler.options import arguments as declared
from pipecompile.compiler.options.arguments import Arguments, Options
from pipecompile.compiler.options.microbatches import divide
from pipecompile.compiler.options.options import CompileOptions
from pipecompile.compiler.options.signature import takes
from pipecompile.compiler.plan.plan import Plan
from pipecompile.compiler.planning.target import Target
from pipecompile.passes.generators.shape import PipelineShape
from pipecompile.passes.graph.verify import verify_graph, verify_placement
from pipecompile.passes.schedule.registry import SCHEDULES, ScheduleKind
from pipecompile.runtime.exchange.agreement import Agreement
from pipecompile.runtime.transport.mesh import Mesh
from support import jobs, models, plain
from support.commands import SMALL_GPT2, plan_of
from torch import fx, nn

DESIGN = Path(__file__).parents[1] / "docs/design.md"
HOST = torch.device("cpu")


def recipe(title: str) -> str:
    """The text of a section of the document."""
    found = re.search(rf"^### {title}\n(.*?)(?=^##)", DESIGN.read_text(), re.MULTILINE | re.DOTALL)
    assert found is not None
    return found[1]


def block(text: str) -> str:
    """The one block of Python in a recipe."""
    (found,) = re.findall(r"^ *```python\n(.*?)^ *```$", text, re.MULTILINE | re.DOTALL)
    return textwrap.dedent(found)


# -- an option ----------------------------------------------------------------------------------


def extended() -> type[Options]:
    """`Options` with the recipe's field, read as the file that it is meant for."""
    lines = "@dataclass(frozen=True, kw_only=True)\nclass Extended(Options):\n"
    namespace = dict(vars(declared))
    exec(lines + textwrap.indent(block(recipe("An option")), "    "), namespace)
    made: type[Options] = namespace["Extended"]
    return made


Extended: Any = extended()


@dataclass(frozen=True)
class Taken(Arguments, Extended):
    """What `compile` would take."""


@dataclass(frozen=True, kw_only=True)
class Resolved(CompileOptions, Extended):
    """What `compile` would make of it."""


@takes(Taken)
def compiled(arguments: Any) -> Any:
    """Compile.

    Args:
        ...
    """
    return arguments.rounding


def test_an_option_is_a_parameter() -> None:
    parameter = inspect.signature(compiled).parameters["rounding"]
    assert (parameter.default, parameter.annotation) == ("nearest", "str")
    assert parameter.kind is parameter.KEYWORD_ONLY
    call: Any = compiled
    assert call(nn.Identity(), 2) == "nearest"
    assert call(nn.Identity(), 2, rounding="stochastic") == "stochastic"
    with pytest.raises(OptionError, match="'roundings': did you mean 'rounding'"):
        call(nn.Identity(), 2, roundings="stochastic")


def test_an_option_is_documented() -> None:
    said = (
        '    rounding: how gradients are rounded: "nearest", or "stochastic": up or down by chance.'
    )
    assert said in inspect.getdoc(compiled)
    assert '"stochastic" is right on average.' in inspect.getdoc(compiled)


def test_an_option_is_checked() -> None:
    with pytest.raises(OptionError, match="rounding='down': use 'nearest' or 'stochastic'"):
        Resolved(n_stages=2, rounding="down")  # type: ignore[call-arg]


def test_an_option_is_a_flag() -> None:
    parser = Parser(prog="inspect")
    add_flags(parser, Taken)
    assert parser.parse_args(["--rounding", "stochastic"]).rounding == "stochastic"
    assert parser.parse_args([]).rounding is None
    said = " ".join(parser.format_help().split())
    assert "--rounding HOW how gradients are rounded: nearest, or stochastic: up or" in said
    assert "by chance (default: nearest)" in said


def test_an_option_is_kept_by_plans() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    skeleton, whole = skeleton_of(model, HOST), flatten(torch.ones(8, 8))[1]

    def plan_of(rounding: str, plan: Plan | None = None) -> Plan:
        options: Any = Resolved(n_stages=2, loss_fn=lambda out, _: out.mean(), plan=plan)
        options = replace(options, rounding=rounding)
        spec, microbatches = divide(whole, options, 1)
        builder = Builder(skeleton, options, Target(HOST, CPU, float("inf")))
        return builder.build(Mode.TRAIN, spec, microbatches).plan

    plan = plan_of("stochastic")
    assert plan.options["rounding"] == "stochastic"
    assert plan_of("stochastic", plan).stages == plan.stages
    with pytest.raises(PlanError, match="the plan has rounding=stochastic, this run rounding=near"):
        plan_of("nearest", plan)


def test_an_option_is_compared_by_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    nearest, stochastic = (
        Resolved(n_stages=2, rounding=rounding)  # type: ignore[call-arg]
        for rounding in ("nearest", "stochastic")
    )
    agreement = Agreement(Mesh(2, 1, 0), HOST)
    monkeypatch.setattr(agreement, "gather", lambda mine: [mine, stochastic.compared()])
    agreement.check_options(stochastic)
    with pytest.raises(RankMismatchError, match="1 has rounding='stochastic', rank 0 rounding='ne"):
        agreement.check_options(nearest)


def test_the_files_that_a_recipe_names_are_there() -> None:
    files = re.findall(r"`([\w/]+\.py)`", recipe("An option"))
    assert len(files) > 5
    assert all((DESIGN.parents[1] / file).is_file() for file in files)


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


def ahead(shape: PipelineShape) -> Schedule:
    """1F1B that is two forwards further ahead."""
    rows: list[list[Action]] = []
    for s in range(shape.n_stages):
        warm_up = min(shape.n_stages - s + 1, shape.microbatches)
        rows.append([Action(s, Kind.F, i) for i in range(warm_up)])
        for i in range(shape.microbatches):
            if warm_up + i < shape.microbatches:
                rows[-1].append(Action(s, Kind.F, warm_up + i))
            rows[-1].append(Action(s, Kind.B, i))
    return tuple(map(tuple, rows))


AHEAD = ScheduleKind("ahead", "1f1b with more microbatches in flight", ahead)


def test_how_to_add_a_schedule(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(cast(dict[str, ScheduleKind], SCHEDULES), "ahead", AHEAD)
    batch = models.batches("gpt2", 8, 2)
    pipe = jobs.pipeline("gpt2", 2, 1, 4, schedule="ahead")
    found = plain.train_pipeline(pipe, batch)
    plain.assert_equal(found, jobs.train_plainly("gpt2", 1, 4, "adamw", 2))
    assert [stage.in_flight for stage in pipe.plan.stages] == [4, 3]
    assert dict(pipe.plan.notes)["schedule"] == "ahead, 4 microbatches"
    usual = jobs.pipeline("gpt2", 2, 1, 4, example_batch=batch[0])
    held = [p.plan.stages[1].memory.peak for p in (pipe, usual)]
    assert held[0] > held[1]  # the last stage holds one microbatch in 1F1B, and three here
    plan = plan_of(f"{SMALL_GPT2} --stages 2 --schedule ahead", capsys)
    assert plan["options"]["schedule"] == "ahead"
    with pytest.raises(pipecompile.errors.OptionError, match="did you mean 'ahead'"):
        jobs.pipeline("gpt2", 2, 1, 4, schedule="ahed")
