"""Evaluation and forward: the plain model's, in its mode; and batches of other shapes and kinds."""

from __future__ import annotations

import copy
from typing import Any

import pipecompile
import pytest
import torch
from pipecompile.errors import PipecompileError
from support import jobs, models, plain
from support.matrix import quickly
from torch import nn

# -- evaluation --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", quickly(["gpt2"], models.MODELS))
def test_evaluate_and_forward_equal_the_plain_model(name: str) -> None:
    pipe, model = jobs.pipeline(name, 3, 2, 2), models.build(name)
    batch = models.batches(name, 8, 1)[0]
    pipe.step(batch)
    model.load_state_dict(pipe.state_dict(), strict=True)
    model.eval()
    with torch.no_grad():
        pieces = [[model(**x) for x in plain.cut(shard, 2)] for shard in plain.cut(batch, 2)]
        losses = [torch.stack([out.loss for out in shard]).mean() for shard in pieces]
    assert torch.equal(pipe.evaluate(batch), torch.stack(losses).mean())
    if name == "mixtral":  # the balance of its router couples rows
        with pytest.raises(pipecompile.errors.BatchError, match="'aux_loss'"):
            pipe.forward(batch)
        return
    found = pipe.forward(batch)
    assert type(found) is type(pieces[0][0])
    expected = torch.cat([out.logits for shard in pieces for out in shard])
    assert torch.equal(found.logits, expected)


def test_evaluation_stashes_nothing_and_changes_nothing() -> None:
    pipe = jobs.pipeline("gpt2", 2, 1, 2)
    batch = models.batches("gpt2", 4, 1)[0]
    pipe.evaluate(batch)
    assert all(stage.stash_bytes == 0 for stage in pipe.programs.stages)
    before = pipe.state_dict()
    pipe.evaluate(batch)
    assert plain.equal(before, pipe.state_dict())
    assert all(param.grad is None for param in pipe.parameters())


