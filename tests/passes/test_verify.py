"""Verifiers can fail: every `VerificationError` of the package has a violation, planted by hand."""

from __future__ import annotations

import ast
import re
import traceback
from collections.abc import Callable, Collection, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pipecompile
import pytest
import torch
from pipecompile.compiler.ir import ops
from pipecompile.compiler.ir.actions import Kind, from_text
from pipecompile.compiler.ir.errors import VerificationError
from pipecompile.compiler.ir.graph import JointGraph, Phase
from pipecompile.compiler.ir.locality import locality_of
from pipecompile.compiler.ir.program import (
    Message,
    PipelineProgram,
    Port,
    Program,
    Role,
    StageProgram,
    TiedGradient,
    ValueSpec,
)
from pipecompile.compiler.ir.zero import LEVELS
from pipecompile.passes.graph.autocast import _check_no_fp64
from pipecompile.passes.graph.verify import verify_graph, verify_placement
from pipecompile.passes.programs.lower import lower
from pipecompile.passes.programs.verify import verify_program, verify_writes
from pipecompile.passes.schedule.exchange import verify_exchange
from pipecompile.passes.schedule.limits import verify_held, verify_in_flight
from pipecompile.passes.schedule.simulate import simulate
from pipecompile.passes.schedule.verify import verify_compute, verify_schedule
from pipecompile.runtime.executor import drive
from pipecompile.runtime.transport.transport import Loopback
from torch import fx, nn

PACKAGE = Path(pipecompile.__file__).parent
ATEN = torch.ops.aten
FORWARD, BACKWARD = Phase.FORWARD, Phase.BACKWARD


# -- graphs ---------------------------------------------------------------------------------------


def joint(change: Callable[[dict[str, fx.Node], JointGraph], object] | None = None) -> JointGraph:
    """y = tanh(w), loss = sum(y), and the gradient of w, with something changed."""
    graph = fx.Graph()
    w, tangent = graph.placeholder("w"), graph.placeholder("tangent")

    def call(name: str, target: Any, *args: Any) -> fx.Node:
        return graph.create_node("call_function", target, args, name=name)

    y = call("y", ATEN.tanh.default, w)
    loss = call("loss", ATEN.sum.default, y)
    spread = call("spread", ATEN.expand.default, tangent, (3,))
    grad = call("grad", ATEN.tanh_backward.default, spread, y)
    graph.output((loss, grad))
    nodes = {node.name: node for node in (w, tangent, y, loss, spread, grad)}
    for node in nodes.values():
        shape = () if node in (loss, tangent) else (3,)
        phase = BACKWARD if node in (tangent, spread, grad) else FORWARD
        node.meta = {"val": torch.empty(shape, device="meta"), "phase": phase}
    made = JointGraph(nn.Module(), graph, {"w": w}, {}, {}, tangent, loss, grads={"w": grad})
    if change is not None:
        change(nodes, made)
    return made


def call_a_module(nodes: dict[str, fx.Node], graph: JointGraph) -> None:
    with graph.graph.inserting_before(nodes["loss"]):
        graph.graph.call_module("layer", (nodes["y"],))


def name_a_constant(nodes: dict[str, fx.Node], graph: JointGraph) -> None:
    with graph.graph.inserting_before(nodes["loss"]):
        graph.graph.get_attr("absent")


def read_backward(nodes: dict[str, fx.Node], graph: JointGraph) -> None:
    nodes["spread"].meta["phase"] = FORWARD


def gradient(shape: tuple[int, ...], dtype: torch.dtype) -> Callable[..., None]:
    def change(nodes: dict[str, fx.Node], graph: JointGraph) -> None:
        nodes["grad"].meta["val"] = torch.empty(shape, dtype=dtype, device="meta")

    return change


def placed(**stages: int) -> None:
    found: dict[str, fx.Node] = {}
    graph = joint(lambda nodes, _: found.update(nodes))
    verify_placement(graph, {found[name]: stage for name, stage in stages.items()})


# -- programs -------------------------------------------------------------------------------------


