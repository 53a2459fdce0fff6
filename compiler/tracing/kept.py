"""What torch.export would change about a model, kept as it is when nobody traces.

While a graph is traced, torch decomposes some operators, differentiates what a
`torch.autograd.Function` does instead of calling its backward, and forgets hooks; and models ask
whether they are traced and take other branches. Any of these changes gradients, if only in their
last bits. These context managers stand around the call of torch.export.

torch has no public way to any of it; every import for it is here.
"""

from __future__ import annotations

import contextlib
import re
import threading
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any

import torch
from torch import fx, nn
from torch.export.custom_ops import (
    _call_custom_autograd_function_in_pre_dispatch as _placeholder_call,
)
from torch.fx.experimental.proxy_tensor import track_tensor_tree
from torch.utils.checkpoint import CheckpointFunction

from ..answers.known import proxy_mode
from ..ir.errors import CaptureError
from ..tensors.pytree import tree_flatten, tree_unflatten

Call = Callable[..., Any]


@contextlib.contextmanager
def copied_tensors() -> Iterator[None]:
    """`copy.deepcopy` of a tensor that is being traced, which has no memory, is an operator."""
    deepcopy = torch.Tensor.__deepcopy__

    def copied(tensor: torch.Tensor, memo: dict[int, Any]) -> torch.Tensor:
        if id(tensor) not in memo:
            memo[id(tensor)] = tensor.detach().clone()
        found: torch.Tensor = memo[id(tensor)]
        return found

    torch.Tensor.__deepcopy__ = copied  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.Tensor.__deepcopy__ = deepcopy  # type: ignore[method-assign]


UNTRACED = (("is_compiling", "is_exporting"), ("is_exporting",), ())
"""What of `torch.compiler` says no, from a model that does all as untraced to one that is told."""


@contextlib.contextmanager
def untraced_branches(denied: Collection[str]) -> Iterator[None]:
    """`torch.compiler.is_exporting()` and the like say no: models do what they do untraced."""
    flags = [f"_{name}_flag" for name in denied]
    before = [getattr(torch.compiler, flag) for flag in flags]
    for flag in flags:
        setattr(torch.compiler, flag, False)
    try:
        yield
    finally:
        for flag, value in zip(flags, before, strict=True):
            setattr(torch.compiler, flag, value)


@contextlib.contextmanager
def native_kernels() -> Iterator[None]:
    """While tracing, resizing (`interpolate`) stays one operator.

    torch decomposes it in Python whenever a graph is traced; what comes out is slower than the
    kernel and rounds differently.
    """
    keys = (torch._C.DispatchKey.CompositeImplicitAutograd, torch._C.DispatchKey.Autograd)
    removed: list[tuple[Any, dict[Any, Any]]] = []
    for name in dir(torch.ops.aten):
        if re.match(r"_?upsample_", name):
            packet = getattr(torch.ops.aten, name)
            for op in (getattr(packet, overload) for overload in packet.overloads()):
                found = {key: op.py_kernels.pop(key) for key in keys if key in op.py_kernels}
                removed.append((op, found))
                op._dispatch_cache.clear()
    try:
        yield
    finally:
        for op, found in removed:
            op.py_kernels.update(found)
            op._dispatch_cache.clear()


def sources_of(
    tensors: Iterable[torch.Tensor], arguments: Iterable[torch.Tensor]
) -> tuple[bool, bool]:
    """Whether tensors that are being traced are made of arguments; of parameters or buffers."""
    given = {_node_of(each) for each in arguments}
    pending, seen = [_node_of(tensor) for tensor in tensors], set()
    of_arguments = of_model = False
    while pending:
        node = pending.pop()
        if node in seen:
            continue
        seen.add(node)
        if node is None or node in given:
            of_arguments = True
        elif node.op == "placeholder" or (
            node.op == "get_attr" and "constant" not in str(node.target)
        ):
            of_model = True
        else:
            pending += node.all_input_nodes
    return of_arguments, of_model


def traced_as(tensor: torch.Tensor) -> tuple[fx.Node | None, Any]:
    """The node of a tensor that is being traced, and the module with the graph's constants."""
    mode = proxy_mode()
    if mode is None:
        return None, None
    node = getattr(mode.tracer.unwrap_proxy(tensor), "node", None)
    return (node if isinstance(node, fx.Node) else None), mode.tracer.root


def _node_of(tensor: torch.Tensor) -> fx.Node | None:
    return traced_as(tensor)[0]


@contextlib.contextmanager
def outside_of_tracing() -> Iterator[None]:
    """What is called inside is not taken for a part of the graph."""
    key = torch._C.DispatchKey.PreDispatch
    include = torch._C._dispatch_tls_local_include_set().remove(key)
    exclude = torch._C._dispatch_tls_local_exclude_set() | torch._C.DispatchKeySet(key)
    with torch._C._ForceDispatchKeyGuard(include, exclude):
        yield


@contextlib.contextmanager
def kept_functions() -> Iterator[list[Call]]:
    """While torch.export traces, every `torch.autograd.Function` stays one call in the graph.

    Yields the calls, which `restore_functions` puts in the places that were held for them.
    Reentrant checkpointing is such a Function too; it is called through, as what to keep and
    what to recompute is not the model's to say here.
    """
    apply = torch.autograd.Function.__dict__["apply"]
    calls: list[Call] = []
    here = threading.get_ident()

    def kept(cls: type[torch.autograd.Function], *args: Any, **kwargs: Any) -> Any:
        mode = proxy_mode()
        traces = mode is not None and threading.get_ident() == here  # modes are all threads'
        if not traces or not torch.is_grad_enabled():
            return apply.__get__(None, cls)(*args, **kwargs)
        if cls is CheckpointFunction:  # (function, preserve_rng_state, *arguments)
            return args[0](*args[2:])
        return _hold_place(cls, apply, mode, calls, args, kwargs)

    torch.autograd.Function.apply = classmethod(kept)  # type: ignore[assignment, method-assign]
    try:
        yield calls
    finally:
        torch.autograd.Function.apply = apply  # type: ignore[method-assign]


