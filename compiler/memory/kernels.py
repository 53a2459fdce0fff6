"""What the kernels of a fusion hold, by the rules of torch's Inductor.

    native_layer_norm, addmm, gelu, addmm     ->     [layer norm], addmm, [gelu], addmm

A library's kernel reads what is in memory and writes there. All other operators become part of the
kernels that need them: what they make is in memory only where a library's kernel reads it or it
leaves the fusion. Memory goes after the last kernel that reads it, an argument's too if nothing
else holds it; but what a later kernel can have as its own is kept for that, where it does not add
to the most at once. Kernels run in the order of the graph, or in that which takes least at every
step, whichever needs less.

No compiler is asked, so that plans are alike where there is none. What kernels allocate inside
themselves is not counted.
"""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import fx

from ...passes.programs.fusions import is_fusable
from ..ir.graph import is_getitem, storage_root, tensors, viewed

Place = tuple[str, int]
"""A block of memory: an ("argument", number), or what is ("made", number)."""

ARGUMENT, MADE = "argument", "made"


@dataclass(frozen=True)
class Step:
    """One kernel.

    Attributes:
        makes: numbers of the blocks that are new.
        frees: what nothing needs after it.
    """

    makes: tuple[int, ...]
    frees: tuple[Place, ...]


@dataclass(frozen=True)
class Launches:
    """The kernels of a fusion in their order.

    Attributes:
        sizes: bytes of each block that they make.
        results: the blocks in which they lie.
        stays: what no kernel frees, each once.
    """

    steps: tuple[Step, ...]
    sizes: tuple[int, ...]
    results: tuple[Place, ...]
    stays: tuple[Place, ...]


def launches_of(fusion: fx.GraphModule) -> Launches:
    """The kernels that a fusion becomes."""
    known = fusion.meta.get("launches")
    if known is None:
        given = len(fusion.graph.find_nodes(op="placeholder"))
        draft = _ordered(_merged(_drafted(fusion.graph)))
        known = fusion.meta["launches"] = _planned(draft, given)
    assert isinstance(known, Launches)
    return known


# -- what becomes a kernel ------------------------------------------------------------------------

_MOVES = {
    "_log_softmax_backward_data",
    "arange",
    "cat",
    "clone",
    "constant_pad_nd",
    "copy",
    "empty_like",
    "fill",
    "flip",
    "full",
    "full_like",
    "new_zeros",
    "repeat",
    "select_backward",
    "select_scatter",
    "slice_backward",
    "slice_scatter",
    "stack",
    "zeros",
    "zeros_like",
}
"""They move values, or make them, and become a part of the kernels that need these."""
_SCATTERS = {"nll_loss2d_backward", "nll_loss_backward"}
"""They write to where indices say: kernels that need their result read it from memory."""


@dataclass(frozen=True)
class _Value:
    """A block of its own.

    Attributes:
        nbytes: dense.
    """

    dtype: torch.dtype
    nbytes: int


@dataclass(frozen=True)
class _Kernel:
    """Attributes:
    reads: the blocks that it needs, none twice.
    makes: number of a block -> what it is.
    elements: that it goes through one by one; 0 for a library's kernel and for sums.
    over: number of a block -> what it alone is made of, and may be written over.
    """

    reads: tuple[Place, ...]
    makes: Mapping[int, _Value]
    elements: int = 0
    over: Mapping[int, Collection[Place]] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        return sum(value.nbytes for value in self.makes.values())


@dataclass(frozen=True)
class _Draft:
    """Kernels, and where results lie."""

    order: tuple[_Kernel, ...]
    results: tuple[Place, ...]

    @property
    def values(self) -> dict[int, _Value]:
        return {number: value for each in self.order for number, value in each.makes.items()}

    def frees(self) -> list[list[Place]]:
        """Per kernel what no later one reads, and is no result."""
        last: dict[Place, int] = {}
        for i, kernel in enumerate(self.order):
            last |= dict.fromkeys((*kernel.reads, *((MADE, n) for n in kernel.makes)), i)
        frees: list[list[Place]] = [[] for _ in self.order]
        for place, i in last.items():
            if place not in self.results:
                frees[i].append(place)
        return frees

    def during(self) -> list[int]:
        """Per kernel the bytes while it runs, beside the arguments, if every block is new."""
        values, live, found = self.values, 0, []
        for kernel, freed in zip(self.order, self.frees(), strict=True):
            live += kernel.nbytes
            found.append(live)
            live -= sum(values[number].nbytes for kind, number in freed if kind == MADE)
        return found


