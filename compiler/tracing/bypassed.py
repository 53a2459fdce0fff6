"""Layers that are left out of a forward: they would do once more what the one before them did.

Such a forward tells how values grow with the rows of the batch as the whole one does, in a fraction
of the time. A layer is left out if the same forward with other rows has copied it (`copies`); when
it is called, all that can be compared is compared anew, and it returns what it was given.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..tensors.pytree import tree_flatten
from .helpers import is_helper
from .likeness import ALL, PLAIN, Place, differences, layout
from .templates import Call, Template

FEWEST = 4  # layers that are worth it


class BypassError(Exception):
    """A layer cannot be left out."""


@dataclass(frozen=True)
class Bypass:
    """What is left out of a forward.

    Attributes:
        traced: the path of the layer that the others are like.
        kept: that of the layer after it, which stands for those that are left out.
        paths: theirs, in the order of their calls.
    """

    traced: str
    kept: str
    paths: Sequence[str]


def bypass_of(copied: Mapping[str, str]) -> Bypass | None:
    """What need not be done again of a forward; None where it is all of it.

    Args:
        copied: the path of each layer that was copied -> that of the one it was copied from.
    """
    sources = set(copied.values())
    if len(sources) != 1 or len(copied) <= FEWEST:
        return None
    (source,), (kept, *rest) = sources, copied
    return Bypass(source, kept, rest)


@dataclass
class Done:
    """The last call that was copied, and what it returned."""

    template: Template
    call: Call
    output: Any

    def again(self, different: set[Place], leaves: Sequence[Any], tree: Any, told: Any) -> None:
        """Raises BypassError unless a call does with its result what this one did with an argument
        that looks the same.

        Args:
            different: where the attributes of its layer are others.
            leaves, tree: its arguments.
            told: whether a tensor's values are known to Python.
        """
        results = [x for x in tree_flatten(self.output)[0] if x is not None]
        if len(results) != 1 or not isinstance(results[0], torch.Tensor):
            raise BypassError("a layer returns more than a tensor")
        (result,) = results
        known = different & self.template.reads or (different and _all_read(self.template))
        if known or tree != self.call.tree or not self.template.outside.holds():
            raise BypassError("a layer may do something else")
        flows = 0
        for mine, theirs in zip(leaves, self.call.leaves, strict=True):
            if mine is result and theirs is not result:
                flows += 1
                alike = layout(mine) == layout(theirs) and told(mine) == told(theirs)
            elif isinstance(mine, torch.Tensor) or is_helper(mine):
                alike = mine is theirs
            else:
                alike = type(mine) is type(theirs) and type(mine) in PLAIN
                alike = alike and repr(mine) == repr(theirs)
            if not alike:
                raise BypassError("a layer has other arguments")
        if flows != 1:
            raise BypassError("a layer does not go on with what the one before it returned")


def _all_read(template: Template) -> bool:
    return any(name == ALL for _, name in template.reads)


@contextmanager
def emptied(root: nn.Module, bypass: Bypass) -> Iterator[Mapping[str, set[Place]]]:
    """Inside, the layers that are left out have neither parameters nor anything in them.

    Yields:
        Path -> where their attributes are others than those of the layer that they are like.

    Raises:
        BypassError: they are not alike.
    """
    first = root.get_submodule(bypass.traced)
    parts = {path: root.get_submodule(path) for path in bypass.paths}
    with torch._C.DisableTorchFunction():
        found = {path: differences(first, part) for path, part in parts.items()}
    if any(each is None for each in found.values()):
        raise BypassError("layers are not alike")
    held = {path: dict(vars(part)) for path, part in parts.items()}
    try:
        for part in parts.values():
            vars(part).update(_parameters={}, _buffers={}, _modules={})
        yield {path: each for path, each in found.items() if each is not None}
    finally:
        for path, part in parts.items():
            vars(part).update(held[path])
