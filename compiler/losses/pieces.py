"""A loss over classes, computed without all of its logits at once.

    hidden (tokens, width) ─▶ product ─▶ steps ─▶ logits (tokens, classes) ─▶ cross-entropy

Logits are made for some classes at a time, as many elements at once as so many ``rows`` (tokens)
have in all. Of a token only the logarithm of the sum of exponentials is kept; the backward makes
the logits again, and a piece of them becomes a piece of their gradient, which is multiplied by the
hidden states and by the weight before the next piece is made. Cut along the classes, every row of
the weight is read once, and its gradient is one product, rounded once; the gradient of the hidden
states adds up over pieces, in fp32.

Logits are widened to fp32 after the steps, fp64 stays. Besides rounding, the numbers are those of
`torch.nn.functional.cross_entropy` with ``reduction="none"``.

``pipecompile::chunked_loss``           losses and logsumexp of each token, as labels are shaped
``pipecompile::chunked_loss_backward``  the gradients of hidden states, weight, bias that are wanted
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .logits import Head, Labels, steps_of, wide_of

# -- forward --------------------------------------------------------------------------------------


@torch.library.custom_op("pipecompile::chunked_loss", mutates_args=())
def chunked_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    offset: torch.Tensor | None,
    labels: torch.Tensor,
    class_weight: torch.Tensor | None,
    ignore_index: int,
    smoothing: float,
    steps: str,
    rows: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss of each token, 0 where its label is ignored, and the logsumexp of its logits.

    Args:
        hidden: (..., width), of as many tokens as there are labels.
        weight: (classes, width).
        class_weight: what each class counts.
        steps: what is done to logits between the product and the loss (`steps_of`).
        rows: so many tokens' logits exist at once.

    Raises:
        IndexError: a label is no class.
    """
    head = Head(weight, bias, offset, steps_of(steps))
    wide = wide_of(head.last)
    told = Labels.of(labels, class_weight, wide, ignore_index, smoothing, weight.shape[0])
    told.check()
    flat = hidden.reshape(-1, hidden.shape[-1])
    tokens = flat.shape[0]
    least = torch.finfo(wide).min  # finite: all logits of a piece may be -inf
    most = flat.new_full((tokens,), least, dtype=wide)
    total, picked, spread = (torch.zeros_like(most) for _ in range(3))
    for at in head.pieces(tokens, rows):
        x = head.logits(flat, at, None)
        there, place = told.chosen(at)
        picked = torch.where(there, x.gather(1, place).squeeze(1), picked)
        if smoothing:
            spread += told.spread(x, at)
        before, most = most, torch.maximum(most, x.amax(1))
        total = total * (before - most).exp_() + x.sub_(most.unsqueeze(1)).exp_().sum(1)
        del x  # before the next piece is made
    total.log_()
    losses = told.of_label(total - (picked - most))
    if smoothing:
        each = smoothing / told.classes
        losses += each * ((total + most) * told.of_all - spread)
    losses = losses.where(told.kept, 0)
    return losses.reshape(labels.shape), (total + most).reshape(labels.shape)