def code(reads: str = "", makes: str = "", *steps: Any) -> Program:
    """A program of values, constants (in capitals), and steps: (operator, what it reads).

    A step is named by its position, an input by its name.
    """
    graph = fx.Graph()
    nodes = {name: graph.placeholder(name) for name in reads.split()}
    for i, (target, read) in enumerate(steps):
        nodes[str(i)] = graph.call_function(target, tuple(nodes[name] for name in read.split()))
    graph.output(())
    ports = [Port(Role.CONSTANT if n.isupper() else Role.VALUE, n) for n in reads.split()]
    made = [Port(Role.CONSTANT if n.isupper() else Role.VALUE, n) for n in makes.split()]
    return Program(fx.GraphModule(nn.Module(), graph), tuple(ports), tuple(made))


def stage(
    number: int, forward: Program, backward: Program | None = None, weight: Program | None = None
) -> StageProgram:
    return StageProgram(number, code("", "TABLE"), forward, backward, weight, (), (), ("w",))


def message(src: int, dst: int, value: str = "x") -> Message:
    phase = FORWARD if src < dst else BACKWARD
    return Message(src, dst, phase, (ValueSpec(value, (1,), (1,), torch.float32),))


def pipeline(*stages: StageProgram, messages: tuple[Message, ...] = ()) -> PipelineProgram:
    return PipelineProgram(stages, messages, (), len(stages) - 1, None)


def two(change: str = "", to: str = "") -> PipelineProgram:
    """x goes up, its gradient dx down; each stage keeps h and carries g to its weights."""

    def named(names: str) -> str:
        return names.replace(change, to) if change else names

    first = stage(0, code("TABLE", named("x h")), code(named("dx h"), "g"), code(named("g h"), ""))
    second = stage(1, code("x", "h"), code("h", named("dx g")), code("g", ""))
    return pipeline(first, second, messages=(message(0, 1), message(1, 0, "dx")))


def written(*steps: Any) -> PipelineProgram:
    return pipeline(stage(0, code("x", "", *steps)))


# -- schedules ------------------------------------------------------------------------------------

MESSAGES = [message(0, 1), message(1, 0)]
LEGAL = (
    "0F0 0SEND_F0→1 0F1 0SEND_F1→1 0RECV_B0←1 0B0 0W0 0RECV_B1←1 0B1 0W1\n"
    "1RECV_F0←0 1RECV_F1←0 1F0 1B0 1SEND_B0→0 1F1 1B1 1SEND_B1→0"
)
SHARDED = "0UNSHARD 0F0 0B0 0REDUCE_B0 0REDUCE_GRAD 0SYNC_TIED"


def scheduled(
    old: str = "", new: str = "", trains: bool = True, weights: Collection[int] | None = None
) -> None:
    assert old in LEGAL
    verify_schedule(from_text(LEGAL.replace(old, new, 1)), MESSAGES, 2, trains, weights)


FORKED = "0F0 0SEND_F0→1 0SEND_F0→2\n1RECV_F0←0 2RECV_F0←0 1F0 2F0"


def forked(old: str = "", new: str = "") -> None:
    assert old in FORKED
    messages = [Message(0, stage, FORWARD, ()) for stage in (1, 2)]
    verify_schedule(from_text(FORKED.replace(old, new, 1)), messages, 1, trains=False)


CIRCULAR = "0RECV_F0←1 0F0 0SEND_F0→1\n1RECV_F0←0 1F0 1SEND_F0→0"


def circular() -> None:
    both = [message(0, 1), Message(1, 0, FORWARD, ())]
    verify_schedule(from_text(CIRCULAR), both, 1, trains=False)


def sharded(old: str = "", new: str = "", zero: int = 2) -> None:
    assert old in SHARDED
    program = pipeline(stage(0, code(), code()))
    verify_exchange(from_text(SHARDED.replace(old, new, 1)), program, 2, LEVELS[zero])


TIED = "0F0 0SEND_F0→1 0SYNC_TIED \n1RECV_F0←0 1F0 1B0 1SYNC_TIED"


def tied_apart(old: str = "", new: str = "") -> None:
    assert old in TIED
    program = pipeline(stage(0, code(), code()), stage(1, code(), code()))
    program = replace(program, tied=(TiedGradient("w", 0, (0, 1), (0, 1)),))
    verify_exchange(from_text(TIED.replace(old, new, 1)), program, 1, LEVELS[0])


# -- elsewhere ------------------------------------------------------------------------------------


def lowered(*reads: str, **stages: int) -> None:
    """With a loss that reads these values, and all on stage 0 but what is said."""

    def change(nodes: dict[str, fx.Node], graph: JointGraph) -> None:
        nodes["loss"].args = tuple(nodes[name] for name in reads)

    graph = joint(change)
    locality = locality_of(graph)
    places = {node: stages.get(node.name, 0) for node in locality.staged}
    lower(graph, locality, places, 2)


