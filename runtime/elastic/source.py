"""A snapshot in the memory of machines as what a training is loaded from."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.storage import StorageReader

from ...compiler.ir.errors import CheckpointError
from ..checkpoint.storage import Reader, check_files
from ..exchange.agreement import Agreement
from ..files import tensor_file
from ..files.index import Chunk, Index, file_name
from ..files.tensor_file import DTYPES, TensorFile
from ..transport.doing import HERE
from ..transport.turns import Turns
from . import piece
from .holdings import Snapshot, server
from .memory import Memory


@dataclass(frozen=True)
class Sent:
    """A piece of a tensor that another machine has sent; read as a file is."""

    tensor: torch.Tensor

    def read(
        self, name: str, start: tuple[int, ...] = (), lengths: tuple[int, ...] | None = None
    ) -> torch.Tensor:
        if not lengths:
            return self.tensor
        return self.tensor[tuple(slice(a, a + n) for a, n in zip(start, lengths, strict=True))]


class InMemory:
    """A `Source`; every rank makes it, of the same snapshot.

    Args:
        machines: the number of each rank's machine, as the snapshot's holders have it.
        group: over gloo, for nothing else meanwhile.
    """

    verify = True

    def __init__(
        self,
        snapshot: Snapshot,
        memory: Memory,
        rank: int,
        machines: Sequence[int],
        agreement: Agreement,
        group: dist.ProcessGroup,
    ):
        self._snapshot, self._memory, self._rank, self._group = snapshot, memory, rank, group
        self._folder = memory.slot(snapshot.attempt, snapshot.sequence)
        self._here = {
            file_name(r) for r, held in enumerate(snapshot.holders) if machines[rank] in held
        }
        self._servers = {file_name(r): server(snapshot, r, machines) for r in range(snapshot.size)}
        mine: dict[int, dict[str, Any]] = {}
        for old in range(snapshot.size):
            if self._servers[file_name(old)] == rank:
                with suppress(OSError, ValueError):
                    mine[old] = memory.read(snapshot.piece(old))
        self._parts: dict[int, dict[str, Any]] = {}
        for found in agreement.gather(mine):
            self._parts |= found

    def __str__(self) -> str:
        return f"the snapshot of step {self._snapshot.steps} in memory"

    def index(self) -> Index:
        if missing := set(range(self._snapshot.size)) - self._parts.keys():
            raise CheckpointError(f"{self}: the part of rank {min(missing)} is damaged")
        return piece.joined([self._parts[old] for old in range(self._snapshot.size)])

    def check(self, index: Index, names: set[str]) -> None:
        """Of this machine's files; of others a checksum will tell."""
        here = {n for n in names if all(c.file in self._here for c in index.tensors[n].chunks)}
        check_files(self._folder, index, here)

    def reader(self, index: Index, turns: Turns) -> StorageReader:
        return _Reader(self, index, turns, self._group, self._rank)


class _Reader(Reader):
    """Reads from this machine what it has, and has the rest sent."""

    def __init__(
        self, source: InMemory, index: Index, turns: Turns, group: dist.ProcessGroup, rank: int
    ):
        super().__init__(source._folder, index, turns)
        self._here, self._servers = source._here, source._servers
        self._group, self._rank = group, rank

    def _read_plan(self, plan: LoadPlan, planner: LoadPlanner) -> None:
        near: list[ReadItem] = []
        far: list[ReadItem] = []
        for item in plan.items:
            chunk = self._chunks[item.storage_index]
            (near if chunk.file in self._here else far).append(item)
        sent = self._exchange([self._chunks[item.storage_index] for item in far])
        for item in far:
            chunk = self._chunks[item.storage_index]
            self._read(cast(TensorFile, Sent(sent[chunk])), item, planner)
        super()._read_plan(LoadPlan(near), planner)

    def _exchange(self, wanted: Sequence[Chunk]) -> dict[Chunk, torch.Tensor]:
        """What all ranks want of other machines, from one to the other, in one order for all."""
        orders: list[Any] = [None] * dist.get_world_size(self._group)
        others = tuple(each for each in range(len(orders)) if each != self._rank)
        got: dict[Chunk, torch.Tensor] = {}
        with HERE.waiting(others):
            dist.all_gather_object(orders, list(dict.fromkeys(wanted)), group=self._group)
            for reader, chunks in enumerate(orders):
                for chunk in chunks:
                    giver = self._servers[chunk.file]
                    if reader == self._rank and giver is not None:
                        got[chunk] = self._room(chunk)
                        dist.recv(_bytes(got[chunk]), giver, self._group)
                    elif giver == self._rank:
                        dist.send(_bytes(self._held(chunk)), reader, self._group)
        return got

    def _room(self, chunk: Chunk) -> torch.Tensor:
        dtype = next(
            entry.spec.dtype for entry in self._index.tensors.values() if chunk in entry.chunks
        )
        return torch.empty(chunk.shape, dtype=DTYPES[dtype][0])

    def _held(self, chunk: Chunk) -> torch.Tensor:
        """What is sent; of what is damaged nothing that would pass for it."""
        try:
            with tensor_file.opened(self._folder / chunk.file) as file:
                found = file.read(chunk.key).contiguous()
            if tuple(found.shape) == chunk.shape:
                return found
        except CheckpointError:
            pass
        return torch.zeros_like(self._room(chunk))


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.uint8)
