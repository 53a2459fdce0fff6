"""What a node does whose operator is no single launch: a region, or a loss in pieces."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from ..calibration.forms import Product
from ..ir.region import Kernel, Work
from ..ir.region import work_of as region_work
from ..losses import logits, pieces
from ..tensors.facts import short_name


def inside(node: fx.Node) -> Work | None:
    """What runs inside a node; None of a node that is one launch."""
    if node.target is pieces.FORWARD or node.target is pieces.BACKWARD:
        known = node.meta.get("inside")
        args: Any = node.args
        if not (isinstance(known, tuple) and known[0] is args):
            known = node.meta["inside"] = args, _chunked(node)
        work = known[1]
        assert isinstance(work, Work)
        return work
    return region_work(node)


@dataclass(frozen=True)
class _Shape:
    """Of one piece of logits.

    Attributes:
        narrow, wide: the dtypes of the product and of the loss.
        steps: between them, casts not counted.
        curved: a step needs its result in the backward.
    """

    tokens: int
    classes: int
    width: int
    narrow: torch.dtype
    wide: torch.dtype
    steps: int
    curved: bool

    @property
    def elements(self) -> int:
        return self.tokens * self.classes

    @property
    def casts(self) -> bool:
        return self.narrow is not self.wide

    def product(self) -> Kernel:
        """Of tokens by width by classes, whichever of them is summed over."""
        t, c, w = self.tokens, self.classes, self.width
        moved = (t * c + t * w + c * w) * self.narrow.itemsize
        form = Product(1, t, c, w)
        return Kernel(form.flops, moved, short_name(self.narrow), form=form)

    def passes(self, count: int) -> Iterator[Kernel]:
        """Over all logits of the piece, each read or written so often."""
        for _ in range(count):
            yield Kernel(0, 2 * self.elements * self.wide.itemsize, short_name(self.wide))

    def cast(self) -> Iterator[Kernel]:
        if self.casts:
            moved = self.elements * (self.narrow.itemsize + self.wide.itemsize)
            yield Kernel(0, moved, short_name(self.wide))

    @property
    def scratch_bytes(self) -> int:
        """A piece in both dtypes, while it is cast."""
        narrow = self.narrow.itemsize if self.casts else 0
        return self.elements * (narrow + self.wide.itemsize)


def _chunked(node: fx.Node) -> Work:
    """Of `pieces.chunked_loss` and its backward, as they are written."""
    back = node.target is pieces.BACKWARD
    given: Any = [a.meta["val"] if isinstance(a, fx.Node) else a for a in node.args]
    hidden, weight, _, _, labels = given[2:7] if back else given[:5]
    smoothing, text, rows = given[10:13] if back else given[7:10]
    steps = logits.steps_of(text)
    tokens, (classes, width) = labels.numel(), weight.shape
    size = logits.piece_classes(tokens, classes, rows)
    last = next((s.dtype for s in reversed(steps) if s.name == "to"), weight.dtype)
    plain = [step.name for step in steps if step.name != "to"]
    of = tokens, size, width, weight.dtype, logits.wide_of(last), len(plain), "tanh" in plain
    piece = _Shape(*of)
    kernels = list(_backward(piece, given[-1], bool(smoothing)) if back else _forward(piece))
    kernels += piece.passes(1) if smoothing and not back else ()
    times = -(-classes // size) if size else 0
    scratch = piece.scratch_bytes
    scratch += 12 * tokens * piece.wide.itemsize  # what is kept of each token meanwhile
    if back:
        scratch += piece.elements * piece.wide.itemsize * plain.count("tanh")
        if given[-1][0] and piece.casts:
            scratch += hidden.numel() * piece.wide.itemsize
    each = (replace(kernel, times=times) for kernel in kernels)
    return Work(tuple(each), scratch)


def _forward(piece: _Shape) -> Iterator[Kernel]:
    yield piece.product()
    yield from piece.cast()
    yield from piece.passes(piece.steps + 3)  # the largest, less that, exponentials and their sum


def _backward(piece: _Shape, wants: list[bool], smooths: bool) -> Iterator[Kernel]:
    yield piece.product()
    yield from piece.cast()
    yield from piece.passes(2 * piece.steps + 3 + smooths)  # less, exponentials, times
    yield from piece.cast()
    if wants[0]:
        yield piece.product()
        moved = piece.tokens * piece.width * (2 * piece.wide.itemsize + piece.narrow.itemsize)
        yield Kernel(0, moved, short_name(piece.wide))
    if wants[1]:
        yield piece.product()
