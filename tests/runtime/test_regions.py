"""What tracing cannot see through runs eagerly inside one node, and trains as on one device."""

from __future__ import annotations

import copy
import gc
import warnings
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest import mock

import pipecompile
import pytest
import torch
from pipecompile.compiler.regions import site
from pipecompile.errors import CaptureError, OptionError, PartitionError, StateError
from support import plain
from support.gang import Gang
from support.matrix import quickly
from torch import nn

ADAMW = partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.1)
WIDTH, WORDS = 8, 16
Batch = dict[str, torch.Tensor]


@dataclass
class Output:
    loss: torch.Tensor


class Experts(nn.Module):
    """A mixture whose tokens are gathered by index; some of its experts get none."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, count, bias=False)
        self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(count))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = x.reshape(-1, WIDTH)
        weights, chosen = self.router(tokens).softmax(-1).topk(2)
        out = torch.zeros_like(tokens)
        for i, expert in enumerate(self.experts):
            rows, which = torch.where(chosen == i)
            if rows.numel():
                made = expert(tokens[rows]) * weights[rows, which, None]
                out.index_add_(0, rows, made.to(out.dtype))
        return out.view_as(x)


class Counting(nn.Module):
    """Updates buffers, in place and not, and returns a structure."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("mean", torch.zeros(WIDTH))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: torch.Tensor, twice: bool) -> dict[str, Any]:
        if self.training:
            self.mean.mul_(0.9).add_(x.detach().mean((0, 1)), alpha=0.1)
            self.calls = self.calls + 1
        if bool((x.sum() > 0).item()):
            x = self.scale(x).to(x.dtype)
        return {"x": x * 2 if twice else x, "extra": None, "mean": self.mean.clone()}


class Choosing(nn.Module):
    """Draws, and shares its parameter with the model's head."""

    def __init__(self, head: nn.Linear) -> None:
        super().__init__()
        self.head, self.drop = head, nn.Dropout(0.3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kept = self.drop(x)[x > 0]
        return x + kept.sum() * self.head.weight.mean() + (x + x * 0.1).relu()


class Dropping(nn.Module):
    """Leaves layers out by chance, whose parameters then get no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            if not self.training or torch.rand(()) > 0.5:
                x = x + layer(x).tanh()
        return x


class Net(nn.Module):
    def __init__(self, kind: str, count: int = 6) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(WORDS, WIDTH), nn.Linear(WIDTH, WORDS)
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(3))
        make: dict[str, Callable[[], nn.Module]] = {
            "experts": lambda: Experts(count),
            "counting": Counting,
            "choosing": lambda: Choosing(self.head),
            "dropping": Dropping,
            "sorted": Sorted,
        }
        self.layers = nn.ModuleList(make[kind]() for _ in range(3))
        self.kind = kind

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> Output:
        h = self.embed(x)
        for norm, layer in zip(self.norms, self.layers, strict=True):
            if self.kind == "counting":
                made = layer(norm(h), twice=True)
                h = h + made["x"] + made["mean"]
            else:
                h = h + layer(h if self.kind == "choosing" else norm(h))
        loss = nn.functional.cross_entropy(self.head(h).flatten(0, 1), y.flatten())
        return Output(loss)


def batches(rows: int, steps: int = 3) -> list[Batch]:
    torch.manual_seed(1)
    return [
        {"x": torch.randint(WORDS, (rows, 5)), "y": torch.randint(WORDS, (rows, 5))}
        for _ in range(steps)
    ]


def trained(kind: str, n_stages: int, dp: int, **options: Any) -> tuple[plain.Trained, Any]:
    options = {"optimizer": ADAMW, "microbatches": 2} | options
    count = options.pop("count", 6)
    pipe = pipecompile.compile(Net(kind, count), n_stages, dp, **options)
    data = batches(4 * dp)
    run = plain.train_pipeline(pipe, data)
    return run, pipe.evaluate(plain.cut(data[0], pipe.data_shards)[pipe.data_shard])


def check(found: tuple[plain.Trained, Any], kind: str, dp: int, count: int = 6) -> None:
    model, data = Net(kind, count), batches(4 * dp)
    expected = plain.train(model, data, ADAMW, dp, 2)
    run, evaluated = found
    assert all(map(torch.equal, run.losses, expected.losses))
    assert all(map(torch.equal, run.norms, expected.norms))
    assert plain.equal(run.params, model.state_dict())
    for mine, theirs in zip(run.grads, expected.grads, strict=True):
        assert all(torch.equal(mine[n], theirs[n]) for n in mine)
    if dp == 1:
        model.eval()
        with torch.no_grad():
            losses = [model(**piece).loss for piece in plain.cut(data[0], 2)]
        assert torch.equal(evaluated, torch.stack(losses).mean())


CASES = [
    (kind, n_stages, dp)
    for kind in ("experts", "counting")
    for n_stages, dp in ((1, 1), (2, 1), (4, 1), (2, 2))
    if kind == "experts" or dp == 1  # each replica has buffers of its own
]
CHOSEN = [("counting", 4, 1)]


@pytest.mark.parametrize(("kind", "n_stages", "dp"), quickly(CHOSEN, CASES))
def test_regions_train_as_on_one_device(kind: str, n_stages: int, dp: int) -> None:
    check(trained(kind, n_stages, dp), kind, dp)


@pytest.mark.slow
@pytest.mark.parametrize("zero", [1, 2, 3])
@pytest.mark.parametrize("schedule", ["1f1b", "zb_h1"])
def test_experts_without_tokens_are_left_alone(zero: int, schedule: str) -> None:
    """Most of 40 experts get no gradient: no momentum nor weight decay moves them."""
    make = partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.1)
    found = trained("experts", 2, 2, zero=zero, schedule=schedule, count=40, optimizer=make)
    model = Net("experts", 40)
    expected = plain.train(model, batches(8), make, 2, 2)
    for name, value in model.state_dict().items():
        assert torch.allclose(found[0].params[name], value, rtol=1e-5, atol=1e-6), name
    for mine, theirs in zip(found[0].grads, expected.grads, strict=True):
        assert {n for n in theirs if "experts" in n} == {n for n in mine if "experts" in n}


@pytest.mark.slow
@pytest.mark.parametrize("count", quickly([6], [6, 40]))
def test_in_processes_too(gang: Callable[[int], Gang], count: int) -> None:
    for found in gang(2).run(trained, "experts", 2, 1, count=count):
        check(found, "experts", 1, count)


@pytest.mark.slow
@pytest.mark.parametrize("zero", [0, 1, 3])
def test_in_more_processes(gang: Callable[[int], Gang], zero: int) -> None:
    expected = trained("experts", 2, 2, count=40)
    for found in gang(4).run(trained, "experts", 2, 2, count=40, zero=zero):
        for name, value in expected[0].params.items():
            assert torch.allclose(found[0].params[name], value, rtol=1e-5, atol=1e-6), name


@pytest.mark.slow
@pytest.mark.parametrize("n_stages", [1, 2])
@pytest.mark.parametrize("kind", ["choosing", "dropping"])
def test_what_a_region_draws_is_the_same_in_any_division(kind: str, n_stages: int) -> None:
    one = trained(kind, 1, 1, seed=3)[0]
    other = trained(kind, 2, 1, seed=3, remat="full")[0]
    assert all(map(torch.equal, one.losses, other.losses))
    assert plain.equal(one.params, other.params)
    pipe = pipecompile.compile(
        Net(kind), n_stages, optimizer=ADAMW, microbatches=2, verify=2, max_grad_norm=0.1
    )
    for batch in batches(4):
        pipe.step(batch)
    assert "identical to the last bit" in pipe.verification


class Skipping(nn.Module):
    """What comes of it does not depend on what it is given, by what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.scale if bool(x.isnan().any()) else self.scale.expand_as(x)


class Chain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.inner, self.last = nn.Linear(WIDTH, WIDTH), Experts(2), Skipping()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.inner(self.first(x))).square().mean()


