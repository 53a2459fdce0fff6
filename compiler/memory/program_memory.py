"""What running a program holds at once, and what it leaves.

A value is freed after its last reader, as the generated code frees it; a view keeps the memory that
it looks into. A fusion is walked kernel by kernel (`kernels`), and frees arguments that it reads
last. What kernels allocate inside themselves is not counted.
"""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import fx

from ..ir import ops
from ..ir.graph import is_getitem, overwritten, tensors, viewed
from ..ir.program import Program, Role
from ..ir.shards import Entry
from .inside import inside
from .kernels import MADE, Launches, Place, launches_of

Block = int | str
"""A block of memory: the name of an input that lies in it, or a number if the program made it."""


@dataclass
class Effect:
    """What running a program does to memory.

    Attributes:
        extra_bytes: the most that it holds at once beyond what is there at its start.
        made: output name -> the block in which it lies, None for one that is held anyway.
        sizes: bytes of the blocks that it made.
        flying_bytes: the parcel of gradients that is under way at the end.
    """

    extra_bytes: int = 0
    made: dict[str, Block | None] = field(default_factory=dict)
    sizes: dict[Block, int] = field(default_factory=dict)
    flying_bytes: int = 0


def effect_of(
    program: Program,
    dropped: Iterable[str],
    inputs: Mapping[str, Block | None],
    sizes: Mapping[Block, int],
    leaving: Sequence[Sequence[Entry]] = (),
    flying: int = 0,
    packed: Collection[int] = (),
) -> Effect:
    """Walk a program once.

    Args:
        dropped: values of the environment that only this program still reads.
        inputs: value name -> block; several values may lie in one.
        sizes: bytes of these blocks.
        leaving: per gradient that it adds up, what leaves then.
        flying: bytes of the parcel that is under way already.
        packed: numbers of the gradients that are packed alone, and not added to slots.
    """
    nodes = list(program.module.graph.nodes)
    walk = _Walk(nodes, inputs, sizes, set(dropped))
    for node, port in zip(nodes, program.inputs, strict=False):
        walk.given(node, inputs[str(port.key)] if port.role is Role.VALUE else None)
    effect, added = walk.effect, 0
    for node in nodes[len(program.inputs) : -1]:
        if node.op == "call_module":
            fusion = program.module.get_submodule(str(node.target))
            assert isinstance(fusion, fx.GraphModule)
            walk.call(node, launches_of(fusion))
            continue
        walk.make(node, _scratch(node, added in packed))
        if node.target in ops.ADDING and leaving:
            for entry in leaving[added]:
                walk.live, flying, peak = leave(entry, walk.live, flying)
                effect.extra_bytes = max(effect.extra_bytes, peak)
            added += 1
        walk.let_go(walk.frees.get(node, ()))
    effect.flying_bytes = flying
    for value, port in zip(nodes[-1].args[0], program.outputs, strict=True):
        if port.role is Role.VALUE:
            effect.made[str(port.key)] = walk.blocks[value][0]
    return effect


class _Walk:
    """Which blocks are held by how many values of a program, from operator to operator.

    Attributes:
        live: bytes that it holds beyond what is there at its start.
        frees: node -> the values that the generated code lets go after it.
    """

    def __init__(
        self,
        nodes: Sequence[fx.Node],
        inputs: Mapping[str, Block | None],
        sizes: Mapping[Block, int],
        gone: Collection[str],
    ):
        self.refs = Counter(block for name, block in inputs.items() if name not in gone)
        self.blocks: dict[fx.Node, tuple[Block | None, ...]] = {}
        self.sizes = dict(sizes)
        self.effect = Effect()
        self.live = 0
        self.frees = _frees(nodes)
        self._numbers = itertools.count()

    def given(self, node: fx.Node, block: Block | None) -> None:
        self.blocks[node] = (block,)
        self.refs[block] += 1

    def make(self, node: fx.Node, scratch_bytes: int) -> None:
        """An operator makes its result."""
        self.blocks[node], new = _made(node, self.blocks, self._numbers)
        for block, size in new.items():
            self._new(block, size)
        self.refs.update(self.blocks[node])
        self._peak(scratch_bytes)

    def call(self, node: fx.Node, launches: Launches) -> None:
        """A fusion runs; arguments that are read last are let go inside."""
        arguments = [block for source in node.all_input_nodes for block in self.blocks[source]]
        self.refs.update(arguments)
        self.let_go(value for value in self.frees.get(node, ()) if value is not node)
        made: dict[int, Block] = {}

        def at(place: Place) -> Block | None:
            kind, number = place
            return made[number] if kind == MADE else arguments[number]

        for step in launches.steps:
            for number in step.makes:
                made[number] = next(self._numbers)
                self._new(made[number], launches.sizes[number])
                self.refs[made[number]] += 1
            self._peak(0)
            self._drop(map(at, step.frees))
        self.blocks[node] = tuple(map(at, launches.results))
        self.refs.update(self.blocks[node])
        self._drop(map(at, launches.stays))
        self.let_go(value for value in self.frees.get(node, ()) if value is node)

    def let_go(self, values: Iterable[fx.Node]) -> None:
        for value in values:
            self._drop(self.blocks[value])

    def _new(self, block: Block, size: int) -> None:
        self.effect.sizes[block] = self.sizes[block] = size
        self.live += size

    def _peak(self, scratch_bytes: int) -> None:
        self.effect.extra_bytes = max(self.effect.extra_bytes, self.live + scratch_bytes)

    def _drop(self, blocks: Iterable[Block | None]) -> None:
        for block in blocks:
            self.refs[block] -= 1
            if block is not None and self.refs[block] == 0:
                self.live -= self.sizes[block]


