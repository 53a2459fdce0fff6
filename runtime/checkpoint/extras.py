"""The user's own objects in a checkpoint.

Optimizers of the pipeline's parameters are kept by parameter name, so that any division takes them
up; of others the state that all ranks that have one share, or else each rank's.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.optim.lr_scheduler import LRScheduler

from ...compiler.ir.errors import CheckpointError
from ..transport.mesh import Mesh
from . import tree
from .optimizer_state import Named


def optimizers_in(extras: Mapping[str, Any], names: Named) -> dict[str, torch.optim.Optimizer]:
    """Those that have parameters of the pipeline; a stage without any may have an empty one.

    Args:
        names: parameter -> FQN.

    Raises:
        CheckpointError: one has others besides.
    """
    found = {}
    for key, extra in extras.items():
        if not isinstance(extra, torch.optim.Optimizer):
            continue
        params = [param for group in extra.param_groups for param in group["params"]]
        others = [param for param in params if param not in names and param.numel()]
        if not others:
            found[key] = extra
        elif len(others) < len(params):
            raise CheckpointError(
                f"checkpoint_extras[{key!r}] has parameters of the pipeline and others: give the "
                "others an optimizer of their own"
            )
    return found


def others_in(extras: Mapping[str, Any], names: Named) -> dict[str, Any]:
    """The rest; None stands for what is not to be kept."""
    by_name = optimizers_in(extras, names)
    return {key: extra for key, extra in extras.items() if extra is not None and key not in by_name}


def check_own(own: Sequence[torch.optim.Optimizer], extras: Mapping[str, Any]) -> None:
    """Raises CheckpointError where an optimizer's state would be lost.

    Args:
        own: optimizers with which the user steps the pipeline's parameters.
    """
    if any(extra is None for extra in extras.values()):
        return
    kept = [each for extra in extras.values() for each in (extra, *_inside(extra))]
    for optimizer in own:
        if optimizer.state and not any(each is optimizer for each in kept):
            raise CheckpointError(
                f"save() would leave out the state of your {type(optimizer).__name__}, which steps "
                "the pipeline's parameters: put it into pipe.checkpoint_extras under any name, and "
                "before load() too; or None, if its state need not be kept"
            )


def _inside(extra: object) -> list[Any]:
    """What an object's state may contain: a scheduler's has all but its optimizer."""
    return [] if isinstance(extra, LRScheduler) else list(getattr(extra, "__dict__", {}).values())


def merge(parts: Sequence[Mapping[str, Any]], division: tuple[int, int]) -> dict[str, Any]:
    """The states of all processes, in rank order: one where all that have one are alike."""
    keys = dict.fromkeys(key for part in parts for key in part)
    alike, differing = {}, {}
    for key in keys:
        states = [part.get(key) for part in parts]
        present = [state for state in states if state is not None]
        if len({json.dumps(state, sort_keys=True) for state in present}) < 2:
            alike[key] = present[0] if present else None
        else:
            differing[key] = states
    return {"extras": alike, "extras_of_ranks": differing, "division": list(division)}


def state_of(key: str, facts: Mapping[str, Any], mesh: Mesh, rank: int) -> Any:
    """What a checkpoint has for an object that is no optimizer of the pipeline's; None for nothing.

    Raises:
        CheckpointError: it differed between ranks, which were others than these.
    """
    states = facts.get("extras_of_ranks", {}).get(key)
    if states is None:
        state = facts["extras"].get(key)
    elif facts["division"] == [mesh.pp, mesh.dp] and mesh.distributed:
        state = states[rank]
    else:
        stages, dp = facts["division"]
        raise CheckpointError(
            f"checkpoint_extras[{key!r}] had another state on each of the {len(states)} ranks that "
            f"saved it: load it in as many processes with n_stages={stages} and dp={dp}, or leave "
            "it out of checkpoint_extras and set it yourself"
        )
    if state is None and key in facts.get("optimizers", {}):
        raise CheckpointError(
            f"checkpoint_extras[{key!r}] was an optimizer of the pipeline's parameters when it was "
            "saved, and is none now: give it what it had"
        )
    return None if state is None else tree.decode(state)
