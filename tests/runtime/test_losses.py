"""A loss that is a module trains with the model, wherever it is, as on one device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pipecompile
import pytest
import torch
from pipecompile.errors import CheckpointError, LossError, OptionError, StateError
from safetensors.torch import save_file
from support import plain
from support.gang import Gang
from support.matrix import quickly
from torch import nn

ADAMW = partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.1)
Batch = dict[str, torch.Tensor]


class Net(nn.Module):
    traced_once = True

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.last(self.second(self.first(x).relu()).relu())
        return out


class Head(nn.Module):
    """Has all that a loss may have; with ``model`` its parameters are tied to the model's."""

    traced_once = True

    def __init__(self, model: Net | None = None) -> None:
        super().__init__()
        self.project, self.scale = nn.Linear(5, 5), nn.Parameter(torch.ones(()))
        self.frozen = nn.Parameter(torch.full((5,), 0.9), requires_grad=False)
        self.register_buffer("calls", torch.zeros(()))
        self.entropy = nn.CrossEntropyLoss(weight=torch.arange(1.0, 6.0))
        self.offset = torch.full((5,), 0.1)  # a plain attribute
        self.penalised = model
        if model is not None:
            self.project.bias = model.last.bias

    def forward(self, output: torch.Tensor, batch: Batch) -> torch.Tensor:
        if self.training:
            self.calls += 1
            output = output * 1.5
        output = self.project(output) * self.scale * self.frozen + self.offset
        loss: torch.Tensor = self.entropy(output, batch["y"])
        if self.penalised is not None:
            loss = loss + 0.01 * sum(p.pow(2).sum() for p in self.penalised.parameters())
        return loss


@dataclass
class Output:
    loss: torch.Tensor


