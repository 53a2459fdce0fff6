"""Which losses are recognised, and that what they become computes the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from pipecompile.compiler.ir.errors import OptionError
from pipecompile.compiler.losses.pieces import FORWARD
from pipecompile.compiler.tracing.kept import drop_metadata_checks
from pipecompile.passes.losses.chunks import chunk_losses, chunk_rows
from torch import nn
from torch.nn.functional import cross_entropy, linear, log_softmax, nll_loss

CLASSES, WIDTH = 90, 8
Loss = Callable[["Head", torch.Tensor, torch.Tensor], Any]


class Head(nn.Module):
    """Hidden states (rows, tokens, width) and labels (rows, tokens) -> what a function says."""

    def __init__(self, loss: Loss):
        super().__init__()
        self.loss = loss
        self.head = nn.Linear(WIDTH, CLASSES)
        self.table = nn.Parameter(torch.randn(CLASSES, WIDTH))
        self.conv = nn.Parameter(torch.randn(WIDTH, CLASSES))
        self.scale = nn.Parameter(torch.ones(()))
        self.register_buffer("offset", torch.randn(1, CLASSES))
        self.register_buffer("counts", torch.rand(CLASSES))

    def forward(self, hidden: torch.Tensor, labels: torch.Tensor) -> Any:
        return self.loss(self, hidden, labels)


def exported(loss: Loss) -> tuple[Head, Any, tuple[torch.Tensor, ...]]:
    torch.manual_seed(0)
    model = Head(loss)
    batch = torch.randn(3, 7, WIDTH), torch.randint(CLASSES, (3, 7))
    batch[1][0, 2:5] = -100
    module: Any = torch.export.export(model, batch, strict=False).module()
    drop_metadata_checks(module)
    return model, module, batch


def plain(self: Head, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return cross_entropy(self.head(x).view(-1, CLASSES), y.view(-1))


def shifted(self: Head, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    logits = self.head(x).float()[..., :-1, :].contiguous()
    return cross_entropy(logits.flatten(0, 1), y[:, 1:].reshape(-1))


def transposed(self: Head, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return cross_entropy(self.head(x).transpose(1, 2), y, reduction="sum") / 7


def unreduced(self: Head, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return (cross_entropy(self.head(x).permute(0, 2, 1), y, reduction="none") * 2).mean()


def tied(self: Head, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return cross_entropy((x @ self.table.t()).view(-1, CLASSES), y.view(-1), label_smoothing=0.1)


def of_a_conv1d(self: Head, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return cross_entropy(torch.addmm(self.head.bias, x.view(-1, WIDTH), self.conv), y.view(-1))


def capped(self: Head, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    logits = torch.tanh(linear(x, self.table) * 0.5 / 3.0) * 3.0
    return cross_entropy(logits.view(-1, CLASSES), y.view(-1))


def shifted_by_class(self: Head, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return cross_entropy((self.head(x) + self.offset).view(-1, CLASSES), y.view(-1), self.counts)


def z_loss(self: Head, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    flat = self.head(x).view(-1, CLASSES)
    return cross_entropy(flat, y.view(-1)) + 1e-2 * torch.logsumexp(flat, -1).square().mean()


def by_parts(self: Head, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return nll_loss(log_softmax(self.head(x), -1).view(-1, CLASSES), y.view(-1))


def by_flat_parts(self: Head, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return nll_loss(log_softmax(self.head(x).view(-1, CLASSES), -1), y.view(-1))


KNOWN = (
    *(plain, shifted, transposed, unreduced, tied, of_a_conv1d, capped, shifted_by_class, z_loss),
    by_flat_parts,
)


@pytest.mark.parametrize("loss", KNOWN)
@pytest.mark.parametrize("rows", [2, 64])
def test_what_is_recognised_computes_the_same(loss: Loss, rows: int) -> None:
    model, module, batch = exported(loss)
    hidden = batch[0].requires_grad_()
    wanted = [hidden, *(p for n, p in model.named_parameters())]
    expected = model(*batch)
    grads = torch.autograd.grad(expected, wanted, allow_unused=True)
    assert "exist for" in chunk_losses(module, rows, asked=True)
    assert chunk_rows(module.graph) == rows
    logits = 3 * 7 * CLASSES
    made = [node.meta.get("val") for node in module.graph.nodes]
    assert max(v.numel() for v in made if isinstance(v, torch.Tensor)) < logits
    found = module(*batch)
    mine = [hidden, *(dict(module.named_parameters())[n] for n, _ in model.named_parameters())]
    torch.testing.assert_close(found, expected, rtol=2e-6, atol=0)
    for one, other in zip(torch.autograd.grad(found, mine, allow_unused=True), grads, strict=True):
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            assert (one - other).abs().max() <= 2e-6 * other.abs().max()


def returned(self: Head, x: torch.Tensor, y: torch.Tensor) -> Any:
    logits = self.head(x)
    return cross_entropy(logits.view(-1, CLASSES), y.view(-1)), logits


def penalised(self: Head, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    logits = self.head(x)
    return cross_entropy(logits.view(-1, CLASSES), y.view(-1)) + logits.square().mean()


def soft(self: Head, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return cross_entropy(self.head(x).view(-1, CLASSES), x.new_ones(21, CLASSES) / CLASSES)


def written(self: Head, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    logits = self.head(x)
    logits[..., 3] = -5.0
    return cross_entropy(logits.view(-1, CLASSES), y.view(-1))


def scaled(self: Head, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return cross_entropy((self.head(x) * self.scale).view(-1, CLASSES), y.view(-1))


def detached(self: Head, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return cross_entropy(self.head(x).detach().view(-1, CLASSES), y.view(-1)) + self.scale


def widened(self: Head, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """What is cut off in front is no token of the hidden states any more."""
    logits = self.head(x[0]) + self.offset.unsqueeze(0)
    return cross_entropy(logits[:, :4].flatten(0, 1), y[0, :4])


def without_gradient(self: Head, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        logits = self.head(x)
    return cross_entropy(logits.view(-1, CLASSES), y.view(-1)) + self.scale


def read_early(self: Head, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    flat = self.head(x).view(-1, CLASSES)
    norm = torch.logsumexp(flat, -1)
    return cross_entropy(flat, y.view(-1) + 0) + norm.square().mean()


def asserted(self: Head, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    logits = self.head(x)
    torch._assert_async(logits.isfinite().all(), "not finite")
    return cross_entropy(logits.view(-1, CLASSES), y.view(-1))


def another(self: Head, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return self.head(x).square().mean()


@pytest.mark.parametrize(
    ("loss", "why"),
    [
        (returned, "they are returned too"),
        (penalised, "pow reads them too|square reads them too"),
        (soft, "labels are probabilities"),
        (written, "reads them too|writes into"),
        (scaled, "mul makes them of the product"),
        (detached, "detach.* makes them of the product"),
        (widened, "add makes them of the product"),
        (without_gradient, "makes them of the product"),
        (read_early, "logsumexp is read before there are labels"),
        (asserted, "reads them too"),
        (another, "it calls no cross_entropy"),
        (by_parts, "nll_loss reads no log_softmax"),
    ],
)
def test_what_is_not_recognised_stays_and_is_said(loss: Loss, why: str) -> None:
    _, module, _ = exported(loss)
    with pytest.raises(OptionError, match=f"chunked_loss=5: .*({why})"):
        chunk_losses(module, 5, asked=True)
    assert chunk_losses(module, 0, asked=False).startswith("logits stay whole")
    with torch.no_grad():  # evaluation may do something else
        assert chunk_losses(module, 5, asked=True).startswith("logits stay whole")
    assert not chunk_rows(module.graph)


def test_of_several_losses_those_over_few_classes_stay_whole() -> None:
    """Next-sentence prediction beside a masked language model."""

    def both(self: Head, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        few = cross_entropy(linear(x[:, 0], self.table[:2]), y[:, 0].clamp(0, 1))
        return plain(self, x, y) + few

    model, module, batch = exported(both)
    expected = model(*batch)
    note = chunk_losses(module, 4, asked=True)
    assert "those of 2 stay whole" in note
    assert len(module.graph.find_nodes(op="call_function", target=FORWARD)) == 1
    torch.testing.assert_close(module(*batch), expected)


def test_losses_over_several_vocabularies_have_pieces_of_as_many_tokens() -> None:
    """A plan keeps one number."""

    def both(self: Head, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return plain(self, x, y) + cross_entropy(linear(x[:, 0], self.table[:30]), y[:, 0] % 30)

    module = exported(both)[1]
    chunk_losses(module, 0, asked=False)
    nodes = module.graph.find_nodes(op="call_function", target=FORWARD)
    assert {node.args[9] for node in nodes} == {chunk_rows(module.graph)}
    assert len(nodes) == 2


def test_a_loss_that_needs_its_logits_beside_one_that_does_not_is_said() -> None:
    def both(self: Head, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return plain(self, x, y) + scaled(self, x, y)

    module = exported(both)[1]
    note = chunk_losses(module, 4, asked=True)
    assert "exist for 4 tokens" in note
    assert "logits stay whole: mul makes them of the product" in note
