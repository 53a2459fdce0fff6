"""torch's Inductor, below autograd: one fusion in, a boxed callable out.

What is private of it stands here. `torch._inductor.compile` and `standalone_compile` are its public
doors, and lead through AOTAutograd: their callables hold on to all arguments until the end, make
views that are results anew on every call, and cost more time per call than a small kernel takes. What
a program has is what they make first, so it is given to what they call last, `compile_fx_inner`,
with decompositions (`select_decomp_table`) as they would be.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import fx
from torch._guards import TracingContext, tracing
from torch._inductor.compile_fx import compile_fx_inner
from torch._inductor.cpp_builder import get_cpp_compiler
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.exc import InvalidCxxCompiler
from torch._inductor.runtime.cache_dir_utils import cache_dir
from torch._inductor.virtualized import V
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._triton import has_triton

Boxed = Callable[[list[torch.Tensor]], Sequence[torch.Tensor]]
"""Takes a list, which it empties at its start."""


def lacking(kind: str) -> str:
    """What Inductor misses to compile for a type of device; "" where there is all of it."""
    if kind == "cuda":
        return "" if has_triton() else "Triton is not installed, or does not know this GPU"
    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        return "there is no C++ compiler (g++, or what CXX names)"
    return ""


def folder() -> Path:
    """Where Inductor keeps what it has compiled."""
    return Path(cache_dir())


def compile_fusion(fusion: fx.GraphModule, device: torch.device) -> Boxed:
    """Compile for arguments of the shapes and strides that a fusion was traced with.

    What it returns may have other strides only in dimensions of size 1, or where Inductor does not
    keep what it is told.
    """
    mode = FakeTensorMode()
    values = [node.meta["val"] for node in fusion.graph.find_nodes(op="placeholder")]
    with mode:
        arguments = [
            torch.empty_strided(v.shape, v.stride(), dtype=v.dtype, device=device) for v in values
        ]

    def run(*given: torch.Tensor) -> Sequence[torch.Tensor]:
        made: Sequence[torch.Tensor] = fusion.forward(list(given))
        return made

    with torch.no_grad():
        traced = make_fx(run, select_decomp_table(), tracing_mode="fake")(*arguments)
        (output,) = traced.graph.find_nodes(op="output")
        output.meta["user_visible_output_idxs"] = list(range(len(output.args[0])))
        with V.set_fake_mode(mode), tracing(TracingContext(mode)):
            compiled: Boxed = compile_fx_inner(traced, arguments, is_inference=True)
    return compiled
