"""Batches as flat lists of tensors: what is cut into microbatches, what a program is made for."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from numbers import Number
from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch

from ..answers.number import plain as plain_number
from ..ir.errors import BatchError
from ..tensors.facts import described
from ..tensors.pytree import (
    TreeSpec,
    tree_flatten,
    tree_flatten_with_path,
    tree_leaves,
    tree_unflatten,
)
from .forms import plain

_NAMED = (Enum, type, FunctionType, BuiltinFunctionType)
"""Equal to themselves alone, and the same whenever they are seen."""

Scales = tuple[tuple[int | None, ...], ...]
"""Of each leaf and dimension, how much of its size is there in every piece, however small; None
where pieces have all of it."""


@dataclass(frozen=True)
class Leaf:
    """One tensor of a batch: its key, shape and dtype. A 0-dim leaf is never cut.

    Attributes:
        plain: it stands for a Python float, which the model gets.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    plain: bool = False

    def __str__(self) -> str:
        if self.plain:
            return f"{self.name}: a number"
        return f"{self.name}: {described(self.shape, self.dtype)}"


@dataclass(frozen=True, eq=False)
class BatchSpec:
    """Structure of a batch without its data; hashable, so that programs can be kept by it.

    Attributes:
        tree: pytree structure in which every non-tensor stands as itself.
        leaves: the tensors, and numbers that are given like tensors, in pytree order.
        constants: (position among all leaves, value) of all else.
        left_out: names of what has a text for each row, which no program takes.
        scales: of a batch that a callable cuts (``cut=``) how its sizes go with what is in it; it
            is one row, as a whole. None of one that is cut along dim 0.
    """

    tree: TreeSpec
    leaves: tuple[Leaf, ...]
    constants: tuple[tuple[int, Any], ...]
    left_out: tuple[str, ...] = ()
    scales: Scales | None = None

    @property
    def rows(self) -> int:
        """Length of dim 0, which all leaves that have one share; where a callable cuts, 1, or 0
        of what has no elements."""
        if self.scales is not None:
            return int(all(all(leaf.shape) for leaf in self.leaves))
        return next(leaf.shape[0] for leaf in self.leaves if leaf.shape)

    @property
    def varies(self) -> bool:
        """Whether it is known in which dimensions a part of it is smaller."""
        return self.scales is None or any(k is not None for each in self.scales for k in each)

    @property
    def amounts(self) -> tuple[tuple[int, ...], ...]:
        """Of each leaf and dimension its size, without what every piece has of it."""
        scales = self.scales or tuple((0,) * len(leaf.shape) for leaf in self.leaves)
        return tuple(
            tuple(n - (fixed or 0) for n, fixed in zip(leaf.shape, scale, strict=True))
            for leaf, scale in zip(self.leaves, scales, strict=True)
        )

    @property
    def nbytes(self) -> int:
        return sum(torch.Size(x.shape).numel() * x.dtype.itemsize for x in self.leaves)

    def repeat(self, times: int) -> BatchSpec:
        """The spec of a batch with ``times`` as many rows, or as much of what a callable cuts."""
        if self.scales is None:
            return self.with_rows(self.rows * times)
        leaves = tuple(
            replace(leaf, shape=tuple(_scaled(*pair, times) for pair in pairs))
            for leaf, scale in zip(self.leaves, self.scales, strict=True)
            for pairs in [zip(leaf.shape, scale, strict=True)]
        )
        return replace(self, leaves=leaves)

    def with_rows(self, rows: int) -> BatchSpec:
        """The spec of a batch with so many rows; what a callable cuts is one, or is empty."""
        if rows and (self.scales is not None or rows == self.rows):
            return self
        leaves = tuple(
            replace(x, shape=(rows, *x.shape[1:])) if x.shape else x for x in self.leaves
        )
        return replace(self, leaves=leaves)

    def build(self, values: Sequence[Any]) -> Any:
        """The batch in its own structure, from one value per leaf."""
        whole: list[Any] = [
            value.item() if leaf.plain and isinstance(value, torch.Tensor) else value
            for leaf, value in zip(self.leaves, values, strict=True)
        ]
        for position, value in self.constants:
            whole.insert(position, value)
        return tree_unflatten(whole, self.tree)

    # -- numbers ------------------------------------------------------------------------------

    @property
    def numbers(self) -> dict[str, float]:
        """The floating-point numbers among the constants, by their names."""
        if not any(isinstance(value, float) for _, value in self.constants):
            return {}
        return {name: value for _, name, value in self._named() if isinstance(value, float)}

    @property
    def plain_leaves(self) -> tuple[int, ...]:
        """Which leaves are numbers."""
        return tuple(i for i, leaf in enumerate(self.leaves) if leaf.plain)

    def numbers_in(self, values: Sequence[torch.Tensor]) -> dict[str, float]:
        """The numbers among the values of the leaves, by their names."""
        return {self.leaves[i].name: values[i].item() for i in self.plain_leaves}

    def opened(
        self, names: Collection[str], values: Sequence[torch.Tensor]
    ) -> tuple[BatchSpec, list[torch.Tensor]]:
        """With leaves for some of the numbers, and the values of all leaves.

        Args:
            values: of the leaves that are there; empty where there are none.
        """
        rest = iter(zip(self.leaves, values or self.leaves, strict=True))
        constants, kept = dict(self.constants), []
        made: list[tuple[Leaf, Any]] = []
        for position, name, value in self._named():
            if name in names and type(value) is float:
                tensor = torch.tensor(value, dtype=torch.float64)
                made.append((Leaf(name, (), tensor.dtype, True), tensor))
            elif position in constants:
                kept.append((position, value))
            else:
                made.append(next(rest))
        spec = replace(self, leaves=tuple(leaf for leaf, _ in made), constants=tuple(kept))
        return spec, [value for _, value in made] if values else []

    def closed(self, values: Sequence[torch.Tensor]) -> tuple[BatchSpec, list[torch.Tensor]]:
        """With all numbers among the constants, and the values of the other leaves."""
        pairs, constants = iter(zip(self.leaves, values, strict=True)), dict(self.constants)
        left: list[tuple[Leaf, torch.Tensor]] = []
        for position in range(len(self.leaves) + len(self.constants)):
            if position not in constants:
                leaf, value = next(pairs)
                if leaf.plain:
                    constants[position] = value.item()
                else:
                    left.append((leaf, value))
        leaves = tuple(leaf for leaf, _ in left)
        ordered = tuple((position, constants[position]) for position in sorted(constants))
        return replace(self, leaves=leaves, constants=ordered), [value for _, value in left]

    def _named(self) -> list[tuple[int, str, Any]]:
        """Of all leaves the position, the name, and the value, which tensors have none of."""
        whole: list[Any] = list(self.leaves)
        for position, value in self.constants:
            whole.insert(position, value)
        paths, _ = tree_flatten_with_path(tree_unflatten(whole, self.tree))
        return [(i, _name(path), value) for i, (path, value) in enumerate(paths)]

    # -----------------------------------------------------------------------------------------

    def without_sizes(self) -> BatchSpec:
        """What batches of all sizes have in common."""
        leaves = tuple(replace(x, shape=(0,) * len(x.shape)) for x in self.leaves)
        return replace(self, leaves=leaves)

    def __str__(self) -> str:
        return ", ".join(str(leaf) for leaf in self.leaves)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, BatchSpec) and self._key == other._key and self.tree == other.tree

    def __hash__(self) -> int:
        return hash(self._key)

    def described(self) -> str:
        """With its constants: the same text in every process."""
        return f"{self} {re.sub(' at 0x[0-9a-f]+', '', repr(self.constants))}"

    @property
    def _key(self) -> Hashable:
        constants = tuple((i, _identity(value)) for i, value in self.constants)
        return self.leaves, constants, self.left_out, self.scales


