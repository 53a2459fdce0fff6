"""An exported forward graph -> `JointGraph`: differentiation by AOTAutograd.

AOTAutograd's joint export has no public name. Every import of it is here; it is there from torch
2.11 on, and tested on 2.13. `preserve_node_meta` keeps the module paths that torch.export recorded.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import fx, nn
from torch.fx.traceback import preserve_node_meta

from ..answers.inputs import LITERAL, NUMBER
from ..effects.code import user_line
from ..ir.errors import CaptureError
from ..ir.graph import JointGraph, Phase, identifier, module_path, passed_on, phase_of, tensors
from ..layers.copies import DifferentError, replicated
from ..layers.runs import Run, runs_of, shortened
from ..regions.operators import known_work
from ..rows.loss import Counting, counting_of
from ..tensors.fakes import FakeTensor, is_fake, on_memory
from ..tracing.sizes import is_known, terms
from .skeleton import Skeleton

try:
    from torch._functorch._aot_autograd.descriptors import (
        BufferAOTInput,
        GradAOTOutput,
        InputMutationAOTOutput,
        ParamAOTInput,
        PlainAOTInput,
        PlainAOTOutput,
        TangentAOTInput,
    )
    from torch._functorch.aot_autograd import aot_export_joint_with_descriptors
except ImportError as error:  # a torch that moved what this file is built on
    raise ImportError(
        f"pipecompile needs torch 2.11 or later with AOTAutograd's joint export; "
        f"torch {torch.__version__} has no {error.name}"
    ) from error

_TRACED = "traced."  # where the model, as "model", and the loss sit in what is differentiated


def differentiated(
    skeleton: Skeleton,
    traced: fx.GraphModule,
    leaves: Sequence[torch.Tensor],
    wants_loss: bool,
    replaced: Sequence[str] = (),
    counts: int = 0,
    given: int = 0,
    numbers: int = 0,
) -> tuple[JointGraph, Counting | None]:
    """The graph of what was exported and, where gradients are on, of its backward; and what counts
    by what microbatches are weighed, if anything does.

    Args:
        leaves: those of the batch, and shares that its terms are multiplied by.
        replaced: buffers, and parameters, whose new values follow the results.
        counts: so many counts are the last results.
        given: so many leaves are the batch's.
        numbers: so many floats of the batch are inputs too, between these and the shares.
    """
    known = skeleton, traced, tuple(leaves), wants_loss, replaced, counts, given, numbers
    if runs := runs_of(traced.graph):
        with contextlib.suppress(Exception):  # what is wrong is told of all layers
            try:
                return _differentiated(*known, shortened(traced.graph, runs), runs)
            except DifferentError:
                if not any(run.ends for run in runs):
                    raise
                runs = [run.shorter() for run in runs]
                return _differentiated(*known, shortened(traced.graph, runs), runs)
    return _differentiated(*known, traced.graph, ())


def _differentiated(
    skeleton: Skeleton,
    traced: fx.GraphModule,
    leaves: tuple[torch.Tensor, ...],
    wants_loss: bool,
    replaced: Sequence[str],
    counts: int,
    given: int,
    numbers: int,
    graph: fx.Graph,
    runs: Sequence[Run],
) -> tuple[JointGraph, Counting | None]:
    """Args:
    graph: that which is exported, without layers that are left out.
    runs: what these are.
    """
    unread = _unread(skeleton, traced, graph) if runs else set()
    whole = _Interpreted(_without(unread, traced, graph) if unread else traced, graph)
    with contextlib.ExitStack() as stack:
        joint = aot_export_joint_with_descriptors(stack, whole, leaves)
    reader = _Reader(skeleton, traced, joint.graph_module, replaced, given, numbers, unread)
    read = reader.read(wants_loss, counts)
    made = replicated(read, runs, reader.states, partial(_attribute, traced), reader.order())
    made.graph.eliminate_dead_code()
    return made, reader.counting


def _state_of(node: fx.Node) -> str | None:
    """What a placeholder of AOTAutograd's stands for, if that is a parameter or a buffer."""
    desc = node.meta["desc"]
    is_state = isinstance(desc, (ParamAOTInput, BufferAOTInput))
    return desc.target.removeprefix(_TRACED) if is_state else None


def _states(module: nn.Module) -> dict[str, tuple[bool, torch.Tensor]]:
    """By all of their names, in AOTAutograd's order, whether it is a parameter, and the tensor."""
    params = module.named_parameters(remove_duplicate=False)
    buffers = module.named_buffers(remove_duplicate=False)
    found = {name: (True, param) for name, param in params}
    return found | {name: (False, buffer) for name, buffer in buffers}


