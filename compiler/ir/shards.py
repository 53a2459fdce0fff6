"""Which rows of a parameter each replica owns, and what travels together.

A parameter is divided along its first dimension as `torch.chunk` and DTensor's ``Shard(0)`` do:
parts of ceil(rows / dp) rows, the last ones smaller or empty. A number without dimensions is
owned by every replica. Where a parameter has an owner, that has all rows.

Gradients and parameters travel in parcels. A parcel has, for each replica, the rows that it owns
of every item, so that replica r sends or receives one contiguous block.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TypeVar

import torch

from . import ops
from .actions import Kind
from .program import PipelineProgram, StageProgram
from .zero import Zero, layer_of

PARCEL_BYTES = 64 << 20  # the most that a parcel has, but for single rows
LEAST_BYTES = 1 << 20  # below which its latency would count
ALONE = 16  # a share of LEAST_BYTES that is worth a collective of its own, if that spares copies
SHARES = 16  # into how many parcels a small stage is cut, so that two under way are little of it
Shape = tuple[int, ...]
K = TypeVar("K")
Owners = Mapping[str, int]
"""FQN -> the replica that owns all of it. Parameters that are not named are divided by rows."""


def row_range(shape: Shape, dp: int, replica: int, owner: int | None = None) -> tuple[int, int]:
    """(first row, rows) that a replica owns; of a number the whole, as if it were one row.

    Args:
        owner: the replica that owns all rows; None where they are divided.
    """
    rows = shape[0] if shape else 1
    if not shape:
        return 0, 1
    if owner is not None:
        return 0, rows if replica == owner else 0
    size = -(-rows // dp)
    start = min(replica * size, rows)
    return start, min(size, rows - start)


def rows_of(tensor: torch.Tensor, dp: int, replica: int, owner: int | None = None) -> torch.Tensor:
    """A view of the rows that a replica owns."""
    if not tensor.dim():
        return tensor
    return tensor.narrow(0, *row_range(tuple(tensor.shape), dp, replica, owner))


def shard_numel(shape: Shape, dp: int, replica: int = 0, owner: int | None = None) -> int:
    """Elements that a replica owns; of rows none owns more than the first."""
    per_row = torch.Size(shape[1:]).numel()
    return row_range(shape, dp, replica, owner)[1] * per_row


@dataclass(frozen=True)
class Item:
    """Rows of one tensor: all of them, or the ``piece``-th of ``pieces`` of each replica's."""

    name: str
    shape: Shape
    dtype: torch.dtype
    piece: int = 0
    pieces: int = 1
    owner: int | None = None

    def span(self, dp: int, replica: int) -> tuple[int, int]:
        """(first row, rows) of a replica's share."""
        found = self._spans.get((dp, replica))
        if found is None:
            start, rows = row_range(self.shape, dp, replica, self.owner)
            first, end = (rows * k // self.pieces for k in (self.piece, self.piece + 1))
            found = self._spans[dp, replica] = start + first, end - first
        return found

    @cached_property
    def _spans(self) -> dict[tuple[int, int], tuple[int, int]]:
        return {}

    def numel(self, dp: int, replica: int) -> int:
        return self.span(dp, replica)[1] * torch.Size(self.shape[1:]).numel()

    def rows(self, tensor: torch.Tensor, dp: int, replica: int) -> torch.Tensor:
        """A replica's share, as a view into the whole tensor."""
        return tensor.narrow(0, *self.span(dp, replica)) if self.shape else tensor

    def own_rows(self, shard: torch.Tensor, dp: int, replica: int) -> torch.Tensor:
        """The same, as a view into that replica's own rows."""
        if not self.shape:
            return shard
        start, rows = self.span(dp, replica)
        return shard.narrow(0, start - row_range(self.shape, dp, replica, self.owner)[0], rows)


def items_of(tensors: Mapping[str, torch.Tensor], owners: Owners) -> dict[str, Item]:
    """All rows of each."""
    return {name: item_of(name, t, owners) for name, t in tensors.items()}


def item_of(
    name: str, tensor: torch.Tensor, owners: Owners, dtype: torch.dtype | None = None
) -> Item:
    """All rows of a tensor, which may travel in another dtype."""
    return Item(name, tuple(tensor.shape), dtype or tensor.dtype, owner=owners.get(name))


@dataclass(frozen=True)
class Parcel:
    """Items of one dtype that travel together between ``dp`` replicas.

    Attributes:
        stays: gradients that are kept until the others' have come: a replica's own rows are read
            where they are.
    """

    items: tuple[Item, ...]
    dp: int
    stays: bool = False

    @property
    def dtype(self) -> torch.dtype:
        return self.items[0].dtype

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Elements per replica."""
        return tuple(sum(x.numel(self.dp, r) for x in self.items) for r in range(self.dp))

    @cached_property
    def offsets(self) -> tuple[tuple[int, ...], ...]:
        """Per replica and item, where the item begins in the replica's block."""
        table = []
        for replica in range(self.dp):
            at, row = 0, []
            for item in self.items:
                row.append(at)
                at += item.numel(self.dp, replica)
            table.append(tuple(row))
        return tuple(table)

    @property
    def scatter_bytes(self) -> tuple[int, int]:
        """The most that a replica packs, its own rows too unless they stay, and that one receives
        to learn the sums of its rows."""
        size, own = self.dtype.itemsize, min(self.sizes) if self.stays else 0
        return (sum(self.sizes) - own) * size, max(self.sizes) * (self.dp - 1) * size

    @property
    def owned(self) -> bool:
        """Whether the replicas' blocks are of different sizes, as some items have owners."""
        return any(item.owner is not None for item in self.items)

    @property
    def gather_bytes(self) -> int:
        """What a replica sends and receives to learn all rows: blocks of one size, and its own
        apart, or all blocks as they are."""
        count = sum(self.sizes) if self.owned else max(self.sizes) * (self.dp + 1)
        return count * self.dtype.itemsize


def parcel_bytes(total: int) -> int:
    """The most that a parcel has, but for single rows, of so much in all."""
    return max(LEAST_BYTES, min(PARCEL_BYTES, total // SHARES))


def parcels_of(items: Iterable[Item], dp: int, whole: bool = False) -> list[Parcel]:
    """Items in their order, in parcels of one dtype.

    Args:
        whole: one parcel per dtype, whatever its size.
    """
    chosen = list(items)
    if whole:
        dtypes = dict.fromkeys(item.dtype for item in chosen)
        return [Parcel(tuple(x for x in chosen if x.dtype is d), dp) for d in dtypes]
    total = sum(torch.Size(x.shape).numel() * x.dtype.itemsize for x in chosen)
    limit = parcel_bytes(total)
    made: list[list[Item]] = []
    held = 0
    for item in (piece for x in chosen for piece in _pieces(x, dp, limit)):
        size = sum(item.numel(dp, r) for r in range(dp)) * item.dtype.itemsize
        if not made or made[-1][0].dtype is not item.dtype or held + size > limit:
            made.append([])
            held = 0
        made[-1].append(item)
        held += size
    return [Parcel(tuple(each), dp) for each in made]


def apart(
    wholes: Mapping[K, torch.Tensor], dp: int, owned: Collection[K] = ()
) -> tuple[dict[K, torch.Tensor], ...]:
    """Parameters that are gathered into their own memory, and those that travel in parcels.

    The replicas' rows of the former stand one after another, all as many, and are worth it.

    Args:
        owned: those of which one replica has all rows.
    """

    def alone(whole: torch.Tensor) -> bool:
        even = whole.dim() > 0 and whole.shape[0] % dp == 0
        return even and whole.is_contiguous() and whole.nbytes >= LEAST_BYTES // ALONE

    direct = {key: whole for key, whole in wholes.items() if key not in owned and alone(whole)}
    return direct, {key: whole for key, whole in wholes.items() if key not in direct}


def _pieces(item: Item, dp: int, limit: int) -> list[Item]:
    """A tensor that is larger than a parcel, cut along its rows."""
    rows = row_range(item.shape, dp, item.owner or 0, item.owner)[1]
    size = sum(item.numel(dp, r) for r in range(dp)) * item.dtype.itemsize
    count = max(1, min(rows, -(-size // limit)))
    return [replace(item, piece=k, pieces=count) for k in range(count)]


Entry = tuple[Parcel, int]
"""A parcel, and the number of an item in it."""


Parts = Mapping[Kind, tuple[tuple[Entry, ...], ...]]
"""Per program, for each gradient that it adds up in order, what leaves then."""


@dataclass(frozen=True)
class Departures:
    """In which parcels the gradients of a stage leave.

    Attributes:
        every: with every microbatch.
        last: with the last one alone.
        closing: name -> what leaves after the last microbatch.
    """

    every: Parts = field(default_factory=dict)
    last: Parts = field(default_factory=dict)
    closing: Mapping[str, tuple[Entry, ...]] = field(default_factory=dict)

    def leaving(self, part: Kind, last: bool) -> tuple[tuple[Entry, ...], ...]:
        """Of one microbatch; nothing where no gradient of a program leaves with it."""
        found = self.every.get(part, ())
        late = self.last.get(part, ()) if last else ()
        if not found or not late:
            return found or late
        return tuple(a + b for a, b in zip(found, late, strict=True))

    @property
    def during(self) -> bool:
        """Whether anything leaves while programs run."""
        return bool(self.every or self.last)


def added(stage: StageProgram) -> dict[Kind, list[str]]:
    """Per backward program the parameters whose gradients it adds up, in its order."""
    found: dict[Kind, list[str]] = {}
    for part, program in stage.parts.items():
        nodes = program.module.graph.nodes
        ports = dict(
            zip(program.module.graph.find_nodes(op="placeholder"), program.inputs, strict=True)
        )
        names = [str(ports[n.args[0]].key) for n in nodes if n.target is ops.accumulate]
        if names:
            found[part] = names
    return found


def departures_of(
    stage: StageProgram, like: Mapping[str, Item], dp: int, zero: Zero, late: Mapping[str, bool]
) -> Departures:
    """Gradients that are whole leave when the last microbatch has added to them, or after it; of
    the others each microbatch's leaves when it is made.

    Args:
        like: of what is trained.
        late: `late_gradients`.
    """
    whole = {name: item for name, item in like.items() if zero.whole_grad(name, stage.kept)}
    rest = {name: item for name, item in like.items() if name not in whole}
    every = {}
    for part, names in added(stage).items() if rest else ():
        mine = [name for name in names if name in rest]
        leaving = dict(zip(mine, _entries([rest[n] for n in mine], dp), strict=True))
        every[part] = tuple(leaving.get(name, ()) for name in names)
    if not whole:
        return Departures(every)
    return replace(_once(stage, whole, dp, late), every=every)


def late_gradients(program: PipelineProgram, stage: int, mates: Collection[int]) -> dict[str, bool]:
    """The gradients of a stage that wait until those of tied parameters are summed.

    Args:
        mates: the stages of its rank.

    Returns:
        Their FQNs -> whether they leave with this stage: with the last that its rank has of them.
    """
    return {
        tied.name: stage == max(s for s in tied.holders if s in mates)
        for tied in program.tied
        if stage in tied.holders
    }


def _once(
    stage: StageProgram, like: Mapping[str, Item], dp: int, late: Mapping[str, bool]
) -> Departures:
    """What leaves once per step."""
    ends: dict[str, tuple[Kind, int]] = {}
    order = added(stage)
    for part, names in order.items():
        ends.update({name: (part, i) for i, name in enumerate(names) if name in like})
    early = [n for part, ns in order.items() for i, n in enumerate(ns) if ends.get(n) == (part, i)]
    early = [name for name in early if name not in late]
    leaving = dict(zip(early, _entries([like[n] for n in early], dp, stays=True), strict=True))
    parts = {
        part: tuple(
            leaving.get(name, ()) if ends.get(name) == (part, i) else ()
            for i, name in enumerate(names)
        )
        for part, names in order.items()
    }
    rest = [name for name in like if late.get(name)]
    closing = dict(zip(rest, _entries([like[n] for n in rest], dp, stays=True), strict=True))
    return Departures(last=parts, closing=closing)


def _entries(items: Sequence[Item], dp: int, stays: bool = False) -> tuple[tuple[Entry, ...], ...]:
    """Per item, where its pieces are."""
    parcels = [replace(parcel, stays=stays) for parcel in parcels_of(items, dp)]
    flat = [(parcel, i) for parcel in parcels for i in range(len(parcel.items))]
    made, at = [], 0
    for _ in items:
        count = flat[at][0].items[flat[at][1]].pieces
        made.append(tuple(flat[at : at + count]))
        at += count
    return tuple(made)


def owners_of(
    params: Mapping[str, torch.Tensor], homes: Mapping[str, Collection[int]], dp: int
) -> dict[str, int]:
    """Owners of those that are trained and have dimensions, the same on every rank.

    The largest first, each to the replica that has the fewest bytes on the stages that hold it
    (Graham's rule: none has more than 4/3 of what the best division would give it). Among equals
    to that with the fewest of its layer, so that a layer is gathered from many.

    Args:
        homes: FQN -> the stages that hold it.
    """
    chosen = {n: p.nbytes for n, p in params.items() if p.requires_grad and p.dim()}
    on_stage: dict[tuple[int, int], int] = defaultdict(int)
    of_layer: dict[tuple[str, int], int] = defaultdict(int)
    owners: dict[str, int] = {}
    for name in sorted(chosen, key=lambda each: -chosen[each]):  # stable: equals in model order

        def load(replica: int, name: str = name) -> tuple[int, int, int]:
            held = sum(on_stage[stage, replica] for stage in homes[name])
            return held, of_layer[layer_of(name), replica], replica

        owner = owners[name] = min(range(dp), key=load)
        of_layer[layer_of(name), owner] += chosen[name]
        for stage in homes[name]:
            on_stage[stage, owner] += chosen[name]
    return {name: owners[name] for name in chosen}


def homes_in(program: PipelineProgram, params: Collection[str]) -> dict[str, tuple[int, ...]]:
    """FQN -> the stages that hold it.

    A parameter that nothing reads lives where the last of its module's others do: another graph may
    read it there. If none of any module around it is read, that is stage 0.
    """
    found: dict[str, tuple[int, ...]] = {}
    last: dict[str, int] = {}  # of a module, what its parameters' last stage is
    for name in params:
        found[name] = tuple(stage.stage for stage in program.stages if name in stage.params)
        for path in _around(name) if found[name] else ():
            last[path] = max(last.get(path, 0), *found[name])
    for name, stages in found.items():
        near = (last[path] for path in _around(name) if path in last)
        found[name] = stages or (next(near, 0),)
    return found


def _around(name: str) -> list[str]:
    """The modules that a parameter is in, the innermost first; the model itself is none of them."""
    parts = name.split(".")
    return [".".join(parts[:n]) for n in range(len(parts) - 1, 0, -1)]
