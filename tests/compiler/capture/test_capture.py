"""What tracing would change about a model, and what pipecompile keeps or refuses.

Each of these once gave other gradients than the untraced model, without a word.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pipecompile
import pytest
import torch
from pipecompile import errors
from support import jobs, models, plain
from support.matrix import quickly
from torch import nn
from torch.utils.checkpoint import checkpoint

X = torch.arange(32.0).view(4, 8) / 10 - 1.5


class Straight(torch.autograd.Function):
    """A straight-through estimator: rounds forward, passes gradients on, doubled."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.scale = scale
        return x.round(), x.sign()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        return grads[0] * ctx.scale + grads[1], None


class Layers(nn.Module):
    """Two linear layers; subclasses put something between them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.register_buffer("count", torch.zeros(()))

    def between(self, y: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.between(self.first(x))).square().mean()


class Rounding(Layers):
    def between(self, y: torch.Tensor) -> torch.Tensor:
        rounded, sign = Straight.apply(y, 2.0)
        return rounded + 0.1 * sign


class Checkpointing(Layers):
    def between(self, y: torch.Tensor) -> torch.Tensor:
        return checkpoint(lambda z: z.sin() * self.first.bias.detach(), y, use_reentrant=True)


class Resizing(Layers):
    def between(self, y: torch.Tensor) -> torch.Tensor:
        image = y.view(-1, 1, 2, 4)
        larger = nn.functional.interpolate(image, (5, 7), mode="bilinear")
        return nn.functional.interpolate(larger, (2, 4), mode="bicubic").reshape(y.shape)


class Caching(Layers):
    """Keeps a tensor on itself, as models do with masks and rotary tables."""

    table: torch.Tensor | None = None

    def between(self, y: torch.Tensor) -> torch.Tensor:
        if self.table is None or self.table.shape[0] != y.shape[0]:
            self.table = torch.linspace(0, 1, y.shape[0])[:, None]
        return y * self.table


class Asking(Layers):
    """Does something else when it is exported, as some models do."""

    def between(self, y: torch.Tensor) -> torch.Tensor:
        return y * 3 if torch.compiler.is_exporting() else y.tanh()


class Needing(Layers):
    """Cannot be exported unless it knows that it is."""

    def between(self, y: torch.Tensor) -> torch.Tensor:
        if torch.compiler.is_exporting():
            return y.relu()
        return y.relu() if y.sum() > 1e9 else y.clamp(min=0)


@pytest.mark.parametrize(
    "model", [Rounding, Checkpointing, Resizing, Caching, Asking, Needing], ids=lambda m: m.__name__
)
@pytest.mark.parametrize("n_stages", quickly([2], [1, 2]))
def test_gradients_are_those_of_the_untraced_model(
    model: Callable[[], nn.Module], n_stages: int
) -> None:
    pipe = pipecompile.compile(model(), n_stages, microbatches=2)
    expected, oracle = [], model()
    for piece in X.chunk(2):
        loss = oracle(piece)
        (loss / 2).backward()
        expected.append(loss.detach())
    assert torch.equal(pipe.forward_backward(X), torch.stack(expected).mean())
    for name, param in oracle.named_parameters():
        assert torch.equal(dict(pipe.named_parameters())[name].grad, param.grad), name
    assert torch.equal(pipe.evaluate(X), torch.stack(expected).mean())
    pipe.forward_backward(X[:2])  # another shape is another capture of the same model


def test_reentrant_checkpointing_in_transformers() -> None:
    def build() -> Any:
        torch.manual_seed(0)
        model = models.gpt2(n_layer=2)
        model.gradient_checkpointing_enable({"use_reentrant": True})
        return model

    batches = models.batches("gpt2", 4, 2)
    sgd = jobs.OPTIMIZERS["sgd"]
    found = plain.train_pipeline(
        pipecompile.compile(build(), 2, microbatches=2, optimizer=sgd), batches
    )
    plain.assert_equal(found, plain.train(build(), batches, sgd, 1, 2))


class Hooking(Layers):
    def between(self, y: torch.Tensor) -> torch.Tensor:
        y.register_hook(lambda grad: grad * 2)
        return y


class Detaching(Layers):
    def between(self, y: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            self.first.weight.clamp_(-1, 1)
        return y


class Holding(Layers):
    def between(self, y: torch.Tensor) -> torch.Tensor:
        return Through.apply(self.second, y)


class Through(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, module: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return module(x)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        return None, grads[0]


class Clamping(Layers):
    def between(self, y: torch.Tensor) -> torch.Tensor:
        self.second.weight.data.clamp_(-0.1, 0.1)
        return y


class Filling(Layers):
    """The derivative of what is filled in has as many rows as were filled."""

    def between(self, y: torch.Tensor) -> torch.Tensor:
        y = y.clone()
        y[y[:, 0] > 0] = self.first.bias
        return y


def with_parameter_hook() -> nn.Module:
    model = Caching()
    model.first.weight.register_hook(lambda grad: grad * 2)
    return model


def with_module_hook() -> nn.Module:
    model = Caching()
    model.second.register_full_backward_hook(lambda *_: None)
    return model


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Hooking, "Tensor.register_hook.*torch.autograd.Function"),
        (Clamping, "changes parameter 'second.weight' in place: do it after the optimizer's step"),
        (Filling, r"test_capture\.py:\d+ .*use masks of a fixed shape"),
        (Detaching, "forward changes .*'first.weight' in place"),
        (Holding, "Through.apply is given a Linear"),
        (with_parameter_hook, "'first.weight' has a gradient hook"),
        (with_module_hook, "'second' has a backward hook"),
    ],
)
def test_what_cannot_be_kept_is_refused(model: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises(errors.CaptureError, match=message):
        pipecompile.compile(model(), 1, example_batch=X)


@pytest.mark.slow
@pytest.mark.parametrize("cached", quickly([True], [True, False]))
def test_caches_are_as_on_one_device(cached: bool) -> None:
    """Without one, transformers takes positions that begin again for packed sequences."""
    model = models.llama(num_hidden_layers=1)
    model.config.use_cache = cached
    batch = models.tokens(2)
    length = batch["input_ids"].shape[1]
    batch["position_ids"] = torch.arange(length).repeat(2, 1) % (length // 2)
    pipe = pipecompile.compile(model, 2, microbatches=2, optimizer=jobs.SGD)
    found = plain.train_pipeline(pipe, [batch] * 2)
    plain.assert_equal(found, plain.train(model, [batch] * 2, jobs.SGD, 1, 2))
    assert ("cache" in model(**batch)) is cached
    assert "cache" not in pipe.forward(batch)


@dataclass
class Kept:
    """What a model returns, and pytree does not look into."""

    hidden: torch.Tensor


class Keeping(Layers):
    def forward(self, x: torch.Tensor, whole: bool) -> Any:
        kept = Kept(self.first(x))
        return kept if whole else {"kept": [kept, 3], "y": self.second(kept.hidden)}


def test_objects_that_keep_tensors_to_themselves_are_left_out() -> None:
    model = Keeping()
    pipe = pipecompile.compile(
        model, 2, microbatches=2, loss_fn=lambda output, _: output["y"].square().mean()
    )
    found = pipe.forward((X, False))
    assert found["kept"] == [None, 3]
    assert torch.equal(found["y"], torch.cat([model(x, False)["y"] for x in X.chunk(2)]))
    with pytest.raises(errors.CaptureError, match=r"returns a Kept, .* in a dict"):
        pipe.forward((X, True))


class Asking(Layers):
    """Does something else where it is told that it is traced."""

    def between(self, y: torch.Tensor) -> torch.Tensor:
        self.second.to(y.dtype)  # converts nothing
        if torch.compiler.is_compiling() or torch.compiler.is_exporting():
            return y
        return y.sin()


class Checking(Layers):
    """Has a check that cannot be traced, and leaves it out where it is told."""

    def between(self, y: torch.Tensor) -> torch.Tensor:
        if not torch.compiler.is_compiling() and bool(y.isnan().any()):
            raise ValueError
        return y.sin()


class Picky(Layers):
    """Calls a kernel that takes no such dtype when it is traced, as grouped products do."""

    def between(self, y: torch.Tensor) -> torch.Tensor:
        if not torch.compiler.is_compiling() and type(y) is not torch.Tensor:
            raise RuntimeError("expected dtype BF16")
        return y.sin()


class Copying(Layers):
    def between(self, y: torch.Tensor) -> torch.Tensor:
        kept = copy.deepcopy([y.detach(), self.count])
        y = y + kept[0]
        kept[0] += 1
        return y * kept[1].cos()


class Deciding(Layers):
    """Asks for values that no call changes."""

    def between(self, y: torch.Tensor) -> torch.Tensor:
        seen = torch.ones(4, 4, dtype=torch.bool).tril()
        if seen[-1].all() and not seen.all() and seen.sum().item() == 10:
            y = y.sin() * int(torch.arange(3).max())
        return y * len(torch.tensor([1, 2]).tolist())


class Reading(Layers):
    def between(self, y: torch.Tensor) -> torch.Tensor:
        return y * self.second.weight.data.norm()


class Wrong(Layers):
    """Takes a branch that fails where it is told; the other one cannot be traced."""

    def between(self, y: torch.Tensor) -> torch.Tensor:
        if torch.compiler.is_compiling():
            raise TypeError("no mask")
        return y if y.sum() > 0 else -y


@pytest.mark.parametrize("kind", [Asking, Checking, Picky, Copying, Deciding, Reading])
def test_a_model_hardly_knows_that_it_is_traced(kind: Callable[[], nn.Module]) -> None:
    model, pipe = kind(), pipecompile.compile(kind(), 2, microbatches=2)
    loss = torch.stack([model(x) for x in X.chunk(2)]).mean()
    loss.backward()
    assert torch.equal(pipe.forward_backward(X), loss.detach())
    grads = {name: param.grad for name, param in model.named_parameters()}
    assert plain.equal({n: p.grad for n, p in pipe.named_parameters()}, grads)


def test_of_several_errors_the_one_with_a_cause_is_raised() -> None:
    with pytest.raises(errors.CaptureError, match=r"y if y.sum.*torch.where"):
        pipecompile.compile(Wrong(), 1, example_batch=X)


class Fading(Layers):
    def between(self, y: torch.Tensor) -> torch.Tensor:
        if not self.training:
            with torch.no_grad():
                self.second.weight.mul_(0.5)
        return y


def test_evaluation_that_changes_parameters_is_refused() -> None:
    pipe = pipecompile.compile(Fading(), 2, microbatches=2, optimizer=jobs.SGD)
    pipe.step(X)
    with pytest.raises(errors.CaptureError, match=r"in evaluation, .*'second.weight' in place"):
        pipe.evaluate(X)
