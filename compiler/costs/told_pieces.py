"""What a plan says of losses in pieces."""

from __future__ import annotations

from collections.abc import Iterable

from torch import fx

from ..losses import pieces
from ..memory.inside import inside
from .hardware import Device


def told_pieces(nodes: Iterable[fx.Node], device: Device) -> str:
    """What losses in pieces save and cost; "" where there are none."""
    found: list[str] = []
    again_s = 0.0
    for node in nodes:
        if node.target is pieces.FORWARD:
            found.append(_saved(node))
        elif node.target is pieces.BACKWARD:
            made = inside(node)
            assert made is not None
            first = made.kernels[0]
            product = first.flops, first.moved_bytes, first.dtype, first.form
            again_s += first.times * device.kernel_s(*product)
    if not found:
        return ""
    cost = f"; made again in the backward: {again_s * 1e3:.3g} ms per microbatch" if again_s else ""
    return "; ".join(found) + cost


def _saved(node: fx.Node) -> str:
    work = inside(node)
    assert work is not None
    weight, labels = (node.args[i].meta["val"] for i in (1, 4))  # type: ignore[union-attr]
    all_bytes = labels.numel() * weight.shape[0] * node.meta["val"][0].element_size()
    return (
        f"{work.scratch_bytes / 2**20:,.1f} MiB for logits at a time, where each copy of all of "
        f"them has {all_bytes / 2**20:,.1f} MiB"
    )
