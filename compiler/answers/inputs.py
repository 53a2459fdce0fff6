"""Python floats of a batch that are inputs of the graph, while forward is traced with them.

Where an operator of arithmetic gets one beside a tensor, the graph has a node in the place of the
literal that tracing would write there; `pipecompile::number` makes it. A program is later given
Python's own float in that place, so that it calls the operators that it would call with a literal.
What Python computes with the numbers themselves it computes again for every batch; what it compares
is asked of each batch; every other use takes the number itself, which is then no input.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ..ir.errors import BatchError, PipecompileError
from .guards import Question, Reading
from .number import How, Number, plain

_T = torch.Tensor
Floats = tuple[float, ...]


@torch.library.custom_op("pipecompile::number", mutates_args=())
def _number(leaf: torch.Tensor, index: int, dtype: torch.dtype) -> torch.Tensor:
    """Stands for a Python float, and is never computed."""
    raise NotImplementedError("a number of the batch has its value in Python")


_number.register_fake(lambda leaf, index, dtype: leaf.new_empty((), dtype=dtype))

NUMBER = torch.ops.pipecompile.number.default

_ARITHMETIC = {
    *(getattr(_T, name) for name in ("add", "sub", "mul", "div", "add_", "sub_", "mul_", "div_")),
    *(getattr(torch, name) for name in ("add", "sub", "mul", "div", "true_divide", "rsub")),
    *(_T.__rsub__, _T.__rdiv__),
}
"""Functions of a tensor and a number that neither in forward nor in backward do anything else for
some values of it."""

_aten = torch.ops.aten
LITERAL: dict[Any, Any] = {
    **{each: each for each in (_aten.add.Tensor, _aten.sub.Tensor)},
    **{each: each for each in (_aten.mul.Tensor, _aten.div.Tensor)},
    _aten.rsub.Tensor: _aten.rsub.Scalar,
}
"""What these functions become in a graph -> the same with a Python float for the tensor."""

_PARTIAL = (operator.truediv, operator.floordiv, operator.mod, operator.pow)
"""What raises for some numbers, or gives what is no float."""


class NumberError(PipecompileError, RuntimeError):
    """Numbers of a batch that cannot be inputs of a graph, which then has them as literals.

    Attributes:
        why: the name of each -> why.
    """

    def __init__(self, why: Mapping[str, str]):
        super().__init__("; ".join(f"{name!r}: {text}" for name, text in why.items()))
        self.why = dict(why)

    def __reduce__(self) -> tuple[Any, ...]:
        """It travels between ranks."""
        return type(self), (self.why,)


@dataclass(frozen=True)
class Scalars:
    """The floats that a graph is given, of those in a batch.

    Attributes:
        places: the leaves that are numbers.
        chains: makes each of all of these.
    """

    places: tuple[int, ...] = ()
    chains: tuple[Callable[[Floats], float], ...] = ()

    def __len__(self) -> int:
        return len(self.chains)

    def of(self, leaves: Sequence[torch.Tensor]) -> Floats:
        """Of a microbatch.

        Raises:
            BatchError: Python cannot compute them, nor can it on one device.
        """
        floats = tuple(leaves[i].item() for i in self.places)
        try:
            return tuple(chain(floats) for chain in self.chains)
        except ArithmeticError as error:
            raise BatchError(
                f"what forward computes with numbers of the batch fails for {floats}: "
                f"{type(error).__name__}: {error}"
            ) from error


class Inputs:
    """Of one trace.

    Args:
        leaves: leaf -> the tensor that stands for it in the trace, and its value.
        where: says where forward is.

    Attributes:
        taken: leaf -> why it is no input, as forward has taken the number itself.
    """

    def __init__(
        self,
        leaves: Mapping[int, tuple[torch.Tensor, float]],
        where: Callable[[], str],
    ):
        self._leaves, self._where = leaves, where
        self._floats = tuple(value for _, value in leaves.values())
        self._questions: list[Question] = []
        self._made: list[tuple[InputNumber, torch.dtype]] = []
        self.taken: dict[int, str] = {}

    def __bool__(self) -> bool:
        return bool(self._leaves)

    def put(self, leaves: Sequence[torch.Tensor]) -> list[Any]:
        """With what forward is given in the places of numbers."""
        made: list[Any] = list(leaves)
        for place, leaf in enumerate(self._leaves):
            made[leaf] = InputNumber(
                self, self._floats[place], operator.itemgetter(place), frozenset({leaf})
            )
        return made

    def replaced(self, func: Any, args: Any, kwargs: Any) -> Any:
        """The arguments of a function, with tensors for numbers where it computes with them, and
        plain numbers elsewhere."""
        if func in _ARITHMETIC and len(args) == 2 and not kwargs:
            left, right = args
            if self._meets(left, right):
                return (self._tensor(left, right), right), kwargs
            if self._meets(right, left):
                return (left, self._tensor(right, left)), kwargs
        return plain((args, kwargs))

    def _meets(self, number: Any, other: Any) -> bool:
        return self.has(number) and isinstance(other, _T) and not other.is_complex()

    def has(self, value: Any) -> bool:
        """Whether it is a number of this trace; one that was kept from another is not."""
        return type(value) is InputNumber and value.inputs is self

    def ask(self, how: How) -> Any:
        """What comes of the numbers, for which the graph is made."""
        question = Question(self._where(), how, how(self._floats))
        self._questions.append(question)
        return question.answer

    def take(self, leaves: frozenset[int]) -> None:
        """Forward takes these numbers themselves."""
        for leaf in leaves:
            self.taken.setdefault(leaf, f"forward takes the number itself {self._where()}")

    def check_left(self, values: Sequence[Any]) -> None:
        """What forward has left behind in Python is there for other graphs, with its value."""
        for leaf in (leaf for value in values if self.has(value) for leaf in value.leaves):
            self.taken.setdefault(leaf, "forward keeps the number itself in Python")

    def _tensor(self, number: InputNumber, beside: torch.Tensor) -> torch.Tensor:
        """Of the dtype with which a result has that which it has with a Python float."""
        floating = beside.is_floating_point()
        dtype = beside.dtype if floating else torch.get_default_dtype()
        key = next((i for i, (n, d) in enumerate(self._made) if n is number and d is dtype), None)
        if key is None:
            key = len(self._made)
            self._made.append((number, dtype))
        leaf, _ = self._leaves[min(number.leaves)]
        found: torch.Tensor = NUMBER(leaf, key, dtype)
        return found

    @property
    def scalars(self) -> Scalars:
        """The floats that stand in the graph, in the order of their nodes' indices."""
        return Scalars(tuple(self._leaves), tuple(number.chain for number, _ in self._made))

    def steps(self) -> list[fx.Node | Reading]:
        """The questions, as `Guards` has them."""
        if not self._questions:
            return []
        graph = fx.Graph()
        places = [graph.placeholder(str(leaf)) for leaf in self._leaves]
        floats = graph.call_function(_floats, tuple(places))
        return [*places, floats, Reading(floats, lambda found: found, self._questions)]


