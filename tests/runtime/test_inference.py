"""training=False: the forward's bits, planned and held for the forward alone."""

from __future__ import annotations

import copy
from functools import cache, partial
from pathlib import Path
from typing import Any

import pipecompile
import pytest
import torch
from pipecompile import Precision
from pipecompile.compiler.options.options import OF_TRAINING
from pipecompile.errors import MemoryBudgetError, OptionError, PlanError, StateError
from support import jobs, models, plain
from support.matrix import quickly
from support.options import FLAGS
from torch import nn

BATCH = {"x": torch.linspace(-1, 1, 64).view(8, 8)}


class Tower(nn.Module):
    """Layers, a norm that autocast leaves in fp32, and a loss."""

    traced_once = True

    def __init__(self, width: int = 8, depth: int = 4) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        for layer in self.layers:
            x = x + self.drop(layer(x)).relu()
        x = self.norm(x)
        return {"loss": x.square().mean(), "logits": x}


def tower() -> Tower:
    torch.manual_seed(0)
    return Tower()


def inferring(**options: Any) -> pipecompile.Pipeline:
    return pipecompile.compile(tower(), 2, training=False, microbatches=2, **options)


@cache
def plain_one() -> pipecompile.Pipeline:
    """Of tests that change nothing of it."""
    return inferring(example_batch=BATCH)


def test_outputs_and_losses_are_those_of_one_device() -> None:
    pipe, model = plain_one(), tower().eval()
    with torch.no_grad():
        pieces = [model(rows) for rows in BATCH["x"].chunk(2)]
    expected = torch.cat([piece["logits"] for piece in pieces])
    assert torch.equal(pipe.forward(BATCH)["logits"], expected)
    assert torch.equal(pipe.predict(iter([BATCH]))["logits"], expected)
    assert torch.equal(pipe.evaluate(BATCH), torch.stack([p["loss"] for p in pieces]).mean())


def test_it_is_planned_for_the_forward_alone() -> None:
    plan = plain_one().plan
    assert [(s.backward_s, s.backward_flops, s.stash_bytes, s.closing_s) for s in plan.stages] == [
        (0, 0, 0, 0)
    ] * 2
    assert [(s.memory.grads, s.memory.states) for s in plan.stages] == [(0, 0)] * 2
    assert all(" ".join(plan.schedule).count(f"{s}F{i}") for s in (0, 1) for i in (0, 1))
    assert "B" not in " ".join(plan.schedule)
    assert plan.step_s < pipecompile.compile(tower(), 2, example_batch=BATCH).plan.step_s / 2


def test_there_are_no_gradients_and_no_optimizer() -> None:
    pipe = plain_one()
    assert not any(param.requires_grad for param in pipe.parameters())
    assert all(param.requires_grad for param in tower().parameters())
    calls = (
        lambda: pipe.step(BATCH),
        lambda: pipe.forward_backward(BATCH),
        lambda: pipe.clip_grad_norm_(1.0),
        lambda: pipe.clip_grad_value_(1.0),
        lambda: pipe.averaged(),
        lambda: pipe.optimizer,
        lambda: pipe.lr_scheduler,
        lambda: pipe.save("nowhere"),
    )
    for call in calls:
        with pytest.raises(OptionError, match="training=False, which has no gradients"):
            call()
    assert not Path("nowhere").exists()


GIVEN = {name: FLAGS[name][1] for name in OF_TRAINING if name in FLAGS} | {
    "optimizer": jobs.SGD,
    "lr_scheduler": jobs.SGD,
    "max_grad_norm": 1.0,
    "verify": 1,
}


@pytest.mark.parametrize("name", list(OF_TRAINING))
def test_options_of_training_are_refused(name: str) -> None:
    with pytest.raises(OptionError, match=f"^{name}= has no effect with training=False: "):
        pipecompile.compile(tower(), 2, 2, training=False, **{name: GIVEN[name]})


@pytest.mark.parametrize(
    "more",
    [{"schedule": "auto"}, {"precision": Precision(compute=torch.bfloat16, grads=torch.bfloat16)}],
)
def test_so_are_parts_of_options(more: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match="has no effect with training=False"):
        inferring(example_batch=BATCH, **more)


def test_it_is_true_or_false() -> None:
    with pytest.raises(OptionError, match="training=0 must be True or False"):
        pipecompile.compile(tower(), 2, training=0)  # type: ignore[arg-type]


# -- weights ------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("precision", quickly(["bf16"], ["bf16", "bf16_params", "fp16"]))
def test_weights_are_held_in_the_compute_dtype_alone(precision: str) -> None:
    """Those that are read in fp32 stay so; and the bits are those of the pipeline that trains."""
    pipe = inferring(precision=precision, example_batch=BATCH)
    other = pipecompile.compile(tower(), 2, microbatches=2, precision=precision)
    assert torch.equal(pipe.forward(BATCH)["logits"], other.forward(BATCH)["logits"])
    assert torch.equal(pipe.evaluate(BATCH), other.evaluate(BATCH))
    narrow = torch.float16 if precision == "fp16" else torch.bfloat16
    wide = set() if precision == "bf16_params" else {"norm.weight", "norm.bias"}
    dtypes = {name: param.dtype for name, param in pipe.named_parameters()}
    assert {name for name, dtype in dtypes.items() if dtype is torch.float32} == wide
    assert {dtypes[name] for name in dtypes.keys() - wide} == {narrow}
    for stage, code in zip(pipe.plan.stages, pipe.programs.stages, strict=True):
        held = [pipe.state_dict()[name].nbytes for name in code.params]
        memory = stage.memory
        assert sum(held) == stage.param_bytes
        assert sum(held) <= memory.weights + memory.copies <= sum(held) + 64 * (len(held) + 1)