def unread() -> None:
    spec = message(0, 1).values[0]
    loopback = Loopback()
    loopback.send(0, 1, [torch.ones(1)], [spec])
    loopback.flush()


def stuck() -> Iterator[None]:
    while True:
        yield


VIOLATIONS: list[tuple[Callable[[], object], str]] = [
    (lambda: verify_graph(joint(call_a_module)), "layer is a call_module"),
    (lambda: verify_graph(joint(name_a_constant)), "absent is no constant of the graph"),
    (lambda: verify_graph(joint(lambda n, _: n["y"].meta.pop("val"))), "has no shape"),
    (lambda: verify_graph(joint(read_backward)), "the forward node spread reads tangent"),
    (lambda: verify_graph(joint(gradient((4,), torch.float32))), "gradient of w is .*4"),
    (lambda: verify_graph(joint(gradient((3,), torch.float64))), "w is .*float64"),
    (lambda: verify_graph(joint(gradient((3,), torch.int16))), "w is .*int16"),
    (lambda: placed(y=1, loss=0), r"y \(stage 1\) is read by loss \(stage 0\)"),
    (lambda: placed(spread=0, grad=1), r"spread \(stage 0\) is read by grad \(stage 1\)"),
    (
        lambda: verify_program(pipeline(stage(0, code("OTHER")))),
        r"stage 0 F reads unknown constant\(OTHER\)",
    ),
    (
        lambda: verify_program(pipeline(stage(0, code("h", "h")))),
        r"stage 0 F reads unknown value\(h\)",
    ),
    (
        lambda: verify_program(pipeline(stage(0, code("", "x"), code("h")))),
        r"stage 0 B reads unknown value\(h\)",
    ),
    (
        lambda: verify_program(pipeline(stage(0, code("", "x"), code("x"), code("g")))),
        r"stage 0 W reads unknown value\(g\)",
    ),
    (
        lambda: verify_program(
            pipeline(stage(0, code("", "x")), stage(1, code("x")), messages=(message(1, 0),))
        ),
        r"stage 1 F reads unknown value\(x\)",
    ),
    (lambda: verify_program(two("x", "y")), "0→1 sends {'x'}"),
    (lambda: verify_program(two("dx g", "g")), "1→0 sends {'dx'}"),
    (
        lambda: verify_writes(written((ATEN.tanh_.default, "x"))),
        "stage 0 F: tanh__default writes over x, which others have",
    ),
    (
        lambda: verify_writes(
            written(
                (ATEN.exp.default, "x"),
                (ops.accumulate, "x 0"),
                (ATEN.tanh_.default, "0"),
            )
        ),
        "tanh__default writes over exp_default, which others have",
    ),
    (
        lambda: verify_writes(
            written(
                (ATEN.exp.default, "x"),
                (ATEN.t.default, "0"),
                (ops.accumulate, "x 1"),
                (ATEN.tanh_.default, "0"),
            )
        ),
        "tanh__default writes over exp_default, which others have",
    ),
    (
        lambda: verify_writes(
            written((ATEN.exp.default, "x"), (ATEN.tanh_.default, "0"), (ATEN.add.Tensor, "0 1"))
        ),
        "add_tensor reads exp_default, which was written over",
    ),
    (
        lambda: verify_writes(
            written(
                (ATEN.exp.default, "x"),
                (ATEN.t.default, "0"),
                (ATEN.tanh_.default, "0"),
                (ATEN.exp.default, "1"),
            )
        ),
        "exp_default_1 reads t_default, which was written over",
    ),
    (lambda: sharded("0UNSHARD 0F0", "0F0 0UNSHARD"), "stage 0 computes before 0UNSHARD"),
    (lambda: sharded("0REDUCE_GRAD ", ""), "stage 0 has 0 REDUCE_GRAD"),
    (lambda: sharded("0SYNC_TIED", "0REDUCE_GRAD"), "stage 0 has 2 REDUCE_GRAD"),
    (
        lambda: sharded("0B0 0REDUCE_B0 0REDUCE_GRAD", "0REDUCE_GRAD 0B0 0REDUCE_B0"),
        "0REDUCE_GRAD comes before 0B0",
    ),
    (lambda: tied_apart("0SYNC_TIED ", ""), "stage 0 has 0 SYNC_TIED"),
    (
        lambda: tied_apart("0F0 0SEND_F0→1 0SYNC_TIED", "0F0 0SYNC_TIED 0SEND_F0→1"),
        "comes after 0SY",
    ),
    (lambda: tied_apart("1B0 1SYNC_TIED", "1SYNC_TIED 1B0"), "1SYNC_TIED comes before 1B0"),
    (lambda: sharded(zero=1), "0SYNC_TIED is on the wrong side of 0REDUCE_GRAD"),
    (
        lambda: sharded("0REDUCE_GRAD 0SYNC_TIED", "0SYNC_TIED 0REDUCE_GRAD"),
        "0REDUCE_GRAD is on the wrong side of 0SYNC_TIED",
    ),
    (lambda: sharded("0B0 0REDUCE_B0", "0REDUCE_B0 0B0"), "0REDUCE_B0 does not follow 0B0"),
    (lambda: sharded("0REDUCE_B0", "0REDUCE_W0"), "0REDUCE_W0 does not follow 0W0"),
    (lambda: sharded("0REDUCE_B0", "0REDUCE_B1"), "0REDUCE_B1 does not follow 0B1"),
    (lambda: scheduled("0F1 ", ""), r"stage 0 runs F of microbatches \[0\]"),
    (lambda: scheduled("0B1", "0B0"), r"stage 0 runs B of microbatches \[0, 0\]"),
    (lambda: scheduled("0F1", "0F2"), r"stage 0 runs F of microbatches \[0, 2\]"),
    (lambda: scheduled(trains=False), r"stage 0 runs B of microbatches \[0, 1\]"),
    (lambda: scheduled("0W1", ""), r"stage 0 runs W of microbatches \[0\]"),
    (lambda: scheduled("0W1", "1W1"), "1W1 is in the list of rank 0, and stage 1 is on rank 1"),
    (
        lambda: verify_schedule(from_text("0F0 2F0"), [], 1, trains=False),
        r"only stages \[0, 2\] have actions",
    ),
    (
        lambda: verify_schedule(from_text("1F0 0F0"), [message(0, 1)], 1, trains=False),
        "1F0 reads what 0F0 makes after it",
    ),
    (lambda: scheduled("1F1 1B1", "1B1 1F1"), "1B1 comes before 1F1"),
    (lambda: scheduled("0B0 0W0", "0W0 0B0"), "0W0 comes before 0B0"),
    (lambda: scheduled("1SEND_B1→0", ""), r"1→0 backward: microbatches \[0\] are sent"),
    (lambda: scheduled("0SEND_F1→1", "0SEND_F0→1"), r"0→1 forward: microbatches \[0, 0\] are sent"),
    (
        lambda: scheduled("1RECV_F0←0 1RECV_F1←0", "1RECV_F1←0 1RECV_F0←0"),
        r"0→1 forward: sent in order \[0, 1\], received \[1, 0\]",
    ),
    (lambda: scheduled("1RECV_F1←0", ""), r"sent in order \[0, 1\], received \[0\]"),
    (lambda: scheduled("0F1 0SEND_F1→1", "0SEND_F1→1 0F1"), "0SEND_F1→1 is on the wrong side"),
    (lambda: scheduled("0RECV_B1←1 0B1", "0B1 0RECV_B1←1"), "0RECV_B1←1 is on the wrong side"),
    (lambda: scheduled("0F1", "0F1 0SEND_B0→1"), "0SEND_B0→1 has no message"),
    (lambda: scheduled("0F1", "0F1 0RECV_F0←1"), "0RECV_F0←1 has no message"),
    (lambda: scheduled("0SEND_F1→1", "0SEND_F1"), "0SEND_F1 names no stage to talk to"),
    (lambda: scheduled("1F1", "1F1→0"), "1F1→0 names a stage to talk to"),
    (lambda: scheduled("1F1", "1F"), "1F names no microbatch"),
    (lambda: scheduled("0W0 0RECV_B1←1 0B1 0W1", "0RECV_B1←1 0B1", weights={0}), "stage 0 runs W"),
    (lambda: scheduled(weights=()), r"stage 0 runs W of microbatches \[0, 1\], and should of none"),
    (lambda: scheduled("0B1 0W1\n", "0B1 0W1\n\n"), "rank 1 has nothing to do"),
    (lambda: verify_schedule(from_text("0F0"), [message(0, 1)], 1, False), "1 has no actions"),
    (
        lambda: scheduled("1SEND_B0→0 1F1 1B1 1SEND_B1→0", "1F1 1B1 1W0 1SEND_B0→0 1SEND_B1→0 1W1"),
        "1SEND_B0→0 is on the wrong side of 1W0, which may be the last to read",
    ),
    (
        lambda: forked("0SEND_F0→1 0SEND_F0→2", "0SEND_F0→2 0SEND_F0→1"),
        "0SEND_F0→2 comes before 0SEND_F0→1, and values are dropped after the last stage",
    ),
    (
        lambda: forked("1RECV_F0←0 2RECV_F0←0", "2RECV_F0←0 1RECV_F0←0"),
        "2RECV_F0←0 is posted where 0SEND_F0→1 is next from rank 0 to rank 1",
    ),
    (
        lambda: verify_compute(from_text("1F0 0F0"), [message(0, 1)], 1, trains=False),
        "1F0 reads what 0F0 makes after it",
    ),
    (circular, "a wait cycle: .*F0"),
    (
        lambda: verify_in_flight(from_text("0F0 0F1 0F2 0B0 0B1 0B2"), [2]),
        "stage 0 holds 3 microbatches, planned 2",
    ),
    (
        lambda: verify_in_flight(from_text("0F0 0B0 0F1 0B1 0W0 0W1"), [1]),
        "stage 0 holds 2 microbatches, planned 1",
    ),
    (
        lambda: verify_held(from_text("0F0 0F1 0B0 0B1"), [8], [0], [15]),
        "after 0F1 rank 0 holds 16 bytes of microbatches, planned 15",
    ),
    (lambda: lowered("y", y=1), "y goes from forward of stage 1 to 0"),
    (lambda: lowered("spread"), "spread is made in B and read in F"),
    (
        lambda: simulate(from_text(CIRCULAR), {(s, Kind.F): 1.0 for s in range(2)}, {}),
        "the schedule deadlocks",
    ),
    (lambda: drive([stuck(), stuck()], lambda: 0), "every rank waits for another"),
    (unread, "messages that nobody read: 0→1"),
    (
        lambda: joint(lambda n, _: _check_no_fp64(n["y"], torch.ones(3, dtype=torch.float64))),
        "y became fp64",
    ),
]
"""What breaks a rule, and what is said of it."""


