"""What users do with a pipeline besides plain training."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pipecompile
import pytest
import torch
from pipecompile.compiler.ir.program import Role
from support import jobs, models, plain
from support.gang import Gang
from support.matrix import quickly
from torch import nn

# -- optimizers --------------------------------------------------------------------------------


def grouped(named: Any) -> torch.optim.Optimizer:
    """Two parameter groups by name, as people write it."""
    named = [(getattr(n, "n", n), p) for n, p in named]
    decay = [p for n, p in named if p.dim() > 1]
    rest = [p for n, p in named if p.dim() <= 1]
    return torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.1}, {"params": rest, "lr": 1e-3}], lr=1e-2
    )


def test_step_clips_schedules_and_clears() -> None:
    def scheduler(optimizer: torch.optim.Optimizer) -> Any:
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))

    batches = models.batches("bert-mlm", 4, 4)
    model = models.build("bert-mlm")
    pipe = pipecompile.compile(
        copy.deepcopy(model),
        3,
        microbatches=2,
        optimizer=grouped,
        lr_scheduler=scheduler,
        max_grad_norm=0.1,
    )
    optimizer = grouped(model.named_parameters())
    schedule = scheduler(optimizer)
    for batch in batches:
        plain.accumulate(model, batch, 1, 2)
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        schedule.step()
        pipe.step(batch)
        assert all(param.grad is None for param in pipe.parameters())
    assert plain.equal(pipe.state_dict(), model.state_dict())
    assert [g["lr"] for g in pipe.optimizer.param_groups] == [
        g["lr"] for g in optimizer.param_groups
    ]


def test_named_groups_that_are_empty_on_a_stage() -> None:
    """torch refuses them in its own words; ours say what to change."""

    def factory(named: Any) -> torch.optim.Optimizer:
        named = list(named)
        heads = [(n, p) for n, p in named if n == "no such parameter"]
        return torch.optim.SGD([{"params": named}, {"params": heads}], lr=0.1)

    batch = models.batches("gpt2", 4, 1)[0]
    with pytest.raises(pipecompile.errors.OptionError, match="put the parameters alone"):
        pipecompile.compile(models.gpt2(), 2, optimizer=factory, example_batch=batch)


def test_a_plan_before_the_first_step() -> None:
    pipe = jobs.pipeline("gpt2", 2, 2, 2)
    plan = pipe.compile_for(models.tokens(8))
    assert pipe.is_main
    assert plan is pipe.plan
    assert plan.microbatch_rows == 2
    pipe.step(models.tokens(8))
    assert len(pipe._session.loaded) == 1


@pytest.mark.parametrize("name", quickly(["gpt2"], ["gpt2", "t5"]))
@pytest.mark.parametrize("tied_grads", ["per_microbatch", "per_step"])
def test_gradients_add_up_over_calls(tied_grads: str, name: str) -> None:
    """As .grad does: until they are cleared, whoever clears them."""
    batches = models.batches(name, 4, 3)
    pipe, model = jobs.pipeline(name, 3, 2, 2, tied_grads=tied_grads), models.build(name)
    totals: dict[str, torch.Tensor] = {}
    for batch in batches:
        plain.accumulate(model, batch, 2, 2)
        for name, param in model.named_parameters():
            totals[name] = totals.get(name, 0) + param.grad
    for round_ in range(2):
        for batch in batches:
            pipe.forward_backward(batch)
        for name, param in pipe.named_parameters():
            torch.testing.assert_close(param.grad, totals[name])
        pipe.zero_grad() if round_ else pipe.optimizer.zero_grad()


def test_gradients_that_the_user_changed_are_taken_up() -> None:
    pipe = jobs.pipeline("gpt2", 2, 2, 2)
    batch = models.batches("gpt2", 8, 1)[0]
    pipe.forward_backward(batch)
    once = {n: p.grad.clone() for n, p in pipe.named_parameters()}
    for param in pipe.parameters():
        param.grad = param.grad * 3
    pipe.forward_backward(batch)
    for name, param in pipe.named_parameters():
        torch.testing.assert_close(param.grad, 4 * once[name])


@pytest.mark.slow
def test_several_parts_of_a_tied_gradient_on_one_stage() -> None:
    """A weight read three times over two stages, so that one stage adds up two parts."""
    found = {}
    for tied_grads in ("per_microbatch", "per_step"):
        pipe = jobs.pipeline("t5", 2, 1, 2, tied_grads=tied_grads)
        pipe.forward_backward(models.batches("t5", 4, 1)[0])
        found[tied_grads] = {name: p.grad for name, p in pipe.named_parameters()}
    for name, grad in found["per_microbatch"].items():
        torch.testing.assert_close(found["per_step"][name], grad)


def test_tied_gradients_summed_per_step_send_less_and_nearly_agree() -> None:
    """Σ over microbatches of (a + b) against Σ a + Σ b: the same sum in another order.

    Both are sums of 2m fp32 numbers, so they differ by at most 2m ulps of the largest partial sum.
    """
    batches = models.batches("gpt2", 8, 1)
    found, sent = {}, {}
    for tied_grads in ("per_microbatch", "per_step"):
        pipe = jobs.pipeline("gpt2", 3, 1, 4, tied_grads=tied_grads)
        pipe.forward_backward(batches[0])
        found[tied_grads] = {n: p.grad.clone() for n, p in pipe.named_parameters()}
        sent[tied_grads] = sum(m.nbytes for m in pipe.programs.messages)
    assert sent["per_step"] == sent["per_microbatch"] - 96 * 32 * 4
    for name, grad in found["per_microbatch"].items():
        other = found["per_step"][name]
        if name != "transformer.wte.weight":
            assert torch.equal(grad, other)
        bound = 2 * 4 * torch.finfo(torch.float32).eps * 4 * grad.abs().max()
        assert (grad - other).abs().max() <= bound


# -- models ------------------------------------------------------------------------------------


def test_frozen_parameters_get_no_gradient_and_stay() -> None:
    def build() -> nn.Module:
        model = models.build("gpt2")
        model.transformer.wpe.requires_grad_(False)
        model.transformer.h[0].requires_grad_(False)
        model.transformer.h[2].mlp.requires_grad_(False)
        return model

    batches = models.batches("gpt2", 4, 3)
    adamw = jobs.OPTIMIZERS["adamw"]
    pipe = pipecompile.compile(build(), 3, microbatches=2, optimizer=adamw)
    found = plain.train_pipeline(pipe, batches)
    plain.assert_equal(found, plain.train(build(), batches, adamw, 1, 2))


@pytest.mark.slow
def test_a_stage_without_anything_to_train() -> None:
    def build() -> nn.Module:
        model = models.build("llama")
        model.model.embed_tokens.requires_grad_(False)
        model.model.layers[:2].requires_grad_(False)
        return model

    batches = models.batches("llama", 4, 2)
    pipe = pipecompile.compile(build(), 3, microbatches=2, optimizer=jobs.SGD)
    found = plain.train_pipeline(pipe, batches)
    assert not pipe.programs.stages[0].grads
    plain.assert_equal(found, plain.train(build(), batches, jobs.SGD, 1, 2))


class Normed(nn.Module):
    """Batch norm: buffers that the forward updates; a parameter that nothing reads."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))
        self.norms = nn.ModuleList(nn.BatchNorm1d(8) for _ in range(4))
        self.unread = nn.Parameter(torch.ones(3))
        self.scale = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0])  # not registered

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = x + norm(layer(x)).relu() * self.scale * torch.tensor(0.5)
        return {"loss": x.square().mean(), "hidden": x}


