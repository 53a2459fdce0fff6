"""The operators of a graph that stand for a region: `torch.library` knows them as any others.

``pipecompile::region``           operands, site -> outputs, updated buffers, ticket
``pipecompile::random_region``    the same, where it draws random numbers
``pipecompile::region_backward``  kept operands, ticket, gradients of outputs, and what gradients
                                  of operands are added to -> gradients of operands
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from ..ir.region import Work, is_region
from .site import Site, site_of

_LIBRARY: Any = torch.library.Library("pipecompile", "DEF")  # type: ignore[no-untyped-call]
_DRAWS = (torch.Tag.nondeterministic_seeded,)
_LIBRARY.define("region(Tensor[] operands, str site) -> Tensor[]")
_LIBRARY.define("random_region(Tensor[] operands, str site) -> Tensor[]", tags=_DRAWS)
_LIBRARY.define(
    "region_backward(Tensor[] kept, Tensor ticket, Tensor?[] grads, Tensor?[] carried, str site)"
    " -> Tensor[]"
)

_PLAIN, _RANDOM = torch.ops.pipecompile.region.default, torch.ops.pipecompile.random_region.default
_BACKWARD = torch.ops.pipecompile.region_backward.default

Tensors = Sequence[torch.Tensor]
Optionals = Sequence[torch.Tensor | None]


def _forward(operands: Tensors, site: str) -> list[torch.Tensor]:
    return site_of(site).forward(operands)


def _forward_fake(operands: Tensors, site: str) -> list[torch.Tensor]:
    facts = site_of(site).known
    device = next(tensor.device for tensor in operands)
    made = [_like(output, device) for output in facts.outputs]
    if site_of(site).trains:
        made.append(torch.empty(1, dtype=torch.uint8, device=device).expand(facts.saved_bytes))
    return made


def _backward(
    kept: Tensors, ticket: torch.Tensor, grads: Optionals, carried: Optionals, site: str
) -> list[torch.Tensor]:
    return site_of(site).backward(kept, ticket, grads, carried)


def _backward_fake(
    kept: Tensors, ticket: torch.Tensor, grads: Optionals, carried: Optionals, site: str
) -> list[torch.Tensor]:
    return [_like(grad, ticket.device) for grad in site_of(site).known.gradients]


def _like(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)


for _name in ("region", "random_region"):
    _LIBRARY.impl(_name, _forward, "CompositeExplicitAutograd")
    torch.library.register_fake(f"pipecompile::{_name}", _forward_fake, lib=_LIBRARY)
_LIBRARY.impl("region_backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("pipecompile::region_backward", _backward_fake, lib=_LIBRARY)


class Region(torch.autograd.Function):
    """A region in an exported graph: (key of the site, operands) -> outputs, updated buffers."""

    @staticmethod
    def forward(ctx: Any, key: str, *operands: torch.Tensor) -> tuple[torch.Tensor, ...]:
        site, facts = site_of(key), site_of(key).known
        *results, ticket = _run(site, operands)
        ctx.key = key
        ctx.set_materialize_grads(False)
        flows = (*facts.differentiable, *(False for _ in facts.updated))
        pairs = zip(results, flows, strict=True)
        ctx.mark_non_differentiable(*(result for result, flow in pairs if not flow))
        ctx.save_for_backward(ticket, *(operands[i] for i in facts.kept))
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        site = site_of(ctx.key)
        ticket, *kept = ctx.saved_tensors
        outputs = grads[: len(site.known.differentiable)]
        nothing = [None] * sum(site.needs)
        found = iter(_BACKWARD(kept, ticket, outputs, nothing, ctx.key))
        return (None, *(next(found) if needs else None for needs in site.needs))


def run(site: Site, operands: Tensors) -> list[torch.Tensor]:
    """A site in the graph that is being traced: outputs and updated buffers."""
    if site.trains:
        return list(Region.apply(site.key, *operands))  # type: ignore[no-untyped-call]
    return _run(site, operands)


def _run(site: Site, operands: Tensors) -> list[torch.Tensor]:
    """The forward operator of a site, called."""
    made: list[torch.Tensor] = (_RANDOM if site.known.draws else _PLAIN)(list(operands), site.key)
    return made


def known_work(node: fx.Node) -> Work | None:
    """What a region's node does; None for others."""
    if not is_region(node):
        return None
    facts = site_of(str(node.args[-1])).known
    return facts.backward if node.target is _BACKWARD else facts.forward