def _drafted(graph: fx.Graph) -> _Draft:
    """One kernel for each block, in the order of the graph."""
    (output,) = graph.find_nodes(op="output")
    results: list[fx.Node] = list(output.args[0])
    in_memory = {storage_root(node) for node in results}
    for node in graph.nodes:
        if _is_library(node):
            in_memory |= {storage_root(source) for source in node.all_input_nodes}
    given = graph.find_nodes(op="placeholder")
    places: dict[fx.Node, tuple[Place, ...]] = {n: ((ARGUMENT, i),) for i, n in enumerate(given)}
    order: list[_Kernel] = []
    numbers = itertools.count()
    for node in graph.nodes:
        if node.op != "call_function" or node in places:
            continue
        needed = dict.fromkeys(p for source in node.all_input_nodes for p in places[source])
        if not (_is_library(node) or node in in_memory or _name(node) in _SCATTERS):
            places[node] = tuple(needed)
            continue
        parts = [user for user in node.users if is_getitem(user)] or [node]
        made = {part: next(numbers) for part in parts if tensors(part.meta["val"])}
        places |= {part: ((MADE, made[part]),) if part in made else () for part in parts}
        values = {number: _value(part) for part, number in made.items()}
        order.append(_Kernel(tuple(needed), values, 0 if _is_library(node) else _elements(node)))
    return _Draft(tuple(order), tuple(place for node in results for place in places[node]))


def _is_library(node: fx.Node) -> bool:
    """Whether an operator is a kernel of its own, whoever calls it."""
    if node.op != "call_function" or is_getitem(node) or viewed(node) is not None:
        return False
    return not (is_fusable(node) or _name(node) in _MOVES | _SCATTERS)


def _name(node: fx.Node) -> str:
    return str(getattr(node.target, "overloadpacket", "")).removeprefix("aten.")


def _value(node: fx.Node) -> _Value:
    (made,) = tensors(node.meta["val"])
    return _Value(made.dtype, made.numel() * made.element_size())


def _elements(node: fx.Node) -> int:
    """Of a value that is made one by one of as many; 0 of a sum of others."""
    maker = node.all_input_nodes[0] if is_getitem(node) else node
    read = (t.numel() for source in maker.all_input_nodes for t in tensors(source.meta["val"]))
    (made,) = tensors(node.meta["val"])
    return made.numel() if made.numel() >= max(read, default=0) else 0


# -- which of them are one ------------------------------------------------------------------------


def _merged(draft: _Draft) -> _Draft:
    """Kernels over as many elements are one where one reads what the other makes, or both read
    the same, and no third has to run between them."""
    groups: list[list[_Kernel]] = []
    home: dict[Place, int] = {}  # block -> the group that makes it
    before: list[set[int]] = []  # per group all that have to run earlier
    for kernel in draft.order:
        direct = {home[place] for place in kernel.reads if place in home}
        joins = (g for g in range(len(groups)) if _joins(kernel, g, groups, direct, before))
        chosen = next(joins, len(groups))
        if chosen == len(groups):
            groups.append([])
            before.append(set())
        groups[chosen].append(kernel)
        home |= {(MADE, number): chosen for number in kernel.makes}
        more = direct.union(*(before[g] for g in direct)) - {chosen}
        for number, earlier in enumerate(before):
            if number == chosen or chosen in earlier:
                earlier |= more
    return replace(draft, order=_joined(groups, before))


def _joins(
    kernel: _Kernel,
    group: int,
    groups: Sequence[Sequence[_Kernel]],
    direct: Collection[int],
    before: Sequence[Collection[int]],
) -> bool:
    """Args:
    direct: the groups that make what the kernel reads.
    """
    if not kernel.elements or groups[group][0].elements != kernel.elements:
        return False
    known = {place for each in groups[group] for place in each.reads}
    known |= {(MADE, number) for each in groups[group] for number in each.makes}
    return not known.isdisjoint(kernel.reads) and not any(group in before[g] for g in direct)


def _joined(groups: Sequence[Sequence[_Kernel]], before: Sequence[set[int]]) -> tuple[_Kernel, ...]:
    """Each group as one kernel, the earliest in the graph first that can run."""
    waiting = {number: set(earlier) for number, earlier in enumerate(before)}
    order = []
    while waiting:
        chosen = next(number for number, earlier in waiting.items() if not earlier)
        del waiting[chosen]
        for earlier in waiting.values():
            earlier.discard(chosen)
        group = groups[chosen]
        makes = {number: value for each in group for number, value in each.makes.items()}
        reads = dict.fromkeys(place for each in group for place in each.reads)
        outside = tuple(p for p in reads if not (p[0] == MADE and p[1] in makes))
        readers = Counter(place for each in group for place in each.reads)
        over = {
            number: [p for p in each.reads if p in outside and readers[p] == 1]
            for each in group
            for number in each.makes
            if each.elements
        }
        order.append(_Kernel(outside, makes, group[0].elements, over))
    return tuple(order)


