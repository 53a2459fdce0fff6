"""A checkpoint on its way into a pipeline: all is checked first, then all is changed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from ...compiler.ir.errors import CheckpointError
from ...compiler.ir.ops import generator_of
from ..data.dataset_loader import DataSetLoaders
from ..state.model_state import ModelState
from . import extras, tree
from .index import Index
from .optimizer_state import OptimizerLoad
from .snapshot import Training, names_of, tied_names

_SHOWN = 3  # names in an error, of each kind


class Restore:
    """What is read from a checkpoint, and where it goes.

    Attributes:
        tensors: checkpoint name -> the tensor to read it to: the pipeline's own, for the model.
        seed, steps: what the pipeline goes on from.

    Raises:
        CheckpointError: the checkpoint is of something else; nothing has been changed.
    """

    def __init__(self, training: Training, index: Index, rank: int):
        self._training, self._rank = training, rank
        self._facts = index.training
        self._sources = _check_model(training.state, index)
        self.tensors = self._model_tensors()
        self._optimizer: OptimizerLoad | None = None
        self._index = index
        self._pending: list[Callable[[], object]] = []
        self.seed, self.steps = training.seed, 0
        if self._facts is None:
            return
        self.seed, self.steps = int(self._facts["seed"]), int(self._facts["steps"])
        _check_ties(training.state, index)
        optimizer, facts = training.optimizer, self._facts["optimizer"]
        if optimizer is not None and facts is not None:
            self._optimizer = OptimizerLoad(
                optimizer, training.param_names, facts, index, training.state.as_stored
            )
            self.tensors |= self._optimizer.tensors
            self._prepare_scheduler(self._facts["schedulers"])
        self._prepare_extras(self._facts)
        self._prepare_data(self._facts["data"])
        self._prepare_random(self._facts["random"])

    def finish(self) -> None:
        """Put everything but the model's tensors where it belongs, once ``tensors`` are read."""
        self._spread_buffers()
        if self._optimizer is not None:
            self._optimizer.finish()
        elif self._training.optimizer is not None:
            self._training.optimizer.state.clear()
        for act in self._pending:
            act()

    def _model_tensors(self) -> dict[str, torch.Tensor]:
        state = self._training.state
        held: dict[str, torch.Tensor] = dict(state.named_parameters())
        held |= next(iter(state.ranks.values())).buffers
        return {
            source: state.as_stored(name, held[name].detach())
            for name, source in self._sources.items()
            if name in held
        }

    def _spread_buffers(self) -> None:
        first, *others = self._training.state.ranks.values()
        for rank in others:
            for name in self._sources:
                if name in rank.buffers:
                    rank.buffers[name].copy_(first.buffers[name])

    def _prepare_scheduler(self, saved: list[Any]) -> None:
        scheduler = self._training.scheduler
        if (scheduler is not None) != bool(saved):
            had, has = ("none", "one") if scheduler is not None else ("one", "none")
            raise CheckpointError(
                f"the pipeline was saved with {had} of lr_scheduler= and is compiled with {has}: "
                "give compile() what it had"
            )
        if scheduler is None:
            return
        mesh = self._training.state.mesh
        if len(saved) == mesh.pp and mesh.distributed:
            chosen = saved[mesh.position_of(self._rank)]
        elif all(each == saved[0] for each in saved):
            chosen = saved[0]
        else:
            raise CheckpointError(
                f"the {len(saved)} stages were saved with different LR schedulers: load them with "
                f"n_stages={len(saved)}, or make the same parameter groups on every stage"
            )
        assert self._training.optimizer is not None
        state, groups = tree.decode(chosen), len(self._training.optimizer.param_groups)
        rates = state.get("base_lrs", state.get("min_lrs", range(groups)))
        if len(rates) != groups:
            raise CheckpointError(
                f"the LR scheduler was saved with {len(rates)} parameter groups and this stage "
                f"has {groups}: make the same groups on every stage, empty or not"
            )
        self._pending.append(partial(scheduler.load_state_dict, state))

    def _prepare_extras(self, facts: Mapping[str, Any]) -> None:
        training = self._training
        names, state = training.param_names, training.state
        for name, extra in extras.others_in(training.extras, names).items():
            if (found := extras.state_of(name, facts, state.mesh, self._rank)) is not None:
                self._pending.append(partial(extra.load_state_dict, found))
        for name, optimizer in extras.optimizers_in(training.extras, names).items():
            saved = facts.get("optimizers", {}).get(name)
            if saved is not None:
                load = OptimizerLoad(
                    optimizer, names, saved, self._index, state.as_stored, f"extras.{name}"
                )
                self.tensors |= load.tensors
                self._pending.append(load.finish)
            elif extras.state_of(name, facts, state.mesh, self._rank) is not None:
                raise CheckpointError(
                    f"checkpoint_extras[{name!r}] is an optimizer of the pipeline's parameters, "
                    "and was something else when it was saved: give it what it had"
                )

    def _prepare_random(self, saved: list[dict[str, Any]]) -> None:
        """The user's own random streams: of this rank, or of rank 0 where there was none."""
        rank = self._rank if self._rank < len(saved) else 0
        here = next(iter(self._training.state.ranks.values())).device
        for device in {torch.device("cpu"), here}:
            if device.type in saved[rank]:
                state = tree.decode(saved[rank][device.type])
                self._pending.append(partial(generator_of(device).set_state, state))

    def _prepare_data(self, saved: list[Any]) -> None:
        data, mesh = self._training.data, self._training.state.mesh
        implied = isinstance(data, DataSetLoaders)
        if data is None or (implied and not saved):
            return
        shards = mesh.dp if mesh.distributed else 1
        if not saved:
            raise CheckpointError(
                "data= was given, and the checkpoint was saved without: leave it out"
            )
        if len(saved) == shards:
            chosen = saved[mesh.replica_of(self._rank) if mesh.distributed else 0]
        elif all(each == saved[0] for each in saved):
            chosen = saved[0]
        else:
            raise CheckpointError(
                f"the data was at {len(saved)} different positions and is now cut into {shards} "
                "shares: leave data= out and set the position yourself, or let its state_dict() "
                "count what all shares have read"
            )
        state = tree.decode(chosen)
        if implied != DataSetLoaders.is_state(state):
            if implied:
                return
            raise CheckpointError(
                "data= was given, and the checkpoint has the position of loaders that the pipeline "
                "made: leave it out"
            )
        self._pending.append(partial(data.load_state_dict, state))


