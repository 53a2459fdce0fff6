"""Tensors that are none of the model's: constants, if they are constant, and else an error."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pipecompile
import pytest
import torch
from pipecompile.errors import CaptureError
from support.matrix import quickly
from torch import nn

Batch = tuple[torch.Tensor, torch.Tensor]
Loss = Callable[[Any, Any], torch.Tensor]
SGD = partial(torch.optim.SGD, lr=0.1)
torch.manual_seed(0)
BATCH: Batch = (torch.randn(8, 4), torch.randn(8, 3))


class Net(nn.Module):
    """Counts its calls; ``outside`` is read in forward."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)
        self.register_buffer("weights", torch.tensor([1.0, 2.0, 3.0]))
        self.outside: Callable[[torch.Tensor], Any] = lambda x: x

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.outside(self.last(self.norm(self.first(x)).relu()))
        return out


def net() -> Net:
    torch.manual_seed(1)
    return Net()


def squares(output: torch.Tensor, batch: Batch) -> torch.Tensor:
    return ((output - batch[1]) ** 2).mean()


def stepped(model: nn.Module, n_stages: int, loss: Loss) -> Any:
    pipe = pipecompile.compile(model, n_stages, optimizer=SGD, loss_fn=loss, microbatches=2)
    pipe.step(BATCH)
    return pipe


class Times(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(a, b)
        return a * b

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:  # type: ignore[override]
        a, b = ctx.saved_tensors
        return grad * b, (grad * a).sum(0)


class Object:
    def __init__(self, model: Net):
        self.model = model

    def __call__(self, output: torch.Tensor, batch: Batch) -> torch.Tensor:
        return self.method(output, batch)

    def method(self, output: torch.Tensor, batch: Batch) -> torch.Tensor:
        return squares(output, batch) + self.model.last.bias.abs().sum()


def given(output: torch.Tensor, batch: Batch, bias: torch.Tensor) -> torch.Tensor:
    return squares(output, batch) + bias.sum()


PARAMETERS: dict[str, Callable[[Net], Loss]] = {
    "penalty": lambda m: lambda o, b: squares(o, b) + sum(p.pow(2).sum() for p in m.parameters()),
    "detached": lambda m: lambda o, b: squares(o, b) * m.last.bias.detach().sum(),
    "view": lambda m: partial(given, bias=m.last.bias.detach()[:2]),
    "number": lambda m: lambda o, b: squares(o, b) * m.last.bias.tolist()[0],
    "function": lambda m: lambda o, b: squares(Times.apply(o, m.last.bias), b),
    "partial": lambda m: partial(given, bias=m.last.bias),
    "object": Object,
    "method": lambda m: Object(m).method,
}


QUICK = ("penalty",)


@pytest.mark.parametrize("how", quickly(QUICK, PARAMETERS))
def test_a_loss_that_reads_the_users_parameters_is_refused(how: str) -> None:
    model = net()
    found = "loss_fn reads parameter '(last.bias|first.weight)' of the model that compile"
    with pytest.raises(CaptureError, match=found) as error:
        stepped(model, 2, PARAMETERS[how](model))
    assert "make loss_fn an nn.Module" in str(error.value)


@pytest.mark.slow
def test_a_forward_that_reads_parameters_of_another_model_is_refused() -> None:
    model, other = net(), net()
    model.outside = lambda x: x * other.last.bias
    with pytest.raises(CaptureError, match=r"forward reads a tensor of .* that requires"):
        stepped(model, 1, squares)


def test_a_forward_that_reads_parameters_of_another_copy_is_refused() -> None:
    model = net()
    model.outside = lambda x: x * model.last.bias  # the user's, in the pipeline's copy too
    with pytest.raises(CaptureError, match=r"forward reads parameter 'last.bias' of the model"):
        stepped(model, 1, squares)


SCALE, TEACHER = torch.zeros((), requires_grad=True), nn.Linear(4, 3)
TRAINED: dict[str, Loss] = {
    "a factor": lambda o, b: squares(o, b) * SCALE.exp(),
    "its number": lambda o, b: squares(o, b) * SCALE.item(),
    "another model": lambda o, b: squares(o, b) + squares(TEACHER(b[0]), (b[0], o)),
}


@pytest.mark.parametrize("name", quickly(["another model"], TRAINED))
def test_a_loss_that_reads_what_requires_gradients_is_refused(name: str) -> None:
    with pytest.raises(CaptureError, match="requires gradients and is no parameter"):
        stepped(net(), 1, TRAINED[name])


def test_a_loss_that_reads_a_buffer_that_forward_updates_is_refused() -> None:
    model = net()
    with pytest.raises(CaptureError, match=r"loss_fn reads buffer 'norm.running_mean'"):
        stepped(model, 2, lambda o, b: squares(o, b) + model.norm.running_mean.sum())


def plain(model: nn.Module, loss: Loss) -> list[torch.Tensor]:
    optimizer, losses = SGD(model.parameters()), []
    for _ in range(2):
        pieces = zip(*(each.chunk(2) for each in BATCH), strict=True)
        found = [loss(model(piece[0]), piece) for piece in pieces]
        for each in found:
            (each / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(torch.stack(found).mean().detach())
    return losses


@pytest.mark.parametrize("n_stages", quickly([2], [1, 2]))
def test_constants_are_constants(n_stages: int) -> None:
    """Frozen modules, weights of classes, tensors made on the way, and shapes of parameters."""
    teacher, weights, twin = nn.Linear(4, 3).requires_grad_(False), torch.arange(3.0), net()

    def loss(model: Net, output: torch.Tensor, batch: Batch) -> torch.Tensor:
        made = torch.tensor([1.0, 2.0, 3.0], requires_grad=True) * weights.tolist()[2]
        like = torch.zeros_like(model.last.bias) + model.last.bias.new_ones(3)
        spread = (teacher(batch[0]) - output) * weights * model.weights * like
        return squares(output, batch) + (spread * made).pow(2).mean() * model.last.bias.numel()

    model = net()
    pipe = pipecompile.compile(
        model, n_stages, optimizer=SGD, loss_fn=partial(loss, model), microbatches=2
    )
    found = [pipe.step(BATCH) for _ in range(2)]
    assert all(map(torch.equal, found, plain(twin, partial(loss, twin))))


@pytest.mark.parametrize(
    "read",
    [
        lambda w: w,
        pytest.param(lambda w: w.tolist()[0], marks=pytest.mark.slow),
        pytest.param(lambda w: w.mean().exp(), marks=pytest.mark.slow),
    ],
)
def test_a_constant_that_changes_is_refused_from_then_on(
    read: Callable[[torch.Tensor], Any],
) -> None:
    weights = torch.ones(3)
    pipe = stepped(net(), 2, lambda o, b: (squares(o, b) * read(weights)).sum())
    pipe.evaluate(BATCH)
    pipe.step(BATCH)
    weights.mul_(0.5)
    for call in (pipe.step, pipe.evaluate):
        with pytest.raises(CaptureError, match=r"loss_fn reads a tensor of float32.*pass it in"):
            call(BATCH)
    twin = pipecompile.compile(net(), 1, loss_fn=lambda o, b: (squares(o, b) * weights).sum())
    twin.forward_backward(BATCH)  # as it is now


def test_a_constant_of_inference_mode_is_a_constant() -> None:
    with torch.inference_mode():
        weights = torch.ones(3)
    stepped(net(), 1, lambda o, b: squares(o, b) + weights.sum())
