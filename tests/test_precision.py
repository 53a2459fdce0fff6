"""Mixed precision is torch.autocast's, bit for bit, on any number of stages."""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Callable
from functools import partial
from typing import Any

import pipecompile
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pipecompile import LossScale, Precision
from pipecompile.compiler.capture import batch as batches
from pipecompile.compiler.capture.capture import capture_training
from pipecompile.compiler.capture.skeleton import skeleton_of
from pipecompile.compiler.ir.errors import OptionError, PlanError, RankMismatchError
from pipecompile.compiler.ir.graph import JointGraph, tensors
from pipecompile.compiler.ir.program import Role
from pipecompile.passes.graph.autocast import insert_casts
from pipecompile.passes.graph.autocast_tables import TABLES
from pipecompile.passes.graph.casts import is_cast, settle_casts
from pipecompile.runtime.loss_scaler import LossScaler
from pipecompile.runtime.state.accumulation import Accumulation
from support import jobs, measured, models, plain
from support.gang import Gang
from support.matrix import quickly
from torch import fx, nn

CPU = torch.device("cpu")
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
NAMED = {"bf16": BF16, "fp16": FP16}
MATRIX = list(itertools.product(("gpt2", "llama", "bert-mlm", "t5", "mixtral"), NAMED, (1, 3)))
COVERING = [
    ("gpt2", "fp16", 3),
    ("llama", "bf16", 3),
    ("bert-mlm", "bf16", 3),
    ("t5", "bf16", 3),
    ("mixtral", "bf16", 3),
    ("mixtral", "fp16", 3),
]


