"""Models, and operands in them, that cannot be compiled, and what to give instead."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import fx, nn
from torch.nn.parameter import is_lazy

from ..ir.errors import BatchError, CaptureError, OptionError
from ..ir.graph import JointGraph, Phase, module_of, tensors
from ..ir.precision import REDUCED
from ..tensors.facts import short_name
from ..tensors.fakes import FakeTensor
from .batch import BatchSpec
from .whole import with_loss

_MADE = {
    "DataParallel": "wrapped in DataParallel: give what is inside, its .module; dp= makes replicas",
    "DistributedDataParallel": "wrapped in DistributedDataParallel: give what is inside, its "
    ".module; dp= makes replicas",
    "FullyShardedDataParallel": "wrapped in FullyShardedDataParallel: give the model as it was "
    "before; zero=3 divides parameters",
    "FSDPModule": "divided by fully_shard: give the model as it was before; zero=3 divides "
    "parameters",
    "DeepSpeedEngine": "a DeepSpeedEngine: give the model as it was before; zero= divides it",
    "OptimizedModule": "compiled by torch.compile, which has no part here: give what is inside, "
    "its ._orig_mod",
    "ScriptModule": "made by torch.jit: give the Python module that it was made from",
    "_StatefulGraphModule": "made by torch.export: give the module that was exported",
}
"""Class, of torch's or of a library for it -> what a module of it is, and what to do.