def _unread(skeleton: Skeleton, traced: nn.Module, graph: fx.Graph) -> set[str]:
    """The model's parameters and buffers that a graph does not read under any of their names."""
    first = skeleton.canonical
    read = {first.get(_fqn(str(node.target))) for node in graph.find_nodes(op="get_attr")}
    fakes = (name for name, (_, value) in _states(traced).items() if isinstance(value, FakeTensor))
    known = (name for name in fakes if _fqn(name) in first)
    return {name for name in known if first[_fqn(name)] not in read}


def _without(unread: Collection[str], traced: nn.Module, graph: fx.Graph) -> nn.Module:
    """What is exported without states that a graph does not read: AOTAutograd takes as long for a
    state as for an operator."""
    made = nn.Module()
    states = {name: each for name, each in _states(traced).items() if name not in unread}
    read = dict.fromkeys(str(node.target) for node in graph.find_nodes(op="get_attr"))
    for name in states | read:
        *path, last = name.split(".")
        parent = made
        for part in path:
            if part not in parent._modules:
                parent.add_module(part, nn.Module())
            parent = parent.get_submodule(part)
        if name in states and not states[name][0]:
            parent.register_buffer(last, states[name][1])
        else:
            setattr(parent, last, _attribute(traced, name))
    return made


class _Interpreted(nn.Module):
    """Runs a graph of what is exported node by node, so that each keeps its module path."""

    def __init__(self, traced: nn.Module, graph: fx.Graph):
        super().__init__()
        self.traced = traced
        self.graph = graph
        for node in graph.nodes:  # torch copies in depth where it came from, for each operator
            node.meta.pop("from_node", None)

    def forward(self, *leaves: torch.Tensor) -> Any:
        with preserve_node_meta():
            return fx.Interpreter(self.traced, graph=self.graph).run(*leaves)