@functools.cache
def oracle(name: str, dtype: torch.dtype, dp: int = 1) -> plain.Trained:
    return jobs.train_plainly(name, dp, 4 // dp, "adamw", 2, dtype=dtype)


def trained_as_autocast(model: nn.Module, x: torch.Tensor, n_stages: int) -> Any:
    """A pipeline of a model after one run, whose loss and gradients are those of autocast."""
    pipe = pipecompile.compile(model, n_stages, microbatches=1, precision="bf16", device="cpu")
    loss = pipe.forward_backward(x)
    with plain.autocast(BF16):
        expected = model(x)
    expected.backward()
    assert torch.equal(loss, expected.detach())
    for name, param in pipe.named_parameters():
        theirs = model.get_parameter(name).grad
        assert (param.grad is None) == (theirs is None), name
        assert theirs is None or torch.equal(param.grad, theirs), name
    return pipe


# -- bits -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "precision", "n_stages"), quickly(COVERING, MATRIX))
def test_training_is_that_of_autocast(name: str, precision: str, n_stages: int) -> None:
    found = jobs.train(name, n_stages, 1, 4, "adamw", 2, precision=precision)
    plain.assert_equal(found, oracle(name, NAMED[precision]))


@pytest.mark.parametrize("precision", quickly(["fp16"], NAMED))
def test_processes_train_as_autocast_does(gang: Callable[[int], Gang], precision: str) -> None:
    for found in gang(2).run(
        "support.jobs:train", "llama", 2, 1, 4, "adamw", 2, precision=precision
    ):
        plain.assert_equal(found, oracle("llama", NAMED[precision]), whole=False)
    for found in gang(2).run(
        "support.jobs:train", "gpt2", 1, 2, 2, "adamw", 2, precision=precision
    ):
        plain.assert_equal(found, oracle("gpt2", NAMED[precision], 2))


@pytest.mark.parametrize("options", [{"schedule": "zb_h1"}, {"remat": "full"}], ids=str)
@pytest.mark.parametrize("name", ["gpt2", pytest.param("t5", marks=pytest.mark.slow)])
def test_schedules_and_recomputation_keep_the_bits(name: str, options: dict[str, Any]) -> None:
    found = jobs.train(name, 2, 2, 2, "adamw", 2, precision="bf16", **options)
    plain.assert_equal(found, oracle(name, BF16, 2))


def test_evaluation_is_that_of_autocast() -> None:
    pipe, model = jobs.pipeline("bert-mlm", 2, 1, 2, precision="bf16"), models.build("bert-mlm")
    batch = models.batches("bert-mlm", 4, 1)[0]
    model.eval()
    with torch.no_grad(), plain.autocast(BF16):
        pieces = [model(**piece) for piece in plain.cut(batch, 2)]
    assert torch.equal(pipe.evaluate(batch), torch.stack([p.loss for p in pieces]).mean())
    found = pipe.forward(batch).logits
    assert found.dtype is BF16
    assert torch.equal(found, torch.cat([p.logits for p in pieces]))


# -- the pass -------------------------------------------------------------------------------------


def captured(
    model: nn.Module, batch: Any, precision: Precision, table: str = "cpu", times: int = 1
) -> JointGraph:
    casts = partial(insert_casts, precision=precision, table=table)
    skeleton, spec = skeleton_of(model, CPU, precision), batches.flatten(batch)[1]
    made = capture_training(skeleton, spec, None, CPU, (casts,) * times, precision.compute)
    return made.graph


def casts_of(graph: JointGraph) -> list[fx.Node]:
    return [node for node in graph.graph.nodes if is_cast(node)]


@pytest.mark.parametrize("table", TABLES)
def test_the_tables_name_what_torch_registers(table: str) -> None:
    """Beside what is made of such operators, and in-place and out variants, which stay as they
    are in autocast too."""
    key = {"cpu": "AutocastCPU", "cuda": "AutocastCUDA"}[table]
    names = [n for n in torch._C._dispatch_get_all_op_names() if n.startswith("aten::")]
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    registered = {n[6:].partition(".")[0] for n in names if has_kernel(n, key)}
    known = TABLES[table].lower | TABLES[table].fp32 | TABLES[table].widest
    assert registered - known == set()
    assert known - registered <= {
        "einsum",
        "tensordot",
        "cross_entropy_loss",
        "_convolution",
        "nll_loss2d",
        "mkldnn_rnn_layer",
    }
    assert not TABLES[table].lower & TABLES[table].fp32


class Drawn(nn.Module):
    """A random program over a few values: products, norms, promotions, casts by hand, integers."""

    def __init__(self, steps: list[tuple[int, int, int]]):
        super().__init__()
        self.steps = steps
        self.linear = nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)
        self.register_buffer("mask", torch.ones(8, 8).tril())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        values = [x, self.linear(x)]
        count = torch.arange(8)
        for kind, i, j in self.steps:
            a, b = values[i % len(values)], values[j % len(values)]
            values.append(self.made(kind, a, b, count))
        return sum((value.float().square().mean() for value in values), torch.zeros(()))

    def made(
        self, kind: int, a: torch.Tensor, b: torch.Tensor, count: torch.Tensor
    ) -> torch.Tensor:
        if kind == 0:
            return torch.tanh(self.linear(a))
        if kind == 1:
            return a @ (b.transpose(-1, -2) * self.mask)
        if kind == 2:
            return torch.softmax(a, -1)
        if kind == 3:
            return torch.cat([a, b], -1)[..., ::2]
        if kind == 4:
            return a.to(b.dtype) * 0.5
        if kind == 5:
            with torch.autocast("cpu", enabled=False):
                return a.float() @ self.linear.weight
        if kind == 6:
            return a.double().sin().to(a.dtype) + count
        if kind == 7:
            return a + b
        return self.norm(a.float())


PROGRAMS = st.lists(st.tuples(st.integers(0, 8), st.integers(0, 9), st.integers(0, 9)), max_size=6)


@settings(max_examples=15)
@given(PROGRAMS)
def test_random_programs_compute_what_autocast_computes(steps: list[tuple[int, int, int]]) -> None:
    torch.manual_seed(0)
    model, x = Drawn(steps), torch.randn(2, 8, 8)
    trained_as_autocast(model, x, 1)


@settings(max_examples=8)
@given(PROGRAMS, st.sampled_from(list(TABLES)))
def test_casting_is_idempotent_and_touches_floats_alone(
    steps: list[tuple[int, int, int]], table: str
) -> None:
    model, x = Drawn(steps), torch.randn(2, 8, 8)
    precision = Precision(compute=BF16)
    once, twice = (captured(model, x, precision, table, times) for times in (1, 2))
    assert len(casts_of(once)) == len(casts_of(twice))
    plainly = captured(model, x, Precision(compute=FP32))
    for dtype in (torch.float64, torch.int64, torch.bool):
        found, expected = (_count(graph, dtype) for graph in (once, plainly))
        assert found == expected
    settle_casts(once, BF16)
    settled = len(casts_of(once))
    settle_casts(once, BF16)
    assert len(casts_of(once)) == settled