def _scaled(size: int, fixed: int | None, times: int) -> int:
    return size if fixed is None else (size - fixed) * times + fixed


def flatten(batch: object, by_rows: bool = True) -> tuple[list[torch.Tensor], BatchSpec]:
    """Split a batch, in any of the forms that `plain` takes, into tensors and their spec.

    Args:
        by_rows: it is cut along dim 0; else a callable cuts it.

    Raises:
        BatchError: no tensor in it, or leaves that disagree on the length of dim 0, along which it
            is cut.
    """
    batch, left_out = plain(batch)
    paths, tree = tree_flatten_with_path(batch)
    values: list[torch.Tensor] = []
    leaves: list[Leaf] = []
    constants: list[tuple[int, Any]] = []
    for position, (path, value) in enumerate(paths):
        if isinstance(value, torch.Tensor):
            if value.is_nested or value.layout is not torch.strided:
                raise BatchError(f"the batch's {_name(path)!r} is sparse or nested: give it dense")
            values.append(value)
            leaves.append(Leaf(_name(path), tuple(value.shape), value.dtype))
        else:
            _check_constant(_name(path), value)
            constants.append((position, value))
    if not any(leaf.shape for leaf in leaves):
        raise BatchError(
            f"the batch (a {type(batch).__name__}) holds no tensor with a batch dimension: "
            "pass a dict, a tuple or a tensor whose dim 0 counts samples"
        )
    spec = BatchSpec(tree, tuple(leaves), tuple(constants), left_out)
    if not by_rows:
        return values, replace(spec, scales=tuple((None,) * len(leaf.shape) for leaf in leaves))
    odd = next((x for x in leaves if x.shape and x.shape[0] != spec.rows), None)
    if odd is not None:
        raise BatchError(
            f"batch leaves disagree on dim 0, along which the batch is cut: "
            f"{odd.name!r} has {odd.shape[0]} rows, the first leaf {spec.rows}; cut= cuts in "
            "another way"
        )
    return values, spec