@chunked_loss.register_fake
def _(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    offset: torch.Tensor | None,
    labels: torch.Tensor,
    class_weight: torch.Tensor | None,
    ignore_index: int,
    smoothing: float,
    steps: str,
    rows: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    wide = wide_of(Head(weight, bias, offset, steps_of(steps)).last)
    made = [hidden.new_empty(labels.shape, dtype=wide) for _ in range(2)]
    return made[0], made[1]


# -- backward -------------------------------------------------------------------------------------


@torch.library.custom_op("pipecompile::chunked_loss_backward", mutates_args=())
def chunked_loss_backward(
    grad_losses: torch.Tensor | None,
    grad_logsumexp: torch.Tensor | None,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    offset: torch.Tensor | None,
    labels: torch.Tensor,
    class_weight: torch.Tensor | None,
    logsumexp: torch.Tensor,
    ignore_index: int,
    smoothing: float,
    steps: str,
    rows: int,
    wants: Sequence[bool],
) -> list[torch.Tensor]:
    """Gradients, from those of what `chunked_loss` has returned.

    Args:
        wants: whether that of the hidden states, of the weight, of the bias is wanted; these are
            returned in this order.
    """
    head = Head(weight, bias, offset, steps_of(steps))
    wide = wide_of(head.last)
    told = Labels.of(labels, class_weight, wide, ignore_index, smoothing, weight.shape[0])
    flat, lse = hidden.reshape(-1, hidden.shape[-1]), logsumexp.reshape(-1, 1)
    tokens = flat.shape[0]
    nothing = torch.zeros_like(lse).squeeze(1)
    losses = nothing if grad_losses is None else grad_losses.reshape(-1).where(told.kept, 0)
    of_label = told.of_label(losses)
    of_each = losses * (smoothing / told.classes)
    of_softmax = of_label + of_each * told.of_all
    if grad_logsumexp is not None:
        of_softmax = of_softmax + grad_logsumexp.reshape(-1)
    sums = torch.zeros(flat.shape, dtype=wide, device=flat.device) if wants[0] else None
    made_weight = torch.empty_like(weight, memory_format=torch.contiguous_format)
    made_bias = None if bias is None else torch.empty_like(bias)
    for at in head.pieces(tokens, rows):
        saved: list[Any] = []
        grad = head.logits(flat, at, saved).sub_(lse).exp_().mul_(of_softmax.unsqueeze(1))
        there, place = told.chosen(at)
        grad.scatter_add_(1, place, -of_label.where(there, 0).unsqueeze(1))
        if smoothing:
            each = grad.new_ones(grad.shape[1]) if told.weight is None else told.weight[at]
            grad.addr_(of_each, each, alpha=-1)
        grad = head.back(grad, saved)
        if sums is not None:
            _add_product(sums, grad, weight[at])
        if wants[1]:
            torch.mm(grad.t(), flat, out=made_weight[at])
        if wants[2] and made_bias is not None:
            made_bias[at] = grad.sum(0)
        del grad, saved
    made = [
        None if sums is None else sums.to(hidden.dtype).reshape(hidden.shape),
        made_weight if wants[1] else None,
        made_bias if wants[2] else None,
    ]
    return [each for each in made if each is not None]


def _add_product(sums: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    if sums.dtype is left.dtype:
        sums.addmm_(left, right)
    else:
        sums.add_(left @ right)


@chunked_loss_backward.register_fake
def _(
    grad_losses: torch.Tensor | None,
    grad_logsumexp: torch.Tensor | None,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    offset: torch.Tensor | None,
    labels: torch.Tensor,
    class_weight: torch.Tensor | None,
    logsumexp: torch.Tensor,
    ignore_index: int,
    smoothing: float,
    steps: str,
    rows: int,
    wants: Sequence[bool],
) -> list[torch.Tensor]:
    found = zip((hidden, weight, bias), wants, strict=True)
    return [each.new_empty(each.shape) for each, wanted in found if wanted and each is not None]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    *tensors, ctx.ignore_index, ctx.smoothing, ctx.steps, ctx.rows = inputs
    ctx.save_for_backward(*tensors, output[1])
    ctx.set_materialize_grads(False)


def _differentiate(
    ctx: Any, grad_losses: torch.Tensor | None, grad_logsumexp: torch.Tensor | None
) -> tuple[torch.Tensor | None, ...]:
    wants = [bool(needed) for needed in ctx.needs_input_grad[:3]]
    made = iter(
        torch.ops.pipecompile.chunked_loss_backward.default(
            grad_losses,
            grad_logsumexp,
            *ctx.saved_tensors,
            ctx.ignore_index,
            ctx.smoothing,
            ctx.steps,
            ctx.rows,
            wants,
        )
    )
    first = [next(made) if wanted else None for wanted in wants]
    return (*first, *([None] * 7))


chunked_loss.register_autograd(_differentiate, setup_context=_keep)
FORWARD: Any = torch.ops.pipecompile.chunked_loss.default
BACKWARD: Any = torch.ops.pipecompile.chunked_loss_backward.default
