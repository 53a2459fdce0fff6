"""An option is declared once: everything that is said and done about it follows."""

from __future__ import annotations

import inspect
import pickle
import pydoc
import re
from dataclasses import MISSING, fields, replace
from pathlib import Path
from typing import Any

import pipecompile
import pytest
import torch
from pipecompile import Precision, errors
from pipecompile.compiler.cli.flags import help_of
from pipecompile.compiler.cli.main import make_parser
from pipecompile.compiler.cli.request import Request
from pipecompile.compiler.options.arguments import Arguments, Options
from pipecompile.compiler.options.declaration import Declaration, declarations_of
from pipecompile.compiler.options.options import CompileOptions
from pipecompile.passes.partition.solve import SOLVERS
from pipecompile.runtime.exchange.agreement import Agreement
from pipecompile.runtime.transport.mesh import Mesh
from support import touching
from support.matrix import quickly
from support.options import FLAGS, SGD, differing
from support.plans import hand_made
from torch import nn

DECLARED = declarations_of(Arguments)
RESOLVED = declarations_of(CompileOptions)
FLAGGED = [name for name, option in DECLARED.items() if option.flag is not None]
COMPARED = [name for name, option in RESOLVED.items() if option.compared is not None]
DECIDES = [name for name, option in RESOLVED.items() if option.plan == "decides"]
KEEPS = [name for name, option in RESOLVED.items() if option.plan == "keeps"]


class Squares(nn.Sequential):
    """Two layers, and a scalar output."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(8, 8), nn.Linear(8, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = super().forward(x)
        return made.square().mean()


class Classes(Squares):
    """The second layer is a head, for a loss that can be taken in pieces."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(nn.Sequential.forward(self, x), x.argmax(-1))


def flat(text: str) -> str:
    return " ".join(text.split())


# -- what is said -------------------------------------------------------------------------------


@pytest.mark.parametrize("option", DECLARED.values(), ids=DECLARED)
def test_every_option_says_what_it_is(option: Declaration) -> None:
    assert option.help
    assert not option.help.endswith(".")
    assert not option.more or option.more.endswith(".")
    for choice in option.choices:
        assert f'"{choice}"' in option.help
    if option.choices:
        assert option.default in option.choices


def test_what_compile_resolves_are_the_options_that_it_takes() -> None:
    assert set(RESOLVED) == set(DECLARED) - {"model", "devices"}
    assert {field.name for field in fields(Options)} == set(RESOLVED) - {"n_stages", "dp"}
    assert DECLARED["solver"].choices == SOLVERS


def test_the_signature_is_that_of_the_options() -> None:
    parameters = inspect.signature(pipecompile.compile).parameters
    assert list(parameters) == list(DECLARED)
    assert list(parameters)[:4] == ["model", "n_stages", "dp", "devices"]
    for name, parameter in parameters.items():
        positional = name in ("model", "n_stages", "dp")
        kind = parameter.POSITIONAL_OR_KEYWORD if positional else parameter.KEYWORD_ONLY
        assert parameter.kind is kind
        required = parameter.default is parameter.empty
        assert required == (DECLARED[name].default is MISSING) == (name in ("model", "n_stages"))
        assert required or parameter.default == DECLARED[name].default
    assert parameters["n_stages"].annotation == "int | str"
    assert pipecompile.compile.__name__ == "compile"
    assert pipecompile.compile.__module__ == "pipecompile.compiler.api"


def test_help_reads_well() -> None:
    text = pydoc.plain(pydoc.render_doc(pipecompile.compile))
    _, signature, *lines = [line for line in text.splitlines() if line.strip()]
    assert signature.startswith("compile(model: 'nn.Module', n_stages: 'int | str', dp:")
    assert signature.endswith("-> 'Pipeline'")
    assert max(map(len, lines)) <= 100
    assert lines[0].strip().startswith("Compile an unmodified model into")
    start, end = (i for i, line in enumerate(lines) if line.strip() in ("Args:", "Raises:"))
    paragraphs = re.split(r"^ {8}(?=\w+: )", "\n".join(lines[start + 1 : end]), flags=re.MULTILINE)
    found = [flat(each) for each in paragraphs[1:]]
    assert found == [flat(f"{name}: {option.text}") for name, option in DECLARED.items()]


# -- calls --------------------------------------------------------------------------------------


def test_names_and_places() -> None:
    batch = torch.ones(8, 8)
    plan = pipecompile.compile(Squares(), 2, 2, example_batch=batch).plan
    assert (plan.n_stages, plan.dp) == (2, 2)
    plan = pipecompile.compile(n_stages=2, model=Squares(), example_batch=batch).plan
    assert (plan.n_stages, plan.dp) == (2, 1)


