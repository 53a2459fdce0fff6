"""What is known of a submodule's call that runs eagerly inside one node (`compiler.regions`).

Nodes of two operators have one, ``pipecompile::region`` and ``pipecompile::region_backward``.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import fx

from ..calibration.forms import Form

FORWARD = ("pipecompile.region.default", "pipecompile.random_region.default")
BACKWARD = "pipecompile.region_backward.default"


@dataclass(frozen=True)
class Kernel:
    """One operator that runs inside a node.

    Attributes:
        flops, moved_bytes: of one launch.
        lacks: its name, if it has no formula for its FLOPs and may need one; "" otherwise.
        times: how often it is launched.
        form: the shape of its products, where it is known.
    """

    flops: int
    moved_bytes: int
    dtype: str
    lacks: str = ""
    times: int = 1
    form: Form | None = None


@dataclass(frozen=True)
class Work:
    """Of one node.

    Attributes:
        kernels: in the order in which they ran.
        scratch_bytes: what is allocated for a moment, besides results.
    """

    kernels: Sequence[Kernel]
    scratch_bytes: int

    @property
    def flops(self) -> int:
        return sum(kernel.flops * kernel.times for kernel in self.kernels)

    @property
    def moved_bytes(self) -> int:
        return sum(kernel.moved_bytes * kernel.times for kernel in self.kernels)


def work_of(node: fx.Node) -> Work | None:
    """None for a node that is no region's."""
    found = node.meta.get("region")
    return found if isinstance(found, Work) else None


def is_region(node: fx.Node) -> bool:
    """Whether a node is one of the two."""
    return str(node.target) in (*FORWARD, BACKWARD)


def alike(text: str) -> str:
    """A text in which regions of models that are alike have the same names (`regions.site`)."""
    return re.sub(r"~\d+~", "", text)


NOT_REACHED = "_pipecompile_not_reached"


def mark_not_reached(grad: torch.Tensor) -> torch.Tensor:
    """Mark zeros that stand for no gradient: nothing that ran has read the parameter."""
    setattr(grad, NOT_REACHED, True)
    return grad


def is_not_reached(grad: torch.Tensor) -> bool:
    return getattr(grad, NOT_REACHED, False)
