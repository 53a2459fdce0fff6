"""An unmodified model -> `JointGraph`: torch.export, then differentiation by AOTAutograd.

AOTAutograd's joint export has no public name. Every import of it is here; it is there from torch
2.11 on, and tested on 2.13. `preserve_node_meta` keeps the module paths that torch.export recorded.
"""

from __future__ import annotations

import contextlib
import io
import logging
import operator
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx, nn
from torch.fx.traceback import preserve_node_meta

from ..ir.errors import BatchError, CaptureError, LossError, PipecompileError
from ..ir.graph import JointGraph, Phase, identifier, module_path, storage_root, tensors
from . import batch as batches
from .batch import BatchSpec
from .blame import data_dependent, explain
from .calling import Call, LossFn, bind, find_loss, not_taken
from .skeleton import Skeleton, evaluating, is_fake, tracking_modules, unchanged
from .tracing import (
    kept_functions,
    native_kernels,
    refused_hooks,
    restore_functions,
    untraced_branches,
)

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

ForwardPass = Callable[[fx.GraphModule, Sequence[torch.Tensor]], str]
"""Rewrites an exported forward graph in place, given its arguments (fake); returns a note on what
it did, or ""."""

_MODEL = "traced.model."  # where the user's model sits in what is differentiated


@dataclass(frozen=True)
class Captured:
    """A graph, and how to put its results back into the structure that the model returned.

    Attributes:
        batch_dims: per result, the dimension that grows with the batch; None for none.
        notes: what the passes over the forward graph did.
    """

    graph: JointGraph
    rebuild: Callable[[list[torch.Tensor]], Any]
    batch_dims: tuple[int | None, ...] = ()
    notes: tuple[str, ...] = ()


def capture_training(
    skeleton: Skeleton,
    spec: BatchSpec,
    loss_fn: LossFn | None,
    device: torch.device,
    passes: Sequence[ForwardPass] = (),
    compute: torch.dtype | None = None,
) -> Captured:
    """Forward, loss and backward of one microbatch, in the mode that the model is in.

    Args:
        passes: applied to the exported forward graph, before it is differentiated.
        compute: trace under autocast to this dtype, which a pass then has to carry out.

    Raises:
        BatchError, LossError, CaptureError: see each.
    """
    trainable = any(p.requires_grad for p in skeleton.module.parameters())
    if not trainable:
        raise LossError("no parameter has requires_grad=True: there is nothing to train")
    with torch.enable_grad():
        return _capture(skeleton, spec, loss_fn, device, "loss", passes, compute)


def capture_evaluation(
    skeleton: Skeleton,
    spec: BatchSpec,
    loss_fn: LossFn | None,
    device: torch.device,
    passes: Sequence[ForwardPass] = (),
    compute: torch.dtype | None = None,
) -> Captured:
    """Forward and loss in evaluation mode, without backward."""
    with evaluating(skeleton.module), torch.no_grad():
        return _capture(skeleton, spec, loss_fn, device, "loss", passes, compute)


def capture_forward(
    skeleton: Skeleton,
    spec: BatchSpec,
    device: torch.device,
    passes: Sequence[ForwardPass] = (),
    compute: torch.dtype | None = None,
) -> Captured:
    """All that the model returns, in evaluation mode, without backward.

    A second capture with twice the rows tells which dimension of each result is the batch's.
    """
    with evaluating(skeleton.module), torch.no_grad():
        captured = _capture(skeleton, spec, None, device, "results", passes, compute)
        doubled = _capture(skeleton, spec.repeat(2), None, device, "results", (), None)
    pairs = zip(captured.graph.results, doubled.graph.results, strict=True)
    dims = tuple(_grown(a.meta["val"].shape, b.meta["val"].shape) for a, b in pairs)
    return replace(captured, batch_dims=dims)


def _grown(shape: torch.Size, doubled: torch.Size) -> int | None:
    dims = [d for d, (n, m) in enumerate(zip(shape, doubled, strict=True)) if m == 2 * n != n]
    return dims[0] if dims else None


def _only(values: list[torch.Tensor]) -> torch.Tensor:
    (value,) = values
    return value


class _Traced(nn.Module):
    """The function that is traced: batch leaves in, loss or results out."""

    def __init__(self, model: nn.Module, spec: BatchSpec, call: Call, loss_fn: LossFn | None):
        super().__init__()
        self.model = model
        self.spec, self.call, self.loss_fn = spec, call, loss_fn
        self.wants_loss = self.as_untraced = True
        self.compute: torch.dtype | None = None
        self.found_structure: Callable[[Any], None] = lambda _: None

    def forward(self, *leaves: torch.Tensor) -> tuple[torch.Tensor, ...]:
        batch = self.spec.build(leaves)
        args, kwargs = self.call.arguments(batch)
        with untraced_branches() if self.as_untraced else contextlib.nullcontext():
            output = self.model(*args, **kwargs)
        if not self.wants_loss:
            values, rebuild = batches.flatten_results(output)
            self.found_structure(rebuild)
            return tuple(values)
        loss = find_loss(output, batch, self.loss_fn)
        if torch.is_grad_enabled() and not loss.requires_grad:
            raise LossError(
                "the loss does not depend on any trainable parameter: was it detached, or "
                "computed under torch.no_grad()?"
            )
        return (loss,)