def test_no_gradient_from_one_region_to_another() -> None:
    """Regions without one are left alone; what is traced before them gets zeros, which is said."""
    pipe = pipecompile.compile(
        Chain(), 1, optimizer=ADAMW, microbatches=1, eager_modules=["inner", "last"]
    )
    with pytest.warns(UserWarning, match="'last'.* passes no gradient to what was computed"):
        pipe.forward_backward(torch.randn(2, 5, WIDTH))
    grads = {name: param.grad for name, param in pipe.named_parameters()}
    assert not grads["first.weight"].any()
    assert [n for n, grad in grads.items() if grad is not None and "first" not in n] == [
        "last.scale"
    ]


def test_nothing_holds_a_call_that_is_over() -> None:
    """Nor needs Python's collector of circles to let it go."""
    alive: weakref.WeakSet[site.Saved] = weakref.WeakSet()
    pipe = pipecompile.compile(Net("experts"), 2, microbatches=2, example_batch=batches(4)[0])
    made = site.Saved.__init__

    def noted(self: site.Saved, *args: Any) -> None:
        alive.add(self)
        made(self, *args)

    gc.disable()
    try:
        with mock.patch.object(site.Saved, "__init__", noted):
            pipe.forward_backward(batches(4)[0])
            assert not alive
    finally:
        gc.enable()


