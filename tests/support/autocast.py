"""Dtypes, and training under torch.autocast, which mixed precision is compared with."""

from __future__ import annotations

import functools
from functools import partial
from typing import Any

import pipecompile
import torch
from pipecompile import Precision
from pipecompile.compiler.capture import batch as batches
from pipecompile.compiler.capture.capture import capture_training
from pipecompile.compiler.capture.skeleton import skeleton_of
from pipecompile.compiler.ir.graph import JointGraph
from pipecompile.passes.graph.autocast import insert_casts
from pipecompile.passes.graph.casts import is_cast
from torch import fx, nn

from support import jobs, plain

CPU = torch.device("cpu")
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
NAMED = {"bf16": BF16, "fp16": FP16}


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


def captured(
    model: nn.Module, batch: Any, precision: Precision, table: str = "cpu", times: int = 1
) -> JointGraph:
    casts = partial(insert_casts, precision=precision, table=table)
    skeleton, spec = skeleton_of(model, CPU, precision), batches.flatten(batch)[1]
    made = capture_training(skeleton, spec, None, CPU, (casts,) * times, precision.compute)
    return made.graph


def casts_of(graph: JointGraph) -> list[fx.Node]:
    return [node for node in graph.graph.nodes if is_cast(node)]


class Summed(nn.Module):
    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x).sum()


def small(large: bool = False) -> torch.Tensor:
    return torch.full((2, 8), 6e4) if large else torch.ones(2, 8)
