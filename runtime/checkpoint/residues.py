"""What compression has not sent yet, in a checkpoint: of each replica its own, by parameter name.

``compression.wte.weight.residue_1`` is replica 1's, in the parameter's shape, and
``compression.wte.weight.basis`` what all replicas have alike. What has not reached a parameter is
the mean of its residues; so as many replicas as there were go on bit for bit, and of other numbers
each begins with that mean, whatever the method. Without a method it is lost, which is told.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch

from ..compression.compressed import DTYPE, Compressed
from ..files.index import Index
from ..files.tensor_file import DTYPES
from ..state.model_state import ModelState
from . import bounds

PREFIX = "compression"
"""What the names of its tensors begin with in a checkpoint."""
BASIS = "basis"


def residue(replica: int) -> str:
    return f"residue_{replica}"


def tensors_of(state: ModelState) -> dict[str, torch.Tensor]:
    """Checkpoint name -> tensor, of those that this process writes: of what several stages hold,
    the first one's."""
    return {f"{PREFIX}.{fqn}.{key}": tensor for fqn, key, tensor in _own(state)}


def facts_of(state: ModelState) -> dict[str, Any] | None:
    """Of this process, as JSON data; None where nothing is compressed."""
    if not state.compressed:
        return None
    tensors: dict[str, list[str]] = {}
    for fqn, key, _ in _own(state):
        tensors.setdefault(fqn, []).append(key)
    return {"replicas": state.mesh.dp, "tensors": tensors}


def _own(state: ModelState) -> Iterator[tuple[str, str, torch.Tensor]]:
    for rank, each in state.compressed.items():
        replica = state.mesh.replica_of(rank)
        first = set(state.mesh.stages_of(rank))
        for fqn, tensor in each.residues.items():
            if state.homes[fqn][0] in first:
                yield fqn, residue(replica), tensor
        for fqn, tensor in each.bases.items() if replica == 0 else ():
            if state.homes[fqn][0] in first:
                yield fqn, BASIS, tensor


def merge(parts: Iterable[dict[str, Any] | None]) -> dict[str, Any] | None:
    """The facts of all ranks as one."""
    present = [part for part in parts if part is not None]
    if not present:
        return None
    tensors: dict[str, list[str]] = {}
    for part in present:
        for fqn, keys in part["tensors"].items():
            tensors[fqn] = sorted({*tensors.get(fqn, ()), *keys})
    return {"replicas": present[0]["replicas"], "tensors": tensors}


class ResidueLoad:
    """Residues of a checkpoint on their way to the ranks of this process.

    Args:
        facts: what `merge` made; None for a checkpoint without any, after which none is kept.

    Attributes:
        tensors: checkpoint name -> where to read it to; empty before `make_room`.

    Raises:
        CheckpointError: they are none, or of other parameters.
    """

    def __init__(self, state: ModelState, facts: dict[str, Any] | None, index: Index):
        self._state, self._facts = state, facts
        self.tensors: dict[str, torch.Tensor] = {}
        self._wanted: dict[str, torch.Tensor] = {}  # name -> of which form it is
        if facts is None:
            return
        _check(facts, index)
        for rank, each in state.compressed.items():
            for fqn, like in each.residues.items():
                for key in self._keys(fqn, state.mesh.replica_of(rank)):
                    self._want(fqn, key, like, index)
            for fqn, like in each.bases.items():
                if BASIS in facts["tensors"].get(fqn, ()) and _fits(fqn, like, index):
                    self._want(fqn, BASIS, like, index)
        exact = sorted(state.tables.intersection(facts["tensors"]))
        if state.compressed and exact:
            warnings.warn(
                f"the checkpoint has what compress= had not sent of {exact[0]!r} yet, of which "
                "sparse_embeddings= sends rows as they are: that is left out",
                stacklevel=2,
            )
        if not state.compressed:
            warnings.warn(
                "the checkpoint has what compress= had not sent of gradients yet, and this "
                "pipeline compresses none: that is left out",
                stacklevel=2,
            )

    @property
    def wanted(self) -> set[str]:
        return set(self._wanted)

    def make_room(self) -> None:
        self.tensors = {name: torch.empty_like(like) for name, like in self._wanted.items()}

    @torch.no_grad()
    def finish(self) -> None:
        """All is known to fit."""
        for rank, each in self._state.compressed.items():
            each.restart()
            self._fill(each, self._state.mesh.replica_of(rank))

    def _fill(self, each: Compressed, replica: int) -> None:
        for fqn, held in each.residues.items():
            names = [f"{PREFIX}.{fqn}.{key}" for key in self._keys(fqn, replica)]
            for name in names:
                held.add_(self.tensors[name])
            if len(names) > 1:
                held.div_(len(names))
        for fqn, held in each.bases.items():
            if (name := f"{PREFIX}.{fqn}.{BASIS}") in self.tensors:
                held.copy_(self.tensors[name])

    def _keys(self, fqn: str, replica: int) -> list[str]:
        """The residues that a replica's begins with: its own, or the mean of all."""
        if self._facts is None or fqn not in self._facts["tensors"]:
            return []
        count = self._facts["replicas"]
        if count == self._state.mesh.dp:
            return [residue(replica)]
        return [residue(r) for r in range(count)]

    def _want(self, fqn: str, key: str, like: torch.Tensor, index: Index) -> None:
        name = f"{PREFIX}.{fqn}.{key}"
        spec = index.tensors[name].spec
        if tuple(spec.shape) != tuple(like.shape):
            raise bounds.damaged(
                f"{name!r} is {list(spec.shape)}, and should be {list(like.shape)}"
            )
        self._wanted[name] = like


def _fits(fqn: str, like: torch.Tensor, index: Index) -> bool:
    """Whether a basis is of the rank that is asked for now."""
    return tuple(index.tensors[f"{PREFIX}.{fqn}.{BASIS}"].spec.shape) == tuple(like.shape)


def check_facts(facts: Any) -> dict[str, Any] | None:
    """What a checkpoint says of its residues; None for nothing.

    Raises:
        CheckpointError: it says nothing that can be.
    """
    if facts is None:
        return None
    replicas = facts.get("replicas") if isinstance(facts, dict) else None
    if type(replicas) is not int or replicas < 2:
        raise bounds.damaged(f"what it says of {PREFIX!r} is no table")
    tables = facts.get("tensors")
    if not isinstance(tables, dict):
        raise bounds.damaged(f"{PREFIX!r} has no table of tensors")
    every = {residue(r) for r in range(replicas)}
    for fqn, keys in tables.items():
        if not isinstance(keys, list) or set(map(str, keys)) - {BASIS} != every:
            raise bounds.damaged(
                f"{PREFIX!r} has not the residues of {replicas} replicas of {fqn!r}"
            )
    return dict(facts)


def _check(facts: Mapping[str, Any], index: Index) -> None:
    """Raises CheckpointError where residues are of what is not in the checkpoint, or no numbers."""
    for fqn, keys in facts["tensors"].items():
        if fqn not in index.known:
            raise bounds.damaged(f"{PREFIX!r} has residues of {fqn!r}, which is not in it")
        for key in keys:
            spec = index.tensors[f"{PREFIX}.{fqn}.{key}"].spec
            if DTYPES[spec.dtype][0] is not DTYPE:
                raise bounds.damaged(f"a residue of {fqn!r} is in {spec.dtype}")
