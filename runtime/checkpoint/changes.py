"""Changes that are made one after the other, and all taken back where one of them fails."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ...compiler.ir.errors import CheckpointError
from ..data.dataset_loader import DataSetLoaders
from ..stepping.several import OptimizersAsOne
from . import tree

Act = Callable[[], object]


class Changes:
    """What may fail while it is done: objects of the user's take their states, or do not."""

    def __init__(self) -> None:
        self._waiting: list[tuple[str, Any, Act]] = []
        self._undo: list[tuple[str, Act]] = []

    def add(self, what: str, changed: Any, act: Act) -> None:
        """Later `make` this change.

        Args:
            what: names what is changed, in an error.
            changed: the object that ``act`` gives another state.
        """
        self._waiting.append((what, changed, act))

    def make(self) -> None:
        """Make all of them.

        Raises:
            CheckpointError: one has failed; call `take_back` then.
        """
        for what, changed, act in self._waiting:
            self._undo.append((what, as_it_was(what, changed)))
            try:
                act()
            except Exception as error:
                raise CheckpointError(
                    f"{what} does not take what was saved of it: {type(error).__name__}: {error}"
                ) from error

    def take_back(self, failure: BaseException) -> None:
        """All that was begun, the last first; what cannot be is a note of the failure."""
        while self._undo:
            what, undo = self._undo.pop()
            try:
                undo()
            except Exception as error:
                failure.add_note(f"{what} could not be put back: {type(error).__name__}: {error}")


def as_it_was(what: str, changed: Any) -> Act:
    """What puts an object back to the state of this moment."""
    if isinstance(changed, DataSetLoaders):
        return changed.kept()
    if isinstance(changed, OptimizersAsOne):
        return _several(changed)
    if isinstance(changed, torch.optim.Optimizer):
        return _optimizer(changed)
    attributes = dict(getattr(changed, "__dict__", {}))
    try:
        state = tree.encode(changed.state_dict(), what)
    except Exception:  # it has none that is of any use; its attributes may do
        state = None

    def undo() -> None:
        if attributes:
            vars(changed).clear()
            vars(changed).update(attributes)
        if state is not None and tree.encode(changed.state_dict(), what) != state:
            changed.load_state_dict(tree.decode(state))

    return undo


def _several(one: OptimizersAsOne) -> Act:
    undone = [_optimizer(each) for each in one.optimizers]

    def undo() -> None:
        for each in undone:
            each()
        one.join()

    return undo


def _optimizer(optimizer: torch.optim.Optimizer) -> Act:
    """Its states are tensors that stay as they are: loading puts others in their places."""
    attributes = dict(vars(optimizer))
    groups, state = optimizer.param_groups, optimizer.state
    settings = [(group, dict(group)) for group in groups]
    states = [(param, each, dict(each)) for param, each in state.items()]

    def undo() -> None:
        vars(optimizer).clear()
        vars(optimizer).update(attributes)
        for group, entries in settings:
            group.clear()
            group.update(entries)
        groups[:] = [group for group, _ in settings]
        state.clear()
        for param, each, entries in states:
            each.clear()
            each.update(entries)
            state[param] = each

    return undo
