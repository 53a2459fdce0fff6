"""Mixed precision is torch.autocast's, bit for bit, on any number of stages."""

from __future__ import annotations

import copy
import itertools
import os
from collections.abc import Callable
from typing import Any

import pipecompile
import pytest
import torch
from pipecompile import LossScale, Precision
from pipecompile.compiler.ir.errors import OptionError, PlanError, RankMismatchError
from pipecompile.compiler.ir.program import Role
from support import jobs, measured, models, plain
from support.autocast import (
    BF16,
    FP16,
    FP32,
    NAMED,
    Summed,
    captured,
    oracle,
    small,
    trained_as_autocast,
)
from support.gang import Gang
from support.matrix import quickly
from torch import nn

MATRIX = list(itertools.product(("gpt2", "llama", "bert-mlm", "t5", "mixtral"), NAMED, (1, 3)))
COVERING = [
    ("gpt2", "fp16", 3),
    ("llama", "bf16", 3),
    ("bert-mlm", "bf16", 3),
    ("t5", "bf16", 3),
    ("mixtral", "bf16", 3),
    ("mixtral", "fp16", 3),
]


# -- bits -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "precision", "n_stages"), quickly(COVERING[:1], MATRIX))
def test_training_is_that_of_autocast(name: str, precision: str, n_stages: int) -> None:
    found = jobs.train(name, n_stages, 1, 4, "adamw", 2, precision=precision)
    plain.assert_equal(found, oracle(name, NAMED[precision]))


@pytest.mark.slow
@pytest.mark.parametrize("precision", NAMED)
def test_processes_train_as_autocast_does(gang: Callable[[int], Gang], precision: str) -> None:
    for found in gang(2).run(jobs.train, "llama", 2, 1, 4, "adamw", 2, precision=precision):
        plain.assert_equal(found, oracle("llama", NAMED[precision]), whole=False)
    for found in gang(2).run(jobs.train, "gpt2", 1, 2, 2, "adamw", 2, precision=precision):
        plain.assert_equal(found, oracle("gpt2", NAMED[precision], 2))


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"schedule": "zb_h1"}, {"remat": "full"}], ids=str)
@pytest.mark.parametrize("name", ["gpt2", pytest.param("t5", marks=pytest.mark.slow)])
def test_schedules_and_recomputation_keep_the_bits(name: str, options: dict[str, Any]) -> None:
    found = jobs.train(name, 2, 2, 2, "adamw", 2, precision="bf16", **options)
    plain.assert_equal(found, oracle(name, BF16, 2))


@pytest.mark.slow
@pytest.mark.parametrize("name", quickly(["gpt2"], ["gpt2", "bert-mlm"]))
def test_evaluation_is_that_of_autocast(name: str) -> None:
    pipe, model = jobs.pipeline(name, 2, 1, 2, precision="bf16"), models.build(name)
    batch = models.batches(name, 4, 1)[0]
    model.eval()
    with torch.no_grad(), plain.autocast(BF16):
        pieces = [model(**piece) for piece in plain.cut(batch, 2)]
    assert torch.equal(pipe.evaluate(batch), torch.stack([p.loss for p in pieces]).mean())
    found = pipe.forward(batch).logits
    assert found.dtype is BF16
    assert torch.equal(found, torch.cat([p.logits for p in pieces]))


# -- options --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_modules_and_operators_stay_in_fp32_by_name() -> None:
    batch = models.batches("mixtral", 4, 1)[0]

    def products(precision: Precision) -> list[torch.dtype]:
        graph = captured(models.build("mixtral"), batch, precision)
        return [
            n.meta["val"].dtype
            for n in graph.ops()
            if ".mm" in str(n.target) and "gate" in n.meta["module"]
        ]

    assert FP32 not in products(Precision(compute=BF16))
    with pytest.raises(OptionError, match=r"calls no operator 'mm'; it calls .*linear"):
        products(Precision(compute=BF16, fp32=["mm"]))
    kept = products(Precision(compute=BF16, fp32_modules=["*.mlp.gate"]))
    assert set(kept) == {FP32}
    with pytest.raises(OptionError, match="stands for no module of the model that would"):
        products(Precision(compute=BF16, fp32_modules=["*.router"]))
    graph = captured(
        models.build("gpt2"),
        models.batches("gpt2", 2, 1)[0],
        Precision(compute=BF16, lower=["embedding"]),
    )
    assert {n.meta["val"].dtype for n in graph.ops() if "embedding.default" in str(n.target)} == {
        BF16
    }


@pytest.mark.slow
def test_values_cross_in_the_boundary_dtype() -> None:
    batch = models.batches("llama", 8, 1)[0]

    def run(precision: Any) -> tuple[float, int, set[torch.dtype]]:
        pipe = jobs.pipeline("llama", 3, 1, 4, precision=precision)
        loss = float(pipe.forward_backward(batch))
        values = [value for message in pipe.programs.messages for value in message.values]
        sent = sum(t.bytes for stage in pipe.plan.stages for t in stage.sends)
        return loss, sent, {value.dtype for value in values}

    wide, narrow = run("bf16"), run(Precision(compute=BF16, boundary=BF16))
    assert wide[2] == {FP32}
    assert narrow[2] == {BF16}
    assert 2 * narrow[1] == wide[1]
    assert narrow[0] == pytest.approx(wide[0], rel=1e-2)