class _Reader:
    """Rewrites AOTAutograd's graph into a `JointGraph` with names instead of descriptors."""

    def __init__(
        self,
        skeleton: Skeleton,
        traced: nn.Module,
        source: fx.GraphModule,
        replaced: Sequence[str],
        given: int,
        numbers: int,
        unread: Collection[str],
    ):
        self.skeleton, self.traced, self.source = skeleton, traced, source
        self.given, self.shift, self.unread = given, numbers, unread
        self.replaced = [skeleton.canonical[name] for name in replaced]
        self.graph = fx.Graph()
        self.env: dict[fx.Node, fx.Node] = {}
        self.root = nn.Module()
        self.states: dict[str, fx.Node] = {}
        self.params: dict[str, fx.Node] = {}
        self.buffers: dict[str, fx.Node] = {}
        self.inputs: dict[int, fx.Node] = {}
        self.tangent: fx.Node | None = None
        self.counting: Counting | None = None

    def read(self, wants_loss: bool, counts: int) -> JointGraph:
        self.skeleton.updated.update(self._updated())
        placeholders = self.source.graph.find_nodes(op="placeholder")
        self._read_states({_state_of(node): node for node in placeholders})
        for node in placeholders:
            if node not in self.env:
                self._read_placeholder(node)
        for node in self.source.graph.find_nodes(op="call_function", target=NUMBER):
            self._read_number(node)
        for node in self.source.graph.nodes:
            if node in self.env:
                continue
            if node.op in ("call_function", "get_attr"):
                self._read_op(node)
        joint = JointGraph(
            self.root,
            self.graph,
            self.params,
            self.buffers,
            self.inputs,
            self.tangent,
        )
        self._read_outputs(joint, wants_loss, counts)
        joint.set_output()
        return joint

    def _updated(self) -> Iterator[str]:
        """The parameters that forward changes.

        Raises:
            CaptureError: one of them is trained.
        """
        (output,) = self.source.graph.find_nodes(op="output")
        descs = (d for d in output.meta["desc"] if isinstance(d, InputMutationAOTOutput))
        params = (d.mutated_input for d in descs if isinstance(d.mutated_input, ParamAOTInput))
        named = dict(self.skeleton.module.named_parameters())
        for name in (*(self.skeleton.canonical[_fqn(p.target)] for p in params), *self.replaced):
            if name in named:
                if named[name].requires_grad:
                    raise _changes_parameter(name)
                yield name

    def _read_states(self, placeholders: Mapping[str | None, fx.Node]) -> None:
        """Those of the graph, and in their places those that it does not read."""
        for name, (is_param, value) in _states(self.traced).items():
            if name in self.unread:
                assert isinstance(value, FakeTensor)
                same = on_memory(value, value.untyped_storage())
                self.states[name] = self._state(name, is_param, same)
            elif (node := placeholders.get(name)) is not None:
                self.states[name] = self._state(name, is_param, node.meta["val"])
                self.env[node] = self.states[name]

    def _read_placeholder(self, node: fx.Node) -> None:
        desc = node.meta["desc"]
        if isinstance(desc, PlainAOTInput):
            index = desc.idx if desc.idx < self.given else desc.idx + self.shift
            placeholder = self._placeholder(f"batch_{index}", node.meta["val"])
            self.env[node] = self.inputs[index] = placeholder
        elif isinstance(desc, TangentAOTInput):
            if isinstance(desc.output, InputMutationAOTOutput):
                if isinstance(desc.output.mutated_input, ParamAOTInput):
                    raise _changes_parameter(desc.output.mutated_input.target)
                mutated = getattr(desc.output.mutated_input, "target", "a leaf of the batch")
                raise CaptureError(
                    f"forward changes {_fqn(mutated)!r} in place, and it needs a "
                    "gradient: compute a new tensor, or keep the value in a buffer"
                )
            self.env[node] = self._placeholder("tangent", node.meta["val"])
            self.env[node].meta["phase"] = Phase.BACKWARD
            self.tangent = self.env[node]
        elif "Token" in type(desc).__name__:
            raise CaptureError(self._ordered())
        elif node.users:
            raise CaptureError(f"the graph has an input that pipecompile does not know: {desc}")

    def _read_number(self, node: fx.Node) -> None:
        """A float of the batch, in the place of a literal.

        Raises:
            CaptureError: something takes it that takes no float.
        """
        number: Any = node.args[1]
        index = self.given + number
        if index not in self.inputs:
            self.inputs[index] = self._placeholder(f"batch_{index}", 1.0)  # any
        self.env[node] = self.inputs[index]
        for user in list(node.users):
            if user.target not in LITERAL or len(user.args) != 2 or user.kwargs:
                raise CaptureError(f"it becomes an operand of {user.target}")
            user.target = LITERAL[user.target]

    def _ordered(self) -> str:
        """Why operators with effects, such as checks of a result, are refused."""
        for node in self.source.graph.nodes:
            if str(node.target) == "with_effects":
                line = user_line(node)
                return (
                    f"forward calls {node.args[1]}{f', {line}' if line else ''}, which checks or "
                    "does something in an order that stages cannot keep: use a function without "
                    "it (of torch.linalg those whose names end in _ex), or pass what it gives in "
                    "with the batch"
                )
        return "forward calls an operator with effects, whose order stages cannot keep"

    def _state(self, target: str, is_param: bool, val: object) -> fx.Node:
        name = self.skeleton.canonical.get(_fqn(target))
        if name is None:  # a tensor made while tracing, and stored by export
            return self._constant(target, _attribute(self.traced, target), val)
        known = self.params if is_param and name not in self.skeleton.updated else self.buffers
        if name not in known:
            known[name] = self._placeholder(identifier(name), val)
        return known[name]

    def _placeholder(self, name: str, val: object) -> fx.Node:
        new = self.graph.placeholder(name)
        new.meta.update(val=val, phase=Phase.FORWARD, module="")
        return new

    def _constant(self, told: str, value: object, val: object) -> fx.Node:
        if not isinstance(value, torch.Tensor) or is_fake(value):
            raise CaptureError(f"the constant {told} has no value that could be run")
        name = f"constant_{len(self.root._buffers)}"
        self.root.register_buffer(name, value.detach())
        new = self.graph.get_attr(name)
        new.meta.update(val=val, phase=Phase.FORWARD, module="")
        return new

    def _read_op(self, node: fx.Node) -> None:
        if node.op == "get_attr":
            value = _attribute(self.source, str(node.target))
            self.env[node] = self._constant(node.name, value, node.meta["val"])
            return
        if str(node.target).startswith("aten._assert_"):
            return  # shapes and dtypes are fixed here, so these hold
        source = passed_on(node, terms)
        if source is not None:
            self.env[node] = self.env[source]
            return
        new = self.graph.node_copy(node, lambda n: self.env[n])
        if new.target is torch.ops.aten.view.default:
            # chosen for the strides that the traced kernel claims; a real one may give others
            new.target = torch.ops.aten.reshape.default
        backward = node.meta.get("partitioner_tag") == "is_backward"
        # what a Function's backward calls may be told of no phase
        backward |= any(phase_of(source) is Phase.BACKWARD for source in new.all_input_nodes)
        path = module_path(node)
        new.meta = {
            "val": node.meta.get("val"),
            "phase": Phase.BACKWARD if backward else Phase.FORWARD,
            "partner": node.meta.get("seq_nr", -1),
            "module": path.removeprefix("model").removeprefix("."),
        }
        if (work := known_work(node)) is not None:
            new.meta["region"] = work
        if not all(is_known(n) for t in tensors(new.meta["val"]) for n in t.shape):
            raise CaptureError(
                f"{new.meta['module'] or 'the model'} makes a tensor whose shape depends on data "
                f"({node.target}): use masks of a fixed shape instead of selecting elements",
                new.meta["module"],
            )
        self.env[node] = new

    def _read_outputs(self, joint: JointGraph, wants_loss: bool, counts: int) -> None:
        (output,) = self.source.graph.find_nodes(op="output")
        results: dict[int, fx.Node] = {}
        for value, desc in zip(output.args[0], output.meta["desc"], strict=True):
            if value is None:
                continue
            node = self.env[value]
            if isinstance(desc, PlainAOTOutput):
                results[desc.idx] = node
            elif isinstance(desc, GradAOTOutput) and isinstance(desc.grad_of, ParamAOTInput):
                self._add_gradient(joint, desc.grad_of.target, node)
            elif isinstance(desc, InputMutationAOTOutput):
                mutated = desc.mutated_input
                if isinstance(mutated, (ParamAOTInput, BufferAOTInput)):
                    joint.mutations[self.skeleton.canonical[_fqn(mutated.target)]] = node
        ordered = tuple(results[i] for i in sorted(results))
        if counts:
            self.counting = counting_of(joint, ordered[-counts:])
            ordered = ordered[:-counts]
        if self.replaced:
            values = map(_uncopied, ordered[-len(self.replaced) :])
            joint.mutations |= dict(zip(self.replaced, values, strict=True))
            ordered = ordered[: -len(self.replaced)]
        if wants_loss:
            joint.loss = ordered[0]
        else:
            joint.results = ordered

    def order(self) -> list[str]:
        """Of the parameters, as their gradients are listed; also of those that have none."""
        (output,) = self.source.graph.find_nodes(op="output")
        listed: dict[str, object] = dict.fromkeys(self.unread)
        for value, desc in zip(output.args[0], output.meta["desc"], strict=True):
            if isinstance(desc, GradAOTOutput) and isinstance(desc.grad_of, ParamAOTInput):
                listed[desc.grad_of.target.removeprefix(_TRACED)] = value
        found: dict[bool, dict[str, int]] = {True: {}, False: {}}
        for i, target in enumerate(each for each in _states(self.traced) if each in listed):
            name = self.skeleton.canonical[_fqn(target)]
            if listed[target] is None:  # of several names the last one is read
                found[False][name] = i
            else:
                found[True].setdefault(name, i)
        places = found[False] | found[True]
        return sorted(places, key=places.__getitem__)

    def _add_gradient(self, joint: JointGraph, target: str, node: fx.Node) -> None:
        name = self.skeleton.canonical[_fqn(target)]
        if name in joint.grads:  # one tensor captured under two of its names
            last = next(reversed(self.graph.nodes))
            with self.graph.inserting_after(last):
                earlier = joint.grads[name]
                node, summand = self.graph.call_function(operator.add, (earlier, node)), node
            node.target = torch.ops.aten.add.Tensor
            node.meta = dict(summand.meta)
        joint.grads[name] = node


def _changes_parameter(target: str) -> CaptureError:
    mode = "" if torch.is_grad_enabled() else "in evaluation, "
    return CaptureError(
        f"{mode}forward changes parameter {_fqn(target)!r} in place: do it after the optimizer's "
        "step, compute a new tensor, or make it a buffer"
    )


def _fqn(target: str) -> str:
    """The name in the model, or beside it, of what is differentiated."""
    return target.removeprefix(_TRACED).removeprefix("model.")


def _uncopied(result: fx.Node) -> fx.Node:
    """What a new buffer was copied from, for tracing to tell it from its source: that is where it
    was made, the copy is at the end."""
    (source,) = result.all_input_nodes
    return result if source.op == "placeholder" else source


def _attribute(module: nn.Module, path: str) -> object:
    return operator.attrgetter(path)(module)
