"""Operators that write over their inputs: no bit changes, and nobody misses what is gone."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

import pipecompile
import pytest
import torch
from hypothesis import given, settings
from pipecompile.compiler.ir.errors import VerificationError
from pipecompile.compiler.ir.graph import overwritten
from pipecompile.compiler.ir.program import Program
from pipecompile.passes.programs import inplace
from pipecompile.passes.programs.verify import _check_writes
from support.drawn import ACTIVATIONS, STEPS, Drawn
from torch import fx, nn

ATEN = torch.ops.aten


def compiled(model: nn.Module, x: torch.Tensor, n_stages: int = 1) -> Any:
    return pipecompile.compile(
        model, n_stages, microbatches=2, loss_fn=None, example_batch=x, device="cpu"
    )


def targets(pipe: Any) -> Counter[Any]:
    parts = [part for stage in pipe.programs.stages for part in stage.parts.values()]
    return Counter(n.target for part in parts for n in part.module.graph.nodes if overwritten(n))


def check(model: nn.Module, x: torch.Tensor, n_stages: int = 1) -> Any:
    """Two steps without an optimizer: the gradients of one process."""
    pipe = compiled(model, x, n_stages)
    for _ in range(2):
        losses = []
        for piece in x.chunk(2):
            loss = model(piece)
            (loss / 2).backward()
            losses.append(loss.detach())
        assert torch.equal(pipe.forward_backward(x), torch.stack(losses).mean())
        for name, param in pipe.named_parameters():
            assert torch.equal(param.grad, model.get_parameter(name).grad), name
    return pipe


@settings(max_examples=2)
@given(STEPS)
def test_random_programs_keep_their_bits(steps: list[tuple[int, int, int]]) -> None:
    torch.manual_seed(1)
    check(Drawn(steps), torch.randn(4, 8, 8))


@pytest.mark.slow
@settings(max_examples=30)
@given(STEPS)
def test_many_programs_keep_their_bits(steps: list[tuple[int, int, int]]) -> None:
    torch.manual_seed(1)
    check(Drawn(steps), torch.randn(4, 8, 8))


class Chain(nn.Module):
    def __init__(self, activation: Any):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(64, 64), nn.Linear(64, 64)
        self.activation = activation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.activation(self.first(x) * 2)).square().mean()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_and_their_derivatives(activation: Any) -> None:
    """37 rows: vectors end within the tensor."""
    pipe = check(Chain(activation), torch.randn(74, 64))
    assert ATEN.mul_.Tensor in targets(pipe)


def test_every_overload_that_is_told_where_to_write_keeps_the_bits() -> None:
    """Contiguous, turned, and with rows that no vector divides."""
    extra: dict[Any, tuple[Any, ...]] = {
        ATEN.hardtanh_backward.default: (-1.0, 1.0),
        ATEN.leaky_relu_backward.default: (0.1, False),
        ATEN.softplus_backward.default: (1.0, 20.0),
        ATEN.threshold_backward.default: (0,),
    }
    for (target, overload), turned in itertools.product(
        (inplace._OUT | inplace._ROWS).items(), (False, True)
    ):
        name = overload._schema.arguments[-1].name
        torch.manual_seed(0)
        a, b, c = (torch.randn(37, 531) for _ in range(3))
        if turned:
            a, b, c = a.t(), b.t(), c.t()
        for dim in (0, 1):
            if target is ATEN.where.self:
                values: tuple[Any, ...] = (c > 0, a, b)
            elif target is ATEN.elu_backward.default:
                values = (a, 1.0, 1.0, 1.0, False, b)
            elif target is ATEN.mse_loss_backward.default:
                values = (a, b, c, 0)
            elif target in (ATEN._softmax.default, ATEN._log_softmax.default):
                values = (a, dim, False)
            elif target in inplace._ROWS:
                values = (a, b, dim, torch.float32)
            else:
                values = (a, b, *extra.get(target, ()))
            expected = target(*values)
            for i, value in enumerate(values):
                if not isinstance(value, torch.Tensor) or value.dtype is not expected.dtype:
                    continue
                if target in inplace._ROWS and turned:
                    continue
                given_ = [v.clone() if isinstance(v, torch.Tensor) else v for v in values]
                made = overload(*given_, **{name: given_[i]})
                assert made.data_ptr() == given_[i].data_ptr()
                assert torch.equal(made, expected), (target, i, turned, dim)


class Careful(nn.Module):
    """What must not be written over: the batch, parameters, buffers, the stash, a view's base."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weight = nn.Parameter(torch.randn(8, 8))
        self.register_buffer("seen", torch.zeros(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.add_(x.detach().mean((0, 1)))
        shifted = self.weight + 0.0 * self.seen
        first = x @ shifted  # (rows, 8, 8)
        half = first[:, :4]
        added = half + 1  # `first` is read below
        return (first * first.tanh()).mean() + added.mean() + (x * 2).mean()


def test_what_others_have_stays() -> None:
    x = torch.randn(4, 8, 8)
    before = x.clone()
    model = Careful()
    pipe = compiled(model, x)
    for _ in range(3):
        pipe.forward_backward(x)
        pipe.zero_grad()
        for piece in x.chunk(2):
            model(piece)
    assert torch.equal(x, before)
    state = pipe.state_dict()
    assert torch.equal(state["weight"], model.weight)
    assert torch.equal(state["seen"], model.seen)


def test_copies_that_change_nothing_are_left_out() -> None:
    class Copies(Chain):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.second(self.first(x).clone().tanh()).clone().square().mean()

    pipe = check(Copies(None), torch.randn(8, 64))
    assert not any(
        node.target is ATEN.clone.default
        for part in pipe.programs.stages[0].parts.values()
        for node in part.module.graph.nodes
    )


def test_a_power_of_a_number_has_no_twin() -> None:
    """pow_.Scalar raises its input to a number, pow.Scalar a number to its input."""
    assert inplace._twin(ATEN.pow.Scalar) is None
    assert inplace._twin(ATEN.mul.Tensor) is ATEN.mul_.Tensor
    check(Chain(lambda x: 2.0 ** (x * 0.1)), torch.randn(8, 64))


def test_peaks_are_lower() -> None:
    class Wide(Chain):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward((x * 2 + 1).exp().view(-1, 64, 64).mean(1))

    x = torch.randn(512, 64 * 64)
    model = Wide(torch.tanh)
    peak = compiled(model, x).plan.stages[0].memory.peak
    undone = inplace._write_over
    inplace._write_over = lambda node, source: False
    try:
        apart = compiled(model, x).plan.stages[0].memory.peak
    finally:
        inplace._write_over = undone
    assert apart - peak > x.numel() // 2 * 4 * 0.9  # of a microbatch


# -- the checker ----------------------------------------------------------------------------------


def traced(*steps: Any) -> list[fx.Node]:
    """A program of one input: each step is (operator, positions of what it reads)."""
    graph = fx.Graph()
    nodes = [graph.placeholder("x")]
    for target, *reads in steps:
        nodes.append(graph.call_function(target, tuple(nodes[i] for i in reads)))
    graph.output((nodes[-1],))
    return list(graph.nodes)


@pytest.mark.parametrize(
    "steps",
    [
        [(ATEN.tanh_.default, 0)],  # an input
        [(ATEN.exp.default, 0), (ATEN.tanh_.default, 1), (ATEN.add.Tensor, 1, 2)],
        [
            (ATEN.exp.default, 0),
            (ATEN.t.default, 1),
            (ATEN.tanh_.default, 1),
            (ATEN.exp.default, 2),
        ],
    ],
)
def test_writes_over_what_is_read_are_found(steps: list[Any]) -> None:
    with pytest.raises(VerificationError, match="writ"):
        _check_writes(traced(*steps))


def test_writes_over_what_nobody_reads_pass() -> None:
    _check_writes(traced((ATEN.exp.default, 0), (ATEN.tanh_.default, 1), (ATEN.exp.default, 2)))


def test_devices_without_a_promise_are_left_alone() -> None:
    """A GPU's softmax, and items of its kernels, which may be slices."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    made = graph.call_function(ATEN.exp.default, (x,))
    soft = graph.call_function(ATEN._softmax.default, (made, 1, False))
    graph.output((soft,))
    for node in (x, made, soft):
        node.meta["val"] = torch.empty(4, 4, device="meta")
    for device, overwriting in (("cuda", 0), ("cpu", 1)):
        reuse = inplace.Reuse()
        copy = fx.GraphModule(nn.Module(), graph)
        inplace._overwrite(Program(copy, (), ()), device, reuse)
        assert reuse.overwriting == overwriting