def _count(graph: JointGraph, dtype: torch.dtype) -> int:
    values = [t for node in graph.graph.nodes for t in tensors(node.meta.get("val"))]
    return sum(t.dtype is dtype for t in values)


def test_one_cast_per_value_and_none_of_a_parameter() -> None:
    graph = captured(
        models.build("llama"), models.batches("llama", 2, 1)[0], Precision(compute=BF16)
    )
    settle_casts(graph, BF16)
    forward = [n for n in casts_of(graph) if n.meta["phase"] == "forward"]
    made = [(n.all_input_nodes[0], n.meta["val"].dtype) for n in forward]
    assert len(made) == len(set(made))
    assert not [n for n in casts_of(graph) if n.all_input_nodes[0] in graph.owners]
    assert {graph.copies[name].meta["val"].dtype for name in graph.copies} == {BF16}


def test_the_cuda_table_keeps_norms_and_reductions_in_fp32() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Softmax(-1))

    def run(table: str) -> set[torch.dtype]:
        graph = captured(_Summed(model), torch.randn(2, 8), Precision(compute=BF16), table)
        names = ("native_layer_norm", "_softmax", "sum")
        nodes = [n for n in graph.ops() if any(name in str(n.target) for name in names)]
        return {tensors(n.meta["val"])[0].dtype for n in nodes if n.meta["phase"] == "forward"}

    assert run("cuda") == {FP32}
    assert BF16 in run("cpu")


class _Summed(nn.Module):
    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x).sum()


# -- options --------------------------------------------------------------------------------------


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
    model = models.build("llama").to(BF16)
    pipe = pipecompile.compile(
        model, 2, microbatches=4, optimizer=jobs.OPTIMIZERS["sgd"], precision="bf16"
    )
    found = plain.train_pipeline(pipe, batch)
    widened = models.build("llama").to(BF16).to(FP32)
    expected = plain.train(widened, batch, jobs.OPTIMIZERS["sgd"], 1, 4, dtype=BF16)
    plain.assert_equal(found, expected)
    assert {p.dtype for p in pipe.parameters()} == {FP32}
    model.load_state_dict(pipe.state_dict(), strict=True)


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


def test_frozen_weights_stay_as_small_as_they_came() -> None:
    model = models.build("llama").to(BF16)
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


# -- fp16 -----------------------------------------------------------------------------------------


def test_the_scale_falls_until_gradients_are_finite_and_grows_again() -> None:
    """Step by step what torch's GradScaler does, from a scale that is far too large."""
    batch = models.batches("gpt2", 4, 6)
    precision = Precision(compute=FP16, loss_scale=LossScale(init=2.0**21, interval=2))
    pipe = jobs.pipeline("gpt2", 2, 1, 2, precision=precision)
    found = plain.train_pipeline(pipe, batch)
    model = models.build("gpt2")
    expected = plain.train(
        model, batch, jobs.OPTIMIZERS["adamw"], 1, 2, dtype=FP16, init_scale=2.0**21, interval=2
    )
    plain.assert_equal(found, expected)
    skipped = sum(not grads for grads in expected.grads)
    assert pipe.loss_scaler.skipped == skipped > 0
    assert skipped < len(batch)
    state = pipe.loss_scaler.state_dict()
    other = jobs.pipeline("gpt2", 2, 1, 2, precision=precision)
    other.loss_scaler.load_state_dict(state)
    assert other.loss_scaler.state_dict() == state


