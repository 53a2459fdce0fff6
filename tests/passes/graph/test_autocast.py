"""The pass that casts: torch.autocast's tables, its casts and no others."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pipecompile import Precision
from pipecompile.compiler.ir.graph import JointGraph, tensors
from pipecompile.passes.graph.autocast_tables import TABLES
from pipecompile.passes.graph.casts import settle_casts
from support import models
from support.autocast import BF16, FP16, FP32, Summed, captured, casts_of, trained_as_autocast
from torch import nn


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
        "_cudnn_rnn",  # of a torch that was built with CUDA
        "linalg_matrix_sqrth",  # from 2.14 on
        "cholesky",  # until 2.13: now made of linalg_cholesky, as qr is of linalg_qr
        "qr",
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


def compute_alike(steps: list[tuple[int, int, int]]) -> None:
    torch.manual_seed(0)
    model, x = Drawn(steps), torch.randn(2, 8, 8)
    trained_as_autocast(model, x, 1)


@settings(max_examples=5)
@given(PROGRAMS)
def test_random_programs_compute_what_autocast_computes(steps: list[tuple[int, int, int]]) -> None:
    compute_alike(steps)


@pytest.mark.slow
@settings(max_examples=30)
@given(PROGRAMS)
def test_many_programs_compute_what_autocast_computes(steps: list[tuple[int, int, int]]) -> None:
    compute_alike(steps)


@settings(max_examples=1)
@given(PROGRAMS, st.sampled_from(list(TABLES)))
@example([(0, 0, 0), (2, 1, 0), (0, 0, 0), (0, 0, 0), (5, 9, 0)], "cuda")  # converts a softmax
def test_casting_is_idempotent_and_touches_floats_alone(
    steps: list[tuple[int, int, int]], table: str
) -> None:
    check_casts(steps, table)


@pytest.mark.slow
@settings(max_examples=10)
@given(PROGRAMS, st.sampled_from(list(TABLES)))
def test_casting_of_many_programs_is_idempotent_and_touches_floats_alone(
    steps: list[tuple[int, int, int]], table: str
) -> None:
    check_casts(steps, table)


def check_casts(steps: list[tuple[int, int, int]], table: str) -> None:
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
        graph = captured(Summed(model), torch.randn(2, 8), Precision(compute=BF16), table)
        names = ("native_layer_norm", "_softmax", "sum")
        nodes = [n for n in graph.ops() if any(name in str(n.target) for name in names)]
        return {tensors(n.meta["val"])[0].dtype for n in nodes if n.meta["phase"] == "forward"}

    assert run("cuda") == {FP32}
    assert BF16 in run("cpu")


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