class Moody(nn.Module):
    """What a mode changes: dropout, a batch norm's buffers; and a norm that stays in evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.norm, self.frozen = nn.BatchNorm1d(8), nn.BatchNorm1d(8).eval()
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        hidden = self.frozen(self.dropout(self.norm(self.first(x))))
        return {"loss": self.second(hidden).square().mean(), "hidden": hidden}


@pytest.mark.parametrize("evaluate_first", quickly([True], [False, True]))
def test_evaluation_draws_nothing_and_counts_nothing(evaluate_first: bool) -> None:
    """Every part evaluates in evaluation mode, and afterwards trains in its own."""
    torch.manual_seed(0)
    model, batch = Moody(), torch.randn(8, 8)
    pipe = pipecompile.compile(model, 2, microbatches=2, optimizer=jobs.SGD)
    if not evaluate_first:
        pipe.step(batch)
    pipe.evaluate(batch)
    before = pipe.state_dict()
    judge = copy.deepcopy(model).eval()
    judge.load_state_dict(before)
    with torch.no_grad():
        pieces = [judge(piece) for piece in batch.chunk(2)]
    for _ in range(2):
        assert torch.equal(pipe.evaluate(batch), torch.stack([p["loss"] for p in pieces]).mean())
        hidden = torch.cat([p["hidden"] for p in pieces])
        assert torch.equal(pipe.forward(batch)["hidden"], hidden)
    assert plain.equal(pipe.state_dict(), before)
    for rows in (batch, batch[:4]):  # the program that is there, and a new one
        before = pipe.state_dict()
        pipe.step(rows)
        after = pipe.state_dict()
        assert after["norm.num_batches_tracked"] == before["norm.num_batches_tracked"] + 2
        assert not torch.equal(after["norm.running_mean"], before["norm.running_mean"])
        assert torch.equal(after["frozen.running_mean"], before["frozen.running_mean"])
    assert pipe.step(batch) != pipe.evaluate(batch)


def test_training_after_evaluating_first() -> None:
    """The stages are chosen for training, also when something else comes first."""
    batches = models.batches("gpt2", 4, 3)
    pipe, model = jobs.pipeline("gpt2", 3, 1, 2), models.build("gpt2")
    pipe.forward(batches[0])
    trained_first = jobs.pipeline("gpt2", 3, 1, 2)
    trained_first.compile_for(batches[0])
    assert [s.params for s in pipe.plan.stages] == [s.params for s in trained_first.plan.stages]
    found = plain.train_pipeline(pipe, batches)
    plain.assert_equal(found, plain.train(model, batches, jobs.OPTIMIZERS["adamw"], 1, 2))


@pytest.mark.parametrize("name", quickly(["gpt2"], ["gpt2", "llama"]))
def test_evaluation_takes_a_ragged_batch(name: str) -> None:
    pipe, model = jobs.pipeline(name, 2, 1, 4), models.build(name).eval()
    pipe.step(models.batches(name, 8, 1)[0])
    batch = models.batches(name, 3, 1)[0]
    model.load_state_dict(pipe.state_dict())
    with torch.no_grad():
        expected = model(**batch).loss
    torch.testing.assert_close(pipe.evaluate(batch), expected, rtol=1e-6, atol=0)


# -- shapes ------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_another_shape_is_another_program_on_the_same_stages(name: str) -> None:
    torch.manual_seed(3)
    batches = [models.MODELS[name][1](4, length) for length in (12, 7, 12, 9)]  # type: ignore[call-arg]
    pipe, model = jobs.pipeline(name, 3, 1, 2), models.build(name)
    found = plain.train_pipeline(pipe, batches)
    plain.assert_equal(found, plain.train(model, batches, jobs.OPTIMIZERS["adamw"], 1, 2))


def test_microbatches_are_chosen_and_shown() -> None:
    model = models.gpt2(n_layer=1)
    pipe = pipecompile.compile(model, 2, example_batch=models.tokens(12))
    assert pipe.plan.microbatches == 6  # of 1, 2, 3, 4, 6, 12 the nearest to 4 × 2
    assert pipe.plan.microbatch_rows == 2
    assert pipecompile.compile(model, 1, example_batch=models.tokens(12)).plan.microbatches == 1


@pytest.mark.parametrize("kind", ["tuple", "list", "tensor", "dict"])
def test_kinds_of_batches(kind: str) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(*(nn.Linear(8, 8) for _ in range(3)))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layers(x)

    torch.manual_seed(0)
    x, y = torch.randn(4, 8), torch.randn(4, 8)
    batch = {"tuple": (x, y), "list": [x, y], "tensor": x, "dict": {"x": x, "target": y}}[kind]

    def loss_fn(output: torch.Tensor, batch: Any) -> torch.Tensor:
        target = {"tensor": lambda: 0.0, "dict": lambda: batch["target"]}.get(
            kind, lambda: batch[1]
        )
        return (output - target()).square().mean()

    model = Model()
    pipe = pipecompile.compile(model, 2, microbatches=2, loss_fn=loss_fn)
    loss = pipe.forward_backward(batch)
    target = torch.zeros_like(y) if kind == "tensor" else y
    expected = torch.stack(
        [(model(a) - b).square().mean() for a, b in zip(x.chunk(2), target.chunk(2), strict=True)]
    )
    (expected / 2).sum().backward()
    assert torch.equal(loss, expected.mean())
    named = dict(model.named_parameters())
    assert all(torch.allclose(p.grad, named[n].grad) for n, p in pipe.named_parameters())


class Looping(nn.Module):
    """Weights that several stages hold; evaluation goes through them in another order."""

    def __init__(self, trained: str, evaluated: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.order = {True: trained, False: evaluated}
        self.low, self.high = nn.Linear(8, 8), nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for name in self.order[self.training]:
            x = self.norm(self.low(x)) if name == "l" else self.high(x).tanh()
        return x.square().mean()


@pytest.mark.parametrize(
    ("trained", "evaluated"),
    quickly(
        [("llhllh", "lhlllh")], [("lhlh", "lhlhh"), ("llhllh", "lhlllh"), ("lhhllhhl", "hlhlhlhl")]
    ),
)
def test_evaluation_finds_shared_weights_in_another_order(trained: str, evaluated: str) -> None:
    model, batch = Looping(trained, evaluated), torch.randn(8, 8)
    pipe = pipecompile.compile(model, 4, microbatches=2, optimizer=jobs.SGD)
    pipe.step(batch)
    model.load_state_dict(pipe.state_dict())
    with torch.no_grad():
        losses = [model.eval()(piece) for piece in batch.chunk(2)]
    assert torch.equal(pipe.evaluate(batch), torch.stack(losses).mean())


def test_a_list_of_batches_is_one_batch_and_the_error_says_so() -> None:
    pipe = pipecompile.compile(models.gpt2(n_layer=1), 1)
    with pytest.raises(PipecompileError) as caught:
        pipe.evaluate([models.tokens(2), models.tokens(2)])
    assert "iter(...) of it gives several" in "".join(caught.value.__notes__)
    assert pipe.evaluate(iter([models.tokens(2), models.tokens(2)])).isfinite()
