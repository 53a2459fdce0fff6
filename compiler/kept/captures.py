"""What was captured, as JSON and tensors, and again."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Mapping
from dataclasses import fields
from enum import Enum
from typing import Any

import torch
from torch import fx, nn

from ..answers import number, sizing
from ..answers.guards import Guards, Question, Reading
from ..capture.batch import Structure
from ..capture.capture import Captured
from ..capture.exporting import only
from ..ir.graph import JointGraph
from ..ir.program import Port, Role
from ..rows.loss import Counting, LossForm, Weighing
from ..rows.outputs import Output
from ..rows.terms import Way
from ..rows.ways import How
from ..tensors.fakes import FakeTensorMode
from ..tensors.pytree import treespec_dumps, treespec_loads
from .graphs import Json, constants_in, constants_of, graph_in, graph_of, value_in, value_of
from .identity import UntoldError

Tensors = dict[str, torch.Tensor]
_ONE = ("tangent", "loss")  # of a joint graph, a node or None
_NAMED = ("params", "buffers", "inputs", "grads", "copies", "mutations")  # names -> nodes


def capture_in(captured: Captured) -> tuple[Json, Tensors]:
    """What was captured as JSON, and the tensors that belong to it.

    Raises:
        UntoldError: it has what no file has.
    """
    if captured.outside:
        raise UntoldError("its forward reads tensors that are none of the model's")
    if captured.scalars:
        raise UntoldError("numbers of the batch are its inputs")
    tensors: Tensors = {}
    found = {
        "graph": _joint_in(captured.graph, tensors),
        "rebuild": _structure_in(captured.rebuild),
        "outputs": [_plain_in(each) for each in captured.outputs],
        "notes": list(captured.notes),
        "guards": _guards_in(captured.guards, tensors),
        "loss": None if captured.loss is None else _loss_in(captured.loss, captured.graph),
        "lost": dict(captured.lost),
    }
    return found, tensors


def capture_of(told: Json, tensors: Mapping[str, torch.Tensor], mode: FakeTensorMode) -> Captured:
    """What was captured, again.

    Raises:
        ValueError, LookupError, TypeError, AttributeError, RuntimeError: it is damaged.
    """
    graph = _joint_of(told["graph"], tensors, mode)
    return Captured(
        graph,
        _structure_of(told["rebuild"]),
        tuple(_plain_of(each, Output, how=How) for each in told["outputs"]),
        tuple(told["notes"]),
        (),
        _guards_of(told["guards"], tensors),
        None if told["loss"] is None else _loss_of(told["loss"], graph, mode),
        told["lost"],
    )


# -- graphs ----------------------------------------------------------------------------------------


def _joint_in(graph: JointGraph, tensors: Tensors) -> Json:
    nodes, numbers = graph_in(graph.graph)
    found: dict[str, Json] = {name: _number(getattr(graph, name), numbers) for name in _ONE}
    for name in _NAMED:
        found[name] = [[key, numbers[node]] for key, node in getattr(graph, name).items()]
    found["results"] = [numbers[node] for node in graph.results]
    return found | {"nodes": nodes, "constants": constants_in(graph.constants, tensors)}


def _number(node: fx.Node | None, numbers: Mapping[fx.Node, int]) -> int | None:
    return None if node is None else numbers[node]


def _joint_of(told: Json, tensors: Mapping[str, torch.Tensor], mode: FakeTensorMode) -> JointGraph:
    graph, nodes = graph_of(told["nodes"], mode)
    named: dict[str, Any] = {name: {key: nodes[i] for key, i in told[name]} for name in _NAMED}
    one = {name: None if told[name] is None else nodes[told[name]] for name in _ONE}
    results = tuple(nodes[i] for i in told["results"])
    constants = constants_of(told["constants"], tensors)
    made = JointGraph(constants, graph, results=results, **(named | one))
    made.set_output()
    return made


def _structure_in(rebuild: Callable[..., Any]) -> Json:
    if rebuild is only:
        return None
    if not isinstance(rebuild, Structure):
        raise UntoldError("a structure of its results")
    others = [[place, value_in(each)] for place, each in rebuild.others.items()]
    try:
        return [treespec_dumps(rebuild.tree), rebuild.size, others]
    except Exception as error:  # of a class that torch was not told how to name
        raise UntoldError(f"the structure of its results ({error})") from error


def _structure_of(told: Json) -> Callable[..., Any]:
    if told is None:
        return only
    tree, size, others = told
    return Structure(treespec_loads(tree), size, {place: value_of(v) for place, v in others})


# -- the loss --------------------------------------------------------------------------------------


def _loss_in(loss: LossForm, graph: JointGraph) -> Json:
    counting = None
    if loss.counting is not None:
        nodes, numbers = graph_in(loss.counting.module.graph)
        (output,) = loss.counting.module.graph.find_nodes(op="output")
        ports = [[port.role.value, port.key] for port in loss.counting.inputs]
        counting = [nodes, ports, [numbers[node] for node in output.args[0]]]
    terms = [_plain_in(term) for term in loss.terms]
    return [terms, loss.factored, counting, value_in(loss.sizes), loss.note, loss.warning]


def _loss_of(told: Json, graph: JointGraph, mode: FakeTensorMode) -> LossForm:
    terms, factored, counting, sizes, note, warning = told
    made = None
    if counting is not None:
        told_nodes, ports, counts = counting
        counted, nodes = graph_of(told_nodes, mode)
        counted.output([nodes[i] for i in counts])
        module = fx.GraphModule(graph.constants, counted)
        made = Counting(module, tuple(Port(Role(role), key) for role, key in ports))
    known = tuple(_plain_of(term, Weighing, way=Way) for term in terms)
    return LossForm(known, factored, made, value_of(sizes), note, warning)


def _plain_in(value: Any) -> Json:
    """A data class of numbers and texts."""
    found = ((each.name, getattr(value, each.name)) for each in fields(value))
    return {name: value_in(v.value if isinstance(v, Enum) else v) for name, v in found}


def _plain_of(told: Json, kind: Any, **enums: type[Enum]) -> Any:
    found = {name: value_of(each) for name, each in told.items()}
    return kind(**(found | {name: each(found[name]) for name, each in enums.items()}))


# -- what forward asks the batch -------------------------------------------------------------------


def _guards_in(guards: Guards, tensors: Tensors) -> Json:
    if not guards:
        return None
    graph = next(step for step in guards.steps if isinstance(step, fx.Node)).graph
    nodes, numbers = graph_in(graph)
    steps: list[Json] = []
    for step in guards.steps:
        if isinstance(step, fx.Node):
            steps.append(numbers[step])
            continue
        asked = [[q.where, _call_in(q.how), value_in(q.answer)] for q in step.questions]
        steps.append([numbers[step.node], _call_in(step.read), asked])
    held = nn.Module()
    for i, value in enumerate(guards.constants.values()):
        held.register_buffer(f"asked_{i}", value)
    constants = [list(guards.constants), constants_in(held, tensors)]
    rest = [value_in(each) for each in (guards.buffers, guards.writes, guards.device)]
    return [nodes, steps, constants, *rest, value_in(guards.compute)]


def _guards_of(told: Json, tensors: Mapping[str, torch.Tensor]) -> Guards:
    if told is None:
        return Guards()
    told_nodes, told_steps, (names, held), *rest = told
    _, nodes = graph_of(told_nodes, None)
    steps: list[fx.Node | Reading] = []
    for step in told_steps:
        if isinstance(step, int):
            steps.append(nodes[step])
            continue
        at, read, asked = step
        questions = [Question(where, _call_of(how), value_of(v)) for where, how, v in asked]
        steps.append(Reading(nodes[at], _call_of(read), questions))
    values = dict(constants_of(held, tensors).named_buffers()).values()
    constants = dict(zip(names, values, strict=True))
    return Guards(tuple(steps), constants, *map(value_of, rest))


_CALLS: dict[str, Callable[..., Any]] = {
    **{f"answers.{each.__name__}": each for each in (*number.HOW, *sizing.READS)},
    **{f"builtins.{each.__name__}": each for each in (bool, int, float)},
    **{f"operator.{name}": getattr(operator, name) for name in (*number.OPERATORS, "index")},
    **{f"tensor.{name}": getattr(torch.Tensor, name) for name in ("item", "tolist")},
    **{f"torch.{each.__name__}": each for each in (torch.unique, torch.unique_consecutive)},
}
"""All that guards call; nothing else that a file may name."""


def _call_in(function: Any) -> Json:
    """A function of those above, or one with some of its arguments."""
    if isinstance(function, functools.partial):
        given = [_argument_in(each) for each in function.args]
        return ["partial", _call_in(function.func), given, _argument_in(function.keywords)]
    for name, known in _CALLS.items():
        if function is known:
            return name
    raise UntoldError(f"{function}, by which its batch is asked")


def _call_of(told: Json) -> Callable[..., Any]:
    if isinstance(told, str):
        return _CALLS[told]
    _, function, given, named = told
    return functools.partial(_call_of(function), *map(_argument_of, given), **_argument_of(named))


def _argument_in(value: Any) -> Json:
    if callable(value):
        return ["call", _call_in(value)]
    return ["value", value_in(value)]


def _argument_of(told: Json) -> Any:
    kind, inner = told
    return _call_of(inner) if kind == "call" else value_of(inner)