def test_what_is_legal_passes() -> None:
    verify_graph(joint())
    verify_graph(joint(gradient((3,), torch.bfloat16)))  # widened where it adds up
    placed(w=0, y=0, loss=1, spread=1, grad=0)
    verify_program(two())
    verify_writes(written((ATEN.exp.default, "x"), (ATEN.tanh_.default, "0")))
    scheduled()
    scheduled(weights={0})
    forked()
    sharded()
    tied_apart()
    verify_compute(from_text("0F0 1F0"), [message(0, 1)], 1, trains=False)
    verify_in_flight(from_text("0F0 0F1 0B0 0B1"), [2])
    verify_held(from_text("0F0 0F1 0B0 0B1"), [8], [0], [16])


@pytest.mark.parametrize(("violate", "said"), VIOLATIONS, ids=[said for _, said in VIOLATIONS])
def test_what_is_not_is_refused(violate: Callable[[], object], said: str) -> None:
    with pytest.raises(VerificationError, match=said):
        violate()


def test_every_refusal_has_a_violation() -> None:
    """One that is new in the package needs a line above."""
    seen: set[tuple[str, int]] = set()
    for violate, _ in VIOLATIONS:
        with pytest.raises(VerificationError) as caught:
            violate()
        error: BaseException | None = caught.value
        while error is not None:  # one that names its place hides the one that it took up
            steps = traceback.extract_tb(error.__traceback__)
            seen |= {(step.filename, step.lineno or 0) for step in steps}
            error = error.__context__
    assert not [place for place in refusals() if place not in seen]


REFUSAL = re.compile(r"\b(VerificationError|FaultError|drawn)\(")


def refusals() -> Iterator[tuple[str, int]]:
    """File and line of all that raises such an error."""
    for folder in ("compiler", "passes", "runtime"):
        for path in (PACKAGE / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Raise) and REFUSAL.search(ast.unparse(node)):
                    yield str(path), node.lineno