# -- their order ----------------------------------------------------------------------------------


def _ordered(draft: _Draft) -> _Draft:
    other = replace(draft, order=_least_first(draft))
    return min(draft, other, key=lambda each: max(each.during(), default=0))


def _least_first(draft: _Draft) -> tuple[_Kernel, ...]:
    """At every step the kernel that can run and leaves least behind, of those that add nothing to
    the most so far; where all do, the one that adds least."""
    sizes = {(MADE, number): value.nbytes for number, value in draft.values.items()}
    readers = Counter(place for kernel in draft.order for place in kernel.reads)
    readers.update(draft.results)
    lacking = {i: {p for p in k.reads if p[0] == MADE} for i, k in enumerate(draft.order)}
    order: list[_Kernel] = []
    live, most = 0, sum(sizes.get(place, 0) for place in draft.results)

    def cost(number: int) -> tuple[int, int, int]:
        kernel = draft.order[number]
        left = sum(sizes.get(place, 0) for place in kernel.reads if readers[place] == 1)
        beyond = kernel.nbytes if live + kernel.nbytes > most else 0
        return beyond, kernel.nbytes - left, number

    while lacking:
        chosen = min((i for i, missing in lacking.items() if not missing), key=cost)
        kernel = draft.order[chosen]
        del lacking[chosen]
        order.append(kernel)
        for missing in lacking.values():
            missing.difference_update((MADE, number) for number in kernel.makes)
        live += kernel.nbytes
        most = max(most, live)
        readers.subtract(kernel.reads)
        live -= sum(sizes.get(place, 0) for place in kernel.reads if not readers[place])
    return tuple(order)


# -- whose memory is whose ------------------------------------------------------------------------


class _Pool:
    """Blocks that nothing needs any more, until something takes them.

    Args:
        during: per kernel the bytes while it runs.
    """

    def __init__(self, during: list[int]):
        self._during, self._most = during, max(during, default=0)
        self._free: dict[_Value, list[tuple[int, int]]] = defaultdict(list)

    def put(self, value: _Value, block: int, number: int) -> None:
        """Args:
        number: of the kernel after which it is free.
        """
        self._free[value].append((block, number))

    def take(self, value: _Value, number: int) -> int | None:
        """A block for what a kernel makes, the one that was freed last, unless keeping it until
        then would add to the most; None for a new one."""
        if not self._free[value]:
            return None
        block, freed = self._free[value][-1]
        between = range(freed + 1, number)
        if any(self._during[i] + value.nbytes > self._most for i in between):
            return None
        for i in between:
            self._during[i] += value.nbytes
        self._free[value].pop()
        return block


def _planned(draft: _Draft, given: int) -> Launches:
    """Args:
    given: how many arguments there are.
    """
    values, frees = draft.values, draft.frees()
    pool, sizes = _Pool(draft.during()), list[int]()
    home: dict[int, int] = {}  # value -> its block
    makes: list[list[int]] = [[] for _ in draft.order]
    last: dict[Place, int] = {}  # after which kernel it goes
    for i, (kernel, freed) in enumerate(zip(draft.order, frees, strict=True)):
        for number, value in kernel.makes.items():
            own = kernel.over.get(number, ())
            like = (n for k, n in freed if k == MADE and (k, n) in own and values[n] == value)
            old = next(like, None)
            if old is not None:
                freed.remove((MADE, old))
            block = pool.take(value, i) if old is None else home[old]
            if block is None:
                block = len(sizes)
                sizes.append(value.nbytes)
                makes[i].append(block)
            home[number] = block
            last.pop((MADE, block), None)
        for kind, number in freed:
            if kind == MADE:
                pool.put(values[number], home[number], i)
            last[kind, home[number] if kind == MADE else number] = i
    goes = [tuple(place for place, i in last.items() if i == each) for each in range(len(makes))]
    steps = tuple(Step(tuple(new), gone) for new, gone in zip(makes, goes, strict=True))
    results = tuple((k, home[n]) if k == MADE else (k, n) for k, n in draft.results)
    every = [*((ARGUMENT, i) for i in range(given)), *((MADE, n) for n in range(len(sizes)))]
    return Launches(steps, tuple(sizes), results, tuple(p for p in every if p not in last))
