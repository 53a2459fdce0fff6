"""Graphs that are traced are read, and hardly ever run."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import fx
from torch.fx.graph import _PyTreeCodeGen


@contextlib.contextmanager
def unwritten() -> Iterator[None]:
    """Graph modules that are made or changed inside have no Python code until they are called.

    torch.export makes each of its graphs anew four times and more, and writes and compiles a
    function for it every time. Its lazy graph modules are none of those.
    """
    write: Any = fx.GraphModule.recompile

    def later(module: Any) -> None:
        codegen = module.graph._codegen
        if isinstance(codegen, _PyTreeCodeGen):
            module._in_spec = codegen.pytree_info.in_spec
            module._out_spec = codegen.pytree_info.out_spec
        kind = type(module)  # each has a class of its own

        def forward(module: Any, *args: Any, **kwargs: Any) -> Any:
            write(module)
            return kind.forward(module, *args, **kwargs)

        kind.forward = forward

    changed: Any = fx.GraphModule
    changed.recompile = later
    try:
        yield
    finally:
        changed.recompile = write