def _hold_place(
    cls: type[torch.autograd.Function],
    apply: Any,
    mode: Any,
    calls: list[Call],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """Run a Function on fake tensors, and leave one node for it in the graph."""
    leaves, tree = tree_flatten((args, kwargs))
    opaque = [x for x in leaves if callable(x) and not isinstance(x, (type, torch.Tensor))]
    if opaque:
        raise CaptureError(
            f"{cls.__name__}.apply is given a {type(opaque[0]).__name__}, which may hold "
            "parameters that no argument shows: pass the tensors themselves"
        )
    inputs = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    kinds = {tensor.device.type for tensor in inputs}
    regions = {k: torch.get_autocast_dtype(k) for k in kinds if torch.is_autocast_enabled(k)}

    def call(*tensors: torch.Tensor) -> Any:
        given = iter(tensors)
        whole = [next(given) if isinstance(x, torch.Tensor) else x for x in leaves]
        again, named = tree_unflatten(whole, tree)
        with contextlib.ExitStack() as stack:
            for kind, dtype in regions.items():
                stack.enter_context(torch.autocast(kind, dtype))
            return apply.__get__(None, cls)(*again, **named)

    graph = mode.tracer.graph
    last = next(reversed(graph.nodes), None)
    with outside_of_tracing():
        output = call(*inputs)
    _forget_switches(graph, last)
    calls.append(call)
    proxies = [mode.tracer.unwrap_proxy(tensor) for tensor in inputs]
    held = (str(len(calls) - 1), *proxies)
    proxy = mode.tracer.create_proxy("call_function", _placeholder_call, held, {})
    track_tensor_tree(output, proxy, constant=None, tracer=mode.tracer)
    return output


def _forget_switches(graph: fx.Graph, last: fx.Node | None) -> None:
    """A Function runs without gradients; where it says so once more (``torch.no_grad()``), what
    follows it would be taken to run without them too."""
    for node in reversed(list(graph.nodes)):
        if node is last:
            return
        if node.target is torch._C._set_grad_enabled:
            graph.erase_node(node)


def restore_functions(traced: fx.GraphModule, calls: list[Call]) -> None:
    """Put the calls of autograd Functions into the places held for them."""
    for graph in (m.graph for m in traced.modules() if isinstance(m, fx.GraphModule)):
        for node in graph.find_nodes(op="call_function", target=_placeholder_call):
            node.target = calls[int(node.args[0])]
            node.args = node.args[1:]


def drop_metadata_checks(traced: fx.GraphModule) -> None:
    """Conversions leave checks of the dtype that they found while they were traced, which casts by
    other tables change; shapes and dtypes are fixed anyway."""
    check = torch.ops.aten._assert_tensor_metadata.default
    for module in (m for m in traced.modules() if isinstance(m, fx.GraphModule)):
        found = module.graph.find_nodes(op="call_function", target=check)
        for node in found:
            module.graph.erase_node(node)
        if found:
            module.recompile()


@contextlib.contextmanager
def refused_hooks() -> Iterator[None]:
    """A gradient hook that forward sets would be lost: say so."""
    register: Any = torch.Tensor.register_hook
    here = threading.get_ident()

    def refuse(tensor: torch.Tensor, hook: Any) -> Any:
        if threading.get_ident() != here:
            return register(tensor, hook)
        raise CaptureError(
            "forward calls Tensor.register_hook, and a compiled backward runs no hooks: write it "
            "as a torch.autograd.Function, whose backward is kept"
        )

    torch.Tensor.register_hook = refuse  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.Tensor.register_hook = register  # type: ignore[method-assign]


@contextlib.contextmanager
def kept_modules() -> Iterator[None]:
    """A `Module.to` that has nothing to convert does nothing, as it does untraced.

    It would swap parameters for themselves, which tensors that are being traced do not allow.
    """
    convert = nn.Module.to

    def kept(module: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        device, dtype, _, layout = torch._C._nn._parse_to(*args, **kwargs)
        tensors = (*module.parameters(), *module.buffers())
        as_it_is = layout is None and all(
            device in (None, t.device) and (dtype in (None, t.dtype) or not _converts(t))
            for t in tensors
        )
        return module if as_it_is else convert(module, *args, **kwargs)

    nn.Module.to = kept  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        nn.Module.to = convert  # type: ignore[method-assign]


def _converts(tensor: torch.Tensor) -> bool:
    """Whether `Module.to` gives a tensor another dtype."""
    return tensor.is_floating_point() or tensor.is_complex()


@contextlib.contextmanager
def nameless(tracer: fx.Tracer | None = None) -> Iterator[None]:
    """Inside, no node notes the lines of code that made it, which takes a tenth of an export
    (from torch 2.12 on; an older one does not ask, and notes them).

    Args:
        tracer: one that traces already: it has asked when it began.
    """
    asked: list[tuple[Any, str, bool]] = [(fx.config, "do_not_emit_stack_traces", True)]
    asked += [] if tracer is None else [(tracer, "record_stack_traces", False)]
    before = [getattr(owner, name, False) for owner, name, _ in asked]
    for owner, name, value in asked:
        setattr(owner, name, value)
    try:
        yield
    finally:
        for (owner, name, _), value in zip(asked, before, strict=True):
            setattr(owner, name, value)
