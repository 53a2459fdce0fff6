"""Frozen parameters that forward updates: a moving average of those that are trained."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pipecompile
import pytest
import torch
from support import jobs, plain
from support.gang import Gang
from support.matrix import quickly
from torch import nn
from torch.nn.functional import cross_entropy, normalize
from torch.nn.utils import parameters_to_vector, vector_to_parameters

WIDTH, ROWS, STEPS = 8, 4, 3
MOMENTUM = 0.75
Update = Callable[[nn.Module, nn.Module], None]


def each(of_pair: Callable[[torch.Tensor, torch.Tensor], None]) -> Update:
    def update(online: nn.Module, average: nn.Module) -> None:
        for param, mean in zip(online.parameters(), average.parameters(), strict=True):
            of_pair(param, mean)

    return update


@each
def new_memory(param: torch.Tensor, mean: torch.Tensor) -> None:
    mean.data = mean.data * MOMENTUM + param.data * (1 - MOMENTUM)


@each
def in_place(param: torch.Tensor, mean: torch.Tensor) -> None:
    mean.data.mul_(MOMENTUM).add_(param.data, alpha=1 - MOMENTUM)


@each
def both(param: torch.Tensor, mean: torch.Tensor) -> None:
    """What was read before another memory was given stays what it was."""
    mean.mul_(1.01)
    before, view = mean.data, mean.view(-1)
    mean.data = before * MOMENTUM + param.data * (1 - MOMENTUM)
    mean.lerp_(before, 0.1)
    mean.data += 0.01 * view.view_as(mean)


def all_at_once(online: nn.Module, average: nn.Module) -> None:
    torch._foreach_lerp_(list(average.parameters()), list(online.parameters()), 1 - MOMENTUM)


def by_state(online: nn.Module, average: nn.Module) -> None:
    new, old = online.state_dict(), average.state_dict()
    average.load_state_dict({n: old[n] * MOMENTUM + new[n] * (1 - MOMENTUM) for n in old})


def by_vector(online: nn.Module, average: nn.Module) -> None:
    new, old = (parameters_to_vector(m.parameters()) for m in (online, average))
    vector_to_parameters(old * MOMENTUM + new * (1 - MOMENTUM), average.parameters())


WAYS = (new_memory, in_place, both, all_at_once, by_state, by_vector)


def encoder() -> nn.Sequential:
    layers = [each for _ in range(3) for each in (nn.Linear(WIDTH, WIDTH), nn.Tanh())]
    return nn.Sequential(*layers)


class Contrasting(nn.Module):
    """Momentum contrast: keys of an averaged encoder, and a queue of earlier ones."""

    def __init__(self, update: Update = new_memory, when: str = "training") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.online, self.update, self.when = encoder(), update, when
        self.average = copy.deepcopy(self.online).requires_grad_(False)
        self.register_buffer("queue", normalize(torch.randn(16, WIDTH), dim=-1))
        self.register_buffer("at", torch.tensor(0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        query = normalize(self.online(x), dim=-1)
        with torch.no_grad():
            if self.training == (self.when == "training"):
                self.update(self.online, self.average)
            key = normalize(self.average(x.flip(0)), dim=-1)
        logits = torch.cat([(query * key).sum(-1, keepdim=True), query @ self.queue.clone().T], 1)
        if self.training:
            with torch.no_grad():
                self.queue[(self.at + torch.arange(len(key))) % len(self.queue)] = key
                self.at.add_(len(key)).remainder_(len(self.queue))
        return cross_entropy(logits / 0.1, torch.zeros(len(x), dtype=torch.long))


def data() -> list[torch.Tensor]:
    torch.manual_seed(5)
    return [torch.randn(ROWS, WIDTH) for _ in range(STEPS)]


def plainly(update: Update) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    """Losses of steps and of evaluations in between, and the state after them."""
    model, losses = Contrasting(update), []
    trained = [param for param in model.parameters() if param.requires_grad]
    optimizer = jobs.OPTIMIZERS["adamw"](trained)
    for batch in data():
        pieces = [model(piece) for piece in batch.chunk(2)]
        for loss in pieces:
            (loss / 2).backward()
        losses.append(torch.stack(pieces).detach().mean())
        nn.utils.clip_grad_norm_(trained, 0.5)
        optimizer.step()
        optimizer.zero_grad()
        model.eval()
        with torch.no_grad():
            losses.append(torch.stack([model(piece) for piece in batch.chunk(2)]).mean())
        model.train()
    return losses, copy.deepcopy(model.state_dict())


def piped(update: Update = new_memory, **options: Any) -> pipecompile.Pipeline:
    return pipecompile.compile(
        Contrasting(update),
        **{"n_stages": 2, "microbatches": 2, "max_grad_norm": 0.5, **options},
        optimizer=jobs.OPTIMIZERS["adamw"],
    )


def trained(pipe: pipecompile.Pipeline) -> tuple[list[torch.Tensor], dict[str, Any]]:
    losses = [use(batch) for batch in data() for use in (pipe.step, pipe.evaluate)]
    return losses, pipe.state_dict()


def assert_same(found: Any, expected: Any) -> None:
    assert all(torch.equal(a, b) for a, b in zip(found[0], expected[0], strict=True))
    assert plain.equal(found[1], expected[1])


@pytest.mark.parametrize("update", quickly([both, by_vector], WAYS))
def test_averages_are_those_of_one_device(update: Update) -> None:
    assert_same(trained(piped(update)), plainly(update))


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", quickly([{"n_stages": 3}], [{"n_stages": 1, "schedule": "1f1b"}, {"n_stages": 3}])
)
def test_on_any_number_of_stages(options: dict[str, Any]) -> None:
    assert_same(trained(piped(**options)), plainly(new_memory))


def test_they_are_no_parameters_of_the_pipeline() -> None:
    """The optimizer has nothing of them, as on one device; the state dict has all."""
    pipe = piped(example_batch=data()[0])
    online = [n for n, p in Contrasting().named_parameters() if p.requires_grad]
    assert [name for name, _ in pipe.named_parameters()] == online
    assert list(pipe.state_dict()) == list(Contrasting().state_dict())
    averages = sum(p.nbytes for p in Contrasting().average.parameters())
    assert all(stage.memory.buffers > averages for stage in pipe.plan.stages)


def resumed(folder: str, zero: int) -> Any:
    """Two steps on this process's rows, saved, and a third one by another pipeline."""
    options: dict[str, Any] = {"dp": 2, "microbatches": 1, "zero": zero, "n_stages": 1}
    pipe = piped(**options)
    *first, last = (batch.chunk(2)[int(os.environ["RANK"])] for batch in data())
    for batch in first:
        pipe.step(batch)
    pipe.save(folder)
    state = pipe.state_dict()
    again = piped(**options, example_batch=last)
    again.load(folder)
    assert plain.equal(again.state_dict(), state)
    return again.step(last), again.state_dict()