class Both(nn.Module):
    """The same on one device."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = Net()
        self.loss_fn = Head(self.model if tied else None)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> Output:
        return Output(self.loss_fn(self.model(x), {"y": y}))


def batches(rows: int, steps: int = 3) -> list[Batch]:
    torch.manual_seed(1)
    return [{"x": torch.randn(rows, 6), "y": torch.randint(5, (rows,))} for _ in range(steps)]


def compiled(n_stages: int, dp: int = 1, tied: bool = False, **options: Any) -> Any:
    both = Both(tied)
    options = {"optimizer": ADAMW, "microbatches": 2} | options
    # the plain loop takes the mean of microbatches, also where classes have weights
    options.setdefault("loss_normalization", "microbatch")
    return pipecompile.compile(both.model, n_stages, dp, loss_fn=both.loss_fn, **options)


def trained(n_stages: int, dp: int, tied: bool, **options: Any) -> tuple[plain.Trained, Any, Any]:
    pipe = compiled(n_stages, dp, tied, **options)
    data = batches(4 * dp)
    run = plain.train_pipeline(pipe, data)
    share = plain.cut(data[0], pipe.data_shards)[pipe.data_shard]
    return run, pipe.evaluate(share), pipe.loss_state_dict()


def check(found: tuple[plain.Trained, Any, Any], dp: int, tied: bool) -> None:
    both, data = Both(tied), batches(4 * dp)
    expected = plain.train(both, data, ADAMW, dp, 2)
    run, evaluated, state = found
    assert all(map(torch.equal, run.losses, expected.losses))
    assert all(map(torch.equal, run.norms, expected.norms))
    assert plain.equal(run.params, dict(both.model.state_dict()))
    mine = dict(both.loss_fn.state_dict())
    calls = mine.pop("calls") / dp  # each replica has its own
    assert torch.equal(state.pop("calls"), calls)
    assert plain.equal(state, mine)
    both.eval()
    with torch.no_grad():
        pieces = [both(**piece).loss for piece in plain.cut(data[0], 2 * dp)]
    means = torch.stack(pieces).view(dp, 2).mean(1)
    assert torch.equal(evaluated, means.mean())


CASES = [
    (n_stages, dp, tied) for n_stages, dp in ((1, 1), (2, 1), (2, 2)) for tied in (False, True)
]


@pytest.mark.parametrize(("n_stages", "dp", "tied"), quickly([(2, 1, False)], CASES))
def test_a_loss_with_parameters_trains_as_on_one_device(n_stages: int, dp: int, tied: bool) -> None:
    check(trained(n_stages, dp, tied), dp, tied)


def test_in_processes_too(gang: Callable[[int], Gang]) -> None:
    for found in gang(2).run(trained, 2, 1, tied=True):
        check(found, 1, tied=True)


def check_divided(found: tuple[plain.Trained, Any, Any], *case: Any, **options: Any) -> None:
    """Processes that divide states have the bits of one that plays them, but for the norm."""
    expected = trained(*case, **options)
    assert all(map(torch.equal, found[0].losses[:1], expected[0].losses))
    for mine, theirs in ((found[0].params, expected[0].params), (found[2], expected[2])):
        assert mine.keys() == theirs.keys()
        assert all(torch.allclose(mine[n], theirs[n], rtol=1e-5, atol=1e-6) for n in mine)


@pytest.mark.slow
def test_replicas_may_divide_it(gang: Callable[[int], Gang]) -> None:
    for found in gang(2).run(trained, 1, 2, tied=True, zero=3):
        check_divided(found, 1, 2, tied=True, zero=3)


@pytest.mark.slow
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("options", [{}, {"zero": 1}, {"zero": 2}, {"schedule": "zb_h1"}])
def test_in_more_processes(
    gang: Callable[[int], Gang], options: dict[str, Any], tied: bool
) -> None:
    for found in gang(4).run(trained, 2, 2, tied, **options):
        if "zero" in options:
            check_divided(found, 2, 2, tied, **options)
        else:
            check(found, 2, tied)


def test_its_parameters_have_names_and_dtypes_of_their_own() -> None:
    both = Both()
    pipe = compiled(2, example_batch=batches(4)[0], precision="bf16")
    pipe.step(batches(4)[0])
    names = [name for name, _ in pipe.named_parameters()]
    theirs = [f"loss_fn.{name}" for name, _ in both.loss_fn.named_parameters()]
    assert names == [name for name, _ in both.model.named_parameters()] + theirs
    assert {p.dtype for p in pipe.parameters()} == {torch.float32}
    both.model.load_state_dict(pipe.state_dict(), strict=True)
    both.loss_fn.load_state_dict(pipe.loss_state_dict(), strict=True)
    pipe.load_loss_state_dict(Both().loss_fn.state_dict())
    assert plain.equal(pipe.loss_state_dict(), Both().loss_fn.state_dict())
    with pytest.raises(StateError, match=r"missing \['loss_fn.scale'"):
        pipe.load_loss_state_dict({})
    assert pipe.forward({"x": batches(4)[0]["x"]}).shape == (4, 5)


@pytest.mark.parametrize("tied", quickly([True], [False, True]))
def test_checkpoints_have_it(tmp_path: Path, tied: bool) -> None:
    first, second = batches(8, 2)
    pipe = compiled(2, 1, tied)
    pipe.step(first)
    pipe.save(tmp_path)
    other = compiled(1, 1, tied, example_batch=first)
    assert other.load(tmp_path) == 1
    assert torch.equal(other.step(second), pipe.step(second))
    assert plain.equal(other.loss_state_dict(), pipe.loss_state_dict())
    without = pipecompile.compile(
        Net(), 1, loss_fn=lambda o, b: o.mean(), optimizer=ADAMW, example_batch={"x": first["x"]}
    )
    with pytest.raises(CheckpointError, match=r"loss_fn\..*(is not in the model|is tied)"):
        without.load(tmp_path)


def test_weights_alone_leave_it_as_it_is(tmp_path: Path) -> None:
    save_file(
        {n: torch.ones_like(t) for n, t in Net().state_dict().items()}, tmp_path / "a.safetensors"
    )
    pipe = compiled(2, weights=tmp_path / "a.safetensors", example_batch=batches(4)[0])
    assert all(t.eq(1).all() for t in pipe.state_dict().values())
    assert plain.equal(pipe.loss_state_dict(), Both().loss_fn.state_dict())


@pytest.mark.slow
def test_a_loss_without_data_is_initialised() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Linear(5, 5)

        def forward(self, output: torch.Tensor, batch: Batch) -> torch.Tensor:
            return nn.functional.cross_entropy(self.scale(output), batch["y"])

    def states(n_stages: int) -> Any:
        with torch.device("meta"):
            model, loss = Net(), Scaled()
        pipe = pipecompile.compile(
            model, n_stages, loss_fn=loss, optimizer=ADAMW, seed=3, microbatches=2
        )
        pipe.step(batches(4)[0])
        return pipe.state_dict() | pipe.loss_state_dict()

    assert plain.equal(states(1), states(2))


class Entropy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.entropy, self.drop = nn.CrossEntropyLoss(torch.arange(1.0, 6.0)), nn.Dropout(0.5)

    def forward(self, output: torch.Tensor, batch: Batch) -> torch.Tensor:
        loss: torch.Tensor = self.entropy(self.drop(output), batch["y"])
        return loss


def test_a_loss_without_parameters_is_evaluated_in_its_mode() -> None:
    (batch,) = batches(4, 1)
    model, loss = Both().model, Entropy()
    pipe = pipecompile.compile(model, 2, loss_fn=loss, microbatches=1)
    assert torch.equal(pipe.evaluate(batch), loss.eval()(model(batch["x"]), batch))
    assert [*pipe.loss_state_dict()] == ["entropy.weight"]


def test_a_loss_may_train_beside_a_frozen_model() -> None:
    both = Both()
    both.model.requires_grad_(False)
    pipe = pipecompile.compile(both.model, 2, loss_fn=both.loss_fn, optimizer=ADAMW)
    (batch,) = batches(4, 1)
    before = pipe.step(batch)
    assert pipe.step(batch) < before
    assert plain.equal(pipe.state_dict(), both.model.state_dict())
    both.loss_fn.requires_grad_(False)
    with pytest.raises(LossError, match="nothing to train"):
        pipecompile.compile(both.model, 2, loss_fn=both.loss_fn, example_batch=batch)


def test_names_that_the_model_has_already_are_refused() -> None:
    model = Net()
    model.loss_fn = nn.Linear(1, 1)
    with pytest.raises(OptionError, match="the model has an attribute 'loss_fn' too"):
        pipecompile.compile(model, 2, loss_fn=Head())


def test_a_loss_that_is_a_part_of_the_model_has_its_names_there() -> None:
    model = Net()
    model.criterion = Head()
    pipe = pipecompile.compile(model, 2, loss_fn=model.criterion, optimizer=ADAMW)
    pipe.step(batches(4)[0])
    names = {name for name, _ in pipe.named_parameters()}
    assert "criterion.scale" in names
    assert not any(name.startswith("loss_fn") for name in names)
    model.load_state_dict(pipe.state_dict(), strict=True)
