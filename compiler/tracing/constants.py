"""Values that a forward asks for and that no call changes: it is told them, as it is untraced.

A mask of nothing but ones that the model makes itself, say, of which it asks whether anything is
masked. The operators that made such a tensor are run, as a graph of them exists.

`_disable_current_modes` is torch's own way out of tracing; it has no public name.
"""

from __future__ import annotations

import contextlib
import operator
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes

from ..effects.outside import NUMBERS
from ..ir.graph import computed, is_getitem, is_operator, is_random, made_of
from ..tensors.fakes import is_fake, is_symbol
from .kept import outside_of_tracing, traced_as
from .sizes import Asked, Sizes, hint

MAX_ELEMENTS = 1 << 26  # of a tensor that is computed to look at


class Constants(TorchFunctionMode):
    """A forward inside, in which `if`, `.item()` and the like work on constants.

    Args:
        sizes: where sizes are symbols, what is made of them is a constant, too, and noted.
    """

    def __init__(self, sizes: Sizes | None = None) -> None:
        super().__init__()
        self.sizes = sizes

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func in NUMBERS:
            found = _operators(args[0], self.sizes is not None)
            if found is not None:
                return self._told(Computation(*found), func, args[1:], kwargs or {})
        return func(*args, **(kwargs or {}))

    def _told(
        self, made: Computation, func: Callable[..., Any], args: Sequence[Any], kwargs: Any
    ) -> Any:
        def told(sizes: Sequence[Any]) -> Any:
            value = made(sizes)
            with _untraced():
                return func(value, *args, **kwargs)

        answer = told([hint(size) for size in made.sizes])
        if made.sizes:
            assert self.sizes is not None
            self.sizes.asked.append(Asked(told, made.sizes, answer))
        return answer


@contextlib.contextmanager
def told_constants(
    sizes: Sizes | None = None, answered: Callable[[torch.Tensor], bool] = lambda _: False
) -> Iterator[None]:
    """`Constants`, and transformers does not take them for tensors that are traced.

    Args:
        answered: whether the batch tells what a tensor holds, so that it may be asked as well.
    """
    utils: Any = sys.modules.get("transformers.utils.import_utils")
    asked = getattr(utils, "is_fake_tensor", None)
    with Constants(sizes):
        if asked is None:
            yield
            return

        def unknown(x: Any) -> bool:
            return asked(x) and _operators(x, sizes is not None) is None and not answered(x)

        utils.is_fake_tensor = unknown
        try:
            yield
        finally:
            utils.is_fake_tensor = asked


@contextlib.contextmanager
def asked_masks(answered: Callable[[torch.Tensor], bool]) -> Iterator[None]:
    """A model that is told that it is traced, inside: transformers asks masks of the batch, which
    answers, whether they mask anything; nothing else of it hears that it may.

    Args:
        answered: as `told_constants` has it.
    """
    masks: Any = sys.modules.get("transformers.masking_utils")
    names = ("is_tracing", "is_torchdynamo_exporting")
    if masks is None or not all(hasattr(masks, name) for name in names):
        yield
        return
    traced, exporting = (getattr(masks, name) for name in names)
    masks.is_tracing = lambda x=None: traced(x) and not (x is not None and answered(x))
    masks.is_torchdynamo_exporting = lambda: False  # is_tracing is asked as well
    try:
        yield
    finally:
        masks.is_tracing, masks.is_torchdynamo_exporting = traced, exporting


def is_told(tensor: torch.Tensor) -> bool:
    """Whether a tensor that is being traced is a constant, of which Python may get the values."""
    return _operators(tensor, False) is not None


class Computation:
    """The operators that made a tensor which depends on nothing, or on sizes alone.

    Args:
        nodes: in order, the tensor's own the last.
        root: has their constants.

    Attributes:
        sizes: the symbols that they read.
    """

    def __init__(self, nodes: Sequence[fx.Node], root: Any):
        graph, twin = fx.Graph(), dict[fx.Node, fx.Node]()
        self._constants: dict[fx.Node, torch.Tensor] = {}
        self._places: list[fx.Node] = []
        self.sizes: list[Any] = []
        for node in nodes:
            if is_symbol(node.meta.get("val")):
                twin[node] = graph.placeholder(node.name)
                self._places.append(twin[node])
                self.sizes.append(node.meta["val"])
                continue
            twin[node] = graph.node_copy(node, twin.__getitem__)
            if node.op == "get_attr":
                value = operator.attrgetter(str(node.target))(root)
                self._constants[twin[node]] = value.cpu()
        self._nodes = list(twin.values())

    def __call__(self, sizes: Sequence[Any]) -> Any:
        """The value, on the CPU."""
        values: dict[fx.Node, Any] = dict(zip(self._places, sizes, strict=True))
        with _untraced(), torch.no_grad():
            return computed(self._nodes, values | self._constants)[self._nodes[-1]]


@contextlib.contextmanager
def _untraced() -> Iterator[None]:
    with outside_of_tracing(), _disable_current_modes(), torch._C.DisableTorchFunction():
        yield


def _operators(tensor: Any, sizes: bool) -> tuple[list[fx.Node], Any] | None:
    """All that a constant is made of, in order, and whose constants these are; None for any other
    tensor.

    Args:
        sizes: what is made of symbols is a constant, too.
    """
    if not isinstance(tensor, torch.Tensor):
        return None
    wanted, root = traced_as(tensor)

    def given(node: fx.Node) -> bool:
        return sizes and is_symbol(node.meta.get("val"))

    def allowed(node: fx.Node) -> bool:
        return given(node) or _is_constant(node, root)

    nodes = None if wanted is None else made_of(wanted, allowed, given)
    return None if nodes is None else (nodes, root)


def _is_constant(node: fx.Node, root: Any) -> bool:
    """Whether a node depends on nothing but what it reads, and can be run."""
    if node.op == "get_attr":
        value = operator.attrgetter(str(node.target))(root)
        return "constant" in str(node.target) and _is_real(value)
    value = node.meta.get("val")
    small = not isinstance(value, torch.Tensor) or _elements(value) <= MAX_ELEMENTS
    return small and (is_operator(node) or is_getitem(node)) and not is_random(node)


def _elements(tensor: torch.Tensor) -> int:
    count = tensor.numel()
    return hint(count) if is_symbol(count) else count


def _is_real(value: object) -> bool:
    return isinstance(value, torch.Tensor) and not is_fake(value)
