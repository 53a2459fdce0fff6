"""Attention of a graph that is traced on a CPU is planned by the kernels of a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pipecompile.compiler.capture.batch import flatten
from pipecompile.compiler.capture.skeleton import skeleton_of
from pipecompile.compiler.costs.hardware import DEVICES
from pipecompile.compiler.driver.builder import Builder
from pipecompile.compiler.driver.compiled import Mode
from pipecompile.compiler.options.options import CompileOptions
from pipecompile.compiler.planning.target import Target
from pipecompile.passes.attention.kernels import attention
from support import models
from torch.fx.experimental.proxy_tensor import make_fx

FLASH = "_scaled_dot_product_flash_attention"
EFFICIENT = "_scaled_dot_product_efficient_attention"
TOKENS = 24


def kernels(
    dtype: torch.dtype,
    heads: tuple[int, int] = (4, 4),
    widths: tuple[int, int] = (32, 32),
    mask: tuple[torch.dtype, int] | None = None,
    tokens: int = TOKENS,
    **options: Any,
) -> tuple[set[str], list[torch.Tensor]]:
    """Attention operators with their backward, and the values that they made."""

    def run(query: Any, key: Any, value: Any, attn_mask: Any) -> Any:
        out = attention(query, key, value, attn_mask, **options)
        assert out.shape == (2, heads[0], TOKENS, widths[1])
        return torch.autograd.grad(out.float().sum(), (query, key, value))

    shapes = [(heads[0], TOKENS, widths[0]), (heads[1], tokens, widths[0])]
    shapes += [(heads[1], tokens, widths[1])]
    given = [torch.empty(2, *shape, dtype=dtype, requires_grad=True) for shape in shapes]
    masks = None if mask is None else torch.ones(2, mask[1], TOKENS, tokens).to(mask[0])
    graph = make_fx(run, tracing_mode="fake")(*given, masks).graph
    called = [str(node.target) for node in graph.nodes if node.op == "call_function"]
    names = {each.split(".")[1] for each in called if "attention" in each}
    vals = [node.meta.get("val") for node in graph.nodes]
    return names, [val for val in vals if isinstance(val, torch.Tensor)]


@pytest.mark.parametrize(
    ("given", "kernel"),
    [
        ({"dtype": torch.bfloat16, "is_causal": True, "dropout_p": 0.1}, FLASH),
        ({"dtype": torch.float16, "heads": (4, 2), "enable_gqa": True}, FLASH),
        ({"dtype": torch.bfloat16, "widths": (12, 12), "scale": 0.3}, FLASH),
        ({"dtype": torch.bfloat16, "tokens": 40}, FLASH),
        ({"dtype": torch.bfloat16, "tokens": 40, "is_causal": True}, EFFICIENT),
        ({"dtype": torch.bfloat16, "widths": (264, 264)}, EFFICIENT),
        ({"dtype": torch.bfloat16, "widths": (32, 16)}, EFFICIENT),
        ({"dtype": torch.bfloat16, "mask": (torch.bool, 1), "dropout_p": 0.1}, EFFICIENT),
        ({"dtype": torch.bfloat16, "mask": (torch.bfloat16, 4)}, EFFICIENT),
        ({"dtype": torch.float32, "is_causal": True}, EFFICIENT),
        ({"dtype": torch.float32, "widths": (30, 30)}, None),
        ({"dtype": torch.float32, "heads": (4, 2), "enable_gqa": True}, None),
        ({"dtype": torch.float64}, None),
        ({"dtype": torch.bfloat16, "mask": (torch.bool, 1), "widths": (36, 36)}, None),
    ],
)  # fmt: skip
def test_which_kernel_runs_and_what_it_keeps(given: dict[str, Any], kernel: str | None) -> None:
    names, vals = kernels(**given)
    assert names == (set() if kernel is None else {kernel, f"{kernel}_backward"})
    scores = [val for val in vals if val.shape[-2:] == (TOKENS, given.get("tokens", TOKENS))]
    probabilities = [val for val in scores if val.shape[0] == 2 * 4 or val.shape[:2] == (2, 4)]
    assert bool(probabilities) == (kernel is None or "mask" in given)


def probabilities(device: str) -> int:
    """Tensors of a program with a number for each pair of tokens; with dropout, in bf16."""
    options = CompileOptions(n_stages=1, precision="bf16")
    model = models.gpt2(dropout=0.1, n_layer=1)
    skeleton = skeleton_of(model.train(), torch.device("cpu"), options.dtypes)
    batch = models.batches("gpt2", 2, 1)[0]
    builder = Builder(skeleton, options, Target(torch.device("cpu"), DEVICES[device]))
    program = builder.build(Mode.TRAIN, flatten(batch)[1], 2).program
    tokens = batch["input_ids"].shape[1]
    vals = [
        node.meta.get("val")
        for stage in program.stages
        for part in stage.parts.values()
        for node in part.module.graph.nodes
    ]
    return sum(isinstance(v, torch.Tensor) and v.shape[-2:] == (tokens, tokens) for v in vals)


def test_a_plan_for_a_gpu_keeps_no_probabilities() -> None:
    assert probabilities("cpu") > 0
    assert probabilities("h100") == 0