class _Interpreted(nn.Module):
    """Runs an exported graph node by node, so that each keeps its module path."""

    def __init__(self, traced: fx.GraphModule):
        super().__init__()
        self.traced = traced

    def forward(self, *leaves: torch.Tensor) -> Any:
        with preserve_node_meta():
            return fx.Interpreter(self.traced).run(*leaves)


def _capture(
    skeleton: Skeleton,
    spec: BatchSpec,
    loss_fn: LossFn | None,
    device: torch.device,
    wants: str,
    passes: Sequence[ForwardPass],
    compute: torch.dtype | None,
) -> Captured:
    """Trace the model as if it were not traced; if it cannot be, as it likes to be traced."""
    leaves = tuple(skeleton.fake(leaf.shape, leaf.dtype, device) for leaf in spec.leaves)
    call = bind(skeleton.module, spec.build(leaves), loss_fn)
    function = _Traced(skeleton.module, spec, call, loss_fn)
    function.wants_loss = wants == "loss"
    function.compute = compute
    try:
        captured = _attempt(skeleton, function, leaves, passes)
    except CaptureError:
        function.as_untraced = False
        captured = _attempt(skeleton, function, leaves, passes)
    if wants == "loss" and torch.is_grad_enabled() and not captured.graph.trains:
        raise LossError(
            "the loss has no gradient once captured: a part of forward runs without gradients"
        )
    _check_leaves(captured.graph, spec, call, type(skeleton.module).__name__)
    return captured


def _attempt(
    skeleton: Skeleton,
    function: _Traced,
    leaves: tuple[torch.Tensor, ...],
    passes: Sequence[ForwardPass],
) -> Captured:
    structures = [_only]
    function.found_structure = structures.append
    name = type(skeleton.module).__name__
    with contextlib.ExitStack() as stack, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        stack.enter_context(_quiet())
        stack.enter_context(native_kernels())
        traced = _export(function, leaves)
        try:
            notes = tuple(note for note in (apply(traced, leaves) for apply in passes) if note)
            joint = aot_export_joint_with_descriptors(stack, _Interpreted(traced), leaves)
        except PipecompileError:
            raise
        except Exception as error:
            raise explain(error, name, *data_dependent(traced)) from error
    graph = _Reader(skeleton, traced, joint.graph_module).read(function.wants_loss)
    return Captured(graph, structures[-1], notes=notes)


def _export(function: _Traced, leaves: tuple[torch.Tensor, ...]) -> fx.GraphModule:
    model = function.model
    with (
        unchanged(model),
        tracking_modules(model) as where,
        refused_hooks(),
        kept_functions() as calls,
        _autocast(function.compute, leaves),
    ):
        try:
            exported = torch.export.export(function, leaves, strict=False)
        except Exception as error:
            raise explain(error, type(model).__name__, where()) from error
    traced = exported.module(check_guards=False)
    restore_functions(traced, calls)
    return traced


def _autocast(
    compute: torch.dtype | None, leaves: Sequence[torch.Tensor]
) -> contextlib.AbstractContextManager[Any]:
    if compute is None:
        return contextlib.nullcontext()
    return torch.autocast(leaves[0].device.type, dtype=compute)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """torch.export prints the graph when it gives up; the error says what there is to say."""
    loggers = [logging.getLogger(name) for name in ("torch", "torch.fx", "torch.export")]
    before = [logger.level for logger in loggers]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            for logger, level in zip(loggers, before, strict=True):
                logger.setLevel(level)


