"""FP8: products by a model's own `torch.autograd.Function` train as on one device."""

from __future__ import annotations

import copy
from typing import Any

import pipecompile
import pytest
import torch
from pipecompile.compiler.capture import joint
from support import jobs, plain
from support.narrowed import BF16, Loop
from torch import nn

F8 = torch.float8_e4m3fn
WIDTH = 16


@torch.no_grad()
def narrowed(x: torch.Tensor, dims: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """A tensor in FP8, and what it is to be multiplied by."""
    peak = x.abs().amax(dims, keepdim=True).float().clamp(min=1e-12)
    scale = torch.finfo(F8).max / peak
    return (x.float() * scale).to(F8), scale.reciprocal()


def product(a: torch.Tensor, b: torch.Tensor, rowwise: bool) -> torch.Tensor:
    """a @ b in FP8, with a scale for each row of a and column of b, or one for each."""
    rows, row_scale = narrowed(a, -1 if rowwise else (0, 1))
    columns, column_scale = narrowed(b, 0 if rowwise else (0, 1))
    columns = columns.t().contiguous().t()  # the kernel wants it column-major
    if not rowwise:
        row_scale, column_scale = row_scale.reshape(()), column_scale.reshape(())
    scales = {"scale_a": row_scale, "scale_b": column_scale}
    return torch._scaled_mm(rows.contiguous(), columns, **scales, out_dtype=BF16)


class Scaled(torch.autograd.Function):
    """x @ weight.t(), with all three products in FP8."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight_t: torch.Tensor, rowwise: bool) -> torch.Tensor:
        ctx.save_for_backward(x, weight_t)
        ctx.rowwise = rowwise
        return product(x, weight_t, rowwise)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:  # type: ignore[override]
        x, weight_t = ctx.saved_tensors
        of_weight = product(grad.t(), x, ctx.rowwise)
        return product(grad, weight_t.t(), ctx.rowwise), of_weight.t(), None


class ScaledLinear(nn.Linear):
    rowwise = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return Scaled.apply(x, self.weight.t(), self.rowwise)  # type: ignore[no-untyped-call, no-any-return]


class Chain(nn.Module):
    """Without biases: what the first layer is given is of the batch alone."""

    def __init__(self, kind: type[nn.Linear], rowwise: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList(kind(WIDTH, WIDTH, bias=False) for _ in range(3))
        for layer in self.layers:
            layer.rowwise = rowwise  # type: ignore[assignment]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x).tanh()
        return x.float().square().mean()


@pytest.mark.parametrize("rowwise", [False, True])
def test_products_in_fp8_keep_the_bits(rowwise: bool) -> None:
    torch.manual_seed(0)
    model = Chain(ScaledLinear, rowwise)
    run = Loop(copy.deepcopy(model), jobs.SGD, call=lambda m, b: m(**b))
    batches = [{"x": torch.randn(2 * WIDTH, WIDTH)} for _ in range(2)]
    expected = run.train(batches, 1, 2)
    options: dict[str, Any] = {"precision": "bf16_params", "optimizer": jobs.SGD, "device": "cpu"}
    pipe = pipecompile.compile(model, 2, microbatches=2, **options)
    found = plain.train_pipeline(pipe, batches)
    plain.assert_equal(found, expected)
    code = "".join(part.module.code for s in pipe.programs.stages for part in s.parts.values())
    assert code.count("_scaled_mm") >= 8
    assert "region" not in code


def test_what_reads_gradients_is_of_the_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    """AOTAutograd marks most nodes; views with which it ends a Function's backward it may not."""
    export: Any = joint.aot_export_joint_with_descriptors

    def unmarked(*args: Any) -> Any:
        made = export(*args)
        for node in made.graph_module.graph.nodes:
            if node.target is torch.ops.aten.t.default:
                node.meta.pop("partitioner_tag", None)
        return made

    monkeypatch.setattr(joint, "aot_export_joint_with_descriptors", unmarked)
    test_products_in_fp8_keep_the_bits(True)


def test_a_first_layer_without_bias_is_of_one_stage() -> None:
    """Its product is made of the batch and a mere view of a parameter, and is computed once."""
    torch.manual_seed(0)
    model, batches = Chain(nn.Linear), [{"x": torch.randn(8, WIDTH)}]
    run = Loop(copy.deepcopy(model), jobs.SGD, torch.float32, call=lambda m, b: m(**b))
    pipe = pipecompile.compile(model, 3, microbatches=2, optimizer=jobs.SGD, device="cpu")
    plain.assert_equal(plain.train_pipeline(pipe, batches), run.train(batches, 1, 2))
    held = [set(stage.params) for stage in pipe.programs.stages]
    assert not held[0] & held[1]
