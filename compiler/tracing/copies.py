"""Layers that do what one before them did: their operators are copied, their Python is not run.

A call of a layer gives the same operators as an earlier call of another one if everything that its
code can see is the same: the state of the layer (`likeness`), its arguments, the modes of torch,
and what else forward can reach. All that is compared when the call comes; where anything differs,
or cannot be compared, the call is traced as ever. So is one of a layer that changes anything
besides its results, draws numbers in Python, asks a tensor for its values, or has operators on
tensors that it was not given. Of a cache that layers are given the methods are called for each of
them (`helpers`).
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn
from torch.overrides import _get_current_function_mode_stack

from ..answers.known import node_of, proxy_mode
from ..effects.contents import Contents
from ..tensors.fakes import FakeTensor
from ..tensors.pytree import tree_flatten
from .bypassed import Bypass, BypassError, Done, emptied
from .constants import is_told
from .helpers import StandIn, Watch, is_helper, nodes_after
from .likeness import ALL, PLAIN, Calls, Place, differences, layers_of, noting_reads
from .templates import Call, Template, copied, template_of

MOST = 4  # calls of layers of one shape that are looked at to copy them


@dataclass
class Copies:
    """Of one forward that is being traced.

    Args:
        root: what is traced, and has the model in it.
        bypass: layers that are left out.

    Attributes:
        count: calls that were copied.
        stood: stand-ins that were handed out.
        sources: the path of each layer that was copied, by call -> that of the one it was copied
            from.
    """

    root: nn.Module
    bypass: Bypass | None = None
    known: Callable[[torch.Tensor], bool] = lambda _: False
    noted: Callable[[], object] = lambda: None
    count: int = 0
    stood: int = 0
    sources: dict[str, str] = field(default_factory=dict)
    _layers: dict[str, tuple[nn.Module, object]] = field(default_factory=dict)
    _different: Mapping[str, set[Place]] = field(default_factory=dict)
    _done: Done | None = None
    _templates: dict[object, list[Template]] = field(default_factory=dict)
    _alike: dict[object, list[nn.Module]] = field(default_factory=dict)
    _inside: bool = False
    _outside: Contents | None = None

    @contextmanager
    def entered(
        self, known: Callable[[torch.Tensor], bool], noted: Callable[[], object]
    ) -> Iterator[None]:
        """A forward inside.

        Args:
            known: whether the batch tells the values of a tensor.
            noted: what others have noted of the forward so far: a layer of which they note
                something is not copied.
        """
        self.known, self.noted = known, noted
        layers = self._layers or self._found()
        self._outside = Contents(self.root, tuple(layers))
        for path, (part, key) in layers.items():
            self._alike.setdefault(key, []).append(part)
            vars(part)["forward"] = _Call(self, path, part, key)
        try:
            yield
        finally:
            for part, _ in layers.values():
                vars(part).pop("forward", None)

    @contextmanager
    def bypassing(self) -> Iterator[None]:
        """Inside, layers that are to be left out are not there for what is traced.

        Raises:
            BypassError: they are not alike.
        """
        assert self.bypass is not None
        self._layers = self._found()
        if not self._layers.keys() >= {self.bypass.traced, self.bypass.kept, *self.bypass.paths}:
            raise BypassError("layers have another forward")
        with emptied(self.root, self.bypass) as self._different:
            yield

    def _found(self) -> dict[str, tuple[nn.Module, object]]:
        with torch._C.DisableTorchFunction():
            layers = layers_of(self.root)
        return {p: found for p, found in layers.items() if "forward" not in vars(found[0])}

    def called(
        self,
        path: str,
        part: nn.Module,
        key: object,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """A layer is."""
        templates = self._templates.setdefault(key, [])
        if path in self._different:
            return self._bypassed(path, args, kwargs)
        with torch._C.DisableTorchFunction():  # to look at tensors calls modes, one by one
            call = None if self._inside else self._call(path, part, args, kwargs)
            like = (template for template in templates if call and self._repeats(template, call))
            found = next(like, None)
        if call is None:
            return forward(*args, **kwargs)
        if found is not None:
            self.count += 1
            self.sources[path] = found.call.path
            output = copied(found, call)
            self._done = Done(found, call, output)
            return output
        if len(templates) >= MOST:
            return forward(*args, **kwargs)
        return self._traced(call, key, forward, args, kwargs)

    def _bypassed(self, path: str, args: Any, kwargs: Any) -> Any:
        """What a layer returns that is left out: what it was given."""
        if self._done is None or self._inside:
            raise BypassError("a layer is called before the one that it is like")
        with torch._C.DisableTorchFunction():
            leaves, tree = tree_flatten((args, kwargs))
            self._done.again(self._different[path], leaves, tree, self._is_told)
            if _modes(self._done.call.state) != self._done.call.modes:
                raise BypassError("torch is in another mode")
        return self._done.output

    def _call(self, path: str, part: nn.Module, args: Any, kwargs: Any) -> Call | None:
        mode = proxy_mode()
        leaves, tree = tree_flatten((args, kwargs))
        others = [x for x in leaves if type(x) not in PLAIN and type(x) is not FakeTensor]
        if mode is None or len(others) > 1 or not all(map(is_helper, others)):
            return None
        told = [isinstance(x, torch.Tensor) and self._is_told(x) for x in leaves]
        state = [*part.parameters(), *part.buffers()]
        given = [*(x for x in leaves if isinstance(x, torch.Tensor)), *state]
        nodes = [node for node in map(node_of, given) if node is not None]
        if len(nodes) < len(given):
            return None
        return Call(part, path, leaves, tree, state, told, _modes(state), nodes)

    def _is_told(self, tensor: torch.Tensor) -> bool:
        return not tensor.requires_grad and (is_told(tensor) or self.known(tensor))

    def _repeats(self, template: Template, call: Call) -> bool:
        """Whether a call does what another one did."""
        first = template.call
        if first.tree != call.tree or template.described != call.describe():
            return False
        different = _differences(first.part, call.part)
        if different is None or different & template.reads:
            return False
        if any(type(vars(call.submodule(path))[name]) is not int for path, name in template.handed):
            return False
        if different and any(name == ALL for _, name in template.reads):
            return False
        return template.outside.holds()

    def _traced(
        self,
        call: Call,
        key: object,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """A call as ever; what is seen of it becomes a template, if that is enough."""
        graph: fx.Graph = proxy_mode().tracer.graph
        assert self._outside is not None
        outside, own = self._outside.now(), Contents(call.part, ())
        described = call.describe()
        noted, last = self.noted(), next(reversed(graph.nodes), None)
        used: set[Place] = set()
        numbers = self._numbers(call, key, used)
        watch = None if call.helper is None else Watch(call.helper, graph)
        self._inside = True
        try:
            with (
                noting_reads(call.part, numbers) as reads,
                nullcontext() if watch is None else watch.watching(),
            ):
                output = forward(*args, **kwargs)
        finally:
            self._inside = False
        nodes = nodes_after(graph, last)
        seen = watch is None or not watch.other
        if seen and self.noted() == noted and own.holds() and outside.holds():
            asked = [] if watch is None else watch.asked
            template = template_of(call, described, reads | used, outside, nodes, output, asked)
            if template is not None:
                self._templates[key].append(template)
        return output

    def _numbers(self, call: Call, key: object, used: set[Place]) -> dict[Place, StandIn]:
        """Stand-ins for numbers that tell layers apart, for one that may hand them to a helper.

        Args:
            used: gets those of which it makes anything else.
        """
        if call.helper is None:
            return {}
        other = next(part for part in self._alike[key] if part is not call.part)
        found: dict[Place, StandIn] = {}
        for path, name in _differences(call.part, other) or ():
            value = vars(call.submodule(path))[name]
            if type(value) is int:
                found[path, name] = StandIn((path, name), value, used.add)
        self.stood += len(found)
        return found


def _differences(one: nn.Module, other: nn.Module) -> set[Place] | None:
    try:
        return differences(one, other)
    except RecursionError:
        return None


class _Call(Calls):
    """Stands for a layer's forward."""

    def __init__(self, copies: Copies, path: str, part: nn.Module, key: object):
        self._copies, self._path, self._part, self._key = copies, path, part, key
        self._forward = part.forward
        self._thread = threading.get_ident()
        functools.update_wrapper(self, part.forward)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if threading.get_ident() != self._thread:
            return self._forward(*args, **kwargs)
        what = self._path, self._part, self._key, self._forward
        return self._copies.called(*what, args, kwargs)


def _modes(state: Sequence[torch.Tensor]) -> tuple[object, ...]:
    """What torch's functions go by besides their arguments."""
    kinds = sorted({tensor.device.type for tensor in state})
    casts = [(k, torch.is_autocast_enabled(k), torch.get_autocast_dtype(k)) for k in kinds]
    kernels: Any = torch.backends.cuda
    functions: Any = _get_current_function_mode_stack
    return (
        *(torch.is_grad_enabled(), torch.get_default_dtype(), casts),
        *(torch.are_deterministic_algorithms_enabled(), torch.get_float32_matmul_precision()),
        *(kernels.flash_sdp_enabled(), kernels.mem_efficient_sdp_enabled()),
        *(kernels.math_sdp_enabled(), kernels.cudnn_sdp_enabled()),
        [id(mode) for mode in functions()],
    )
