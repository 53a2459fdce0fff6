"""A number that forward has got of a tensor (``.item()``), and what Python makes of it."""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

How = Callable[[Any], Any]


def _same(found: Any) -> Any:
    return found


class Number:
    """Where it is compared, only what comes of that is asked of the batch; where it is used in
    another way, it is itself what is asked, and Python goes on with a plain number.

    Args:
        ask: an answer of the batch, by what makes it of the number that was read.
        value: the number itself.
        chain: makes this of the number that was read.
    """

    __slots__ = ("_ask", "_chain", "_value")

    def __init__(self, ask: Callable[[How], Any], value: Any, chain: How = _same):
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
        return getattr(self.plain(), name)


def plain(value: Any) -> Any:
    """A value in which numbers are Python's own."""
    if type(value) is Number:
        return value.plain()
    if type(value) in (tuple, list):
        return type(value)(map(plain, value))
    if type(value) is dict:
        return {key: plain(each) for key, each in value.items()}
    return value


def _operand(other: Any) -> Any:
    other = other.plain() if type(other) is Number else other
    return other if isinstance(other, (int, float)) else NotImplemented


def _after(op: Callable[[Any, Any], Any], chain: How, other: Any, found: Any) -> Any:
    return op(chain(found), other)


def _turned(op: Callable[[Any, Any], Any], a: Any, b: Any) -> Any:
    return op(b, a)


def _compared(op: Callable[[Any, Any], Any]) -> Callable[[Number, Any], Any]:
    def compare(self: Number, other: Any) -> Any:
        if isinstance(other, torch.Tensor):
            return op(self.plain(), other)
        other, chain = _operand(other), self._chain
        return other if other is NotImplemented else self._ask(partial(_after, op, chain, other))

    return compare


def _computed(op: Callable[[Any, Any], Any]) -> Callable[[Number, Any], Any]:
    def compute(self: Number, other: Any) -> Any:
        if isinstance(other, torch.Tensor):
            return op(self.plain(), other)
        other, chain = _operand(other), self._chain
        if other is NotImplemented:
            return other
        return Number(self._ask, op(self._value, other), partial(_after, op, chain, other))

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
    setattr(Number, f"__{_name}__", _computed(_op))
    setattr(Number, f"__r{_name}__", _computed(partial(_turned, _op)))
for _name, _op in _USED.items():
    setattr(Number, f"__{_name}__", _used(_op))
HOW = (_same, _after, _turned)
"""What chains are made of, with ``OPERATORS`` of Python's module `operator`."""
OPERATORS = (*_COMPARED, *_COMPUTED)

Number.__bool__ = lambda self: bool(self != 0)  # type: ignore[attr-defined]