def resumed_plainly() -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    """Replicas have averages and queues of their own; a checkpoint has those of the first."""
    model = Contrasting()
    trained = [param for param in model.parameters() if param.requires_grad]
    own = [n for n in model.state_dict() if not n.startswith("online")]
    optimizer = jobs.OPTIMIZERS["adamw"](trained)
    kept = [copy.deepcopy(model.state_dict()) for _ in range(2)]
    for step, batch in enumerate(data()):
        losses, grads = [], []
        if step == STEPS - 1:
            kept = [kept[0], kept[0]]
        for replica, piece in enumerate(batch.chunk(2)):
            model.load_state_dict({n: kept[replica][n] for n in own}, strict=False)
            losses.append(model(piece))
            losses[-1].backward()
            grads.append([param.grad for param in trained])
            model.zero_grad()
            kept[replica] = copy.deepcopy(model.state_dict())
        for param, *parts in zip(trained, *grads, strict=True):
            param.grad = torch.stack(parts).sum(0) / 2
        nn.utils.clip_grad_norm_(trained, 0.5)
        optimizer.step()
        optimizer.zero_grad()
    last = torch.stack(losses).detach().mean()
    return [last], kept[0] | {n: t.detach() for n, t in model.named_parameters() if n not in own}


@pytest.mark.slow
@pytest.mark.parametrize("zero", [0, pytest.param(3, marks=pytest.mark.slow)])
def test_processes_resume(gang: Callable[[int], Gang], tmp_path: Path, zero: int) -> None:
    expected = resumed_plainly()
    for loss, state in gang(2).run(resumed, str(tmp_path), zero):
        if zero:  # the norm is taken of rows
            assert all(torch.allclose(state[n], each) for n, each in expected[1].items())
        else:
            assert_same(([loss], state), expected)


@pytest.mark.slow
def test_verify_follows_them() -> None:
    pipe = piped(dp=2, microbatches=1, verify=2)
    for batch in data():
        pipe.step(batch)


class Assigning(nn.Module):
    """Gives a tensor another memory."""

    def __init__(self, assign: Callable[[Any], None]) -> None:
        super().__init__()
        self.assign, self.inner, self.outer = assign, nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 1)
        self.frozen = nn.Parameter(torch.ones(WIDTH), requires_grad=False)
        self.register_buffer("seen", torch.zeros(WIDTH))
        self.same = self.seen

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.inner(x) * self.frozen
        self.assign(self)
        return (self.outer(x) + (self.seen * self.same).sum()).square().mean()


def halve(module: Any) -> None:
    module.inner.weight.data = module.inner.weight / 2


def cut(module: Any) -> None:
    module.frozen.data = module.frozen[:2]


def count(module: Any) -> None:
    module.seen.data = module.seen.data + 1


@pytest.mark.parametrize(
    ("assign", "message"),
    [
        (halve, r"a tensor that needs a gradient another memory \(.data = ...\)"),
        (cut, r"parameter 'frozen': forward replaces its float32\[8\].* by float32\[2\]"),
    ],
)
def test_what_cannot_be_kept_is_refused(assign: Any, message: str) -> None:
    pipe = pipecompile.compile(Assigning(assign), 2, microbatches=1, optimizer=jobs.SGD)
    with pytest.raises(pipecompile.errors.CaptureError, match=message):
        pipe.step(data()[0])


def test_buffers_get_another_memory_under_all_their_names() -> None:
    torch.manual_seed(0)
    model = Assigning(count)
    pipe = pipecompile.compile(copy.deepcopy(model), 2, microbatches=2, optimizer=jobs.SGD)
    pipe.step(data()[0])
    for piece in data()[0].chunk(2):
        model(piece)
    assert torch.equal(pipe.state_dict()["seen"], model.seen)
    assert model.seen.tolist() == [2.0] * WIDTH


def test_an_update_in_evaluation_alone_is_refused() -> None:
    pipe = pipecompile.compile(
        Contrasting(when="evaluation"), 2, microbatches=1, optimizer=jobs.SGD
    )
    pipe.step(data()[0])
    with pytest.raises(pipecompile.errors.CaptureError, match=r"'average.*in the first graph it"):
        pipe.evaluate(data()[0])
