"""One graph for batches of many sizes: symbols while it is traced, and numbers for each batch.

torch.export decides by the sizes of an example, and writes down what it decided as guards of its
`ShapeEnv`. For other sizes all of it has to hold. `ShapeEnv` and what belongs to it has no public
name; it is used in this file alone.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import sympy  # type: ignore[import-untyped]
import torch
from torch import fx
from torch._dynamo.source import ConstantSource
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv

from ..ir.errors import CaptureError
from ..ir.graph import passed_on
from ..tensors.fakes import FakeTensorMode, is_symbol

LEAST = 2  # of what is a symbol: torch takes 0 and 1 for numbers
Dims = Collection[int]


class Sizes:
    """The symbols of one trace.

    Args:
        mode: makes its fake tensors.
        shapes: of the leaves of an example.
        varying: of each leaf, the dimensions that are symbols.

    Attributes:
        asked: what the trace was told of values that sizes alone determine.

    Raises:
        CaptureError: the example has a size that is none of others.
    """

    def __init__(
        self, mode: FakeTensorMode, shapes: Sequence[Sequence[int]], varying: Sequence[Dims]
    ):
        self._mode, self._env = mode, ShapeEnv(duck_shape=False)
        self.varying = varying
        self.asked: list[Asked] = []
        pairs = zip(shapes, varying, strict=True)
        least = min((shape[dim] for shape, dims in pairs for dim in dims), default=0)
        if least < LEAST:
            raise CaptureError(f"a size of {least} stands for no others")
        self._shapes: list[list[Any]] = [
            [self._symbol(f"leaf {i} dim {d}", n) if d in varying[i] else n for d, n in each]
            for i, each in enumerate(map(enumerate, shapes))
        ]
        self._scopes = [(self._env, self._shapes)]

    def _symbol(self, name: str, hint: int) -> torch.SymInt:
        source = ConstantSource(name)
        symbol = self._env.create_symbol(hint, source, DimDynamic.DYNAMIC)
        made = self._env.create_symintnode(symbol, hint=hint, source=source)
        assert isinstance(made, torch.SymInt)
        return made

    @contextmanager
    def traced(self) -> Iterator[None]:
        """A trace inside, in which the mode knows symbols."""
        mode: Any = self._mode
        before = mode.shape_env, mode.static_shapes
        mode.shape_env, mode.static_shapes = self._env, False
        try:
            yield
        finally:
            mode.shape_env, mode.static_shapes = before

    @contextmanager
    def without(self) -> Iterator[None]:
        """A trace inside that one, in which the mode knows none."""
        mode: Any = self._mode
        mode.shape_env, mode.static_shapes = None, True
        try:
            yield
        finally:
            mode.shape_env, mode.static_shapes = self._env, False

    def leaf(self, i: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """A fake leaf of a batch."""
        with self._mode:
            return torch.empty(self._shapes[i], dtype=dtype, device=device)

    def met(self, traced: fx.GraphModule) -> None:
        """What was exported has symbols of its own, of which other things were decided."""
        leaves = (node.meta["val"] for node in traced.graph.find_nodes(op="placeholder"))
        shapes = [list(leaf.shape) for leaf in leaves]
        symbols = (n for shape in shapes for n in shape if isinstance(n, torch.SymInt))
        if not any(isinstance(n, torch.SymInt) for shape in shapes for n in shape):
            raise CaptureError("forward is made for these sizes alone")
        for env in dict.fromkeys(symbol.node.shape_env for symbol in symbols):
            self._scopes.append((env, shapes))

    @property
    def dynamic(self) -> tuple[dict[int, Any], ...]:
        """As torch.export wants to be told."""
        auto: Any = torch.export.Dim.AUTO
        return tuple(dict.fromkeys(dims, auto) for dims in self.varying)

    def check_free(self) -> None:
        """Raises CaptureError if a symbol has become a number."""
        for env, shapes in self._scopes:
            pairs = zip(shapes, self.varying, strict=True)
            for size in (shape[dim] for shape, dims in pairs for dim in dims):
                stands = env.replace(size.node._expr) if is_symbol(size) else size
                if isinstance(stands, int) or stands.is_number:
                    raise CaptureError(f"forward is made for a size of {stands}")

    def at(self, shapes: Sequence[Sequence[int]]) -> Numbers:
        """The numbers of a batch.

        Raises:
            CaptureError: what was traced is not what such a batch would give.
        """
        found = Numbers(
            {id(env): _numbers(symbols, shapes) for env, symbols in self._scopes},
        )
        for env, symbols in self._scopes:
            found.check(env, [n for shape in symbols for n in shape if is_symbol(n)])
        for each in self.asked:
            if not each.holds(found):
                raise CaptureError("forward decides by a value that follows from sizes")
        return found


def _numbers(symbols: Sequence[Sequence[Any]], shapes: Sequence[Sequence[int]]) -> dict[Any, int]:
    """What each symbol stands for in a batch."""
    numbers: dict[Any, int] = {}
    for i, (mine, theirs) in enumerate(zip(symbols, shapes, strict=True)):
        for d, (symbol, number) in enumerate(zip(mine, theirs, strict=True)):
            if is_symbol(symbol) and number >= LEAST:
                numbers[symbol.node._expr] = number  # the symbol, before it was replaced
            elif symbol is not number and symbol != number:
                raise CaptureError(f"leaf {i} has {number} in dimension {d}")
    return numbers


class Numbers:
    """The numbers that symbols stand for; those of two traces may have one name.

    Args:
        numbers: by the id of the `ShapeEnv` that the symbols are of.
    """

    def __init__(self, numbers: Mapping[int, Mapping[Any, int]]):
        self._numbers = {
            env: {symbol: sympy.Integer(number) for symbol, number in each.items()}
            for env, each in numbers.items()
        }
        self._known: dict[tuple[int, Any], Any] = {}

    def check(self, env: ShapeEnv, symbols: Sequence[torch.SymInt]) -> None:
        """Raises CaptureError if something was decided otherwise than for these numbers."""
        if env.deferred_runtime_asserts:
            raise CaptureError("sizes depend on data")
        for symbol in (each.node._expr for each in symbols):
            number, stands = self.number(env, symbol), env.replace(symbol)
            if self.number(env, stands) != number:
                raise CaptureError(f"forward is made for a size of {stands}, and not {number}")
            within = env.var_to_range.get(symbol)
            if within is not None and number not in within:
                raise CaptureError(
                    f"forward is made for sizes from {within.lower} to {within.upper}, and not "
                    f"{number}"
                )
        for guard in env.guards:
            if self.number(env, guard.expr) != 1:
                raise CaptureError(f"forward decides by {guard.expr}, which is untrue")

    def number(self, env: ShapeEnv, expression: Any) -> Any:
        """Of an expression of symbols; a truth is 0 or 1."""
        key = id(env), expression
        if key not in self._known:
            found = sympy.sympify(expression).xreplace(self._numbers.get(id(env), {}))
            if found.free_symbols:
                raise CaptureError(f"{expression} is no number")
            if found in (sympy.true, sympy.false):
                self._known[key] = int(bool(found))
            else:
                self._known[key] = int(found) if found.is_integer else float(found)
        return self._known[key]

    def value(self, symbol: Any) -> Any:
        """The number, or the truth, of what Python takes for one."""
        found = self.number(symbol.node.shape_env, symbol.node.expr)
        if isinstance(symbol, torch.SymFloat):
            return float(found)
        return bool(found) if isinstance(symbol, torch.SymBool) else found

    def tensors(self, value: Any, mode: FakeTensorMode) -> Any:
        """What a node makes, with shapes and strides that are numbers."""
        if isinstance(value, (list, tuple)):
            return type(value)(self.tensors(item, mode) for item in value)
        if is_symbol(value):
            return self.value(value)
        if not isinstance(value, torch.Tensor) or _is_plain(value):
            return value
        size, stride = ([self._size(n) for n in each] for each in (value.size(), value.stride()))
        with mode:
            return torch.empty_strided(size, stride, dtype=value.dtype, device=value.device)

    def shape(self, shape: Sequence[Any]) -> tuple[int, ...]:
        """A shape in numbers."""
        return tuple(map(self._size, shape))

    def _size(self, size: Any) -> Any:
        return self.value(size) if isinstance(size, torch.SymInt) else size


class Asked:
    """A value that a trace was told, as sizes alone determine it.

    Args:
        compute: what is told, of numbers in the places of sizes.
        sizes: what it depends on.
        answer: what was told.
    """

    def __init__(
        self,
        compute: Callable[[Sequence[Any]], Any],
        sizes: Sequence[Any],
        answer: Any,
    ):
        self._compute, self._sizes, self._answer = compute, sizes, answer

    def holds(self, numbers: Numbers) -> bool:
        """Whether it is the same for other sizes."""
        found = self._compute([numbers.value(size) for size in self._sizes])
        return type(found) is type(self._answer) and bool(found == self._answer)


def is_known(size: Any) -> bool:
    """Whether a size is a number, or a symbol that stands for one of a batch's."""
    return isinstance(size, int) or bool(size.node.has_hint())


