"""The recipes of docs/design.md, followed."""

from __future__ import annotations

import inspect
import re
import textwrap
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pipecompile.compiler.capture.batch import flatten
from pipecompile.compiler.capture.skeleton import skeleton_of
from pipecompile.compiler.cli.flags import Parser, add_flags
from pipecompile.compiler.costs.hardware import CPU
from pipecompile.compiler.driver.builder import Builder, Mode, divide
from pipecompile.compiler.ir.errors import OptionError, PlanError, RankMismatchError
from pipecompile.compiler.options import arguments as declared
from pipecompile.compiler.options.arguments import Arguments, Options
from pipecompile.compiler.options.options import CompileOptions
from pipecompile.compiler.options.signature import takes
from pipecompile.compiler.plan.plan import Plan
from pipecompile.compiler.planning.target import Target
from pipecompile.runtime.exchange.agreement import Agreement
from pipecompile.runtime.exchange.mesh import Mesh
from torch import nn

DESIGN = Path(__file__).parents[1] / "docs/design.md"
HOST = torch.device("cpu")


def recipe(title: str) -> str:
    """The text of a section of the document."""
    found = re.search(rf"^## {title}\n(.*?)(?=^## )", DESIGN.read_text(), re.MULTILINE | re.DOTALL)
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
    exec(lines + textwrap.indent(block(recipe("How to add an option")), "    "), namespace)
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
    files = re.findall(r"`([\w/]+\.py)`", recipe("How to add an option"))
    assert len(files) > 5
    assert all((DESIGN.parents[1] / file).is_file() for file in files)