def _check_model(state: ModelState, index: Index) -> dict[str, str]:
    """First name of each tensor of model and loss -> its name in the checkpoint.

    Raises:
        CheckpointError: with the first names and shapes that differ.
    """
    wanted, trained = names_of(state), index.trained
    saved = {name: index.tensors[stored].spec for name, stored in trained.items()}
    if index.training is None:  # weights alone are the model's: the loss stays as it is
        wanted = {
            name: fake for name, fake in wanted.items() if not state.skeleton.is_of_loss(name)
        }
    aliases: dict[str, list[str]] = {name: [name] for name in wanted}
    for name, first in tied_names(state).items():
        if first in wanted:
            aliases[first].append(name)
    sources = {
        first: next((n for n in names if n in saved), None) for first, names in aliases.items()
    }
    known = {name for names in aliases.values() for name in names}
    differing = [f"{name!r} is missing" for name, source in sources.items() if source is None]
    differing += [f"{name!r} is not in the model" for name in saved if name not in known]
    differing += [
        f"{source!r} is {list(saved[source].shape)} and {list(wanted[name].shape)} in the model"
        for name, source in sources.items()
        if source is not None and saved[source].shape != tuple(wanted[name].shape)
    ]
    if differing:
        more = f", and {len(differing) - _SHOWN} more" if len(differing) > _SHOWN else ""
        raise CheckpointError(
            f"the checkpoint is of another model: {', '.join(differing[:_SHOWN])}{more}: build "
            "the model that was saved"
        )
    return {name: trained[source] for name, source in sources.items() if source is not None}


def _check_ties(state: ModelState, index: Index) -> None:
    tied = tied_names(state)
    for name in sorted(tied.keys() | index.tied.keys()):
        if tied.get(name) != index.tied.get(name):
            here, there = ("tied", "separate") if name in tied else ("separate", "tied")
            raise CheckpointError(
                f"{name!r} is {there} in the checkpoint and {here} in the model: build the model "
                "that was saved"
            )
