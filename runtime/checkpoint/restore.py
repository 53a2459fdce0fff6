"""A checkpoint on its way into a pipeline: all is checked first, then all is changed.

    [1] Restore(...)      names, shapes, numbers: of all that is not a tensor's data
    [2] make_room()       beside what the pipeline has; DCP reads into it
    [3] check()           what was read
    [4] change()          what may refuse: optimizers, scheduler, extras, data; or take_back()
    [5] finish()          what cannot, but for a lack of memory: parameters, buffers, random states

Between any two of them all ranks agree that all have succeeded, so that one that finds a fault
stops the others before they change anything.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch.optim.lr_scheduler import LRScheduler

from ...compiler.ir.errors import CheckpointError
from ...compiler.ir.ops import generator_of
from ...compiler.tensors.facts import short_name
from ..data.dataset_loader import DataSetLoaders
from ..files.index import Index, steps_of
from ..state.model_state import ModelState
from . import bounds, extras, tree
from .changes import Changes
from .optimizer_state import THE_PIPELINES, OptimizerLoad, local_rows
from .residues import PREFIX, ResidueLoad, check_facts
from .snapshot import Training, names_of, tied_names

_SHOWN = 3  # names in an error, of each kind


class Restore:
    """What is read from a checkpoint, and where it goes.

    Attributes:
        tensors: checkpoint name -> the tensor to read it to; empty before `make_room`.
        wanted: their names.
        sources: first name of each tensor of model and loss -> its name in the checkpoint.
        seed, steps: what the pipeline goes on from.

    Raises:
        CheckpointError: the checkpoint is of something else; nothing has been changed.
    """

    def __init__(self, training: Training, index: Index, rank: int):
        self._training, self._rank = training, rank
        self._facts = index.training
        self._index = index
        self.sources = _check_model(training.state, index)
        self._targets = self._model_tensors()
        self.tensors: dict[str, torch.Tensor] = {}
        self._loads: list[OptimizerLoad] = []
        self._residues = ResidueLoad(training.state, None, index)
        self._changes = Changes()
        self._random: list[tuple[torch.Generator, torch.Tensor]] = []
        self.seed, self.steps = training.seed, 0
        if self._facts is None:
            bounds.check_claimed(index, {})
            self._forget()
            return
        self.seed = bounds.check_seed(self._facts["seed"])
        self.steps = steps_of(self._facts["steps"])
        if self.steps != index.step:
            raise bounds.damaged(f"it is of step {index.step}, and its training of {self.steps}")
        _check_ties(training.state, index)
        self._prepare_optimizers()
        self._prepare_extras(self._facts)
        self._prepare_data(self._facts["data"])
        self._prepare_random(self._facts["random"])

    @property
    def wanted(self) -> set[str]:
        loaded = set(self._targets).union(*(load.wanted for load in self._loads))
        return loaded | self._residues.wanted

    @property
    def buffers(self) -> set[str]:
        """First names of those that the checkpoint has."""
        tensors, homes = self._index.tensors, self._training.state.homes
        return {n for n, source in self.sources.items() if source in tensors and n not in homes}

    def make_room(self) -> None:
        """For what is read, once the files are known to have it: nothing is read in place."""
        self.tensors = {name: torch.empty_like(held) for name, held in self._targets.items()}
        for load in self._loads:
            load.make_room()
            self.tensors |= load.tensors
        self._residues.make_room()
        self.tensors |= self._residues.tensors

    def check(self) -> None:
        """What was read.

        Raises:
            CheckpointError: it is nothing that a training can have left.
        """
        for load in self._loads:
            load.check()

    def change(self) -> None:
        """Give optimizers, scheduler, extras and data what was saved of them.

        Raises:
            CheckpointError: one does not take it; `take_back` what was done on every rank then.
        """
        self._changes.make()

    def take_back(self, failure: BaseException) -> None:
        """All is as it was; what could not be put back becomes a note of the failure."""
        self._changes.take_back(failure)

    @torch.no_grad()
    def finish(self) -> None:
        """Parameters, buffers and random states: all is known to fit."""
        for name, held in self._targets.items():
            local_rows(held).copy_(local_rows(self.tensors[name]))
        self._residues.finish()
        self._spread_buffers()
        for generator, state in self._random:
            generator.set_state(state)

    def _model_tensors(self) -> dict[str, torch.Tensor]:
        state = self._training.state
        held: dict[str, torch.Tensor] = dict(state.named_parameters())
        held |= next(iter(state.ranks.values())).buffers
        return {
            source: state.as_stored(name, held[name].detach())
            for name, source in self.sources.items()
            if name in held and source in self._index.tensors
        }

    def _prepare_optimizers(self) -> None:
        """The pipeline's own; those in the extras are prepared there."""
        assert self._facts is not None
        training, facts = self._training, self._facts["optimizer"]
        tables = {f"extras.{name}": t for name, t in self._facts.get("optimizers", {}).items()}
        kept = check_facts(self._facts.get("compression"))
        bounds.check_claimed(self._index, tables | {THE_PIPELINES: facts, PREFIX: kept})
        self._residues = ResidueLoad(training.state, kept, self._index)
        if training.optimizer is None or facts is None:
            self._forget()
            return
        load = OptimizerLoad(
            training.optimizer, training.param_names, facts, self._index, training.state.as_stored
        )
        self._loads.append(load)
        self._changes.add("the optimizer", training.optimizer, load.finish)
        self._prepare_scheduler(self._facts["schedulers"])

    def _forget(self) -> None:
        """The optimizer starts afresh, from weights alone."""
        if (optimizer := self._training.optimizer) is not None:
            self._changes.add("the optimizer", optimizer, optimizer.state.clear)

    def _spread_buffers(self) -> None:
        first, *others = self._training.state.ranks.values()
        for rank in others:
            for name in self.sources:
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
        bounds.check_scheduler(scheduler, state)
        self._changes.add("lr_scheduler=", scheduler, partial(scheduler.load_state_dict, state))

    def _prepare_extras(self, facts: Mapping[str, Any]) -> None:
        training = self._training
        names, state = training.param_names, training.state
        for name, extra in extras.others_in(training.extras, names).items():
            if (found := extras.state_of(name, facts, state.mesh, self._rank)) is not None:
                what = f"checkpoint_extras[{name!r}]"
                if isinstance(extra, LRScheduler):
                    bounds.check_scheduler(extra, found)
                self._changes.add(what, extra, partial(extra.load_state_dict, found))
        for name, optimizer in extras.optimizers_in(training.extras, names).items():
            saved = facts.get("optimizers", {}).get(name)
            if saved is not None:
                load = OptimizerLoad(
                    optimizer, names, saved, self._index, state.as_stored, f"extras.{name}"
                )
                self._loads.append(load)
                self._changes.add(f"checkpoint_extras[{name!r}]", optimizer, load.finish)
            elif extras.state_of(name, facts, state.mesh, self._rank) is not None:
                raise CheckpointError(
                    f"checkpoint_extras[{name!r}] is an optimizer of the pipeline's parameters, "
                    "and was something else when it was saved: give it what it had"
                )

    def _prepare_random(self, saved: list[dict[str, Any]]) -> None:
        """The user's own random streams: of this rank, or of rank 0 where there was none."""
        if not saved or not all(
            isinstance(each, dict) and "cpu" in each for each in _listed(saved)
        ):
            raise bounds.damaged("a rank has no random state")
        rank = self._rank if self._rank < len(saved) else 0
        here = next(iter(self._training.state.ranks.values())).device
        for device in {torch.device("cpu"), here}:
            if device.type in saved[rank]:
                state = tree.decode(saved[rank][device.type])
                try:
                    torch.Generator(device).set_state(state)
                except (RuntimeError, TypeError) as error:
                    raise bounds.damaged(f"the random state of rank {rank}: {error}") from error
                self._random.append((generator_of(device), state))

    def _prepare_data(self, saved: list[Any]) -> None:
        _listed(saved)
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
        self._changes.add("data=", data, partial(data.load_state_dict, state))


