"""State dicts, under the names of the unmodified model: gathered, whole or by piece; loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

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


@dataclass(frozen=True)
class Piece:
    """A tensor of a state dict, or extra state, which is none.

    Attributes:
        names: that it has; several where tensors are tied.
        first: its name among the parameters and buffers; "" of extra state.
        stage: that has its latest value.
        like: of its shape and dtype; extra state itself.
    """

    names: tuple[str, ...]
    first: str
    stage: int
    like: Any


def pieces_of(
    state: ModelState, buffer_stage: Mapping[str, int], of_loss: bool = False
) -> list[Piece]:
    """What the state dict of the model, or of the loss, is made of.

    Args:
        buffer_stage: buffers that a forward has updated -> a stage that has the latest value.
    """
    wanted = wanted_of(state, of_loss)
    names: dict[str, list[str]] = {}
    for name in wanted:
        names.setdefault(state.skeleton.canonical.get(name, f"extra state {name}"), []).append(name)
    found = []
    for first, mine in names.items():
        is_tensor = mine[0] in state.skeleton.canonical
        stage = state.homes[first][0] if first in state.homes else buffer_stage.get(first, 0)
        shown = tuple(name.removeprefix(f"{LOSS}.") if of_loss else name for name in mine)
        found.append(Piece(shown, first if is_tensor else "", stage, wanted[mine[0]]))
    return found


def gather(
    state: ModelState,
    buffer_stage: Mapping[str, int],
    of_loss: bool = False,
    readers: Sequence[int] | None = None,
) -> dict[str, Any]:
    """Full tensors on the CPU, in the model's order; a collective between processes.

    Args:
        buffer_stage: as `pieces_of` has it.
        readers: the ranks that get them, the others nothing; None for all.
    """
    pieces = pieces_of(state, buffer_stage, of_loss)
    held = {name: fetch(state, each, readers) for each in pieces for name in each.names[:1]}
    if not reads(state, readers):
        return {}
    first_of = {name: each.names[0] for each in pieces for name in each.names}
    prefix = f"{LOSS}." if of_loss else ""
    order = [name.removeprefix(prefix) for name in wanted_of(state, of_loss)]
    return {name: held[first_of[name]] for name in order}


def reads(state: ModelState, readers: Sequence[int] | None) -> bool:
    """Whether this process is one of those that get something."""
    return readers is None or not state.mesh.distributed or state.mesh.rank in readers


def fetch(state: ModelState, piece: Piece, readers: Sequence[int] | None = None) -> Any:
    """A copy on the CPU, on the ranks that read it; None on others."""
    name, like = piece.first, piece.like
    if not name:
        return like
    if not state.mesh.distributed:
        return _held(state, state.mesh.rank_of(0, piece.stage), name).to("cpu", copy=True)
    if name in state.divided:
        return _assemble(state, piece, readers)
    owner = state.mesh.rank_of(0, piece.stage)
    local = _held(state, owner, name) if owner in state.ranks else None
    told = _tell(state, local, owner, like, readers)
    if told is None or told is not local:
        return None if told is None else told.cpu()
    return told.to("cpu", copy=True)


def _held(state: ModelState, rank: int, name: str) -> torch.Tensor:
    local = state.ranks[rank]
    return (local.params if name in state.homes else local.buffers)[name].detach()


def _assemble(
    state: ModelState, piece: Piece, readers: Sequence[int] | None
) -> torch.Tensor | None:
    """A divided parameter from its rows, each told by who owns them."""
    name, like, mesh = piece.first, piece.like, state.mesh
    mine = reads(state, readers)
    whole = torch.empty(like.shape, dtype=like.dtype) if mine else like.detach()  # for its shape
    for replica in range(mesh.dp if like.dim() else 1):
        rows = rows_of(whole, mesh.dp, replica, state.owners.get(name))
        owner = mesh.rank_of(replica, piece.stage)
        if not rows.numel():
            continue
        local = None
        if owner in state.ranks:
            local = state.master(owner, name).detach().to(like.dtype)
        told = _tell(state, local, owner, rows, readers)
        if told is not None:
            rows.copy_(told)
        del told  # before the next
    return whole if mine else None


def _tell(
    state: ModelState,
    local: torch.Tensor | None,
    owner: int,
    like: torch.Tensor,
    readers: Sequence[int] | None,
) -> torch.Tensor | None:
    """What one rank has, on the device of those that read it; None on others.

    Args:
        local: on the owner.
        readers: None for all, which it is broadcast to; else it is sent to each of them alone.
    """
    me = state.mesh.rank
    if local is not None:
        told = local.contiguous()
    else:
        shape = like.shape if reads(state, readers) else (0,)
        told = torch.empty(shape, dtype=like.dtype, device=state.device)
    if readers is None:
        with HERE.waiting((owner,)):
            dist.broadcast(told, owner)
        return told
    for reader in readers:
        if reader == owner or me not in (reader, owner):
            continue
        with HERE.waiting((reader if me == owner else owner,)):
            dist.send(told, reader) if me == owner else dist.recv(told, owner)
    return told if reads(state, readers) else None


class IncompatibleKeys(NamedTuple):
    """As `torch.nn.Module.load_state_dict` returns it.

    Attributes:
        missing_keys: names of the model that the state dict lacks.
        unexpected_keys: names of the state dict that the model lacks.
    """

    missing_keys: list[str]
    unexpected_keys: list[str]


def checked(
    state: ModelState, tensors: Mapping[str, Any], of_loss: bool = False, strict: bool = True
) -> tuple[dict[str, torch.Tensor], IncompatibleKeys]:
    """What `put` takes, of a state dict of the unmodified model, or of the loss.

    Args:
        strict: names that are missing or unexpected are an error.

    Raises:
        StateError: names, shapes or dtypes that do not fit, or no tensors.
    """
    if of_loss:
        tensors = {f"{LOSS}.{name}": value for name, value in tensors.items()}
    wanted = wanted_of(state, of_loss)
    chosen = _chosen(state, tensors, wanted)
    canonical = state.skeleton.canonical
    unexpected = [name for name in tensors if name not in wanted]
    if not strict:
        missing = [name for name in wanted if name not in tensors]
        return chosen, IncompatibleKeys(missing, unexpected)
    missing = [n for n in wanted if n in canonical and canonical[n] not in chosen]
    if unexpected or missing:
        raise StateError(
            f"the state dict does not fit the model: missing {missing[:5]}, "
            f"unexpected {unexpected[:5]}"
        )
    return chosen, IncompatibleKeys([], [])


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


def _chosen(
    state: ModelState, tensors: Mapping[str, Any], wanted: Mapping[str, Any]
) -> dict[str, torch.Tensor]:
    """First name -> its tensor."""
    canonical = state.skeleton.canonical
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
    return chosen


def _plain(name: str, value: Any, like: torch.Tensor) -> torch.Tensor:
    """A value of a state dict as a tensor that can be copied; one of another class, or layout, is
    copied once here, where nothing is changed if that fails."""
    if not isinstance(value, torch.Tensor):
        raise StateError(f"{name!r} is a {type(value).__name__} in the state dict, and no tensor")
    if is_fake(value):
        raise StateError(f"{name!r} has no values in the state dict: it is on the meta device")
    if kind_of(value.dtype) != kind_of(like.dtype):
        raise StateError(
            f"{name!r} is {short_name(value.dtype)} in the state dict and "
            f"{short_name(like.dtype)} in the model: convert it first"
        )
    if type(value) in (torch.Tensor, nn.Parameter) and value.layout is torch.strided:
        if value.numel() and not value.untyped_storage().nbytes():  # reading it would crash
            raise StateError(f"{name!r} has no values in the state dict: its memory was freed")
        return value.detach()
    try:
        dense = value.detach() if value.layout is torch.strided else value.detach().to_dense()
        return torch.empty(value.shape, dtype=like.dtype).copy_(dense)
    except Exception as error:
        raise StateError(
            f"{name!r} is a {type(value).__name__} of layout {value.layout} in the state dict, "
            f"which cannot be copied: give a plain tensor ({type(error).__name__}: {error})"
        ) from error


def kind_of(dtype: torch.dtype) -> tuple[bool, bool, bool]:
    """Values are converted within one of these alone: numbers with fractions, integers, truths."""
    return dtype.is_floating_point, dtype.is_complex, dtype is torch.bool