def terms(shape: Sequence[Any]) -> tuple[Any, ...]:
    """Of a shape, to compare it without a decision that would become a guard."""
    return tuple(n.node.expr if isinstance(n, torch.SymInt) else n for n in shape)


def hint(symbol: Any) -> Any:
    """What a symbol is in the example."""
    return symbol.node.hint


def instance(
    graph: fx.Graph, numbers: Numbers, mode: FakeTensorMode
) -> tuple[fx.Graph, dict[fx.Node, Any]]:
    """A graph with numbers in the places of symbols, and each node's twin there, or its number."""
    made = fx.Graph()
    twin: dict[fx.Node, Any] = {}

    def given(value: Any) -> Any:
        if isinstance(value, fx.Node):
            return twin[value]
        return numbers.value(value) if is_symbol(value) else value

    for node in graph.nodes:
        value = node.meta.get("val")
        if is_symbol(value):
            twin[node] = numbers.value(value)
            continue
        source = passed_on(node, numbers.shape)
        if source is not None:
            twin[node] = twin[source]
            continue
        args = fx.node.map_aggregate(node.args, given)
        kwargs = fx.node.map_aggregate(node.kwargs, given)
        new = made.create_node(node.op, node.target, args, kwargs, node.name)
        new.meta = dict(node.meta)
        if "val" in new.meta:
            new.meta["val"] = numbers.tensors(value, mode)
        twin[node] = new
    return made, twin


def _is_plain(tensor: torch.Tensor) -> bool:
    return all(isinstance(n, int) for n in (*tensor.size(), *tensor.stride()))
