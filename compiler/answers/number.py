"""A number that forward has got of a tensor (``.item()``), and what Python makes of it."""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

How = Callable[[Any], Any]


def same(found: Any) -> Any:
    """What was read, itself."""
    return found


def _always(value: Any, _: Any) -> Any:
    return value


def _both(op: Callable[[Any, Any], Any], left: How, right: How, found: Any) -> Any:
    return op(left(found), right(found))


class Number:
    """Where it is compared, only what comes of that is asked of the batch; where it is used in
    another way, it is itself what is asked, and Python goes on with a plain number.

    Args:
        ask: an answer of the batch, by what makes it of the number that was read.
        value: the number itself.
        chain: makes this of the number that was read.
    """

    __slots__ = ("_ask", "_chain", "_value")

    def __init__(self, ask: Callable[[How], Any], value: Any, chain: How = same):
        self._ask, self._value, self._chain = ask, value, chain

    @property
    def __class__(self) -> Any:  # for isinstance
        return type(self._value)

    @__class__.setter
    def __class__(self, _: Any) -> None:
        raise TypeError("a number of a batch has no other class")

    def plain(self) -> Any:
        """Python's number."""
        return self._ask(self._chain)

    def __reduce__(self) -> Any:
        return type(self._value), (self.plain(),)

    def __getattr__(self, name: str) -> Any:
        if not hasattr(type(self._value), name):
            raise AttributeError(f"{type(self._value).__name__!r} object has no attribute {name!r}")
        return getattr(self.plain(), name)

    # -- what subclasses do otherwise -----------------------------------------------------------

    def _with_tensor(self, op: Callable[[Any, Any], Any], tensor: torch.Tensor) -> Any:
        return op(self.plain(), tensor)

    def _operand(self, other: Any) -> tuple[Any, How] | None:
        """Another operand's value, and what makes it of the number that was read; None of what is
        no number."""
        other = plain(other)
        return (other, partial(_always, other)) if isinstance(other, (int, float)) else None

    def _made(self, value: Any, chain: How, op: Any, *operands: Any) -> Any:
        """What is computed, of operands in their order."""
        return Number(self._ask, value, chain)


def plain(value: Any) -> Any:
    """A value in which numbers are Python's own."""
    if issubclass(type(value), Number):
        return value.plain()
    if type(value) in (tuple, list):
        return type(value)(map(plain, value))
    if type(value) is dict:
        return {key: plain(each) for key, each in value.items()}
    return value


def _compared(op: Callable[[Any, Any], Any]) -> Callable[[Number, Any], Any]:
    def compare(self: Number, other: Any) -> Any:
        if isinstance(other, torch.Tensor):
            return self._with_tensor(op, other)
        found, mine = self._operand(other), self._chain
        if found is None:
            return NotImplemented
        theirs = found[1]
        return self._ask(partial(_both, op, mine, theirs))

    return compare


def _computed(op: Callable[[Any, Any], Any], swapped: bool) -> Callable[[Number, Any], Any]:
    def compute(self: Number, other: Any) -> Any:
        if isinstance(other, torch.Tensor):
            return self._with_tensor(lambda a, b: op(b, a) if swapped else op(a, b), other)
        found, mine = self._operand(other), self._chain
        if found is None:
            return NotImplemented
        value, theirs = found
        if swapped:
            chain = partial(_both, op, theirs, mine)
            return self._made(op(value, self._value), chain, op, other, self)
        chain = partial(_both, op, mine, theirs)
        return self._made(op(self._value, value), chain, op, self, other)

    return compute


def _used(op: Callable[..., Any]) -> Callable[..., Any]:
    return lambda self, *args: op(self.plain(), *args)


_COMPARED = ("lt", "le", "gt", "ge", "eq", "ne")
_COMPUTED: dict[str, Callable[[Any, Any], Any]] = {
    name: getattr(operator, name)
    for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow")
}
_USED: dict[str, Callable[..., Any]] = {
    **{name: getattr(operator, name) for name in ("index", "neg", "pos", "abs", "invert")},
    **{name: getattr(operator, f"__{name}__") for name in ("and", "or", "xor")},
    **{name: getattr(operator, name) for name in ("lshift", "rshift")},
    **{each.__name__: each for each in (int, float, complex, hash, str, repr, format, round)},
    "divmod": divmod,
    "rand": lambda value, other: other & value,
    "ror": lambda value, other: other | value,
    "trunc": int,
}

for _name in _COMPARED:
    setattr(Number, f"__{_name}__", _compared(getattr(operator, _name)))
for _name, _op in _COMPUTED.items():
    setattr(Number, f"__{_name}__", _computed(_op, swapped=False))
    setattr(Number, f"__r{_name}__", _computed(_op, swapped=True))
for _name, _op in _USED.items():
    setattr(Number, f"__{_name}__", _used(_op))
HOW = (same, _always, _both)
"""What chains are made of, with ``OPERATORS`` of Python's module `operator`."""
OPERATORS = (*_COMPARED, *_COMPUTED)

Number.__bool__ = lambda self: bool(self != 0)  # type: ignore[attr-defined]
