"""Full state dicts, under the names of the unmodified model: gathered, and loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ...compiler.capture.whole import LOSS, saved_of_loss
from ...compiler.ir.errors import StateError
from ...compiler.ir.shards import rows_of
from ...compiler.tensors.facts import short_name
from ...compiler.tensors.fakes import is_fake
from ..transport.doing import HERE
from .model_state import ModelState


def wanted_of(state: ModelState, of_loss: bool) -> dict[str, Any]:
    """What the state dict of the model, or of the loss, has, by the names beside each other."""
    skeleton = state.skeleton
    if of_loss:
        return saved_of_loss(skeleton.module)
    return dict(skeleton.model.state_dict(keep_vars=True))


def gather(
    state: ModelState, buffer_stage: Mapping[str, int], of_loss: bool = False
) -> dict[str, Any]:
    """Full tensors on the CPU; a collective between processes.

    Args:
        buffer_stage: buffers that a forward has updated -> a stage that has the latest value.
    """
    held: dict[str, torch.Tensor] = {}
    result: dict[str, Any] = {}
    for name, value in wanted_of(state, of_loss).items():
        first = state.skeleton.canonical.get(name)
        if first is None:  # extra state, which is no tensor
            result[name] = value
            continue
        if first not in held:
            stage = state.homes[first][0] if first in state.homes else buffer_stage.get(first, 0)
            held[first] = _fetch(state, first, stage, value)
        result[name] = held[first]
    return {name.removeprefix(f"{LOSS}."): v for name, v in result.items()} if of_loss else result


def _fetch(state: ModelState, name: str, stage: int, like: torch.Tensor) -> torch.Tensor:
    if state.mesh.distributed and name in state.divided:
        return _assemble(state, name, stage, like)
    owner = state.mesh.rank_of(0, stage)
    local = state.ranks.get(owner)
    if local is not None:
        tensor = (local.params if name in state.homes else local.buffers)[name].detach()
    if not state.mesh.distributed:
        return tensor.cpu().clone()
    if local is None:
        tensor = torch.empty(like.shape, dtype=like.dtype, device=state.device)
    else:
        tensor = tensor.contiguous()
    with HERE.waiting((owner,)):
        dist.broadcast(tensor, owner)
    return tensor.cpu().clone()


def _assemble(state: ModelState, name: str, stage: int, like: torch.Tensor) -> torch.Tensor:
    """A divided parameter from its rows, each told by who owns them."""
    whole = torch.empty(like.shape, dtype=like.dtype)
    for replica in range(state.mesh.dp if like.dim() else 1):
        rows = rows_of(whole, state.mesh.dp, replica, state.owners.get(name))
        owner = state.mesh.rank_of(replica, stage)
        told = torch.empty(rows.shape, dtype=like.dtype, device=state.device)
        if owner in state.ranks:
            told.copy_(state.master(owner, name).detach())
        if told.numel():
            with HERE.waiting((owner,)):
                dist.broadcast(told, owner)
        rows.copy_(told)
    return whole


def checked(
    state: ModelState, tensors: Mapping[str, Any], of_loss: bool = False
) -> dict[str, torch.Tensor]:
    """What `put` takes, of a state dict of the unmodified model, or of the loss.

    Raises:
        StateError: names, shapes or dtypes that do not fit, or no tensors.
    """
    if of_loss:
        tensors = {f"{LOSS}.{name}": value for name, value in tensors.items()}
    return _checked(state, tensors, wanted_of(state, of_loss))


@torch.no_grad()
def put(state: ModelState, chosen: Mapping[str, torch.Tensor]) -> None:
    """Take over tensors that were `checked`."""
    for (name, _), param in state.copies.items():
        if name in chosen:
            param.copy_(chosen[name])
    for rank in state.ranks.values():
        if rank.shards is not None:
            rank.shards.load(chosen)
        for name, buffer in rank.buffers.items():
            if name in chosen:
                buffer.copy_(chosen[name])


def _checked(
    state: ModelState, tensors: Mapping[str, Any], wanted: Mapping[str, Any]
) -> dict[str, torch.Tensor]:
    """First name -> its tensor."""
    canonical = state.skeleton.canonical
    unexpected = [name for name in tensors if name not in wanted]
    chosen: dict[str, torch.Tensor] = {}
    for name, value in tensors.items():
        first = canonical.get(name)
        if first is None or name not in wanted:
            continue
        value = _plain(name, value, wanted[name])
        if tuple(value.shape) != tuple(wanted[name].shape):
            raise StateError(
                f"{name!r} has shape {list(value.shape)} in the state dict and "
                f"{list(wanted[name].shape)} in the model"
            )
        if first in chosen and not torch.equal(chosen[first], value):
            raise StateError(f"{name!r} and {first!r} are one tied tensor, with two values")
        chosen[first] = value
    missing = [n for n in wanted if n in canonical and canonical[n] not in chosen]
    if unexpected or missing:
        raise StateError(
            f"the state dict does not fit the model: missing {missing[:5]}, "
            f"unexpected {unexpected[:5]}"
        )
    return chosen


def _plain(name: str, value: Any, like: torch.Tensor) -> torch.Tensor:
    """A value of a state dict as a tensor that can be copied; one of another class, or layout, is
    copied once here, where nothing is changed if that fails."""
    if not isinstance(value, torch.Tensor):
        raise StateError(f"{name!r} is a {type(value).__name__} in the state dict, and no tensor")
    if is_fake(value):
        raise StateError(f"{name!r} has no values in the state dict: it is on the meta device")
    if _kind(value.dtype) != _kind(like.dtype):
        raise StateError(
            f"{name!r} is {short_name(value.dtype)} in the state dict and "
            f"{short_name(like.dtype)} in the model: convert it first"
        )
    if type(value) in (torch.Tensor, nn.Parameter) and value.layout is torch.strided:
        return value.detach()
    try:
        dense = value.detach() if value.layout is torch.strided else value.detach().to_dense()
        return torch.empty(value.shape, dtype=like.dtype).copy_(dense)
    except Exception as error:
        raise StateError(
            f"{name!r} is a {type(value).__name__} of layout {value.layout} in the state dict, "
            f"which cannot be copied: give a plain tensor ({type(error).__name__}: {error})"
        ) from error


def _kind(dtype: torch.dtype) -> tuple[bool, bool, bool]:
    """Values are converted within one of these alone: numbers with fractions, integers, truths."""
    return dtype.is_floating_point, dtype.is_complex, dtype is torch.bool
