"""Tensors from one process of a machine to another, through memory that both see.

The sender writes into a block and posts where that is; the receiver reads the values in place. The
block is free again once the last of these tensors is gone: its first byte says so.

    sender      finds a free block, or makes a segment of some · TAKEN · writes values · posts
    receiver    waits for the packet · tensors over the block · ... · the last one dies: FREE
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import os
import struct
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from ...compiler.ir.program import ValueSpec
from . import neighbours, wire
from .neighbours import Neighbours, Ticket

Values = list[torch.Tensor]

FREE, TAKEN = 0, 1
IN_PACKET = neighbours.MOST_BYTES // 2  # values of so many bytes travel in the packet itself
BLOCKS = 64  # of a segment; one that was never used has no memory yet
IDLE = 512  # after so many messages to a rank a segment that none of them needed is given back
_HEAD = struct.Struct("<qqq")  # segment, its block, how many numbers of closed segments follow
_NONE = -1
_IN_PACKET = _HEAD.pack(_NONE, 0, 0)
_NUMBER = struct.Struct("<q")
CPU = torch.device("cpu")
SEGMENTS = -3  # the channel on which new ones are shown


class _Form:
    """How the values of a message lie in a block.

    Attributes:
        places, sizes: where each begins, and its bytes.
        denses: whether each fills its bytes in some order; dense: all of them do, and none is
            empty.
        total: bytes of the block.
        nbytes: of the values.
        count: elements of the first one.
        owner: the type of what tensors hold while they read such a block.
    """

    def __init__(self, specs: Sequence[ValueSpec]):
        self.specs = specs
        self.sizes = [wire.size_of(spec) for spec in specs]
        self.places, end = [], wire.ALIGNED
        for size in self.sizes:
            self.places.append(wire.aligned(end))
            end = self.places[-1] + size
        self.total = wire.aligned(end)
        self.denses = [wire.is_dense(spec.shape, spec.stride) for spec in specs]
        self.dense, self.nbytes = all(self.denses) and all(self.sizes), sum(self.sizes)
        self.count = self.sizes[0] // specs[0].dtype.itemsize if specs else 0
        self.owner = _owner_type(self.total)


@dataclass(eq=False)
class _Segment:
    """Blocks of memory that this process writes and another reads.

    Attributes:
        number: of those for that process.
        size: of a block, its first ALIGNED bytes included.
        used: the number of the last message in it.
        written: views of blocks that messages were written to.
    """

    number: int
    size: int
    memory: mmap.mmap
    room: torch.Tensor
    used: int = 0
    written: dict[tuple[int, _Form], Values] = field(default_factory=dict)

    def views(self, place: int, form: _Form) -> Values:
        """A block as the dense values of a message."""
        found = self.written.get((place, form))
        if found is None:
            if len(self.written) >= wire.MOST_KNOWN:
                self.written.clear()
            start = place * self.size
            pairs = zip(form.specs, form.places, strict=True)
            found = [wire.view(self.room, spec, start + at) for spec, at in pairs]
            self.written[place, form] = found
        return found

    def free(self) -> int | None:
        """The first block that is free: one that was in use before, if there is any."""
        found = (i for i in range(BLOCKS) if self.memory[i * self.size] == FREE)
        return next(found, None)

    @property
    def idle(self) -> bool:
        return all(self.memory[i * self.size] == FREE for i in range(BLOCKS))


class Draft(NamedTuple):
    """A message that is being written.

    Attributes:
        values: where.
    """

    rank: int
    segment: _Segment
    place: int
    nbytes: int
    values: Values


class _Block(NamedTuple):
    segment: _Segment
    place: int  # among its blocks
    file: int | None  # of a new segment


class _Pool:
    """The segments for one process."""

    def __init__(self) -> None:
        self._segments: list[_Segment] = []
        self._made = self._sent = 0

    def find(self, nbytes: int) -> _Block:
        """A free block of so many bytes, the first ALIGNED included."""
        self._sent += 1
        for segment in self._segments:
            if nbytes <= segment.size <= 2 * nbytes:
                place = segment.free()
                if place is not None:
                    segment.used = self._sent
                    return _Block(segment, place, None)
        return self._made_anew(nbytes)

    def _made_anew(self, nbytes: int) -> _Block:
        size = -(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
        file = os.memfd_create("pipecompile")
        os.ftruncate(file, BLOCKS * size)
        memory = mmap.mmap(file, BLOCKS * size)
        room = torch.frombuffer(memory, dtype=torch.uint8)
        self._segments.append(_Segment(self._made, size, memory, room, self._sent))
        self._made += 1
        return _Block(self._segments[-1], 0, file)

    def closed(self) -> list[int]:
        """Give back what has not been needed for long; the numbers of these."""
        old = [s for s in self._segments if self._sent - s.used > IDLE and s.idle]
        if old:
            self._segments = [s for s in self._segments if s not in old]
        return [segment.number for segment in old]


class SharedMemory:
    """Messages to and from the processes of this machine.

    Attributes:
        sent_bytes: of all values that were sent.
    """

    def __init__(self, others: Neighbours):
        self._neighbours = others
        self._pools: dict[int, _Pool] = defaultdict(_Pool)
        self._maps: dict[tuple[int, int], mmap.mmap] = {}  # (rank, number of its segment)
        self._process = os.getpid()
        self._forms = wire.Known(_Form)
        self.sent_bytes = 0

    @property
    def ranks(self) -> frozenset[int]:
        return self._neighbours.ranks

    def send(
        self, rank: int, channel: int, values: Sequence[torch.Tensor], specs: Sequence[ValueSpec]
    ) -> None:
        """Values can be overwritten when this returns.

        Raises:
            ConnectionError: the rank has ended.
        """
        form = self._forms.of(specs)
        self.sent_bytes += form.nbytes
        if form.total <= IN_PACKET:
            parts = [wire.to_bytes(v, s) for v, s in zip(values, specs, strict=True)]
            contents = (ctypes.string_at(part.data_ptr(), part.numel()) for part in parts)
            packet = b"".join((_IN_PACKET, *contents))
            self._neighbours.post(rank, channel, packet)
            return
        segment, place = self._taken(rank, form)
        if form.dense:
            for view, value in zip(segment.views(place, form), values, strict=True):
                view.copy_(value)
        else:
            start = place * segment.size
            for value, spec, at in zip(values, specs, form.places, strict=True):
                wire.write(value, spec, segment.room, start + at)
        self._post(rank, channel, segment, place)

    def draft(self, rank: int, specs: Sequence[ValueSpec]) -> Draft:
        """A message whose values, dense ones, are yet to be written; `post` sends it."""
        form = self._forms.of(specs)
        assert form.dense
        segment, place = self._taken(rank, form)
        return Draft(rank, segment, place, form.nbytes, segment.views(place, form))

    def post(self, draft: Draft, channel: int) -> None:
        """Send a draft; its values are the receiver's from here on.

        Raises:
            ConnectionError: the rank has ended.
        """
        self.sent_bytes += draft.nbytes
        self._post(draft.rank, channel, draft.segment, draft.place)

    def _taken(self, rank: int, form: _Form) -> tuple[_Segment, int]:
        """A block for a message to a rank, which can see it."""
        segment, place, file = self._pools[rank].find(form.total)
        segment.memory[place * segment.size] = TAKEN
        if file is not None:
            self._show(rank, segment.number, file)
        return segment, place

    def _post(self, rank: int, channel: int, segment: _Segment, place: int) -> None:
        closed = self._pools[rank].closed()
        head = _HEAD.pack(segment.number, place, len(closed))
        if closed:
            head += struct.pack(f"<{len(closed)}q", *closed)
        self._neighbours.post(rank, channel, head)

    def _show(self, rank: int, number: int, file: int) -> None:
        """Let a rank see a new segment."""
        try:
            self._neighbours.post(rank, SEGMENTS, _NUMBER.pack(number), [file])
        finally:
            os.close(file)

    def receive(self, rank: int, channel: int, specs: Sequence[ValueSpec]) -> Mail:
        """What the rank sends next on the channel, of what nobody has asked for."""
        return Mail(self, self._neighbours.ask(rank, channel), specs)

    def take(self, ticket: Ticket, specs: Sequence[ValueSpec]) -> Values:
        """Wait for values; they are in memory that is another process's until they are gone."""
        packet = self._neighbours.take(ticket)
        number, place, closed = _HEAD.unpack_from(packet.content)
        form = self._forms.of(specs)
        if closed:
            for each in struct.unpack_from(f"<{closed}q", packet.content, _HEAD.size):
                del self._maps[ticket.rank, each]
        if number == _NONE:
            return _unpacked(packet.content, form)
        memory = self._mapped(ticket.rank, number)
        start = place * (len(memory) // BLOCKS)
        owner = form.owner.from_buffer(memory, start)
        owner.memory, owner.start, owner.process = memory, start, self._process
        if len(specs) == 1 and form.dense:  # most messages: one tensor over the block
            spec = specs[0]
            flat = torch.frombuffer(
                owner, dtype=spec.dtype, offset=form.places[0], count=form.count
            )
            return [flat.as_strided(spec.shape, spec.stride)]
        room = torch.frombuffer(owner, dtype=torch.uint8)
        return [wire.read(room, spec, at) for spec, at in zip(specs, form.places, strict=True)]

    def _mapped(self, rank: int, number: int) -> mmap.mmap:
        while (rank, number) not in self._maps:  # it was shown before the message was posted
            content, (file,) = self._neighbours.take(self._neighbours.ask(rank, SEGMENTS))
            (each,) = _NUMBER.unpack(content)
            self._maps[rank, each] = mmap.mmap(file, 0)
            os.close(file)
        return self._maps[rank, number]


class Mail:
    """A message from another process of this machine."""

    def __init__(self, memory: SharedMemory, ticket: Ticket, specs: Sequence[ValueSpec]):
        self._memory, self._ticket, self._specs = memory, ticket, specs

    def ready(self) -> bool:
        return True

    def wait(self) -> Values:
        return self._memory.take(self._ticket, self._specs)


@functools.lru_cache(maxsize=4096)
def _owner_type(nbytes: int) -> Any:
    """Of what tensors hold while they read a block of so many bytes."""
    return type("Owner", (ctypes.c_ubyte * nbytes,), {"__del__": _release})


def _release(owner: Any) -> None:
    """Nobody reads the block any more; a forked process has no say."""
    if os.getpid() == owner.process:
        owner.memory[owner.start] = FREE


def _unpacked(content: bytes, form: _Form) -> Values:
    """Of values in a packet, one after the other."""
    found, at = [], _HEAD.size
    for spec, size, dense in zip(form.specs, form.sizes, form.denses, strict=True):
        if dense:
            made = wire.empty(spec, CPU)
            ctypes.memmove(made.data_ptr(), content[at : at + size], size)
        else:
            room = wire.room_for(spec, CPU)
            ctypes.memmove(room.data_ptr(), content[at : at + size], size)
            made = wire.from_bytes(room, spec)
        at += size
        found.append(made)
    return found