@pytest.mark.parametrize(
    ("arguments", "options", "kind", "message"),
    [
        ((), {"stages": 2}, errors.OptionError, "unknown option 'stages': did you mean 'n_stages'"),
        ((), {"flavour": 2}, errors.OptionError, "'flavour': known are .*; 'n_stages' is missing"),
        (
            (2,),
            {"stages": 2, "foo": 3},
            errors.OptionError,
            "options 'stages': .* 'foo': known are",
        ),
        ((2,), {"flavour": 2}, errors.OptionError, "'flavour': known are model, n_stages, dp, dev"),
        ((), {}, TypeError, r"compile\(\): missing a required argument: 'n_stages'"),
        ((2, 1, 4), {}, TypeError, r"compile\(\): too many positional arguments"),
        ((2,), {"n_stages": 3}, TypeError, r"compile\(\): multiple values for argument 'n_stages'"),
    ],
)
def test_calls_that_do_not_fit(
    arguments: Any, options: dict[str, Any], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        pipecompile.compile(nn.Linear(2, 2), *arguments, **options)


@pytest.mark.parametrize("flag", ["--stages", "--dp", "--microbatches", "--devices"])
def test_a_flag_of_a_billion(flag: str) -> None:
    with pytest.raises(errors.OptionError, match=f"{flag}: '1000000000' is more than 65536"):
        make_parser().parse_args(["inspect", "hf:gpt2", flag, "1000000000"])


@pytest.mark.parametrize("name", ["dp", "time_limit_s", "zero", "schedule", "n_stages"])
def test_none_is_no_value_but_where_it_is_the_default(name: str) -> None:
    with pytest.raises((errors.OptionError, TypeError)):
        CompileOptions(**{"n_stages": 2, name: None})


# -- the command line ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", FLAGGED)
def test_a_flag_is_parsed_to_the_value_of_its_option(name: str) -> None:
    text, value = FLAGS[name]
    assert value != DECLARED[name].default
    args = make_parser().parse_args(["inspect", "hf:gpt2", *text.split()])
    assert getattr(args, name) == value
    assert type(getattr(args, name)) is type(value)
    others = set(FLAGGED) - {name}
    assert all(getattr(args, other) is None for other in others)
    if name not in ("devices", "plan"):  # which need others, or a file
        stages = [] if name == "n_stages" else ["--stages", "2"]
        beside = {
            "zero": "--dp 2",
            "placement": "--dp 2",
            "compress": "--dp 2",
            "sparse_embeddings": "--dp 2",
            "zero_by": "--dp 2 --zero 1",
            "zero_keep": "--dp 2 --zero 3",
            "virtual_stages": "--schedule interleaved",
            "schedule_memory": "--schedule zb",
        }.get(name, "")
        words = [*text.split(), *stages, *beside.split()]
        args = make_parser().parse_args(["inspect", "hf:gpt2", *words])
        assert getattr(Request.of(args).options, name) == value


def test_flags_that_are_not_given_leave_the_defaults() -> None:
    options = Request.of(make_parser().parse_args(["inspect", "hf:gpt2", "--stages", "2"])).options
    others = {"optimizer": torch.optim.AdamW, "costs": "roofline"}
    assert options == CompileOptions(n_stages=2, **others)


def test_inspect_explains_every_flag(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        make_parser().parse_args(["inspect", "--help"])
    text = flat(capsys.readouterr().out)
    flags = {name: DECLARED[name].flag_name for name in FLAGGED}
    for name in FLAGGED:
        option = DECLARED[name]
        assert option.flag is not None
        assert flat(f"{flags[name]} {option.flag.metavar} {help_of(option, flags)}") in text
        for choice in option.choices:
            assert choice in help_of(option, flags)
    assert "1f1b: few microbatches in flight; interleaved: 1f1b over several stages" in text
    assert "(default: 1f1b)" in text
    assert "(default: 30)" in text
    assert "what it takes to fit into --memory;" in text
    assert "(default: all that --device has; without --device no limit)" in text
    assert '"' not in text
    assert "`" not in text


# -- plans --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DECIDES)
def test_what_a_plan_has_decided_has_no_effect_beside_it(name: str) -> None:
    value = FLAGS[name][1]
    plan = hand_made()[0]
    beside = {"n_stages": 2} | ({"schedule": "zb"} if name == "schedule_memory" else {})
    assert getattr(CompileOptions(**beside, plan=plan), name) == RESOLVED[name].default
    assert getattr(CompileOptions(**beside, **{name: value}), name) == value
    with pytest.raises(errors.OptionError, match=f"{name}= has no effect beside plan="):
        CompileOptions(**beside, plan=plan, **{name: value})


def test_those_that_a_plan_has_decided() -> None:
    assert set(DECIDES) == {
        "memory",
        "remat",
        "pin",
        "schedule_memory",
        "solver",
        "time_limit_s",
    }


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({}, ("1f1b", "per_microbatch", "off", "as it is", "0", "auto")),
        (
            {"precision": "bf16", "zero": 3, "dp": 2},
            ("1f1b", "per_microbatch", "off", "bf16", "3", "auto"),
        ),
        (
            {"precision": Precision(compute=torch.float16, grads=torch.float16)},
            ("1f1b", "per_microbatch", "off", "fp16 grads=fp16", "0", "auto"),
        ),
        (
            {"schedule": "zb_h1", "tied_grads": "per_step", "chunked_loss": 512},
            ("zb_h1", "per_step", "512", "as it is", "0", "auto"),
        ),
    ],
)
def test_what_a_plan_keeps(options: dict[str, Any], kept: tuple[str, ...]) -> None:
    names = ("schedule", "tied_grads", "chunked_loss", "precision", "zero", "zero_by")
    others = {"training": "True", "compress": "off", "zero_keep": "auto"}
    expected = dict(zip(names, kept, strict=True)) | others | {"sparse_embeddings": "off"}
    assert CompileOptions(n_stages=2, **options).in_plan() == expected