def test_what_is_widened_again_crosses_and_is_stashed_narrow() -> None:
    """A tied weight's gradient from the head is bf16 until it is added to the embedding's."""
    pipe = jobs.pipeline("gpt2", 2, 1, 4, precision="bf16")
    pipe.forward_backward(models.batches("gpt2", 8, 1)[0])
    backward = [m for m in pipe.programs.messages if m.src > m.dst]
    by_size = {value.shape: value.dtype for message in backward for value in message.values}
    assert by_size[tuple(models.build("gpt2").transformer.wte.weight.shape)] is BF16


def test_gradients_add_up_in_the_dtype_asked_for() -> None:
    batch = models.batches("gpt2", 8, 1)[0]
    found = {}
    for grads in (FP32, BF16):
        pipe = jobs.pipeline("gpt2", 2, 1, 4, precision=Precision(compute=BF16, grads=grads))
        pipe.forward_backward(batch)
        assert all(param.grad.dtype is FP32 for param in pipe.parameters())
        found[grads] = {n: p.grad.clone() for n, p in pipe.named_parameters()}
        held = [rank.grads.nbytes for rank in pipe._session.state.ranks.values()]
        assert held == [stage.memory.grads for stage in pipe.plan.stages]
    for name, grad in found[BF16].items():
        assert torch.equal(grad, grad.to(BF16).float())
        assert torch.allclose(grad, found[FP32][name], rtol=0.1, atol=1e-3)
    assert any(not torch.equal(found[FP32][n], found[BF16][n]) for n in found[FP32])


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Precision(compute=torch.float64), "compute=torch.float64"),
        (lambda: Precision(compute=BF16, grads=FP16), "grads=torch.float16"),
        (lambda: Precision(compute=BF16, boundary=FP32), "boundary=torch.float32"),
        (lambda: Precision(compute=BF16, boundary=FP16), "boundary=torch.float16"),
        (lambda: LossScale(init=float("inf")), "init must be between"),
        (lambda: Precision(compute=BF16, table="tpu"), "table='tpu'"),
        (lambda: Precision(compute=BF16, lower=["softmux"]), "no ATen operator 'softmux'"),
        (lambda: Precision(compute=BF16, lower="softmax"), "give a list"),
        (lambda: Precision(compute=BF16, lower=["mm"], fp32=["mm"]), "in lower and in fp32"),
        (lambda: Precision(compute=FP32, lower=["mm"]), "no effect: compute is fp32"),
        (lambda: Precision(compute=FP32, table="cuda"), "no effect: compute is fp32"),
        (lambda: Precision(compute=BF16, loss_scale=LossScale()), "no effect with bf16"),
        (lambda: LossScale(backoff=2.0), "backoff between 0 and 1"),
        (lambda: pipecompile.compile(nn.Linear(2, 2), 1, precision="fp8"), "precision='fp8'"),
        (lambda: pipecompile.compile(nn.Linear(2, 2), 1, precision=BF16), "pipecompile.Precision"),
    ],
)
def test_bad_options_are_refused(make: Callable[[], Any], said: str) -> None:
    with pytest.raises(OptionError, match=said):
        make()


def test_a_plan_is_of_one_precision() -> None:
    batch = models.batches("gpt2", 8, 1)[0]
    plan = jobs.pipeline("gpt2", 2, 1, 4, precision="bf16", example_batch=batch).plan
    assert plan.options["precision"] == "bf16"
    again = jobs.pipeline("gpt2", 2, 1, 4, precision="bf16", example_batch=batch, plan=plan)
    assert again.plan.to_json() == plan.to_json()
    with pytest.raises(PlanError, match="precision"):
        jobs.pipeline("gpt2", 2, 1, 4, example_batch=batch, plan=plan)


# -- models that are not all fp32 -----------------------------------------------------------------


def test_a_model_in_bf16_trains_with_fp32_masters() -> None:
    """As its weights in fp32 do; what is loaded back fits the model."""
    batch = models.batches("llama", 8, 1)
    model = models.llama(num_hidden_layers=1).to(BF16)
    widened = copy.deepcopy(model).to(FP32)
    pipe = pipecompile.compile(
        model, 2, microbatches=4, optimizer=jobs.OPTIMIZERS["sgd"], precision="bf16"
    )
    found = plain.train_pipeline(pipe, batch)
    expected = plain.train(widened, batch, jobs.OPTIMIZERS["sgd"], 1, 4, dtype=BF16)
    plain.assert_equal(found, expected)
    assert {p.dtype for p in pipe.parameters()} == {FP32}
    model.load_state_dict(pipe.state_dict(), strict=True)