By name: importing them all takes a second.
"""

_QUANTISED = "quantised, and has no gradients: give the model in floating point"


def check_model(model: object, loss_fn: object = None) -> None:
    """What can be seen before anything is traced.

    Raises:
        OptionError: it is no module, or the loss is one that takes its names.
        CaptureError: it, or something in it, is a module of a kind that cannot be compiled.
    """
    if not isinstance(model, nn.Module):
        raise OptionError(_no_module(model))
    whole = with_loss(model, loss_fn)
    for name, part in whole.named_modules():
        why = _of_module(part)
        if why:
            raise CaptureError(f"{f'module {name!r}' if name else 'the model'} is {why}")
    for kind, named in (
        ("parameter", whole.named_parameters()),
        ("buffer", whole.named_buffers()),
    ):
        for name, tensor in named:
            why = _of_tensor(tensor)
            if why:
                raise CaptureError(f"{kind} {name!r} is {why}")


def _no_module(given: object) -> str:
    kind = type(given).__name__
    if isinstance(given, type):
        return f"model is the class {given.__name__}: give an instance of it"
    if isinstance(given, str | Path):
        return (
            f"model={str(given)!r} is a path or a name: build the model, and let weights= read "
            "the file if it is of safetensors"
        )
    if isinstance(given, Mapping):
        return f"model is a {kind}: build the model, and load the state dict into it"
    return f"model is a {kind}: give a torch.nn.Module"


def _of_module(part: nn.Module) -> str:
    """Why it cannot be compiled; "" if nothing is known against it."""
    for each in type(part).__mro__:
        if each.__module__.split(".")[0] in ("torch", "deepspeed") and each.__name__ in _MADE:
            return _MADE[each.__name__]
    if part._compiled_call_impl is not None:
        return "compiled by its compile(), which has no part here: leave that call out"
    home = type(part).__module__.split(".")
    if "quantized" in home or home[0] == "bitsandbytes" or getattr(part, "is_quantized", False):
        return _QUANTISED
    sparse = isinstance(part, nn.Embedding | nn.EmbeddingBag) and part.sparse
    if sparse and part.weight.requires_grad:
        return (
            "an embedding with sparse=True: give sparse=False, as gradients are dense here, and "
            'sparse_embeddings="step" for an optimizer that is to be given sparse ones'
        )
    return ""


def _of_tensor(tensor: torch.Tensor) -> str:
    """The same of a parameter or a buffer."""
    kind = type(tensor)
    if is_lazy(tensor):
        return "not initialised yet: run the model once, on a batch, before compiling it"
    if tensor.is_quantized:
        return _QUANTISED
    own = () if isinstance(tensor, FakeTensor) else set(kind.__mro__) - set(nn.Parameter.__mro__)
    if any({"__torch_function__", "__torch_dispatch__"} & set(vars(each)) for each in own):
        way = "which computes in its own way: give a plain tensor"
        if kind.__module__.startswith("torchao."):
            way += ", after torchao.utils.unwrap_tensor_subclass(model)"
        return f"a {kind.__name__}, {way}"
    if tensor.layout is not torch.strided:
        return f"of layout {tensor.layout}: give a dense one, .to_dense()"
    return ""


# -- operands: what kernels refuse, and tracing, which runs none, lets pass ---------------------

_aten = torch.ops.aten
_ALIKE = {
    _aten.mm.default,
    _aten.addmm.default,
    _aten.bmm.default,
    _aten.baddbmm.default,
    _aten.mv.default,
    _aten.dot.default,
    _aten.convolution.default,
}
"""All tensors that they take have one dtype."""

_NORMS = {
    _aten.native_layer_norm.default,
    _aten.native_group_norm.default,
    _aten.native_batch_norm.default,
    _aten._native_batch_norm_legit.default,
    _aten._native_batch_norm_legit_functional.default,
}
"""The same, but that a reduced dtype goes with fp32 parameters."""


_COUNTS = {
    _aten.nll_loss_forward.default: {torch.int64, torch.uint8},
    _aten.nll_loss2d_forward.default: {torch.int64, torch.uint8},
    _aten.embedding.default: {torch.int64, torch.int32},
}
"""Their second operand counts classes or rows: in which dtypes. Torch 2.11 traces others, too."""


def check_operands(graph: JointGraph, spec: BatchSpec) -> None:
    """What the operators of a captured graph are given.

    Raises:
        BatchError: a leaf's dtype, which is named with the module that cannot take it.
        CaptureError: dtypes that do not go together for another reason, or sparse gradients.
    """
    for node in graph.ops():
        if any(tensor.layout is not torch.strided for tensor in tensors(node.meta.get("val"))):
            raise CaptureError(
                f"{_module(node)} makes a sparse tensor ({node.target}), or has a sparse "
                "gradient: give sparse=False, and dense tensors"
            )
    for node in graph.ops(Phase.FORWARD):
        expected, odd = _odd(graph, node)
        if not odd:
            continue
        for leaf in (spec.leaves[i] for i in sorted(_leaves(graph, node, len(spec.leaves)))):
            if leaf.dtype in odd:
                raise BatchError(
                    f"the batch's {leaf.name!r} is {short_name(leaf.dtype)}, and {_module(node)} "
                    f"computes with {short_name(expected)}: give it .to({expected})"
                )
        given = ", ".join(sorted(map(short_name, odd)))
        raise CaptureError(
            f"{_module(node)} gives {node.target} {given} where it takes {short_name(expected)}: "
            "convert it with .to()"
        )


def _odd(graph: JointGraph, node: fx.Node) -> tuple[torch.dtype, set[torch.dtype]]:
    """The dtype that an operator wants, and those of its operands that it refuses."""
    dtypes = [value.dtype for each in _given(node) for value in tensors(each.meta.get("val"))]
    if node.target in _COUNTS:
        return torch.int64, {dtypes[1]} - _COUNTS[node.target]
    normalises = node.target in _NORMS
    if len(set(dtypes)) < 2 or not (normalises or node.target in _ALIKE):
        return torch.float32, set()
    if normalises and dtypes[0] in REDUCED and set(dtypes[1:]) == {torch.float32}:
        return torch.float32, set()
    expected = _expected(graph, node, dtypes[-1])
    return expected, set(dtypes) - {expected}


def _given(node: fx.Node) -> Iterator[fx.Node]:
    """The tensors that an operator takes, in its order."""
    return (each for each in node.args if isinstance(each, fx.Node))


def _expected(graph: JointGraph, node: fx.Node, otherwise: torch.dtype) -> torch.dtype:
    """The dtype of the parameters of an operator's module."""
    own = module_of(node) + "."
    values = (p.meta["val"] for name, p in graph.params.items() if name.startswith(own))
    return next((value.dtype for value in values), otherwise)


def _leaves(graph: JointGraph, node: fx.Node, count: int) -> set[int]:
    """The leaves of the batch that an operator's operands are made of, without weights.

    Args:
        count: of the leaves; further inputs are none.
    """
    index = {each: i for i, each in graph.inputs.items() if i < count}
    found, seen, todo = set(), {node}, [node]
    while todo:
        each = todo.pop()
        if each in index:
            found.add(index[each])
        if each is not node and each.target in _ALIKE | _NORMS:
            continue
        fresh = set(each.all_input_nodes) - seen
        seen |= fresh
        todo += fresh
    return found


def _module(node: fx.Node) -> str:
    name = module_of(node)
    return f"module {name!r}" if name else "the model itself"
