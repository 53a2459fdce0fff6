"""torch's functions that get values of tensors: which of them, and what stands for them.

What gives Python a value is answered. What makes a tensor of as many elements as the data says asks
for their number alone; the graph gets an operator that is told it.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.nn import functional as F  # noqa: N812

from . import sized
from .answering import PASS, Answering

_T = torch.Tensor

# -- what is read --------------------------------------------------------------------------------


def _item_as(kind: Callable[[Any], Any], x: torch.Tensor) -> Any:
    return kind(x.item())


def _number_of_nonzeros(x: torch.Tensor) -> int:
    return int(torch.count_nonzero(x))


def _number_of_kinds(unique: Callable[..., torch.Tensor], dim: int | None, x: torch.Tensor) -> int:
    return unique(x, dim=dim).shape[dim or 0]


def _number_of_bins(least: int, x: torch.Tensor) -> int:
    return torch.bincount(x, minlength=least).numel()


def _sum_along(size: int, x: torch.Tensor) -> int:
    return int(x.expand(size).sum())


def _number_of_classes(x: torch.Tensor) -> int:
    return int(x.max()) + 1


READS = (
    *(_item_as, _number_of_nonzeros, _number_of_kinds, _number_of_bins, _sum_along),
    _number_of_classes,
)
"""All that is read of tensors, besides ``Tensor.item`` and ``Tensor.tolist``."""

# -- values ----------------------------------------------------------------------------------------


def _item(answers: Answering, _: Any, x: Any) -> Any:
    return answers.number(x) if answers.knows(x) and x.numel() == 1 else PASS


def _as(kind: Callable[[Any], Any], answers: Answering, _: Any, x: Any) -> Any:
    """``bool()``, ``int()`` and so on; of more than one element that raises."""
    if not answers.knows(x) or x.numel() != 1:
        return PASS
    return answers.ask(x, partial(_item_as, kind))


def _values(answers: Answering, _: Any, x: Any) -> Any:
    return answers.ask(x, torch.Tensor.tolist) if answers.knows(x) else PASS


def _alike(answers: Answering, func: Any, x: Any, other: Any, **kwargs: Any) -> Any:
    """`torch.equal`, `torch.allclose`, ``in``: by tensors that torch would read."""
    if not answers.knows(x, other):
        return PASS
    if func is torch.equal or func is _T.equal:
        if x.shape != other.shape:
            return False
        return answers.ask((x == other).all(), torch.Tensor.item)
    if func is _T.__contains__:
        return answers.ask((x == other).any(), torch.Tensor.item)
    return answers.ask(torch.isclose(x, other, **kwargs).all(), torch.Tensor.item)


# -- sizes -------------------------------------------------------------------------------------


def _count(answers: Answering, mask: torch.Tensor) -> Any:
    return answers.ask(mask, _number_of_nonzeros)


def _places(answers: Answering, x: torch.Tensor) -> torch.Tensor:
    """Its nonzero elements, one in each row."""
    places: torch.Tensor = torch.ops.aten.nonzero_static.default(x, size=_count(answers, x))
    return places


def _nonzero(answers: Answering, _: Any, x: Any, *, as_tuple: bool = False, out: Any = None) -> Any:
    if out is not None or not answers.knows(x):
        return PASS
    if not as_tuple:
        return _places(answers, x)
    return _places(answers, x if x.dim() else x.unsqueeze(0)).unbind(1)


def _where(answers: Answering, _: Any, condition: Any, *others: Any, **kwargs: Any) -> Any:
    return PASS if others or kwargs else _nonzero(answers, _, condition, as_tuple=True)


def _is_mask(index: Any) -> bool:
    kinds = (torch.bool, torch.uint8)
    return isinstance(index, torch.Tensor) and index.dtype in kinds and index.dim() > 0


def _index(answers: Answering, index: Any) -> Any:
    """One without masks and with numbers in slices; `PASS` where that is no other."""
    parts = index if isinstance(index, tuple) else (index,)
    if any(isinstance(part, list) for part in parts):
        return PASS
    found: list[Any] = []
    for part in parts:
        if _is_mask(part):
            if not answers.knows(part):
                return PASS
            found += _places(answers, part).unbind(1)
        elif isinstance(part, slice):
            ends = (part.start, part.stop, part.step)
            wholes = [_whole(answers, end) for end in ends]
            found.append(part if all(map(operator.is_, ends, wholes)) else slice(*wholes))
        else:
            found.append(part)
    same = len(found) == len(parts) and all(map(operator.is_, found, parts))
    return PASS if same else tuple(found)


_WHOLE = (torch.int64, torch.int32, torch.int16, torch.int8)


def _whole(answers: Answering, value: Any) -> Any:
    """A tensor that stands where Python has a whole number."""
    if isinstance(value, torch.Tensor) and value.numel() == 1 and value.dtype in _WHOLE:
        return answers.ask(value, partial(_item_as, int)) if answers.knows(value) else value
    return value


def _wholes(answers: Answering, func: Any, *args: Any, **kwargs: Any) -> Any:
    """A call in which tensors stand for whole numbers."""

    def plain(value: Any) -> Any:
        if isinstance(value, (tuple, list)):
            return type(value)(map(plain, value)) if type(value) in (tuple, list) else value
        return _whole(answers, value)

    own = args[:1] if func in _OF_TENSORS else ()
    rest = tuple(plain(value) for value in args[len(own) :])
    named = {key: plain(value) for key, value in kwargs.items()}
    return func(*own, *rest, **named)


def _get(answers: Answering, func: Any, x: Any, index: Any) -> Any:
    found = _index(answers, index)
    return PASS if found is PASS else func(x, found)


def _set(answers: Answering, func: Any, x: Any, index: Any, value: Any) -> Any:
    """One number for all of a mask is no question of sizes."""
    if not isinstance(value, torch.Tensor) or value.numel() == 1:
        return PASS
    found = _index(answers, index)
    return PASS if found is PASS else func(x, found, value)


def _masked(answers: Answering, _: Any, x: Any, mask: Any, *, out: Any = None) -> Any:
    if out is not None or not answers.knows(mask):
        return PASS
    whole = torch.logical_or(x.detach(), mask)  # of the shape of both
    x, mask = x.expand(whole.shape), mask.expand(whole.shape)
    return sized.masked_select(x, mask, _count(answers, mask))


def _unique(
    answers: Answering,
    _: Any,
    x: Any,
    sorted: bool = True,
    return_inverse: bool = False,
    return_counts: bool = False,
    dim: int | None = None,
) -> Any:
    if not answers.knows(x):
        return PASS
    dim, size = _how_many(answers, x, dim, torch.unique)
    found = sized.unique(x, sorted, dim, size)
    return _some(found, return_inverse, return_counts)


def _consecutive(
    answers: Answering,
    _: Any,
    x: Any,
    return_inverse: bool = False,
    return_counts: bool = False,
    dim: int | None = None,
) -> Any:
    if not answers.knows(x):
        return PASS
    dim, size = _how_many(answers, x, dim, torch.unique_consecutive)
    return _some(sized.unique_consecutive(x, dim, size), return_inverse, return_counts)


def _how_many(
    answers: Answering, x: torch.Tensor, dim: int | None, unique: Callable[..., torch.Tensor]
) -> tuple[int | None, int]:
    """The dimension counted from the first, and how many are left along it."""
    dim = dim if dim is None else dim % max(x.dim(), 1)
    return dim, answers.ask(x, partial(_number_of_kinds, unique, dim))


def _some(found: list[torch.Tensor], inverse: bool, counts: bool) -> Any:
    values = (found[0], *found[1:2] * inverse, *found[2:] * counts)
    return values if len(values) > 1 else values[0]


def _bincount(answers: Answering, _: Any, x: Any, weights: Any = None, minlength: int = 0) -> Any:
    if weights is not None or not answers.knows(x):
        return PASS
    size = answers.ask(x, partial(_number_of_bins, minlength))
    return sized.bincount(x, size)


def _repeated(
    answers: Answering, func: Any, x: Any, repeats: Any, dim: Any = None, **kwargs: Any
) -> Any:
    given = isinstance(repeats, torch.Tensor) and kwargs.get("output_size") is None
    if not given or not answers.knows(repeats):
        return PASS
    along = x.numel() if dim is None else x.shape[dim]
    size = answers.ask(repeats, partial(_sum_along, along))
    return func(x, repeats, dim, output_size=size)


def _one_hot(answers: Answering, func: Any, x: Any, num_classes: int = -1) -> Any:
    if num_classes != -1 or not answers.knows(x) or not x.numel():
        return PASS
    return func(x, answers.ask(x, _number_of_classes))


_OF_TENSORS = {
    getattr(_T, name)
    for name in (
        *("new_zeros", "new_ones", "new_empty", "new_full", "narrow", "view", "reshape", "expand"),
        *("repeat", "split", "unflatten", "roll", "tile"),
    )
} | {torch.narrow, torch.reshape, torch.split, torch.roll, torch.tile}
_CREATING = {torch.arange, torch.zeros, torch.ones, torch.empty, torch.full}

HANDLERS: dict[Any, Callable[..., Any]] = {
    _T.item: _item,
    _T.__bool__: partial(_as, bool),
    _T.is_nonzero: partial(_as, bool),
    torch.is_nonzero: partial(_as, bool),
    _T.__int__: partial(_as, int),
    _T.__float__: partial(_as, float),
    _T.__index__: partial(_as, operator.index),
    _T.tolist: _values,
    **dict.fromkeys((torch.equal, _T.equal, torch.allclose, _T.allclose, _T.__contains__), _alike),
    **dict.fromkeys((torch.nonzero, _T.nonzero, torch.argwhere, _T.argwhere), _nonzero),
    torch.where: _where,
    _T.__getitem__: _get,
    _T.__setitem__: _set,
    **dict.fromkeys((torch.masked_select, _T.masked_select), _masked),
    **dict.fromkeys((torch.unique, _T.unique), _unique),
    **dict.fromkeys((torch.unique_consecutive, _T.unique_consecutive), _consecutive),
    **dict.fromkeys((torch.bincount, _T.bincount), _bincount),
    **dict.fromkeys((torch.repeat_interleave, _T.repeat_interleave), _repeated),
    F.one_hot: _one_hot,
    **dict.fromkeys(_OF_TENSORS | _CREATING, _wholes),
}
"""By the function; `PASS` where torch goes on as if nobody had asked."""