@given(st.lists(st.booleans(), max_size=20), st.integers(1, 4), st.integers(0, 20))
def test_the_scale_is_that_of_torchs_scaler(finite: list[bool], interval: int, at: int) -> None:
    """After any steps, also where another scaler goes on: good steps are counted from the last
    overflow, and from the last growth."""
    config = LossScale(init=2.0**10, growth=4.0, backoff=0.25, interval=interval)
    scaler = LossScaler(config)
    scale, count = torch.tensor(config.init), torch.tensor(0, dtype=torch.int32)
    for step, good in enumerate(finite):
        if step == at:
            state, scaler = scaler.state_dict(), LossScaler(config)
            scaler.load_state_dict(state)
        scaler.saw(True)
        scaler.saw(good)  # a step has several runs
        scaler.end_step()
        scaler.end_step()  # nothing has run since
        found = torch.tensor(float(not good))
        torch._amp_update_scale_(scale, count, found, 4.0, 0.25, interval)
        assert scaler.scale == float(scale)
    assert scaler.skipped == finite.count(False)


@pytest.mark.parametrize("grads", [FP32, FP16])
def test_gradients_of_several_calls_add_up_unscaled(grads: torch.dtype) -> None:
    batch = models.batches("gpt2", 8, 1)[0]
    precision = Precision(compute=FP16, grads=grads, loss_scale=LossScale(init=2.0**10))
    pipe = jobs.pipeline("gpt2", 2, 2, 2, precision=precision)
    pipe.forward_backward(batch)
    once = {name: param.grad.clone() for name, param in pipe.named_parameters()}
    pipe.forward_backward(batch)
    for name, param in pipe.named_parameters():
        assert torch.allclose(param.grad, 2 * once[name], rtol=1e-2, atol=1e-3), name
    model = models.build("gpt2")
    plain.accumulate(model, batch, 2, 2)
    for name, grad in once.items():
        assert torch.allclose(grad, model.get_parameter(name).grad, rtol=0.05, atol=1e-3), name


