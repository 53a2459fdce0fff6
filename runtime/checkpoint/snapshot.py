"""What of a training run goes into a checkpoint, as this process's part of it."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from ...compiler.capture.whole import model_of, saved
from ...compiler.ir.ops import generator_of
from ..data.dataset_loader import DataSetLoaders
from ..state.model_state import ModelState
from . import extras, optimizer_state, residues, tree


@dataclass(frozen=True)
class Training:
    """All that a checkpoint keeps, or is loaded into.

    Attributes:
        data: what knows the position in the data; None if nobody does.
        extras: name -> further objects with ``state_dict`` and ``load_state_dict``.
        own: optimizers of the user's that have stepped the parameters.
        buffer_stages: buffers that a forward has updated -> a stage that has the latest value.
        seed, steps: what dropout is drawn from.
        config: the model's configuration as JSON data, if it had one.
        adapters: what peft has made of it, as JSON data; None for a model without adapters.
        updated: buffers that forward updates, in any graph that is there.
    """

    state: ModelState
    optimizer: torch.optim.Optimizer | None
    scheduler: Any
    data: Any
    extras: Mapping[str, Any]
    buffer_stages: Mapping[str, int]
    seed: int
    steps: int
    config: dict[str, Any] | None
    own: Sequence[torch.optim.Optimizer] = ()
    adapters: dict[str, Any] | None = None
    updated: Collection[str] = ()

    @property
    def adapted(self) -> set[str]:
        """Names of the tensors that are in peft's files of the adapters."""
        found = (self.adapters or {}).values()
        return {name for each in found for name in each["tensors"].values()}

    @property
    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """Those of the parameters -> what the names of their states begin with in a checkpoint."""
        found = {
            f"extras.{name}": each
            for name, each in extras.optimizers_in(self.extras, self.param_names).items()
        }
        if self.optimizer is not None:
            found[optimizer_state.THE_PIPELINES] = self.optimizer
        return found

    @property
    def param_names(self) -> dict[torch.Tensor, str]:
        """The parameters that this process trains -> their FQNs."""
        return {param: name for name, param in self.state.named_parameters()}


def config_of(model: nn.Module) -> dict[str, Any] | None:
    """A model's configuration as `from_pretrained` wants it; None for a model without one."""
    model = model_of(model)
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "to_dict"):
        return None
    fields = json.loads(json.dumps(config.to_dict(), default=str, skipkeys=True))
    return {**fields, "architectures": [type(model).__name__]}


def names_of(state: ModelState) -> dict[str, torch.Tensor]:
    """Parameters and persistent buffers by their first names -> a fake of each."""
    canonical = state.skeleton.canonical
    return {
        canonical[name]: fake
        for name, fake in saved(state.skeleton.module).items()
        if name in canonical  # and not extra state, which is no tensor
    }


def stored_name(state: ModelState, name: str) -> str:
    """In a checkpoint, of a tensor by its first name."""
    return name if state.skeleton.is_of_loss(name) else f"model.{name}"


def tied_names(state: ModelState) -> dict[str, str]:
    """The further names of tied tensors -> their first."""
    canonical = state.skeleton.canonical
    wanted = names_of(state)
    return {name: first for name, first in canonical.items() if name != first and first in wanted}


def tensors_of(training: Training, left_out: Collection[str] = ()) -> dict[str, torch.Tensor]:
    """Checkpoint name -> tensor, of those that this process writes.

    Of what several ranks hold, replica 0 of the first stage that does writes it; of a DTensor
    every rank gives its own part, and DCP drops copies.

    Args:
        left_out: names in the checkpoint of those that nobody writes.
    """
    state = training.state
    held = dict(state.named_parameters())
    tensors: dict[str, torch.Tensor] = {}
    for name in names_of(state):
        if stored_name(state, name) in left_out:
            continue
        if name in state.homes:
            if name in held:
                tensor = state.as_stored(name, held[name].detach())
                if state.is_ours(name) or isinstance(tensor, DTensor):
                    tensors[stored_name(state, name)] = tensor
        else:
            rank = state.mesh.rank_of(0, training.buffer_stages.get(name, 0))
            if rank in state.ranks:
                tensors[stored_name(state, name)] = state.ranks[rank].buffers[name].detach()
    names, our_names = training.param_names, _our_params(training)
    for prefix, optimizer in training.optimizers.items():
        found = optimizer_state.tensors_of(optimizer, names, state.as_stored, prefix)
        ours = optimizer_state.tensors_of(optimizer, our_names, prefix=prefix)
        tensors |= {n: t for n, t in found.items() if n in ours or isinstance(t, DTensor)}
    return tensors | residues.tensors_of(state)


def facts_of(training: Training) -> dict[str, Any]:
    """This process's part of what is no model tensor, as JSON data."""
    state, optimizer = training.state, training.optimizer
    rank = next(iter(state.ranks))
    facts: dict[str, Any] = {"optimizer": None, "scheduler": None, "data": None}
    facts["first_replica"] = state.mesh.replica_of(rank) == 0
    data = training.data
    if 0 in state.mesh.stages_of(rank) and not (
        data is None or (isinstance(data, DataSetLoaders) and data.empty)
    ):
        facts["data"] = tree.encode(data.state_dict(), "the state of data=")
    if optimizer is not None:
        facts["optimizer"] = optimizer_state.facts_of(optimizer, _our_params(training))
    if training.scheduler is not None:
        facts["scheduler"] = tree.encode(training.scheduler.state_dict(), "the LR scheduler")
    facts["random"] = {
        device.type: tree.encode(generator_of(device).get_state(), "the random state")
        for device in {torch.device("cpu"), state.ranks[rank].device}
    }
    facts["compression"] = residues.facts_of(state)
    extras.check_own(training.own, training.extras)
    names, our_names = training.param_names, _our_params(training)
    facts["optimizers"] = {
        name: optimizer_state.facts_of(each, our_names)
        for name, each in extras.optimizers_in(training.extras, names).items()
    }
    facts["extras"] = {
        name: tree.encode(extra.state_dict(), f"the state of {name}")
        for name, extra in extras.others_in(training.extras, names).items()
    }
    return facts


def merge(
    parts: Sequence[dict[str, Any]], seed: int, steps: int, division: tuple[int, int]
) -> dict[str, Any]:
    """The parts of all processes, in rank order, as a checkpoint keeps them.

    Schedulers are kept per rank of a replica (their groups may differ), data per share, random
    states per process, extras once where all have the same.

    Args:
        division: ranks of a replica, and replicas.
    """
    first_replica = [part for part in parts if part["first_replica"]]
    return {
        "seed": seed,
        "steps": steps,
        "optimizer": _merged(part["optimizer"] for part in parts),
        "schedulers": _present(part["scheduler"] for part in first_replica),
        "data": _present(part["data"] for part in parts),
        "random": [part["random"] for part in parts],
        "compression": residues.merge(part.get("compression") for part in parts),
        "optimizers": {
            name: _merged(part["optimizers"].get(name) for part in parts)
            for name in dict.fromkeys(name for part in parts for name in part["optimizers"])
        },
        **extras.merge([part["extras"] for part in parts], division),
    }


def _merged(parts: Iterable[dict[str, Any] | None]) -> dict[str, Any] | None:
    present = _present(parts)
    return optimizer_state.merge(present) if present else None


def _present(values: Iterable[Any]) -> list[Any]:
    return [value for value in values if value is not None]


def _our_params(training: Training) -> dict[torch.Tensor, str]:
    names = training.param_names
    return {param: name for param, name in names.items() if training.state.is_ours(name)}