def _floats(*values: torch.Tensor) -> Floats:
    return tuple(value.item() for value in values)


class InputNumber(Number):
    """A float of the batch that forward is given, or one that Python has computed of such.

    Args:
        value: the number for this batch.
        chain: makes it of all floats of a batch.
        leaves: those that it is made of.
    """

    __slots__ = ("inputs", "leaves")

    def __init__(self, inputs: Inputs, value: float, chain: How, leaves: frozenset[int]):
        super().__init__(inputs.ask, value, chain)
        self.inputs, self.leaves = inputs, leaves

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Functions of torch take it; while forward is traced `Inputs.replaced` comes first."""
        args, kwargs = plain((args, kwargs or {}))
        return func(*args, **kwargs)

    @property
    def chain(self) -> How:
        return self._chain

    def plain(self) -> Any:
        self.inputs.take(self.leaves)
        return self._value

    def _with_tensor(self, op: Callable[[Any, Any], Any], tensor: torch.Tensor) -> Any:
        return NotImplemented  # for the tensor's own method

    def _operand(self, other: Any) -> tuple[Any, How] | None:
        if self.inputs.has(other):
            return other._value, other._chain
        return super()._operand(other)

    def _made(self, value: Any, chain: How, op: Any, *operands: Any) -> Any:
        leaves = frozenset[int]().union(*(n.leaves for n in operands if self.inputs.has(n)))
        if type(value) is not float:
            self.inputs.take(leaves)
            return value
        if op in _PARTIAL and not _is_total(op, operands[-1]):
            self.inputs.ask(lambda floats: type(chain(floats)))
        return InputNumber(self.inputs, value, chain, leaves)

    def __neg__(self) -> Any:
        return self._changed(operator.neg)

    def __pos__(self) -> Any:
        return self._changed(operator.pos)

    def __abs__(self) -> Any:
        return self._changed(operator.abs)

    def _changed(self, op: How) -> Any:
        chain = self._chain
        return self._made(op(self._value), lambda floats: op(chain(floats)), op, self)


def _is_total(op: Any, right: Any) -> bool:
    """Whether a float is what comes of every float on the left; by zero it would have failed."""
    if issubclass(type(right), Number):
        return False
    return op is not operator.pow or (isinstance(right, int) and right >= 0)