def leave(entry: Entry, live: int, flying: int) -> tuple[int, int, int]:
    """A gradient is packed: (bytes now, of them under way, the most at once)."""
    parcel, number = entry
    sent, received = parcel.scatter_bytes
    peak = live
    if number == 0:
        live += sent
        peak = live
    if number == len(parcel.items) - 1:
        live += received - flying
        return live, sent + received, max(peak, live)
    return live, flying, peak


def _made(
    node: fx.Node, blocks: Mapping[fx.Node, tuple[Block | None, ...]], numbers: Iterator[int]
) -> tuple[tuple[Block | None, ...], dict[Block, int]]:
    """The blocks in which a node's value lies, and those of them that are new."""
    source = viewed(node) or overwritten(node)
    if source is not None:
        return blocks[source], {}
    if is_getitem(node):
        whole, index = node.args
        assert isinstance(whole, fx.Node)
        assert isinstance(index, int)
        return blocks[whole][index : index + 1], {}
    if node.op == "get_attr" or node.target in ops.ADDING:
        return (None,), {}
    value = node.meta["val"]
    items = value if isinstance(value, (tuple, list)) else (value,)
    made = tuple(next(numbers) if tensors(item) else None for item in items)
    pairs = zip(made, items, strict=True)
    return made, {b: item.numel() * item.element_size() for b, item in pairs if b is not None}


def _scratch(node: fx.Node, packed: bool) -> int:
    """What runs eagerly has its own; a gradient in another layout than its slot is copied before
    it is added, a product that is in another dtype, or packed, is made before, and of a table the
    rows that are read are added beside it."""
    if (work := inside(node)) is not None:
        return work.scratch_bytes
    if node.target not in ops.ADDING:
        return 0
    slot, grad, *rest = node.args
    assert isinstance(slot, fx.Node)
    assert isinstance(grad, fx.Node)
    made: torch.Tensor = slot.meta["val"]
    given: torch.Tensor = grad.meta["val"]
    if node.target is ops.accumulate_rows:
        ids = rest[0]
        assert isinstance(ids, fx.Node)
        numbers: torch.Tensor = ids.meta["val"]
        return 2 * given.numel() * made.element_size() + 3 * numbers.numel() * torch.int64.itemsize
    if node.target is ops.accumulate_product:
        apart = packed or given.dtype is not made.dtype
        return made.numel() * given.element_size() if apart else 0
    moved = not packed and given.stride() != made.stride()
    return made.numel() * made.element_size() if moved else 0


def _frees(nodes: Sequence[fx.Node]) -> dict[fx.Node, list[fx.Node]]:
    """Node -> the values that the generated code lets go after it."""
    last: dict[fx.Node, fx.Node] = {}
    for node in nodes:
        if node.op not in ("placeholder", "output"):
            last[node] = node
        for source in node.all_input_nodes:
            last[source] = node
    frees: dict[fx.Node, list[fx.Node]] = defaultdict(list)
    for value, node in last.items():
        frees[node].append(value)
    return frees
