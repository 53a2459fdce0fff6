"""Buffers that forward replaces, and that one program updates and another reads elsewhere."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import pipecompile
import pytest
import torch
from support import jobs, plain
from support.gang import Gang
from support.matrix import quickly
from torch import nn
from torch.nn.utils import prune

STEPS, WIDTH = 3, 8


class Layers(nn.Module):
    """Layers between which a subclass keeps something in buffers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.register_buffer("mean", torch.zeros(WIDTH))
        self.register_buffer("n", torch.tensor(0))

    def through(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + layer(x).tanh()
        return x

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.through(x).square().mean()


class Replaced(Layers):
    """By values of the last layer, which the loss reads, and by a count."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.through(x)
        before = self.mean
        self.mean = 0.9 * self.mean + 0.1 * x.mean(0).detach()
        self.n = self.n + 1
        return (x - self.mean).square().mean() + (before / self.n).sum()


class Twice(Layers):
    """Replaced in one call, updated in place in the next, and by a part of the batch."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.mean = x[0] + self.mean.flip(0)
        self.mean.mul_(0.5)
        self.n += 1
        return self.through(x + self.mean).square().mean()


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("scale", torch.ones(WIDTH), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = self.lin(x) / self.scale
        self.scale = torch.maximum(self.scale, made.detach().abs().amax(0))
        return made


class Nested(Layers):
    """In every layer, one of which is called twice, and not in the state dict."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.layers = nn.ModuleList(Inner() for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers[2](self.through(x)).square().mean()


class LateAndEarly(Layers):
    """Training updates after the last layer what evaluation reads before the first one, also in a
    value that it makes of buffers alone."""

    traced_once = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training:
            x = x - (2 * self.mean).tanh() + self.n
        x = self.through(x)
        if self.training:
            self.mean.mul_(0.9).add_(0.1 * x.mean(0).detach())
            self.n.add_(1)
        return x.square().mean()


class BothWays(Layers):
    """Evaluation updates before the first layer what training updates after the last."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training:
            self.mean = self.mean / 2 + x.amax(0)
        x = self.through(x - self.mean if not self.training else x)
        if self.training:
            self.mean = self.mean + x.mean(0).detach()
        return (x - self.mean).square().mean()


class Attribute(Layers):
    """A tensor that was never registered, in place and anew, and one that is made in every call."""

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.arange(WIDTH) / WIDTH
        self.momentum = torch.zeros(WIDTH)
        self.scaled = self.layers[0].weight.mean(0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.scaled = self.layers[0].weight.mean(0) * self.table.clone()
        self.momentum = 0.5 * self.momentum + x.detach().mean(0)
        x = self.through(x + self.scaled - self.momentum)
        self.table += 0.1
        return x.square().mean()


def reparametrised(wrap: Callable[[nn.Module], Any]) -> Layers:
    """Weights that forward makes of parameters and buffers."""
    model = Layers()
    for layer in model.layers:
        wrap(layer)
    return model


REPARAMETRISED: dict[str, Callable[[nn.Module], Any]] = {
    "spectral norm by hooks": nn.utils.spectral_norm,
    "spectral norm": nn.utils.parametrizations.spectral_norm,
    "weight norm by hooks": nn.utils.weight_norm,
    "weight norm": nn.utils.parametrizations.weight_norm,
    "orthogonal": nn.utils.parametrizations.orthogonal,
    "pruned": partial(prune.random_unstructured, name="weight", amount=0.3),
}
CLASSES = (Replaced, Twice, Nested, LateAndEarly, BothWays, Attribute)
KINDS: dict[str, Callable[[], Layers]] = {kind.__name__: kind for kind in CLASSES}
KINDS |= {name: partial(reparametrised, wrap) for name, wrap in REPARAMETRISED.items()}


def data() -> list[torch.Tensor]:
    torch.manual_seed(5)
    return [torch.randn(4, WIDTH) for _ in range(STEPS)]


def plainly(kind: str) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    """Losses of steps and of evaluations in between, and the state after them."""
    model, losses = KINDS[kind](), []
    optimizer = jobs.SGD(model.parameters())
    for batch in data():
        pieces = batch.chunk(2)
        for piece in pieces:
            losses.append(model(piece))
            (losses[-1] / 2).backward()
        losses[-2:] = [torch.stack([loss.detach() for loss in losses[-2:]]).mean()]
        optimizer.step()
        optimizer.zero_grad()
        model.eval()
        with torch.no_grad():
            losses.append(torch.stack([model(piece) for piece in pieces]).mean())
        model.train()
    return losses, copy.deepcopy(model.state_dict())


def in_stages(kind: str, n_stages: int) -> tuple[list[torch.Tensor], dict[str, Any]]:
    pipe = pipecompile.compile(KINDS[kind](), n_stages, microbatches=2, optimizer=jobs.SGD)
    losses = [use(batch) for batch in data() for use in (pipe.step, pipe.evaluate)]
    return losses, pipe.state_dict()


def assert_same(found: Any, expected: Any) -> None:
    assert all(torch.equal(a, b) for a, b in zip(found[0], expected[0], strict=True))
    assert plain.equal(found[1], expected[1])


CASES = [*product(KINDS, (1, 2)), ("LateAndEarly", 4)]
QUICK = [
    *((kind.__name__, 2) for kind in CLASSES),
    ("spectral norm", 2),
    ("LateAndEarly", 4),
]


@pytest.mark.parametrize(("kind", "n_stages"), quickly(QUICK, CASES))
def test_buffers_are_those_of_one_device(kind: str, n_stages: int) -> None:
    assert_same(in_stages(kind, n_stages), plainly(kind))


@pytest.mark.parametrize(
    "kind",
    quickly(["LateAndEarly"], ["Replaced", "LateAndEarly", "BothWays", "spectral norm by hooks"]),
)
def test_processes_pass_them_on(gang: Callable[[int], Gang], kind: str) -> None:
    for found in gang(2).run(in_stages, kind, 2):
        assert_same(found, plainly(kind))


@pytest.mark.parametrize("another", quickly([True], [False, True]))
def test_a_new_program_starts_from_them(another: bool) -> None:
    """Of another shape, or of the results, after training has updated what it reads."""
    model, pipe = LateAndEarly(), None
    pipe = pipecompile.compile(LateAndEarly(), 4, microbatches=2, optimizer=jobs.SGD)
    pipe.step(data()[0])
    model.load_state_dict(pipe.state_dict())
    batch = data()[1][:2] if another else data()[1]
    found = pipe.evaluate(batch)
    with torch.no_grad():
        pieces = [model.eval()(piece) for piece in batch.chunk(2)]
    assert torch.equal(found, torch.stack(pieces).mean())


def test_each_replica_has_its_own() -> None:
    pipe = pipecompile.compile(Replaced(), 2, 2, microbatches=1, optimizer=jobs.SGD)
    model = Replaced()
    batch = data()[0]
    pipe.step(batch)
    model(batch[:2])
    assert torch.equal(pipe.state_dict()["mean"], model.mean)


def assigning(value: Callable[[Layers, torch.Tensor], Any]) -> nn.Module:
    class Assigning(Layers):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.through(x)
            self.mean = value(self, x)
            return x.square().mean()

    return Assigning()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (lambda m, x: x[0], "'mean': forward gives it a value with a gradient.*detach"),
        (lambda m, x: m.mean.double(), r"replaces its float32\[8\].* by float64\[8\]"),
        (lambda m, x: m.mean[:4], r"replaces its float32\[8\].* by float32\[4\]"),
        (lambda m, x: None, "takes it away"),
    ],
)
def test_what_cannot_be_the_next_calls_buffer_is_refused(value: Any, message: str) -> None:
    pipe = pipecompile.compile(assigning(value), 2, microbatches=1, optimizer=jobs.SGD)
    with pytest.raises(pipecompile.errors.CaptureError, match=message):
        pipe.step(data()[0])


def test_one_of_two_names_is_refused() -> None:
    model = assigning(partial(lambda m, x: m.mean + 1))
    model.register_buffer("same", model.mean)
    pipe = pipecompile.compile(model, 2, microbatches=1, optimizer=jobs.SGD)
    with pytest.raises(pipecompile.errors.CaptureError, match="under one of its names"):
        pipe.step(data()[0])


class Cached(Layers):
    """Of which the next call reads what has a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.last = torch.zeros(WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.through(x + self.last)
        self.last = x.mean(0)
        return x.square().mean()


class Aliased(Layers):
    def __init__(self) -> None:
        super().__init__()
        self.first = self.layers[0].weight.data[0]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.through(x * self.first).square().mean()


class InEvaluation(Layers):
    """Which reads what training has left with a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.last = torch.zeros(WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return self.through(x + self.last).square().mean()
        x = self.through(x)
        self.last = x.mean(0)
        return x.square().mean()


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (
            Cached,
            "attribute 'last': forward reads it, and forward gives it a value with a gradient",
        ),
        (InEvaluation, "attribute 'last': forward reads it"),
        (Aliased, "'first' lies in the memory of parameter 'layers.0.weight'"),
    ],
)
def test_attributes_that_cannot_be_kept_are_refused(kind: Any, message: str) -> None:
    pipe = pipecompile.compile(kind(), 2, microbatches=1, optimizer=jobs.SGD)
    if kind is InEvaluation:
        pipe.step(data()[0])
    use = pipe.evaluate if kind is InEvaluation else pipe.step
    with pytest.raises(pipecompile.errors.CaptureError, match=message):
        use(data()[0])


def test_stages_that_a_buffer_would_tie_are_refused() -> None:
    """Read before the first layer and updated after the last."""

    class Around(Layers):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.through(x + self.mean)
            self.mean = x.detach().mean(0)
            return x.square().mean()

    pipe = pipecompile.compile(Around(), 3, microbatches=1, optimizer=jobs.SGD)
    with pytest.raises(pipecompile.errors.PartitionError, match=r"updating it.* mean"):
        pipe.step(data()[0])
