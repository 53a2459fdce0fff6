"""Which gradients this rank adds to their sums without making them first (`passes.programs.sums`).

**Rows of a table**: those of which a microbatch has few.

**Products**, slot += mm(xᵀ, g) in one kernel, where that rounds as two kernels do.

A library multiplies in blocks of a sum's terms. If one block has all of them, the kernel that adds
to what there is adds a whole product to it, just as an addition would. It does not say how long
blocks are, so each shape is tried once, with random numbers and the kernels of this machine: the
order of additions depends on the shape alone, and another one would show in a fifth of the elements
or more. Of few elements, or of numbers that a factor repeats, that may be none.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache, partial

import torch
from torch import fx

from ...compiler.ir.ops import Slot
from ...compiler.ir.program import Port, Program, Role, StageProgram
from ...passes.programs.products import Product
from ...passes.programs.sums import with_sums

FEW = 4
"""A table has at least so many times as many rows as a microbatch has ids."""
MOST_TERMS = 512
"""Of an element: blocks are shorter, and with more the addition is a small part of the product."""
LEAST_ELEMENTS, MOST_ELEMENTS = 256, 1 << 22
"""Of a gradient: with fewer a trial tells too little, and there is nothing to gain; a trial takes
four times its memory, for a moment before the first step."""
_EXACT = (torch.float32, torch.float64)

Layout = tuple[tuple[int, ...], tuple[int, ...]]
"""Shape and strides."""

Kernels = tuple[int, str]
"""How many threads they have, and the precision of products that the user has set."""


def adding(program: Program, slots: Mapping[str, Slot], device: torch.device) -> Program:
    """A program that does so; itself where it makes no such gradient.

    Args:
        slots: FQN -> where its gradient goes.
    """
    if device.type != "cpu":
        return program
    return with_sums(program, partial(_alike, slots), partial(_sparse, slots))


def adding_stage(stage: StageProgram, device: torch.device) -> StageProgram:
    """A stage's eager programs as they run where all gradients add up whole."""
    slots = {
        str(port.key): _Traced(node.meta["val"])
        for program in stage.parts.values()
        for node, port in zip(program.module.graph.nodes, program.inputs, strict=False)
        if port.role is Role.SLOT
    }
    return stage.with_parts({k: adding(each, slots, device) for k, each in stage.parts.items()})


class _Traced(Slot):
    """Stands for one that is laid out as the program was traced for it."""

    def __init__(self, sums: torch.Tensor):
        self._sums = sums

    @property
    def sums(self) -> torch.Tensor:
        return self._sums


def _sums(slots: Mapping[str, Slot], port: Port) -> torch.Tensor | None:
    slot = slots.get(str(port.key))
    return None if slot is None else slot.sums


def _sparse(slots: Mapping[str, Slot], port: Port, grad: fx.Node) -> bool:
    sums, ids = _sums(slots, port), grad.args[1]
    assert isinstance(ids, fx.Node)
    rows = ids.meta["val"].numel()
    return sums is not None and sums.shape == grad.meta["val"].shape and rows * FEW <= len(sums)


def _alike(slots: Mapping[str, Slot], port: Port, product: Product) -> bool:
    sums = _sums(slots, port)
    left, right = product.factors
    if sums is None or sums.shape != product.made.meta["val"].shape or sums.dtype not in _EXACT:
        return False
    if {left.dtype, right.dtype} != {sums.dtype}:
        return False
    if left.shape[1] > MOST_TERMS or not LEAST_ELEMENTS <= sums.numel() <= MOST_ELEMENTS:
        return False
    if _repeats(left) or _repeats(right):
        return False
    layouts = (_layout(left), _layout(right), _layout(sums))
    return rounds_alike(*layouts, sums.dtype, kernels_now())


def _repeats(tensor: torch.Tensor) -> bool:
    """Whether it has rows or columns that are one in memory (``expand``)."""
    pairs = zip(tensor.shape, tensor.stride(), strict=True)
    return any(size > 1 and step == 0 for size, step in pairs)


def _layout(tensor: torch.Tensor) -> Layout:
    return tuple(tensor.shape), tensor.stride()


def kernels_now() -> Kernels:
    """What decides, with the shape, which kernels multiply."""
    precision: str = torch.backends.mkldnn.matmul.fp32_precision  # type: ignore[attr-defined]
    return torch.get_num_threads(), precision


@cache
def rounds_alike(
    left: Layout, right: Layout, sums: Layout, dtype: torch.dtype, kernels: Kernels
) -> bool:
    """Whether products that are written to sums, and then added to them, while they are made have
    the bits of those that are made first.

    Args:
        kernels: `kernels_now`.
    """
    generator = torch.Generator().manual_seed(0)

    def drawn(layout: Layout) -> torch.Tensor:
        made = torch.empty_strided(*layout, dtype=dtype)
        return made.copy_(torch.randn(layout[0], dtype=dtype, generator=generator))

    at_once, apart = (torch.empty_strided(*sums, dtype=dtype) for _ in range(2))
    first, second = ((drawn(left), drawn(right)) for _ in range(2))
    torch.mm(*first, out=at_once)
    apart.copy_(torch.mm(*first))
    if not torch.equal(at_once, apart):
        return False
    return torch.equal(at_once.addmm_(*second), apart.add_(torch.mm(*second)))