class _Reader:
    """Rewrites AOTAutograd's graph into a `JointGraph` with names instead of descriptors."""

    def __init__(self, skeleton: Skeleton, traced: nn.Module, source: fx.GraphModule):
        self.skeleton, self.traced, self.source = skeleton, traced, source
        self.graph = fx.Graph()
        self.env: dict[fx.Node, fx.Node] = {}
        self.root = nn.Module()
        self.params: dict[str, fx.Node] = {}
        self.buffers: dict[str, fx.Node] = {}
        self.inputs: dict[int, fx.Node] = {}
        self.tangent: fx.Node | None = None

    def read(self, wants_loss: bool) -> JointGraph:
        for node in self.source.graph.find_nodes(op="placeholder"):
            self._read_placeholder(node)
        for node in self.source.graph.nodes:
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
        self._read_outputs(joint, wants_loss)
        joint.set_output()
        self.graph.eliminate_dead_code()
        return joint

    def _read_placeholder(self, node: fx.Node) -> None:
        desc = node.meta["desc"]
        if isinstance(desc, (ParamAOTInput, BufferAOTInput)):
            self.env[node] = self._state(node, desc.target)
        elif isinstance(desc, PlainAOTInput):
            self.env[node] = self._placeholder(node, f"batch_{desc.idx}")
            self.inputs[desc.idx] = self.env[node]
        elif isinstance(desc, TangentAOTInput):
            if isinstance(desc.output, InputMutationAOTOutput):
                mutated = getattr(desc.output.mutated_input, "target", "a leaf of the batch")
                raise CaptureError(
                    f"forward changes {mutated.removeprefix(_MODEL)!r} in place, and it needs a "
                    "gradient: compute a new tensor, or keep the value in a buffer"
                )
            self.env[node] = self._placeholder(node, "tangent")
            self.env[node].meta["phase"] = Phase.BACKWARD
            self.tangent = self.env[node]
        elif node.users:
            raise CaptureError(f"the graph has an input that pipecompile does not know: {desc}")

    def _state(self, node: fx.Node, target: str) -> fx.Node:
        if not target.startswith(_MODEL):  # a tensor made while tracing, and stored by export
            return self._constant(node, _attribute(self.traced, target.removeprefix("traced.")))
        name = self.skeleton.canonical[target.removeprefix(_MODEL)]
        known = self.params if isinstance(node.meta["desc"], ParamAOTInput) else self.buffers
        if name not in known:
            known[name] = self._placeholder(node, identifier(name))
        return known[name]

    def _placeholder(self, node: fx.Node, name: str) -> fx.Node:
        new = self.graph.placeholder(name)
        new.meta.update(val=node.meta["val"], phase=Phase.FORWARD, module="")
        return new

    def _constant(self, node: fx.Node, value: object) -> fx.Node:
        if not isinstance(value, torch.Tensor) or is_fake(value):
            raise CaptureError(f"the constant {node.name} has no value that could be run")
        name = f"constant_{len(self.root._buffers)}"
        self.root.register_buffer(name, value.detach())
        new = self.graph.get_attr(name)
        new.meta.update(val=node.meta["val"], phase=Phase.FORWARD, module="")
        return new

    def _read_op(self, node: fx.Node) -> None:
        if node.op == "get_attr":
            self.env[node] = self._constant(node, _attribute(self.source, str(node.target)))
            return
        if str(node.target).startswith("aten._assert_"):
            return  # shapes and dtypes are fixed here, so these hold
        if node.target is torch.ops.aten.detach.default:
            self.env[node] = self.env[node.args[0]]  # type: ignore[index]
            return
        new = self.graph.node_copy(node, lambda n: self.env[n])
        if new.target is torch.ops.aten.view.default:
            # chosen for the strides that the traced kernel claims; a real one may give others
            new.target = torch.ops.aten.reshape.default
        backward = node.meta.get("partitioner_tag") == "is_backward"
        path = module_path(node)
        new.meta = {
            "val": node.meta.get("val"),
            "phase": Phase.BACKWARD if backward else Phase.FORWARD,
            "partner": node.meta.get("seq_nr", -1),
            "module": path.removeprefix("model").removeprefix("."),
        }
        if any(not isinstance(n, int) for t in tensors(new.meta["val"]) for n in t.shape):
            raise CaptureError(
                f"{new.meta['module'] or 'the model'} makes a tensor whose shape depends on data "
                f"({node.target}): use masks of a fixed shape instead of selecting elements"
            )
        self.env[node] = new

    def _read_outputs(self, joint: JointGraph, wants_loss: bool) -> None:
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
                if isinstance(mutated, ParamAOTInput) and torch.is_grad_enabled():
                    raise CaptureError(
                        f"forward changes parameter {mutated.target.removeprefix(_MODEL)!r} in "
                        "place: do it after the optimizer's step, or make it a buffer"
                    )
                if isinstance(mutated, BufferAOTInput):
                    name = mutated.target.removeprefix(_MODEL)
                    joint.mutations[self.skeleton.canonical[name]] = node
        ordered = tuple(results[i] for i in sorted(results))
        if wants_loss:
            joint.loss = ordered[0]
        else:
            joint.results = ordered

    def _add_gradient(self, joint: JointGraph, target: str, node: fx.Node) -> None:
        name = self.skeleton.canonical[target.removeprefix(_MODEL)]
        if name in joint.grads:  # one tensor captured under two of its names
            last = next(reversed(self.graph.nodes))
            with self.graph.inserting_after(last):
                earlier = joint.grads[name]
                node, summand = self.graph.call_function(operator.add, (earlier, node)), node
            node.target = torch.ops.aten.add.Tensor
            node.meta = dict(summand.meta)
        joint.grads[name] = node


def _attribute(module: nn.Module, path: str) -> object:
    return operator.attrgetter(path)(module)


def _check_leaves(graph: JointGraph, spec: BatchSpec, call: Call, name: str) -> None:
    used = {i for i, node in graph.inputs.items() if any(not _is_output(u) for u in node.users)}
    used |= {i for i, node in graph.inputs.items() if storage_root(node) in graph.results}
    unused = [
        key
        for key in call.doubtful
        if not any(
            leaf.name.split(".")[0] == key and i in used for i, leaf in enumerate(spec.leaves)
        )
    ]
    if unused:
        raise BatchError(not_taken(name, unused))


def _is_output(node: fx.Node) -> bool:
    return node.op == "output"
