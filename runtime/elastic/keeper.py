"""Keeps the state of every step in memory: this rank's part, and a copy of another machine's.

After a step the training's thread copies the state to memory that outlives the process; all else is
done beside the next step, by a thread on a group of its own:

    training   step 7 ┃copy┃ step 8                        ┃wait, copy┃ step 9
    beside            ┃    ┃ checksums · publish · swap · all have it ┃ ...
    slot a  ─ 7 ──────────────────────────────────────────────────────── 9 is written over 7
    slot b  ──────────┃ 8 is written ─────── 8 ───────────────────────────────

A slot is written over only when all ranks have published what is in the other one. So there is a
snapshot that all have at every moment, and it is the one before the step that runs, at worst the
one before that.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch
import torch.distributed as dist

from ..checkpoint import snapshot
from ..checkpoint.snapshot import Training
from ..transport import joining
from ..transport.doing import HERE
from . import piece
from .holdings import Held, neighbours
from .memory import Memory, sealed
from .piece import Form, Room

_SIZES, _ANSWER, _TENSORS, _FACTS = 1, 2, 3, 4  # tags: two ranks may be each other's neighbours
_ENDS_S = 5.0  # what the thread has for ending once its connections are closed


@dataclass(frozen=True)
class Copied:
    """This rank's part of a snapshot, complete but for its checksums."""

    form: Form
    room: Room
    rest: dict[str, object]


class Keeper:
    """Of one process, in one attempt.

    Args:
        group: over gloo, for nothing else; None where there is one rank.
        places: the machine of each rank.
        first: what a machine does once the first snapshot is complete.

    Attributes:
        complete: snapshots that all ranks have.
        lack: why the last one is not complete; "" if it is.
    """

    def __init__(
        self,
        memory: Memory,
        attempt: str,
        rank: int,
        places: Sequence[str],
        group: dist.ProcessGroup | None,
        first: Callable[[], None],
    ):
        self._memory, self._attempt, self._rank, self._group = memory, attempt, rank, group
        self._size, self._first = len(places), first
        self._others = tuple(each for each in range(self._size) if each != rank)
        beside = neighbours(places)
        self._to = beside[rank]
        self._sources = [r for r, neighbour in enumerate(beside) if neighbour == rank]
        self._rooms: dict[str, Room] = {}
        self._sequence = 0
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self.complete, self.lack = 0, ""

    def take(self, training: Training) -> None:
        """Copy the state of this moment, and see to it beside what follows.

        Raises:
            RuntimeError: a rank has ended that was to have the one before.
        """
        self.wait()
        held = self._held(training.steps, self._rank)
        copied: Copied | None = None
        lack = ""
        try:
            copied = self._copied(held, training)
        except OSError as error:
            lack = f"rank {self._rank} has no room for a snapshot: {error.strerror or error}"
        self._thread = threading.Thread(
            target=self._see_to, args=(held, copied, lack), daemon=True, name="pipecompile-elastic"
        )
        self._thread.start()

    def wait(self) -> None:
        """Until all ranks have published the last one, or know that one could not.

        Raises:
            RuntimeError: a rank has ended meanwhile.
        """
        if self._thread is not None:
            with HERE.waiting(self._others):
                self._thread.join()
            self._thread = None
            if (error := self._error) is not None:
                self._error = None
                raise error
            self._sequence += 2 if self.lack else 1  # what is not complete is written over first

    def abandon(self) -> None:
        """This process ends by an error: its thread must not be inside of gloo then."""
        if self._thread is not None and self._group is not None:
            with suppress(Exception):
                joining.close(self._group)
            self._thread.join(_ENDS_S)

    def _held(self, steps: int, rank: int) -> Held:
        return Held(self._attempt, self._sequence, steps, self._size, rank)

    def _copied(self, held: Held, training: Training) -> Copied:
        tensors = snapshot.tensors_of(training)
        form = Form.of(tensors)
        room = self._room(held, form.size_bytes)
        piece.copy(form, tensors, room)
        return Copied(form, room, piece.rest(training))

    def _room(self, held: Held, size_bytes: int) -> Room:
        """Where a piece goes, of this rank or of another; what was there is given up."""
        path = self._memory.begin(held)
        known = self._rooms.pop(str(path), None)
        if known is None or known.content.numel() != size_bytes:
            known = Room.of(path, size_bytes)
        self._rooms[str(path)] = known
        return known

    # -- the thread ---------------------------------------------------------------------------

    def _see_to(self, held: Held, copied: Copied | None, lack: str) -> None:
        try:
            facts = b""
            if copied is not None:
                told = piece.described(copied.form, copied.room)
                facts = sealed(held, told | copied.rest)
                lack = self._published(held, facts)
            content = torch.empty(0, dtype=torch.uint8) if copied is None else copied.room.content
            lack = self._swap(held, content, facts) or lack
            whole = torch.tensor([0 if lack else 1])
            if self._group is not None:
                dist.all_reduce(whole, dist.ReduceOp.MIN, group=self._group)
            self.lack = "" if whole.item() else lack or "another rank has no room for a snapshot"
            if not self.lack:
                self.complete += 1
                if self.complete == 1:
                    self._first()
        except Exception as error:
            self._error = error

    def _published(self, held: Held, facts: bytes) -> str:
        """Why a piece could not be, or ""."""
        try:
            self._memory.publish(held, facts)
        except OSError as error:
            return f"rank {self._rank} has no room for a snapshot: {error.strerror or error}"
        return ""

    def _swap(self, held: Held, content: torch.Tensor, facts: bytes) -> str:
        """Give a copy to the neighbour, and keep those of whom this rank is the neighbour; why not
        all could be kept, or ""."""
        if self._to is None and not self._sources:
            return ""
        sizes = torch.tensor([content.numel(), len(facts)])
        sent: list[dist.Work | None] = [self._send(sizes, _SIZES)]
        lack = ""
        kept: list[tuple[Held, torch.Tensor]] = []
        taken: list[dist.Work | None] = []
        for source in self._sources:
            theirs = torch.empty(2, dtype=torch.int64)
            dist.recv(theirs, source, self._group, _SIZES)
            size_bytes, facts_bytes = map(int, theirs)
            other = self._held(held.steps, source)
            room = None
            try:
                room = self._room(other, size_bytes) if facts_bytes else None
            except OSError as error:
                lack = f"rank {self._rank} has no room for a copy: {error.strerror or error}"
            answer = torch.tensor([int(room is not None)])
            sent.append(dist.isend(answer, source, self._group, _ANSWER))
            if room is not None:
                told = torch.empty(facts_bytes, dtype=torch.uint8)
                taken.append(dist.irecv(room.content, source, self._group, _TENSORS))
                taken.append(dist.irecv(told, source, self._group, _FACTS))
                kept.append((other, told))
        if self._to is not None:
            wanted = torch.empty(1, dtype=torch.int64)
            dist.recv(wanted, self._to, self._group, _ANSWER)
            if wanted.item():
                told = torch.frombuffer(bytearray(facts), dtype=torch.uint8)
                sent += [self._send(content, _TENSORS), self._send(told, _FACTS)]
        for work in (*taken, *sent):
            if work is not None:
                work.wait()
        for other, told in kept:
            lack = self._published(other, told.numpy().tobytes()) or lack
        return lack

    def _send(self, tensor: torch.Tensor, tag: int) -> dist.Work | None:
        return None if self._to is None else dist.isend(tensor, self._to, self._group, tag)
