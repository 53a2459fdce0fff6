"""Exported graphs of one model that several captures need: twice the rows of one are those of
another. Each is made once, and every capture has a copy to change."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

import torch
from torch import fx

from .exporting import Results, Traced, exported

Export = tuple[fx.GraphModule, Results]


@dataclass(frozen=True)
class Exports:
    """Of one model, as long as nothing about it changes but the batch."""

    _known: dict[object, Export] = field(default_factory=dict)

    def exported(self, function: Traced, leaves: tuple[torch.Tensor, ...]) -> Export:
        """As `exported` has it."""
        if function.regions.why or function.spec.plain_leaves:
            return exported(function, leaves)
        key = (
            *(function.spec, function.loss_fn, function.wants_loss, function.compute),
            *(function.floats, tuple(function.denied), function.lazily),
            *(function.whole.training, torch.is_grad_enabled(), leaves[0].device),
        )
        if key not in self._known:
            made, results = exported(function, leaves)
            inner = (part for part in made.modules() if part is not made)
            if results.guards or any(isinstance(part, fx.GraphModule) for part in inner):
                return made, results  # what the batch answers, and graphs in the graph
            self._known[key] = made, results
        made, results = self._known[key]
        return _copied(made), results


def _copied(made: fx.GraphModule) -> fx.GraphModule:
    """The same tensors, under operators of its own."""
    twin = fx.GraphModule(made, copy.deepcopy(made.graph))
    twin.meta = dict(made.meta)
    for node in made.graph.find_nodes(op="get_attr"):
        path, _, name = str(node.target).rpartition(".")
        theirs, mine = (each.get_submodule(path) for each in (made, twin))
        if name in vars(theirs) and name in mine._buffers:
            # a constant, which torch makes a buffer of when it copies
            vars(mine)[name] = mine._buffers.pop(name)
    return twin
