"""Values that a forward asks for and that no call changes: it is told them, as it is untraced.

A mask of nothing but ones that the model makes itself, say, of which it asks whether anything is
masked. The operators that made such a tensor are run, as a graph of them exists.

`_disable_current_modes` is torch's own way out of tracing; it has no public name.
"""

from __future__ import annotations

import contextlib
import operator
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes

from ..effects.outside import NUMBERS
from ..ir.graph import computed, is_getitem, is_operator, is_random, made_of
from ..tensors.fakes import is_fake
from .kept import outside_of_tracing, traced_as

MAX_ELEMENTS = 1 << 26  # of a tensor that is computed to look at


class Constants(TorchFunctionMode):
    """A forward inside, in which `if`, `.item()` and the like work on constants."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func in NUMBERS:
            value = constant_value(args[0])
            if value is not None:
                with _untraced():
                    return func(value, *args[1:], **(kwargs or {}))
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def told_constants() -> Iterator[None]:
    """`Constants`, and transformers does not take them for tensors that are traced."""
    utils: Any = sys.modules.get("transformers.utils.import_utils")
    asked = getattr(utils, "is_fake_tensor", None)
    with Constants():
        if asked is None:
            yield
            return
        utils.is_fake_tensor = lambda x: asked(x) and _operators(x) is None
        try:
            yield
        finally:
            utils.is_fake_tensor = asked


def constant_value(tensor: torch.Tensor) -> torch.Tensor | None:
    """The value of a tensor that is being traced and depends on nothing, on the CPU; else None."""
    found = _operators(tensor)
    if found is None:
        return None
    nodes, root = found
    values = {
        node: operator.attrgetter(str(node.target))(root).cpu()
        for node in nodes
        if node.op == "get_attr"
    }
    with _untraced(), torch.no_grad():
        value = computed(nodes, values)[nodes[-1]]
    return value if isinstance(value, torch.Tensor) else None


@contextlib.contextmanager
def _untraced() -> Iterator[None]:
    with outside_of_tracing(), _disable_current_modes(), torch._C.DisableTorchFunction():
        yield


def _operators(tensor: Any) -> tuple[list[fx.Node], Any] | None:
    """All that a constant is made of, in order, and whose constants these are; None for any other
    tensor."""
    if not isinstance(tensor, torch.Tensor):
        return None
    wanted, root = traced_as(tensor)
    nodes = None if wanted is None else made_of(wanted, lambda node: _is_constant(node, root))
    return None if nodes is None else (nodes, root)


def _is_constant(node: fx.Node, root: Any) -> bool:
    """Whether a node depends on nothing but what it reads, and can be run."""
    if node.op == "get_attr":
        value = operator.attrgetter(str(node.target))(root)
        return "constant" in str(node.target) and _is_real(value)
    value = node.meta.get("val")
    small = not isinstance(value, torch.Tensor) or value.numel() <= MAX_ELEMENTS
    return small and (is_operator(node) or is_getitem(node)) and not is_random(node)


def _is_real(value: object) -> bool:
    return isinstance(value, torch.Tensor) and not is_fake(value)
