"""Optimizer state by parameter name, so that any division into stages can take it up.

A torch optimizer numbers its parameters in the order in which it was given them. That order is
another on every stage, so a checkpoint has states and settings under the parameters' names; for
loading they are numbered again and given to the optimizer's own ``load_state_dict``.

States that are tensors are stored as such. What they are is read from the checkpoint, not from
the optimizer: before its first step it has none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from ...compiler.ir.errors import CheckpointError
from ..files.index import Index
from ..files.tensor_file import DTYPES
from . import bounds, tree

# How a step is computed belongs to the run and its device, not to the checkpoint.
_HOW = ("foreach", "fused", "capturable", "differentiable")
_NOT_SETTINGS = ("params", "param_names", *_HOW)

Named = Mapping[torch.Tensor, str]
Stored = Callable[[str, torch.Tensor], torch.Tensor]


THE_PIPELINES = "optimizer"
"""What the names of its states begin with in a checkpoint."""


def tensor_name(fqn: str, key: str, optimizer: str = THE_PIPELINES) -> str:
    """Of an optimizer's state in a checkpoint, for example ``optimizer.wte.weight.exp_avg``."""
    return f"{optimizer}.{fqn}.{key}"


def as_it_is(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """What is stored of a tensor that one rank has whole."""
    return tensor


def tensors_of(
    optimizer: torch.optim.Optimizer,
    names: Named,
    as_stored: Stored = as_it_is,
    prefix: str = THE_PIPELINES,
) -> dict[str, torch.Tensor]:
    """Checkpoint name -> state, of the states that are tensors.

    Args:
        names: parameter -> FQN, of those that are wanted.
        as_stored: (FQN, state of this rank's rows) -> a part of the whole parameter's.
    """
    return {
        tensor_name(names[param], key, prefix): as_stored(names[param], value)
        for param, states in optimizer.state.items()
        if param in names
        for key, value in states.items()
        if isinstance(value, torch.Tensor)
    }


def facts_of(optimizer: torch.optim.Optimizer, names: Named) -> dict[str, Any]:
    """The rest, as JSON data: which states there are, those that are no tensors, the settings."""
    groups: list[Any] = []
    group_of: dict[str, int] = {}
    for number, group in enumerate(optimizer.param_groups):
        settings = {key: value for key, value in group.items() if key not in _NOT_SETTINGS}
        groups.append(tree.encode(settings, f"the optimizer's parameter group {number}"))
        group_of |= {names[param]: number for param in group["params"] if param in names}
    tensors: dict[str, list[str]] = {}
    values: dict[str, Any] = {}
    for param, states in optimizer.state.items():
        if param not in names:
            continue
        fqn = names[param]
        tensors[fqn] = [key for key, value in states.items() if isinstance(value, torch.Tensor)]
        rest = {key: value for key, value in states.items() if key not in tensors[fqn]}
        values[fqn] = tree.encode(rest, f"the optimizer's state of {fqn!r}")
    return {
        "class": type(optimizer).__name__,
        "groups": groups,
        "group_of": group_of,
        "tensors": tensors,
        "values": values,
    }


def merge(parts: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """The facts of all ranks as one; each distinct group's settings are kept once."""
    merged: dict[str, Any] = {"groups": [], "group_of": {}, "tensors": {}, "values": {}}
    groups: list[Any] = merged["groups"]
    for part in parts:
        merged["class"] = part["class"]
        groups.extend(group for group in part["groups"] if group not in groups)
        places = [groups.index(group) for group in part["groups"]]
        merged["group_of"] |= {fqn: places[i] for fqn, i in part["group_of"].items()}
        merged["tensors"] |= part["tensors"]
        merged["values"] |= part["values"]
    return merged


class OptimizerLoad:
    """State of a checkpoint on its way into an optimizer.

    Args:
        names: parameter -> FQN.
        as_stored: (FQN, this rank's rows) -> a part of the whole parameter.

    Attributes:
        optimizer: which one.
        tensors: checkpoint name -> where to read it to; empty before `make_room`.

    Raises:
        CheckpointError: the state is another optimizer's, or its settings do not fit the groups.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        names: Named,
        facts: Mapping[str, Any],
        index: Index,
        as_stored: Stored = as_it_is,
        prefix: str = THE_PIPELINES,
    ):
        kind = type(optimizer).__name__
        if facts["class"] != kind:
            raise CheckpointError(
                f"the checkpoint has the state of {facts['class']} and the pipeline trains with "
                f"{kind}: compile with the same optimizer=, or export the weights and start anew"
            )
        bounds.check_tables(prefix, facts, index)
        self.optimizer, self._names, self._facts = optimizer, names, facts
        self._prefix, self._index = prefix, index
        self._values: dict[str, dict[str, Any]] = {
            fqn: tree.decode(values) for fqn, values in facts["values"].items()
        }
        for fqn, values in self._values.items():
            bounds.check_values(fqn, values, facts["tensors"].get(fqn, ()))
        self._settings = [self._settings_of(group) for group in optimizer.param_groups]
        self._check_steps()
        self._like: dict[str, torch.Tensor] = {}  # tensor -> of which parameter it is
        self.tensors: dict[str, torch.Tensor] = {}
        for param, fqn in names.items():
            for key in facts["tensors"].get(fqn, ()):
                name = tensor_name(fqn, key, prefix)
                self._like[name] = as_stored(fqn, param.detach())
                bounds.check_state(optimizer, param, self._like[name], index, name)

    def _check_steps(self) -> None:
        """Of parameters of a group that are alike in what counts one is tried."""
        tried = set()
        groups = zip(self.optimizer.param_groups, self._settings, strict=True)
        for number, (group, settings) in enumerate(groups):
            for param in group["params"]:
                fqn = self._names.get(param, "")
                tensors, values = self._facts["tensors"].get(fqn, ()), self._values.get(fqn, {})
                keys = frozenset((*tensors, *values))
                if (kind := (number, param.dim(), param.dtype, keys)) not in tried:
                    tried.add(kind)
                    bounds.check_steps(self.optimizer, settings, param, fqn, keys)

    @property
    def wanted(self) -> set[str]:
        """Names of the tensors that `make_room` makes room for."""
        return set(self._like)

    def make_room(self) -> None:
        """For the tensors, once their files are known to have them."""
        self.tensors = {name: _room(like, self._index, name) for name, like in self._like.items()}

    def check(self) -> None:
        """What was read.

        Raises:
            CheckpointError: a counter of steps is none.
        """
        for name, tensor in self.tensors.items():
            bounds.check_step(name, tensor)

    def finish(self) -> None:
        """Give the optimizer what was read."""
        groups, states = [], {}
        number = 0
        for group, settings in zip(self.optimizer.param_groups, self._settings, strict=True):
            members = []
            for param in group["params"]:
                if (found := self._state_of(param)) is not None:
                    states[number] = found
                members.append(number)
                number += 1
            groups.append({**group, **settings, "params": members})
        self.optimizer.load_state_dict({"state": states, "param_groups": groups})

    def _state_of(self, param: torch.Tensor) -> dict[str, Any] | None:
        fqn = self._names.get(param)
        if fqn is None or fqn not in self._facts["tensors"]:
            return None
        keys = self._facts["tensors"][fqn]
        tensors = {
            key: local_rows(self.tensors[tensor_name(fqn, key, self._prefix)]) for key in keys
        }
        return tensors | self._values.get(fqn, {})

    def _settings_of(self, group: Mapping[str, Any]) -> dict[str, Any]:
        """What the checkpoint says of a group's parameters; they must agree."""
        saved = self._facts["groups"]
        known: dict[
            int, str
        ] = {}  # number of a saved group -> the first parameter here that was in it
        for param in group["params"]:
            fqn = self._names.get(param)
            if fqn is not None and fqn in self._facts["group_of"]:
                known.setdefault(self._facts["group_of"][fqn], fqn)
        if len(known) > 1:
            (a, first), (b, second), *_ = known.items()
            differing = [key for key in saved[a] if saved[a][key] != saved[b].get(key)]
            raise CheckpointError(
                f"{first!r} and {second!r} share a parameter group, and were saved with different "
                f"{', '.join(differing)}: make the groups as they were, or export the weights"
            )
        if not known and len(saved) == 1:  # no parameter of this stage, as in a frozen one
            known[0] = ""
        found: dict[str, Any] = tree.decode(saved[next(iter(known))]) if known else {}
        if known:
            bounds.check_settings(self.optimizer, group, found)
        return found


def local_rows(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's rows of a tensor that replicas divide."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _room(param: torch.Tensor, index: Index, name: str) -> torch.Tensor:
    """Memory for a state; scalars, such as step counters, on the CPU, where optimizers keep them.

    ``load_state_dict`` moves those that belong elsewhere.
    """
    spec = index.tensors[name].spec
    dtype = DTYPES[spec.dtype][0]
    if not spec.shape:
        return torch.empty((), dtype=dtype)
    if spec.shape == tuple(param.shape):
        return torch.empty_like(param, dtype=dtype, requires_grad=False)
    return torch.empty(spec.shape, dtype=dtype, device=param.device)
