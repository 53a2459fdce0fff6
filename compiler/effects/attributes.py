"""Tensors that are attributes of modules and neither parameters nor buffers.

A copy of the model has them as buffers outside its state dict, so that what forward makes of them
is kept from call to call as one device keeps it. Those that forward makes anew before it reads
them, of parameters for example (`torch.nn.utils.weight_norm`), need not be kept; whether it does is
known when its graphs are.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from ..ir.errors import CaptureError


@dataclass
class Attributes:
    """Of one model.

    Attributes:
        shared: attribute -> a parameter that has the same memory.
        names: all of them.
        lost: attributes that a graph leaves without a value for the next call -> why.
        read: attributes whose values a graph reads.
        decided: buffers whose values Python has got while a graph was made.
        updated: buffers that a graph updates.
    """

    names: frozenset[str]
    shared: Mapping[str, str]
    lost: dict[str, str] = field(default_factory=dict)
    read: set[str] = field(default_factory=set)
    decided: set[str] = field(default_factory=set)
    updated: set[str] = field(default_factory=set)

    def met(self, read: set[str], lost: Mapping[str, str]) -> None:
        """Of one more graph, what it reads and what it leaves without a value.

        Raises:
            CaptureError: a graph reads what is not kept from one call to the next.
        """
        self.read |= read & self.names
        self.lost |= lost
        for name in sorted(self.read):
            if name in self.lost:
                raise CaptureError(
                    f"attribute {name!r}: forward reads it, and {self.lost[name]}; what is kept "
                    "from call to call has to be a buffer (register_buffer) that stays alike"
                )
            if name in self.shared:
                raise CaptureError(
                    f"attribute {name!r} lies in the memory of parameter {self.shared[name]!r}, "
                    "which the optimizer changes: read the parameter in forward"
                )

    def asked(self, decided: Iterable[str], updated: Iterable[str]) -> None:
        """Of one more graph, the buffers by whose values it was made, and those that it updates.

        Raises:
            CaptureError: a buffer is both, of this graph or of two.
        """
        self.decided |= set(decided)
        self.updated |= set(updated)
        for name in sorted(self.decided & self.updated):
            raise CaptureError(
                f"buffer {name!r}: forward updates it, and its value is read in Python (.item(), "
                "bool(), int()), which a graph that is made once cannot follow: keep it a tensor, "
                "and decide with torch.where"
            )


def attributes_of(module: nn.Module) -> Iterator[tuple[str, nn.Module, str, torch.Tensor]]:
    """Each such tensor: its name, and of which module it is which attribute; those that are shared
    under every name."""
    known = {id(tensor) for tensor in (*module.parameters(), *module.buffers())}
    for path, part in module.named_modules(remove_duplicate=False):
        for attribute, value in list(vars(part).items()):
            if isinstance(value, torch.Tensor) and id(value) not in known:
                yield f"{path}.{attribute}".lstrip("."), part, attribute, value


def promote(module: nn.Module) -> frozenset[str]:
    """Make the tensors that are attributes buffers, in place; their names."""
    found = list(attributes_of(module))  # one that is shared is an attribute under all its names
    for _, part, attribute, value in found:
        if vars(part).pop(attribute, None) is not None:
            part.register_buffer(attribute, value, persistent=False)
    return frozenset(name for name, *_ in found)