class Halves(nn.Module):
    def forward(self, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return a * b if bool(a.sum() > b.sum()) else a + a * b, a


class TwoViews(nn.Module):
    """Gives a region two views of one tensor, and gets one back."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.mix, self.last = nn.Linear(4, 4), Halves(), nn.Linear(2, 1)

    def forward(self, x: torch.Tensor) -> Output:
        h = self.first(x)
        made, same = self.mix(h[:, :2], h[:, 2:])
        return Output(self.last(made * same).mean())


@pytest.mark.parametrize("n_stages", quickly([2], [1, 2]))
def test_operands_may_share_memory(n_stages: int) -> None:
    data = [{"x": torch.randn(4, 4)} for _ in range(2)]
    pipe = pipecompile.compile(TwoViews(), n_stages, optimizer=ADAMW, microbatches=2)
    run = plain.train_pipeline(pipe, data)
    model = TwoViews()
    expected = plain.train(model, data, ADAMW, 1, 2)
    assert all(map(torch.equal, run.losses, expected.losses))
    assert plain.equal(run.params, model.state_dict())


@pytest.mark.slow
def test_a_plan_says_what_runs_eagerly_and_what_it_costs() -> None:
    options: dict[str, Any] = {"example_batch": batches(4)[0], "microbatches": 2}
    said = r"runs eagerly, each call as one node on one stage: layers\.\*; eager_modules=\['layers"
    with pytest.warns(UserWarning, match=said):
        pipe = pipecompile.compile(Net("experts"), 2, **options)
    (note,) = [note for name, note in pipe.plan.notes if name == "capture"]
    assert "layers.* runs eagerly, each call as one node (3 of them)" in note
    assert pipe.plan.stages[0].forward_s > 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipecompile.compile(Net("experts"), 2, eager_modules=["layers.*"], **options)
    with pytest.raises(PartitionError, match=r"only \d units .*layers.\* runs eagerly"):
        pipecompile.compile(Net("experts"), 9, eager_modules=["layers.*"], **options)


def test_a_user_may_ask_for_it() -> None:
    model = nn.Sequential(
        nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.ReLU()), nn.Linear(4, 1)
    )
    other = copy.deepcopy(model)
    data = [{"input": torch.randn(4, 4)} for _ in range(2)]
    loss = lambda output, batch: output.square().mean()  # noqa: E731
    make = partial(torch.optim.SGD, lr=0.1)
    options: dict[str, Any] = {"loss_fn": loss, "optimizer": make, "microbatches": 1}
    pipe = pipecompile.compile(model, 2, eager_modules=["1"], **options)
    plain_optimizer = make(other.parameters())
    for batch in data:
        pipe.step(batch)
        loss(other(batch["input"]), batch).backward()
        plain_optimizer.step()
        plain_optimizer.zero_grad()
    assert plain.equal(pipe.state_dict(), other.state_dict())
    options |= {"example_batch": data[0]}
    with pytest.raises(
        OptionError, match=r"'layers\.\*' stands for no submodule.* has '0', '1', '1.0'"
    ):
        pipecompile.compile(model, 2, eager_modules=["layers.*"], **options)


class Stateful(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.seen, self.linear = 0, nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen += 1
        return self.linear(x) if bool(x.sum() > 0) else x


class Selecting(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[x > 0]


@pytest.mark.parametrize(
    ("inner", "message"),
    [
        (Stateful(), "module 'inner' cannot run eagerly inside a graph: it changes 'seen'"),
        (Selecting(), "module 'inner' cannot run eagerly .* shapes of its results depend on data"),
    ],
)
def test_what_cannot_be_a_region_is_refused(inner: nn.Module, message: str) -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.inner = nn.Linear(4, 4), inner

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(self.first(x)).sum()

    with pytest.raises(CaptureError, match=message):
        pipecompile.compile(Outer(), 1, example_batch={"x": torch.randn(2, 4)})


class Sizes(nn.Module):
    """Returns numbers that only its own weights and data tell: no node can."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(WIDTH, 3)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, list[int]]:
        chosen = self.lin(x).argmax(-1)
        return chosen.argsort(), torch.bincount(chosen, minlength=3).tolist()


class Sorted(nn.Module):
    """Experts on tokens that are sorted by them, in parts of any size."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes = Sizes()
        self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = x.reshape(-1, WIDTH)
        order, sizes = self.sizes(tokens)
        parts = tokens[order].split(sizes)
        made = torch.cat([e(part) for e, part in zip(self.experts, parts, strict=True)])
        return torch.zeros_like(tokens).index_copy(0, order, made).view_as(x)


@pytest.mark.slow
def test_what_is_around_it_runs_eagerly_where_a_part_cannot() -> None:
    model = Net("sorted")
    pipe = pipecompile.compile(model, 2, optimizer=ADAMW, microbatches=2, verify=2)
    for batch in batches(4):
        pipe.step(batch)
    assert "identical to the last bit" in pipe.verification
    (note,) = [note for name, note in pipe.plan.notes if name == "capture"]
    assert "layers.* runs eagerly" in note
    assert "sizes" not in note


class Sometimes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(()))
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if bool((x * self.weight).sum() < 100):
            self.mean = self.mean + 1
        return (x * self.weight).sum()


def test_updates_that_depend_on_data_are_an_error() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Sometimes()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x)

    pipe = pipecompile.compile(Outer(), 1, example_batch={"x": torch.ones(2, 4)})
    pipe.forward_backward({"x": torch.ones(2, 4)})
    with pytest.raises(StateError, match="changes 'mean' in some calls and not in others"):
        pipe.forward_backward({"x": torch.full((2, 4), 1e3)})