@pytest.mark.slow
def test_a_model_in_bf16_can_train_in_fp32() -> None:
    batch = models.batches("gpt2", 8, 2)
    pipe = pipecompile.compile(
        models.build("gpt2").to(BF16),
        2,
        microbatches=4,
        optimizer=jobs.OPTIMIZERS["sgd"],
        precision="fp32",
    )
    expected = plain.train(
        models.build("gpt2").to(BF16).float(), batch, jobs.OPTIMIZERS["sgd"], 1, 4
    )
    plain.assert_equal(plain.train_pipeline(pipe, batch), expected)


@pytest.mark.slow
def test_frozen_weights_stay_as_small_as_they_came() -> None:
    model = models.llama(num_hidden_layers=1).to(BF16)
    model.requires_grad_(False)
    model.lm_head.weight.requires_grad_(True)
    pipe = pipecompile.compile(model, 2, microbatches=2, precision="bf16")
    batch = models.batches("llama", 4, 1)[0]
    loss = pipe.forward_backward(batch)
    dtypes = {n: p.dtype for n, p in pipe.named_parameters() if p.dim() > 1}
    assert dtypes.pop("lm_head.weight") is FP32
    assert set(dtypes.values()) == {BF16}
    for param in model.parameters():
        if param.dim() == 1 or param.requires_grad:
            param.data = param.data.float()
    with torch.no_grad(), plain.autocast(BF16):
        expected = torch.stack([model(**piece).loss for piece in plain.cut(batch, 2)]).mean()
    assert torch.equal(loss, expected)


class Islands(nn.Module):
    """A router in fp32, a table in a buffer, a batch norm beside trained weights."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.router, self.last = nn.Linear(16, 16), nn.Linear(16, 4), nn.Linear(16, 1)
        self.norm = nn.BatchNorm1d(16)
        self.register_buffer("table", torch.randn(16, 16))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.norm(self.first(x).float())
        with torch.autocast("cpu", enabled=False):
            gates = self.router(hidden).softmax(-1)
        mixed = (hidden @ self.table) * gates.max(-1, keepdim=True).values
        self.seen += 1
        return self.last(mixed).float().square().mean()


def test_islands_and_buffers_are_as_autocast_leaves_them() -> None:
    torch.manual_seed(3)
    model, x = Islands(), torch.randn(8, 16)
    pipe = trained_as_autocast(model, x, 2)
    for name, buffer in model.named_buffers():
        assert torch.equal(pipe.state_dict()[name], buffer), name
    stages = pipe.programs.stages
    copied = {name for stage in stages for name in stage.copies}
    assert "router.weight" not in copied
    assert "last.weight" in copied
    constants = [
        p.key
        for s in stages
        for part in s.parts.values()
        for p in part.inputs
        if p.role is Role.CONSTANT
    ]
    assert constants, "the table is cast once, and not for every microbatch"


def test_autocast_around_the_pipeline_is_refused() -> None:
    pipe = pipecompile.compile(Summed(nn.Linear(8, 8)), 1, microbatches=1, device="cpu")
    with plain.autocast(BF16), pytest.raises(OptionError, match="leave it out"):
        pipe.forward_backward(small())


def in_other_precisions() -> str:
    precision = Precision(
        compute=FP16, loss_scale=LossScale(init=2.0 ** (4 + 8 * int(os.environ["RANK"])))
    )
    batch = models.batches("gpt2", 4, 1)[0]
    with pytest.raises(RankMismatchError) as caught:
        jobs.pipeline("gpt2", 1, 2, 2, precision=precision, example_batch=batch)
    return str(caught.value)


def test_ranks_of_different_precision_are_refused(gang: Callable[[int], Gang]) -> None:
    for message in gang(2).run(in_other_precisions):
        assert "rank 1" in message


# -- memory, and what people see ------------------------------------------------------------------


def peaks(precision: str) -> tuple[int, int, int]:
    return measured.peaks("llama", 6, 32, precision=precision)


@pytest.mark.slow
def test_the_predicted_peak_is_the_measured_one(gang: Callable[[int], Gang]) -> None:
    for found, predicted, message in gang(2).run(peaks, "bf16"):
        assert abs(predicted - found) <= message + 0.01 * found


@pytest.mark.slow
def test_inspect_shows_what_is_cast_and_what_that_saves(capsys: pytest.CaptureFixture[str]) -> None:
    from pipecompile.compiler.cli.main import main

    small = [
        "--set",
        "n_layer=1",
        "--set",
        "n_embd=64",
        "--set",
        "n_head=2",
        "--set",
        "vocab_size=128",
    ]
    assert (
        main(["inspect", "hf:gpt2", "--stages", "2", "--seq", "16", "--precision", "bf16", *small])
        == 0
    )
    said = capsys.readouterr().out
    assert "mixed precision" in said
    assert "parameters cast once per step" in said
    for row in (
        "stash of a microbatch",
        "sent per microbatch",
        "largest peak of a stage",
        "predicted step",
    ):
        line = next(line for line in said.splitlines() if line.startswith(row))
        assert "%" in line
