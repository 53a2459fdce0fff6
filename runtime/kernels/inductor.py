"""torch's Inductor, below autograd: one fusion in, a boxed callable out.

What is private of it stands here. `torch._inductor.compile` and `standalone_compile` are its public
doors, and lead through AOTAutograd: their callables hold on to all arguments until the end, make
views that are results anew on every call, and cost more time per call than a small kernel takes. A
fusion is what they would make first, a flat graph without writes; so it is decomposed as they do it
(`select_decomp_table`), and given to what they call last (`compile_fx_inner`).
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch._guards import TracingContext, tracing
from torch._inductor import config
from torch._inductor.compile_fx import compile_fx_inner
from torch._inductor.cpp_builder import get_cpp_compiler
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.exc import InductorError, InvalidCxxCompiler
from torch._inductor.runtime.cache_dir_utils import cache_dir
from torch._inductor.virtualized import V
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._triton import has_triton

from ...compiler.ir.program import ANY_STRIDES
from ...passes.programs.products import is_turn

_ATEN, _PRIMS = torch.ops.aten, torch.ops.prims

Boxed = Callable[[list[torch.Tensor]], Sequence[torch.Tensor]]
"""Takes a list, which it empties at its start."""


def lacking(kind: str) -> str:
    """What Inductor misses to compile for a type of device; "" where there is all of it."""
    if kind == "cuda":
        if not has_triton():
            return "Triton is not installed, or does not know this GPU"
        named = os.environ.get("CC")
        if not any(map(shutil.which, [named] if named else ["gcc", "clang", "cc"])):
            return "Triton finds no C compiler (gcc or clang, or what CC names)"
        return ""
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
    mode = FakeTensorMode(shape_env=ShapeEnv())  # without one nothing is kept on disk
    values = [node.meta["val"] for node in fusion.graph.find_nodes(op="placeholder")]
    with mode:
        arguments = [
            torch.empty_strided(
                v.shape,
                v.stride(),
                dtype=v.dtype,
                device=device if v.device.type == device.type else v.device,
            )
            for v in values
        ]

    def run(*given: torch.Tensor) -> Sequence[torch.Tensor]:
        made: Sequence[torch.Tensor] = fusion.forward(list(given))
        return made

    with torch.no_grad():
        traced = make_fx(run, select_decomp_table(), tracing_mode="fake")(*arguments)
        (output,), (told,) = (g.find_nodes(op="output") for g in (traced.graph, fusion.graph))
        for made, node in zip(output.args[0], told.args[0], strict=True):
            if node.meta.get(ANY_STRIDES):
                _in_rows(made)
        _add_biases_apart(traced.graph)
        traced.recompile()
        output.meta["user_visible_output_idxs"] = list(range(len(output.args[0])))
        # a CUDA graph's results are gone with its next call, and another microbatch's is next; what
        # only leaves would be computed last, and all that it reads held until then
        alone = config.patch({"triton.cudagraphs": False, "reorder_for_locality": False})
        with V.set_fake_mode(mode), tracing(TracingContext(mode)), alone:
            while True:
                try:
                    compiled: Boxed = compile_fx_inner(traced, arguments, is_inference=True)
                    return compiled
                except (ImportError, InductorError) as error:
                    if not _removed(str(error)):
                        raise


def _removed(error: str) -> bool:
    """Whether the error was that of a library that cannot be loaded, and that is gone now.

    A process that was killed while it compiled leaves a part of one, which torch would take for
    whole for ever.
    """
    found = re.search(r"(/\S+\.so): ", error)
    if found is None or not Path(found[1]).is_relative_to(folder()):
        return False
    there = Path(found[1]).exists()
    Path(found[1]).unlink(missing_ok=True)
    return there


def _in_rows(gradient: fx.Node) -> None:
    """Make a weight's gradient row by row, as its sum is: of ``(xᵀ g)ᵀ`` make ``gᵀ x``.

    A linear layer's arrives transposed, and would be copied before it is added. Also where it is
    cast first.
    """
    turned = gradient
    if turned.target is _PRIMS.convert_element_type.default and len(turned.users) == 1:
        turned = turned.args[0]  # type: ignore[assignment]
    if not is_turn(turned):
        return
    product = turned.args[0]
    if not isinstance(product, fx.Node) or product.target is not _ATEN.mm.default:
        return
    if len(product.users) > 1 or len(turned.users) > 1:
        return
    graph = turned.graph
    with graph.inserting_before(turned):
        left, right = (_turned(graph, factor) for factor in product.args)
        made = graph.call_function(_ATEN.mm.default, (right, left))
    made.meta["val"] = turned.meta["val"].contiguous()
    turned.replace_all_uses_with(made)
    graph.erase_node(turned)
    graph.erase_node(product)


def _add_biases_apart(graph: fx.Graph) -> None:
    """On the CPU, make ``mm`` and ``add`` of an ``addmm`` whose result is read elementwise.

    The library's kernel would be given copies of the bias as what it adds to, one for every row;
    the sum costs nothing where what follows is computed. In fp32 alone: the product would be
    rounded once more. On CUDA, Inductor does the same.
    """
    for node in graph.find_nodes(op="call_function", target=_ATEN.addmm.default):
        bias, left, right = node.args
        value: torch.Tensor = node.meta["val"]
        here = value.device.type == "cpu" and value.dtype is torch.float32
        if not here or node.kwargs or not _is_read_elementwise(node):
            continue
        with graph.inserting_before(node):
            product = graph.call_function(_ATEN.mm.default, (left, right))
            total = graph.call_function(_ATEN.add.Tensor, (product, bias))
        product.meta["val"], total.meta["val"] = value, value
        node.replace_all_uses_with(total)
        graph.erase_node(node)


def _is_read_elementwise(node: fx.Node) -> bool:
    for user in node.users:
        if user.target in (_ATEN.view.default, _ATEN.reshape.default, _ATEN._unsafe_view.default):
            if not _is_read_elementwise(user):
                return False
        elif torch.Tag.pointwise not in getattr(user.target, "tags", ()):
            return False
    return True


def _turned(graph: fx.Graph, factor: Any) -> fx.Node:
    if is_turn(factor):
        (source,) = factor.all_input_nodes
        return source
    node = graph.call_function(_ATEN.permute.default, (factor, [1, 0]))
    node.meta["val"] = factor.meta["val"].t()
    return node
