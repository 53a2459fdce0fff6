"""The instructions that stage programs have beyond ATen; each is one call in a lowered graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch

PIECE = 1 << 16  # elements
_TABLE = torch.ops.aten.embedding_dense_backward.default


class Slot:
    """Where the gradient of one parameter adds up."""

    @property
    def sums(self) -> torch.Tensor | None:
        """What is added to here and now, if the whole gradient is."""
        return None

    def add(self, grad: torch.Tensor) -> None:
        raise NotImplementedError

    def add_product(self, left: torch.Tensor, right: torch.Tensor) -> None:
        """Add a gradient that is the product of two matrices."""
        self.add(torch.mm(left, right))

    def add_rows(
        self, grad: torch.Tensor, ids: torch.Tensor, rows: int, padding: int, by_count: bool
    ) -> None:
        """Add a table's gradient, with the bits of one that is made first.

        Args:
            grad, ids, rows, padding, by_count: as ``aten.embedding_dense_backward`` has them.
        """
        self.add(_TABLE(grad, ids, rows, padding, by_count))


def accumulate(slot: Slot, grad: torch.Tensor) -> None:
    """Add one microbatch's gradient to its slot, as autograd's AccumulateGrad does."""
    slot.add(grad)


def accumulate_product(slot: Slot, left: torch.Tensor, right: torch.Tensor) -> None:
    """The same with a gradient that is a product, which may be added while it is made; the sum is
    then rounded in another order."""
    slot.add_product(left, right)


def accumulate_rows(
    slot: Slot, grad: torch.Tensor, ids: torch.Tensor, rows: int, padding: int, by_count: bool
) -> None:
    """The same with the gradient of a table of which few rows are read."""
    slot.add_rows(grad, ids, rows, padding, by_count)


ADDING = accumulate, accumulate_product, accumulate_rows


def rows_gradient(
    grad: torch.Tensor, ids: torch.Tensor, padding: int, by_count: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """What ``aten.embedding_dense_backward`` has in the rows that are read: the same kernel adds up
    the same occurrences in their order, in a table of these rows alone.

    Returns:
        Their numbers, (rows,), rising, and what is in them, (rows, width).
    """
    numbers, places = torch.unique(ids, return_inverse=True)
    where = (numbers == padding).nonzero()
    at = int(where) if padding >= 0 and len(where) else -1
    return numbers.long(), _TABLE(grad, places, len(numbers), at, by_count)


def add_rows(
    total: torch.Tensor, grad: torch.Tensor, ids: torch.Tensor, padding: int, by_count: bool
) -> None:
    """Add a table's gradient to a sum, in the rows that are read."""
    numbers, made = rows_gradient(grad, ids, padding, by_count)
    rows = total.index_select(0, numbers)
    add_gradient(rows, made)
    total.index_copy_(0, numbers, rows)


def add_gradient(total: torch.Tensor, grad: torch.Tensor) -> None:
    """Add to a sum of gradients, whatever layout and dtype the addend has.

    Adding across layouts is up to 20 times slower than copying first. A CPU makes a copy of an
    addend of another dtype: a small one at a time stays in its cache.
    """
    if grad.stride() != total.stride():
        grad = torch.empty_like(total).copy_(grad)
    whole = total.dtype is grad.dtype or total.numel() <= PIECE or total.device.type != "cpu"
    if whole or not total.is_contiguous():
        total.add_(grad)
        return
    pieces = (torch.split(tensor.view(-1), PIECE) for tensor in (total, grad))
    for part, addend in zip(*pieces, strict=True):
        part.add_(addend)


class Group(Protocol):
    """Parameters that become whole together (`passes.programs.sharding`)."""

    def start(self) -> Sequence[Any]: ...

    def finish(self, ticket: Sequence[Any]) -> tuple[torch.Tensor, ...]: ...


def gather(group: Group) -> Sequence[Any]:
    """Begin to fetch the rows that other replicas own.

    Returns:
        The ticket for `unshard`: what is under way, then the parameters that arrive in place.
    """
    return group.start()


def unshard(group: Group, ticket: Sequence[Any]) -> tuple[torch.Tensor, ...]:
    """Wait for what `gather` has begun: the parameters that arrived in parcels."""
    return group.finish(ticket)


class Draw(Protocol):
    """Stands for the seed of a program that is recorded, whose seeds come with every replay."""

    def draw(self, site: int, op: Callable[..., Any], args: Any, kwargs: Any) -> Any: ...


def seeded(seed: int | Draw, site: int, op: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Run a random op from a seed of its own.

    The draw depends on ``seed`` (run, step, replica, microbatch) and ``site`` (which random op
    of the model), so it is the same for every number of stages and every schedule.
    """
    if not isinstance(seed, int):
        return seed.draw(site, op, args, kwargs)
    given = (a[0] if isinstance(a, (list, tuple)) and a else a for a in args)
    device = next((a.device for a in given if isinstance(a, torch.Tensor)), None)
    generator_of(device or kwargs.get("device") or torch.device("cpu")).manual_seed(mix(seed, site))
    return op(*args, **kwargs)


def draws(op: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether an ATen operator draws from a generator."""
    if torch.Tag.nondeterministic_seeded not in getattr(op, "tags", ()):
        return False
    names = [argument.name for argument in op._schema.arguments]
    if "dropout_p" not in names:
        return True
    given = dict(zip(names, args, strict=False)) | dict(kwargs)
    return bool(given.get("dropout_p", 0.0) != 0.0)


def generator_of(device: torch.device) -> torch.Generator:
    """The default generator of a device, which ATen's random ops draw from."""
    if device.type == "cuda":
        return torch.cuda.default_generators[device.index or 0]
    return torch.default_generator


def mix(*numbers: int) -> int:
    """One 63-bit number from several, well spread (the finaliser of SplitMix64)."""
    mask = (1 << 64) - 1
    state = 0
    for number in numbers:
        state = (state + number + 0x9E3779B97F4A7C15) & mask
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & mask
        state ^= state >> 31
    return state >> 1