class Optional(nn.Module):
    """Reads a part of its weights only where it is given ``y``."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: torch.Tensor, y: torch.Tensor | None = None) -> torch.Tensor:
        hidden = torch.tanh(self.a(x))
        return self.b(hidden if y is None else hidden + self.c(y)).square().mean()


def small(large: bool = False) -> torch.Tensor:
    return torch.full((2, 8), 6e4) if large else torch.ones(2, 8)


def test_an_overflow_is_forgotten_where_the_next_program_reads_less() -> None:
    sgd = partial(torch.optim.SGD, lr=1e-3)
    pipe = pipecompile.compile(
        Optional(), 1, microbatches=1, precision="fp16", optimizer=sgd, device="cpu"
    )
    pipe.step({"x": small(), "y": small(large=True)})
    assert pipe.loss_scaler.skipped == 1
    for _ in range(3):
        pipe.step({"x": small()})
    assert pipe.loss_scaler.skipped == 1


def test_one_overflow_spoils_all_runs_of_a_step() -> None:
    sgd = partial(torch.optim.SGD, lr=1e-3)
    scale = LossScale(init=2.0**10, interval=2)
    precision = Precision(compute=FP16, loss_scale=scale)
    pipe = pipecompile.compile(
        _Summed(nn.Linear(8, 8)),
        1,
        microbatches=1,
        precision=precision,
        optimizer=sgd,
        device="cpu",
    )

    def step(*batches: torch.Tensor) -> bool:
        pipe.compile_for(small())
        before = [param.detach().clone() for param in pipe.parameters()]
        for batch in batches:
            pipe.forward_backward(batch)
        pipe.optimizer.step()
        pipe.zero_grad()
        return any(not torch.equal(a, b) for a, b in zip(before, pipe.parameters(), strict=True))

    assert not step(small(large=True), small())
    assert pipe.loss_scaler.scale == 2.0**9
    assert step(small(), small())
    assert pipe.loss_scaler.scale == 2.0**9
    assert step(small(), small())
    assert pipe.loss_scaler.scale == 2.0**10


def test_fp64_gradients_are_unscaled_too() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin, self.t = nn.Linear(8, 8), nn.Parameter(torch.ones((), dtype=torch.float64))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (self.lin(x).double() * self.t).square().mean().float()

    model, x = Mixed(), torch.randn(2, 8)
    pipe = pipecompile.compile(model, 1, microbatches=1, precision="fp16", device="cpu")
    pipe.forward_backward(x)
    with plain.autocast(FP16):
        loss = model(x)
    (loss * 2.0**16).backward()
    for name, param in pipe.named_parameters():
        assert torch.allclose(param.grad, model.get_parameter(name).grad / 2.0**16, rtol=1e-6), name


class Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, w)
        return x @ w

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x, w = ctx.saved_tensors
        return grad.float() @ w.T, (x.T @ grad.float()).to(BF16)


class Odd(nn.Module):
    """A Function of its own, recurrent layers, a weight in two dtypes, vmap."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.lin = kind, nn.Linear(8, 8)
        self.w = nn.Parameter(torch.randn(8, 8) / 4)
        self.rnn = nn.GRU(8, 8, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made = self.lin(x)
        if self.kind == "function":
            made = made + Scaled.apply(x, self.w)
        elif self.kind == "recurrent":
            made = self.rnn(made.unsqueeze(1))[0]
        elif self.kind == "two dtypes":
            made = made.float() @ self.lin.weight.to(FP16).float()
        elif self.kind == "vmap":
            made = torch.vmap(lambda row: row * row.sum())(made)
        return made.float().square().mean()


@pytest.mark.parametrize("kind", ["function", "recurrent", "two dtypes", "vmap"])
def test_unusual_operators_are_cast_as_autocast_casts_them(kind: str) -> None:
    torch.manual_seed(0)
    model, x = Odd(kind), torch.randn(4, 8)
    trained_as_autocast(model, x, 1)


def test_autocast_around_the_pipeline_is_refused() -> None:
    pipe = pipecompile.compile(_Summed(nn.Linear(8, 8)), 1, microbatches=1, device="cpu")
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
    for message in gang(2).run("test_precision:in_other_precisions"):
        assert "rank 1" in message


def overflowing(rank: int, steps: int, at: int) -> dict[str, Any]:
    """One gradient of one rank becomes infinite in one step."""
    batch = models.batches("llama", 8, steps)
    pipe = jobs.pipeline(
        "llama", 2, 1, 4, precision="fp16", max_grad_norm=0.1, lr_scheduler=_halving
    )
    unscale = Accumulation.unscale

    def broken(sums: Accumulation, scale: float) -> bool:
        mine = sums._state.ranks.get(rank)
        if mine is not None and pipe._steps == at:
            next(iter(mine.grads.slots.values())).tensor.view(-1)[0] = torch.inf
        return unscale(sums, scale)

    Accumulation.unscale = broken  # type: ignore[method-assign]
    scales, params = [], []
    try:
        for piece in batch:
            pipe.step(piece)
            scales.append(pipe.loss_scaler.scale)
            params.append({n: p.detach().clone() for n, p in pipe.named_parameters()})
    finally:
        Accumulation.unscale = unscale  # type: ignore[method-assign]
    counts = {int(state["step"]) for state in pipe.optimizer.state.values()}
    return {
        "scales": scales,
        "params": params,
        "counts": counts,
        "lr": pipe.optimizer.param_groups[0]["lr"],
    }


def _halving(optimizer: torch.optim.Optimizer) -> Any:
    return torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)


@pytest.mark.parametrize("rank", [0, 1])
def test_an_overflow_on_one_stage_skips_the_step_on_all(
    gang: Callable[[int], Gang], rank: int
) -> None:
    for found in gang(2).run("test_precision:overflowing", rank, 3, 1):
        assert found["scales"] == [2.0**16, 2.0**15, 2.0**15]
        first, second, third = found["params"]
        assert all(torch.equal(first[n], second[n]) for n in first)
        assert any(not torch.equal(second[n], third[n]) for n in first)
        assert found["counts"] == {2}
        assert found["lr"] == pytest.approx(1e-2 / 4)


# -- memory, and what people see ------------------------------------------------------------------


def peaks(precision: str) -> tuple[int, int, int]:
    return measured.peaks("llama", 6, 32, precision=precision)


def test_the_predicted_peak_is_the_measured_one(gang: Callable[[int], Gang]) -> None:
    for found, predicted, message in gang(2).run("test_precision:peaks", "bf16"):
        assert abs(predicted - found) <= message + 0.01 * found


def test_inspect_shows_what_is_cast_and_what_that_saves(capsys: pytest.CaptureFixture[str]) -> None:
    from pipecompile.compiler.cli.main import main

    small = [
        "--set",
        "n_layer=2",
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