def test_values_that_are_loaded_are_rounded_once(tmp_path: Path) -> None:
    """State dicts, checkpoints and files; and they go back into a plain model."""
    trained = pipecompile.compile(
        tower(), 2, microbatches=2, precision="bf16", optimizer=partial(torch.optim.AdamW, lr=0.1)
    )
    trained.step(BATCH)
    expected = trained.forward(BATCH)["logits"]
    pipe = inferring(precision="bf16", example_batch=BATCH)
    assert not torch.equal(pipe.forward(BATCH)["logits"], expected)
    pipe.load_state_dict(trained.state_dict())
    assert torch.equal(pipe.forward(BATCH)["logits"], expected)
    trained.step(BATCH)
    trained.save(tmp_path / "run")
    assert pipe.load(tmp_path / "run") == 2
    assert torch.equal(pipe.forward(BATCH)["logits"], trained.forward(BATCH)["logits"])
    weights = trained.state_dict()
    held = {name: value.dtype for name, value in pipe.state_dict().items()}
    for name, value in pipe.load_into(tower()).state_dict().items():
        assert torch.equal(value, weights[name].to(held[name]).float())
    with torch.no_grad():
        for param in pipe.parameters():
            param.zero_()
    assert not pipe.forward(BATCH)["logits"].any()


class Decayed(Tower):
    """The loss reads weights in fp32, which the outputs do not."""

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        for layer in self.layers:
            x = layer(x)
        return {"logits": x}


def decay(output: dict[str, torch.Tensor], batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return output["logits"].square().mean()


class WithWeights(nn.Module):
    """A loss of weights that the model has too."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, output: dict[str, torch.Tensor], batch: Any) -> torch.Tensor:
        return output["logits"].square().mean() + self.weight.square().sum()


def test_a_weight_that_another_graph_reads_in_fp32_is_named() -> None:
    torch.manual_seed(0)
    model = Decayed()
    loss = WithWeights(model.layers[0].weight)
    pipe = pipecompile.compile(
        model, 2, training=False, microbatches=2, precision="bf16", loss_fn=loss
    )
    pipe.forward(BATCH)
    with pytest.raises(StateError, match=r"reads 'layers.0.weight' in the model's dtype"):
        pipe.evaluate(BATCH)
    other = pipecompile.compile(
        model, 2, training=False, microbatches=2, precision="bf16", loss_fn=loss
    )
    other.evaluate(BATCH)  # in this order both are there
    assert torch.equal(other.forward(BATCH)["logits"], pipe.forward(BATCH)["logits"])


# -- plans --------------------------------------------------------------------------------------


def test_plans_are_of_training_or_of_inference() -> None:
    plan = plain_one().plan
    again = inferring(plan=plan, example_batch=BATCH)
    assert again.plan.decision == plan.decision
    with pytest.raises(PlanError, match="training=False, this run training=True"):
        pipecompile.compile(tower(), 2, microbatches=2, plan=plan, example_batch=BATCH)


def test_a_budget_is_kept() -> None:
    """What the forward needs fits where training does not; less does not."""
    need = max(stage.memory.peak for stage in plain_one().plan.stages)
    pipe = inferring(memory=f"{need} B", example_batch=BATCH)
    assert max(stage.memory.peak for stage in pipe.plan.stages) <= need
    with pytest.raises(MemoryBudgetError):
        inferring(memory=f"{need - 1} B", example_batch=BATCH)
    with pytest.raises(MemoryBudgetError):
        pipecompile.compile(
            tower(), 2, microbatches=2, memory=f"{need} B", optimizer=jobs.SGD, example_batch=BATCH
        )


def test_devices_are_divided_for_the_forward() -> None:
    pipe = pipecompile.compile(
        tower(), "auto", devices=2, training=False, microbatches=2, example_batch=BATCH
    )
    expected = torch.cat([tower().eval()(rows)["logits"] for rows in BATCH["x"].chunk(4)])
    assert pipe.plan.n_stages * pipe.plan.dp == 2
    assert not pipe.plan.training
    assert torch.allclose(pipe.forward(BATCH)["logits"], expected)


# -- architectures --------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", models.MODELS)
@pytest.mark.parametrize("precision", [None, "bf16", "bf16_params"])
def test_architectures(name: str, precision: str | None) -> None:
    model, batch = models.build(name), models.batches(name, 4, 1)[0]
    one = pipecompile.compile(copy.deepcopy(model), 2, microbatches=2, precision=precision)
    pipe = pipecompile.compile(model, 2, training=False, microbatches=2, precision=precision)
    assert torch.equal(pipe.evaluate(batch), one.evaluate(batch))
    if name != "mixtral":  # the balance of its router couples rows
        outputs = [p.predict(iter([batch]), lambda out, _: out.logits) for p in (pipe, one)]
        assert torch.equal(*outputs)
    assert plain.equal(pipe.load_into(models.build(name)).state_dict(), pipe.state_dict())