@pytest.mark.parametrize("name", quickly(["schedule"], KEEPS))
def test_a_plan_is_used_with_the_options_that_it_keeps(name: str) -> None:
    model: Any = {"chunked_loss": Classes, "sparse_embeddings": touching.build}.get(name, Squares)
    batch: Any = touching.batches(1)[0] if model is touching.build else torch.ones(8, 8)

    def compile_(**options: Any) -> Any:
        return pipecompile.compile(model(), 2, 2, example_batch=batch, **options)

    text, value = FLAGS[name]
    beside = {"zero_by": {"zero": 1}, "zero_keep": {"zero": 3}}.get(name, {})
    plan = compile_(**beside, **{name: value}).plan
    assert plan.options[name].lower() in text  # False is "false" there
    assert compile_(**beside, **{name: value}, plan=plan).plan.options == plan.options
    with pytest.raises(errors.PlanError, match=f"the plan has {name}={plan.options[name]}, this"):
        compile_(**beside, plan=plan)


# -- ranks --------------------------------------------------------------------------------------


def compare(monkeypatch: pytest.MonkeyPatch, first: CompileOptions, second: CompileOptions) -> None:
    """What ``second`` on rank 1 of two makes of ``first`` on rank 0."""
    agreement = Agreement(Mesh(2, 1, 1), torch.device("cpu"))
    theirs = pickle.loads(pickle.dumps(first.compared()))
    monkeypatch.setattr(agreement, "gather", lambda mine: [theirs, mine])
    agreement.check_options(second)


@pytest.mark.parametrize("name", COMPARED)
def test_ranks_that_differ_in_an_option_are_told_which(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str
) -> None:
    first, second = (CompileOptions(**given) for given in differing(tmp_path)[name])
    compare(monkeypatch, first, first)
    compare(monkeypatch, second, second)
    with pytest.raises(errors.RankMismatchError) as caught:
        compare(monkeypatch, first, second)
    values = first.compared()[name], second.compared()[name]
    assert str(caught.value) == (
        f"rank 1 has {name}={values[1]!r}, rank 0 {name}={values[0]!r}: "
        "give all ranks the same options"
    )


def test_every_difference_is_of_an_option_that_ranks_compare(tmp_path: Path) -> None:
    assert set(differing(tmp_path)) == set(COMPARED)


def test_the_message_names_the_option_and_both_values(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = (CompileOptions(n_stages=2, remat=remat) for remat in ("none", "full"))
    said = "rank 1 has remat='full', rank 0 remat='none': give all ranks the same options"
    with pytest.raises(errors.RankMismatchError, match=said):
        compare(monkeypatch, first, second)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"memory": "1GiB"}, {"memory": 2**30}),
        ({"precision": "bf16"}, {"precision": Precision(compute=torch.bfloat16)}),
        ({"pin": {"a": 0, "b": 1}}, {"pin": {"b": 1, "a": 0}}),
        ({"max_grad_norm": 1, "optimizer": SGD}, {"max_grad_norm": 1.0, "optimizer": SGD}),
        ({"costs": "roofline"}, {"hardware": "h100"}),
        ({"optimizer": SGD}, {"optimizer": torch.optim.SGD}),
        ({"seed": 1}, {"seed": 2}),
        ({"solver": "cbc", "time_limit_s": 3.0}, {"dump_dir": "elsewhere"}),
        ({}, {"hardware": "h100"}),  # PIPECOMPILE_COSTS=roofline in tests
    ],
)
def test_what_ranks_may_write_differently(
    monkeypatch: pytest.MonkeyPatch, first: dict[str, Any], second: dict[str, Any]
) -> None:
    compare(monkeypatch, CompileOptions(n_stages=2, **first), CompileOptions(n_stages=2, **second))


def test_ranks_compare_what_plans_decide(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """And not how they came: as a path or as a `Plan`."""
    plan = hand_made()[0]
    plan.save(tmp_path / "plan.json")
    moved = replace(plan, decision=replace(plan.decision, recomputed=("relu",)))
    as_plan, as_path, other = (
        CompileOptions(n_stages=2, plan=given) for given in (plan, tmp_path / "plan.json", moved)
    )
    compare(monkeypatch, as_plan, as_path)
    with pytest.raises(errors.RankMismatchError, match="rank 1 has plan='"):
        compare(monkeypatch, as_plan, other)
