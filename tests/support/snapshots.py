"""A rank's snapshots without a pipeline: one tensor that says of which step it is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from pipecompile.runtime.checkpoint import snapshot
from pipecompile.runtime.checkpoint.storage import check_files, reading
from pipecompile.runtime.elastic import piece
from pipecompile.runtime.elastic.holdings import Snapshot, complete
from pipecompile.runtime.elastic.keeper import Keeper
from pipecompile.runtime.elastic.memory import WHERE, Memory, held_in

ATTEMPT = "00000001-a"
FACTS = {
    "first_replica": True,
    "optimizer": None,
    "scheduler": None,
    "data": None,
    "random": {},
    "optimizers": {},
    "extras": {},
}


@contextmanager
def memory_in(folder: Path) -> Iterator[None]:
    """That of this machine, inside."""
    with mock.patch.dict("os.environ", {WHERE: str(folder)}):
        yield


def training(step: int, rows: int = 256) -> Any:
    """What a keeper is given, inside of `simple`."""
    return SimpleNamespace(steps=step, values=torch.full((rows, 4), float(step)))


@contextmanager
def simple() -> Iterator[None]:
    """What is kept of a training is one tensor, inside."""

    def rest(given: Any) -> dict[str, Any]:
        more = {"seed": 0, "steps": given.steps, "tied": {}, "config": None}
        return {"facts": FACTS, "division": [1, 1], **more}

    def tensors(given: Any) -> dict[str, torch.Tensor]:
        return {"model.w": given.values}

    with mock.patch.object(snapshot, "tensors_of", tensors), mock.patch.object(piece, "rest", rest):
        yield


def keeper(memory: Memory, **options: Any) -> Keeper:
    """Of the one rank that there is."""
    more = {"places": ["here"], "group": None, "first": lambda: None} | options
    return Keeper(memory, ATTEMPT, 0, **more)


def newest(memory: Memory) -> Snapshot | None:
    return next(iter(complete([list(held_in(memory.folder))])), None)


def values(memory: Memory, found: Snapshot) -> torch.Tensor:
    """What a snapshot has, with all that is checked.

    Raises:
        CheckpointError: it is damaged.
    """
    index = piece.joined([memory.read(found.piece(0))])
    folder = memory.slot(found.attempt, found.sequence)
    check_files(folder, index, set(index.tensors))
    with reading(folder, index) as read:
        return read("model.w")