def _check_constant(name: str, value: Any) -> None:
    """Raises BatchError for a value of which nobody can tell whether it is another one."""
    kind: Any = type(value)
    try:
        known = isinstance(hash(value), int) and bool(value == value) in (True, False)
    except (TypeError, ValueError):
        known = False
    changes = kind.__eq__ is object.__eq__ and hasattr(value, "__dict__")
    if not known or (changes and not isinstance(value, _NAMED)):
        raise BatchError(
            f"the batch's {name!r} is a {kind.__name__}, which cannot be told from that of another "
            "batch: give tensors, arrays, numbers or texts"
        )


def _identity(value: Any) -> Hashable:
    """Equal where a model does the same: not for 1 and True, nor for 0.0 and -0.0."""
    return type(value), repr(value) if isinstance(value, Number) else value


def cut(values: Sequence[torch.Tensor], sizes: Sequence[int]) -> list[list[torch.Tensor]]:
    """Cut every tensor into views of so many rows each; 0-dim tensors go to every part."""
    pieces = [torch.split(v, list(sizes)) if v.dim() else (v,) * len(sizes) for v in values]
    return [[piece[i] for piece in pieces] for i in range(len(sizes))]


def repeated(
    values: Sequence[torch.Tensor], spec: BatchSpec, times: int
) -> tuple[torch.Tensor, ...]:
    """The values of a batch that is ``times`` as large (`BatchSpec.repeat`); none of none.

    Borders of documents, of which there is one more than documents, go on where they end.
    """
    if spec.scales is None or not values:
        return tuple(torch.cat([v] * times) if v.dim() else v for v in values)
    made = []
    for value, scale in zip(values, spec.scales, strict=True):
        for dim, fixed in enumerate(scale):
            if fixed == 0:
                value = torch.cat([value] * times, dim)
            elif fixed:
                more = (value[1:] + i * (value[-1] - value[0]) for i in range(1, times))
                value = torch.cat([value, *more])
        made.append(value)
    return tuple(made)


def _name(path: tuple[Any, ...]) -> str:
    """Of a leaf by its path; "batch" where it is all that there is."""
    if not path:
        return "batch"
    parts = [str(getattr(key, "key", getattr(key, "idx", key))) for key in path]
    return ".".join(parts)


def flatten_arguments(arguments: Any) -> tuple[list[Any], Callable[[list[Any]], Any]]:
    """The leaves of a call's arguments, and a function that puts others in their places."""
    leaves, tree = tree_flatten(arguments)
    return leaves, lambda values: tree_unflatten(values, tree)


@dataclass(frozen=True)
class Structure:
    """Of what a model returned: puts tensors into it.

    Attributes:
        others: what is in it besides tensors, by its place among all leaves.
    """

    tree: TreeSpec
    size: int
    others: Mapping[int, Any]

    def __call__(self, values: list[torch.Tensor]) -> Any:
        rest, others = iter(values), self.others
        leaves = [others[i] if i in others else next(rest) for i in range(self.size)]
        return tree_unflatten(leaves, self.tree)


def flatten_results(output: Any) -> tuple[dict[str, torch.Tensor], Structure]:
    """The tensors in what a model returned, by their places in it, and what puts others there.

    An object in it that keeps tensors to itself, such as a cache, becomes None.
    """
    paths, tree = tree_flatten_with_path(output)
    others = {
        i: None if _keeps_tensors(leaf) else plain_number(leaf)
        for i, (_, leaf) in enumerate(paths)
        if not isinstance(leaf, torch.Tensor)
    }
    named = {_name(path): leaf for path, leaf in paths if isinstance(leaf, torch.Tensor)}
    return named, Structure(tree, len(paths), others)


def _keeps_tensors(value: Any) -> bool:
    """Whether an object has tensors in its attributes, or in those of objects in them."""
    pending, seen = [value], set()
    while pending:
        leaf = pending.pop()
        if isinstance(leaf, torch.Tensor):
            return True
        if id(leaf) not in seen and not isinstance(leaf, _NAMED):
            seen.add(id(leaf))
            pending += tree_leaves(list(getattr(leaf, "__dict__", {}).values()))
    return False