def _listed(found: Any) -> list[Any]:
    """Raises CheckpointError where there is no list."""
    if not isinstance(found, list):
        raise bounds.damaged(f"it has {found!r} where a list belongs")
    return found


def _check_model(state: ModelState, index: Index) -> dict[str, str]:
    """First name of each tensor of model and loss -> its name in the checkpoint.

    Raises:
        CheckpointError: with the first names and shapes that differ.
    """
    wanted, known, specs = names_of(state), index.known, index.specs
    saved = {name: specs[stored] for name, stored in known.items()}
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
    expected = {name for names in aliases.values() for name in names}
    differing = [f"{name!r} is missing" for name, source in sources.items() if source is None]
    differing += [f"{name!r} is not in the model" for name in saved if name not in expected]
    differing += [
        f"{source!r} is {list(saved[source].shape)} and {list(wanted[name].shape)} in the model"
        for name, source in sources.items()
        if source is not None and saved[source].shape != tuple(wanted[name].shape)
    ]
    differing += [
        f"{source!r} is {saved[source].dtype} and {short_name(wanted[name].dtype)} in the model"
        for name, source in sources.items()
        if source is not None
        and bounds.category(saved[source].dtype) != bounds.category(short_name(wanted[name].dtype))
    ]
    if differing:
        more = f", and {len(differing) - _SHOWN} more" if len(differing) > _SHOWN else ""
        raise CheckpointError(
            f"the checkpoint is of another model: {', '.join(differing[:_SHOWN])}{more}: build "
            "the model that was saved"
        )
    return {name: known[source] for name, source in sources.items() if source is not None}


def _check_ties(state: ModelState, index: Index) -> None:
    tied = tied_names(state)
    for name in sorted(tied.keys() | index.tied.keys()):
        if tied.get(name) != index.tied.get(name):
            here, there = ("tied", "separate") if name in tied else ("separate", "tied")
            raise CheckpointError(
                f"{name!r} is {there} in the checkpoint and {here} in the model: build the model "
                "that was saved"
            )
