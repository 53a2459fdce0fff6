"""Weights from the model's own initialisers, for a model that was built without data.

They run on a copy of the model in which this process's tensors have memory and all others are on
the meta device, where writing costs nothing. What they draw is seeded tensor by tensor, so that the
values are the same however many processes and stages there are.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import nn

from ...compiler.capture.skeleton import Skeleton, named_state
from ...compiler.ir.errors import PipecompileError, StateError
from ...compiler.tensors.fakes import meta_like
from .allocation import Allocation
from .draws import Draws

RUNS = 16  # at least so many, unless single tensors are larger; each passes over the whole model
_DONE = "_is_hf_initialized"  # transformers marks what it has initialised, also without data


class Initializers:
    """A `materialize.Source` of last resort: it has every tensor, until an initialiser is missing.

    As while a model is constructed, children come before their parents, and each module runs
    ``reset_parameters()``, then ``_init_weights`` on all below it (in Hugging Face models through
    ``initialize_weights()``).
    """

    def __init__(self, model: nn.Module, skeleton: Skeleton, seed: int):
        self._model, self._skeleton, self._seed = model, skeleton, seed

    def has(self, name: str) -> bool:
        return True

    def fill(self, allocations: Mapping[str, Allocation]) -> None:
        """Run every initialiser, once if all tensors are kept whole, else once for each group.

        Those that read one tensor to set another make all at once.

        Raises:
            StateError: an initialiser failed, or left one of the tensors as it was.
        """
        groups = _groups(allocations)
        if len(groups) > 1:
            with suppress(StateError):
                for group in groups:
                    self._run(group)
                return
        self._run(allocations)

    def _run(self, allocations: Mapping[str, Allocation]) -> None:
        rooms = {name: allocation.room() for name, allocation in allocations.items()}
        model = self._stand_in(rooms)
        state = dict(named_state(model))
        draws = Draws(self._seed, state)
        devices = {room.device for room in rooms.values() if room.is_cuda}
        with torch.random.fork_rng(tuple(devices)), torch.no_grad(), draws:
            _initialize(model, draws)
        for name, allocation in allocations.items():
            if draws.written[name] < allocation.like.numel():
                raise StateError(self._missing(name))
            allocation.take(rooms.pop(name))
            if not allocation.whole:  # a cycle of references may keep the copy of the model
                state[name].data = state[name].new_empty(0)

    def _stand_in(self, rooms: Mapping[str, torch.Tensor]) -> nn.Module:
        memo: dict[int, Any] = {}
        for name, tensor in named_state(self._model):
            room = rooms.get(self._skeleton.canonical[name])
            memo[id(tensor)] = _stand_in(tensor, room)
        model = copy.deepcopy(self._model, memo)
        for part in model.modules():
            vars(part).pop(_DONE, None)
        _untie(model, self._skeleton.canonical)
        return model

    def _missing(self, name: str) -> str:
        path, _, _ = name.rpartition(".")
        model, kind = self._skeleton.model, type(self._model.get_submodule(path)).__name__
        saved = model.state_dict(keep_vars=True)
        keys = {self._skeleton.canonical.get(key) for key in saved}
        files = "give compile() weights=PATH, " if name in keys else ""
        return (
            f"{type(model).__name__} has no weights, and no initialiser sets {name!r}: "
            f"{files}give {kind} a reset_parameters() that does, or assign a tensor with data to it"
        )


def _groups(allocations: Mapping[str, Allocation]) -> list[dict[str, Allocation]]:
    """What is made in one run: first what is kept whole, and then a few that are divided, so that
    they are as large as the largest, or a sixteenth of all."""
    groups = [{name: allocation for name, allocation in allocations.items() if allocation.whole}]
    divided = {name: allocation for name, allocation in allocations.items() if not allocation.whole}
    sizes = {name: allocation.like.nbytes for name, allocation in divided.items()}
    limit = max([*sizes.values(), sum(sizes.values()) // RUNS])
    held = limit
    for name, allocation in divided.items():
        if held + sizes[name] > limit:
            groups.append({})
            held = 0
        groups[-1][name] = allocation
        held += sizes[name]
    return [group for group in groups if group]


def _stand_in(tensor: torch.Tensor, room: torch.Tensor | None) -> torch.Tensor:
    if room is None:
        room = meta_like(tensor)
    if not isinstance(tensor, nn.Parameter):
        return room
    return nn.Parameter(room, requires_grad=tensor.requires_grad)


def _untie(model: nn.Module, canonical: Mapping[str, str]) -> None:
    """Only the first name of a tied tensor keeps it: a constructor ties after it has drawn."""
    for name, first in canonical.items():
        (part, key), owner = _slot(model, name), _slot(model, first)
        if name != first and (part, key) != owner:
            setattr(part, key, _stand_in(getattr(part, key), None))


def _slot(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, key = name.rpartition(".")
    return model.get_submodule(path), key


def _initialize(model: nn.Module, draws: Draws) -> None:
    names = {part: name for name, part in model.named_modules()}
    for part, name in reversed(names.items()):  # children first
        with _running(part, name, draws):
            reset: Any = getattr(part, "reset_parameters", getattr(part, "_reset_parameters", None))
            if callable(reset):
                reset()
            init: Any = getattr(part, "_init_weights", None)
            if callable(init):
                _apply(part, init, names, draws)


def _apply(
    model: nn.Module, init: Callable[..., None], names: Mapping[nn.Module, str], draws: Draws
) -> None:
    """What a model calls at the end of its constructor."""
    if not inspect.signature(init).parameters:
        init()
        return

    def each(part: nn.Module) -> None:
        with _running(part, names[part], draws):
            init(part)

    initialize: Any = getattr(model, "initialize_weights", None)
    if callable(initialize):  # Hugging Face, which calls `each`
        vars(model)["_init_weights"] = each
        initialize()
    else:
        model.apply(each)


@contextmanager
def _running(part: nn.Module, name: str, draws: Draws) -> Iterator[None]:
    with draws.inside(name):
        try:
            yield
        except PipecompileError:
            raise
        except Exception as error:
            raise StateError(
                f"the initialiser of {name or 'the model'!r} ({type(part).__name__}) fails on a "
                f"model without weights ({error}): give compile() weights=PATH, or build the model "
                "with real weights"
            ) from error
