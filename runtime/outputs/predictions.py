"""What a model returns for a data set: of its batches and replicas, in the order of the rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import torch

from ...compiler.ir.errors import BatchError
from ...compiler.rows.outputs import Output
from ...compiler.rows.ways import How
from ...compiler.tensors.pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten
from ..exchange.agreement import Agreement
from .parts import Part, Pieces, check_joins, own
from .sharing import shared

Fn = Callable[[Any, Any], Any]
"""(output, batch) -> what is kept of it; see `Pipeline.predict`."""


def on_device(batch: Any, like: torch.device) -> Any:
    """A batch with its tensors where a model's outputs are."""
    whole = dict(batch) if isinstance(batch, Mapping) else batch
    return tree_map(lambda x: x.to(like) if isinstance(x, torch.Tensor) else x, whole)


Given = Callable[[], tuple[Any, Any]]
"""Makes output and batch, which a function of both gets."""


def given_of(part: Part, batch: Any) -> Given:
    """On a rank that has outputs of some rows.

    Raises:
        BatchError: from what is returned: outputs cannot be joined, or there is no batch.
    """

    def given() -> tuple[Any, Any]:
        values = part.values()
        if batch is None:
            raise BatchError(
                "functions of (output, batch) run on the ranks of the last stage, and one of them "
                "was given None as its batch: give these ranks their batches too"
            )
        return part.rebuild(values), on_device(batch, values[0].device)

    return cache(given)


class Predictions:
    """Of the batches that have run so far.

    Args:
        fn: what is kept; None for all that the model returns.
        what: how users write ``fn``.
    """

    def __init__(self, fn: Fn | None = None, what: str = "predict(fn=)"):
        self._fn, self._what = fn, what
        self._parts: list[Part] = []
        self._kept: list[Any] = []  # None where there were no rows here
        self.trouble: BatchError | None = None

    def add(self, part: Part, given: Given) -> None:
        """One more; an error of ``fn`` is kept in `trouble`, as other ranks go on."""
        if self._fn is None:
            self._parts.append(part.on_cpu())
            return
        made = None
        if part.has_rows and self.trouble is None:
            try:
                made = _kept(self._fn(*given()), self._what)
            except Exception as error:
                self.trouble = as_trouble(error, self._what)
        self._kept.append(made)

    def joined(self, agreement: Agreement, who: str) -> Any:
        """All of them, on the ranks that get them; None on others. A collective.

        Raises:
            BatchError: they cannot be joined.
        """
        if self._fn is None:
            everyone = shared(agreement, [part.pieces for part in self._parts], who)
            return agreement.together(lambda: everyone and self._outputs(everyone), BatchError)
        kept = shared(agreement, self._kept, who)
        return agreement.together(lambda: kept and _joined_kept(kept, self._what), BatchError)

    def _outputs(self, everyone: Sequence[Sequence[Pieces]]) -> Any:
        """What the model returns, as for one batch with all rows; what is not by rows, such as a
        loss, stands there once per batch."""
        by_batch = zip(self._parts, zip(*everyone, strict=True), strict=True)
        found = [part.of(pieces).values() for part, pieces in by_batch]
        last = self._parts[-1]
        names = [output.name for output in last.outputs]
        if any([output.name for output in part.outputs] != names for part in self._parts):
            raise BatchError("the model returns other things for some batches: predict them apart")
        columns = [[each[i] for each in found] for i in range(len(names))]
        whole = [_over_batches(*pair) for pair in zip(last.outputs, columns, strict=True)]
        return last.rebuild(whole)


def _over_batches(output: Output, values: list[torch.Tensor]) -> torch.Tensor:
    """One result of several batches.

    Raises:
        BatchError: they cannot be joined.
    """
    if len(values) == 1 and output.how in (How.ROWS, How.NONE):
        return values[0]
    what = f"the model returns {output.name!r}"
    if output.how is How.NONE:
        raise BatchError(
            f"{what} for each of {len(values)} batches, which cannot be joined, as it "
            f"{output.why}: give predict() fn=, which keeps what is by rows"
        )
    if output.how is How.SAME:
        return values[0]
    by_rows = output.how is How.ROWS
    check_joins(values, output.dim if by_rows else values[0].dim(), what)
    return torch.cat(values, output.dim) if by_rows else torch.stack(values)


def as_trouble(error: Exception, what: str) -> BatchError:
    """An error of a user's function, for all ranks."""
    if isinstance(error, BatchError):
        return error
    made = BatchError(f"{what} raised {type(error).__name__}: {error}")
    made.__cause__ = error
    return made


def said_of(act: Callable[[], Any], what: str) -> Any:
    """What a function of the user's returns.

    Raises:
        BatchError: with what it raised.
    """
    try:
        return act()
    except Exception as error:
        raise as_trouble(error, what) from error


def _kept(value: Any, what: str) -> Any:
    """What fn returned, with tensors that can be sent.

    Raises:
        BatchError: there is something in it that has no rows.
    """
    leaves = tree_leaves(value)
    odd = [leaf for leaf in leaves if not isinstance(leaf, torch.Tensor) or not leaf.dim()]
    if odd or not leaves:
        number = bool(odd) and isinstance(odd[0], torch.Tensor)
        found = "a number" if number else f"a {type(value).__name__}"
        raise BatchError(
            f"{what} returned {found}: return tensors with rows in dim 0, alone or in a tuple, a "
            "list or a dict; evaluate(metrics=) takes means"
        )
    return tree_map(own, value)


def _joined_kept(everyone: Sequence[Sequence[Any]], what: str) -> Any:
    """Batch by batch, and in each replica by replica."""
    kept = [each for batch in zip(*everyone, strict=True) for each in batch if each is not None]
    found = [tree_flatten(each) for each in kept]
    first, tree = found[0]
    if any(other != tree for _, other in found):
        raise BatchError(f"{what} returned other structures for some rows")
    columns = [[leaves[i] for leaves, _ in found] for i in range(len(first))]
    for column in columns:
        check_joins(column, 0, f"{what} returned tensors")
    return tree_unflatten([torch.cat(column) for column in columns], tree)