@pytest.mark.parametrize("n_stages", quickly([2], [1, 2, 4]))
def test_buffers_are_updated_in_order(n_stages: int) -> None:
    torch.manual_seed(0)
    model = Normed()
    pipe = pipecompile.compile(copy.deepcopy(model), n_stages, microbatches=4, optimizer=jobs.SGD)
    optimizer = jobs.SGD(model.parameters())
    for _ in range(3):
        batch = torch.randn(16, 8)
        for piece in batch.chunk(4):
            (model(piece)["loss"] / 4).backward()
        optimizer.step()
        optimizer.zero_grad()
        pipe.step(batch)
    assert plain.equal(pipe.state_dict(), model.state_dict())
    model.eval()
    with torch.no_grad():
        expected = torch.cat([model(piece)["hidden"] for piece in batch.chunk(4)])
    assert torch.equal(pipe.forward(batch)["hidden"], expected)


def test_the_model_is_left_alone() -> None:
    model = models.build("llama")
    before = copy.deepcopy(model.state_dict())
    config = model.config.to_dict()
    pipe = pipecompile.compile(model, 2, microbatches=4, optimizer=jobs.SGD)
    pipe.step(models.batches("llama", 8, 1)[0])
    assert plain.equal(model.state_dict(), before)
    assert model.config.to_dict() == config
    assert model.config.use_cache
    assert model.training
    assert all(param.grad is None for param in model.parameters())


def test_a_state_dict_loads_back() -> None:
    batches = models.batches("gpt2", 4, 2)
    pipe, other = jobs.pipeline("gpt2", 3, 1, 2), jobs.pipeline("gpt2", 2, 2, 1)
    pipe.step(batches[0])
    other.step(batches[1])
    other.load_state_dict(pipe.state_dict())
    assert plain.equal(other.state_dict(), pipe.state_dict())
    assert torch.equal(other.evaluate(batches[0]), pipe.evaluate(batches[0]))
    tensors = pipe.state_dict()
    tensors["transformer.wte.weight"].zero_()  # a copy: changing it changes nothing
    assert pipe.state_dict()["transformer.wte.weight"].any()


def test_loading_buffers_makes_constants_anew() -> None:
    """What was computed from a buffer at compile time follows the buffer."""
    pipe = pipecompile.compile(models.llama(num_hidden_layers=1), 2, microbatches=2)
    batch = models.batches("llama", 4, 1)[0]
    first = pipe.evaluate(batch)

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)
            self.register_buffer("factor", torch.ones(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (self.linear(x) * (self.factor * 2)).square().mean()

    scaled = pipecompile.compile(Scaled(), 1, example_batch=torch.ones(2, 4))
    before = scaled.evaluate(torch.ones(2, 4))
    state = scaled.state_dict()
    state["factor"] = state["factor"] * 3
    scaled.load_state_dict(state)
    torch.testing.assert_close(scaled.evaluate(torch.ones(2, 4)), before * 9)
    assert torch.equal(pipe.evaluate(batch), first)


def test_masks_are_made_once_and_never_sent() -> None:
    """Rotary tables are constants of every stage with attention; masks are made from the batch."""
    pipe = jobs.pipeline("llama", 2, 1, 2)
    pipe.step(models.batches("llama", 4, 1)[0])
    constants = [stage.constants.outputs for stage in pipe.programs.stages]
    assert all(constants)
    floats = {v.dtype for m in pipe.programs.messages for v in m.values}
    assert floats == {torch.float32}


# -- random numbers ----------------------------------------------------------------------------


def dropping(n_stages: int, dp: int, seed: int, microbatches: int = 2) -> Any:
    torch.manual_seed(0)
    return pipecompile.compile(
        models.gpt2(dropout=0.3, n_layer=2),
        n_stages,
        dp,
        microbatches=microbatches,
        optimizer=jobs.SGD,
        seed=seed,
    )


def losses_with_dropout(n_stages: int, dp: int, seed: int, microbatches: int = 2) -> list[Any]:
    pipe = dropping(n_stages, dp, seed, microbatches)
    batches = models.batches("gpt2", 8, 3)
    mine = [plain.cut(batch, pipe.data_shards)[pipe.data_shard] for batch in batches]
    return [pipe.step(batch).item() for batch in mine]


@pytest.mark.slow
def test_dropout_is_reproducible_and_independent_of_the_stages() -> None:
    expected = losses_with_dropout(1, 2, seed=5)
    assert losses_with_dropout(1, 2, seed=5) == expected
    assert losses_with_dropout(3, 2, seed=5) == expected
    assert losses_with_dropout(3, 2, seed=6) != expected
    assert len(set(expected)) == 3


@pytest.mark.slow
def test_dropout_is_the_same_in_processes(gang: Callable[[int], Gang]) -> None:
    case = (losses_with_dropout, 2, 2, 5)
    assert gang(4).run(*case) == [losses_with_dropout(2, 2, seed=5)] * 4


def test_dropout_differs_between_microbatches_replicas_and_steps() -> None:
    """The same rows in every microbatch and replica give different losses only by dropout."""
    pipe = dropping(2, 2, seed=1)
    row = models.batches("gpt2", 1, 1)[0]
    batch = {key: value.repeat(4, 1) for key, value in row.items()}
    session, loaded, jobs_ = pipe._prepare(pipecompile.compiler.driver.compiled.Mode.TRAIN, batch)
    with torch.no_grad():
        session.run(loaded, jobs_)
    last = [rank for rank in jobs_ if jobs_[rank].losses]
    seen = [loss.item() for rank in last for loss in jobs_[rank].losses]
    assert len(set(seen)) == 4
    assert pipe.evaluate(batch).item() == pipe.evaluate(batch).item()


def test_the_users_random_stream_is_not_disturbed() -> None:
    pipe = dropping(2, 1, seed=1)
    batch = models.batches("gpt2", 4, 1)[0]
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    pipe.step(batch)
    assert torch.equal(torch.rand(3), expected)


# -- the inside --------------------------------------------------------------------------------


def test_dumps_are_readable(tmp_path: Any) -> None:
    jobs.pipeline("gpt2", 2, 1, 2, dump_dir=tmp_path).step(models.batches("gpt2", 4, 1)[0])
    (folder,) = tmp_path.iterdir()
    assert folder.name == "train-2x12"
    names = sorted(path.name for path in folder.iterdir())
    assert names[:2] == ["000_capture.py", "001_partition.txt"]
    assert {"004_inplace_stage1_backward.py", "005_schedule.txt", "plan.json"} <= set(names)
    assert "def forward(self" in (folder / "003_lower_stage0_forward.py").read_text()
    assert "0SEND_F0→1" in (folder / "006_communication.txt").read_text()


@pytest.mark.slow
def test_every_parameter_of_a_stage_is_read_there() -> None:
    pipe = jobs.pipeline("t5", 4, 1, 2)
    pipe.step(models.batches("t5", 4, 1)[0])
    for stage in pipe.programs.stages:
        ports = {p for part in (stage.forward, stage.backward) for p in part.inputs}
        read = {port.key for port in ports if port.role in (Role.PARAM, Role.SLOT)}
        assert read == set(stage.params)
    held = {name for stage in pipe.programs.stages for name in stage.params}
    assert held == {name for name, _ in models.build("t5").named_parameters()}


FIRST = """
import gc
import weakref
import pipecompile
import torch

def used():
    model = torch.nn.Linear(4, 4)
    squared = lambda output, batch: output.square().mean()
    pipe = pipecompile.compile(model, 1, loss_fn=squared, microbatches=1)
    pipe.forward_backward(torch.randn(2, 4))
    torch.optim.Adam(pipe.parameters()).step()
    return [weakref.ref(each) for each in (pipe, model, *pipe.parameters())]

held = used()
gc.collect()
assert not any(each() is not None for each in held)
"""


@pytest.mark.slow
def test_the_first_pipeline_of_a_process_is_let_go_of() -> None:
    """Libraries that are imported with it may keep frames."""
    subprocess.run([sys.executable, "-c", FIRST], check=True)
