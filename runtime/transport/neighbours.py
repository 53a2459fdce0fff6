"""Packets between the processes of one machine, over a socket between each two of them.

A packet is some bytes, and open files where needed. It costs tens of microseconds, where gloo's
threads take hundreds. Packets of a channel, from one rank to another, arrive in the order in which
they were posted. Who waits for one reads the sockets of all, so that nobody waits for room for
ever.
"""

from __future__ import annotations

import array
import mmap
import os
import pickle
import secrets
import select
import socket
import struct
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from .doing import HERE, Doing

SWITCH = "PIPECOMPILE_SHARED_MEMORY"
"""The environment variable that keeps processes of a machine apart, if it is ``off``."""

MOST_BYTES = 16 << 10  # of a packet
CONTROL = -1  # the channel of what ranks agree on
REPORTS = -4  # that of what they tell rank 0 of their steps
_ROOM = socket.CMSG_SPACE(4 * array.array("i").itemsize)  # for the numbers of open files
_CHANNEL = struct.Struct("<q")
_MACHINE = Path("/proc/sys/kernel/random/boot_id")


class Packet(NamedTuple):
    content: bytes
    files: list[int]


class Ticket(NamedTuple):
    """Asks for the packet of this number, of those of a channel from a rank."""

    rank: int
    channel: int
    number: int


class Neighbours:
    """The other processes of this machine.

    Args:
        rank: of this process.
        sockets: rank -> of packets (``SOCK_SEQPACKET``), connected to it.
        doing: where it is noted for whom this process waits.
    """

    def __init__(self, rank: int, sockets: Mapping[int, socket.socket], doing: Doing = HERE):
        self.rank, self._sockets, self._doing = rank, dict(sockets), doing
        self._inbox: dict[Ticket, Packet] = {}
        self._arrived: dict[tuple[int, int], int] = defaultdict(int)
        self._asked: dict[tuple[int, int], int] = defaultdict(int)
        self._poll = select.epoll()
        self._ranks = {each.fileno(): rank for rank, each in self._sockets.items()}
        for each in self._sockets.values():
            each.setblocking(False)
            self._poll.register(each.fileno(), select.EPOLLIN)
        self._bell, self._ring = socket.socketpair()
        self._poll.register(self._bell.fileno(), select.EPOLLIN)
        doing.wakes(self)

    def wake(self) -> None:
        """Whoever waits here, now or later, gets a ConnectionError."""
        with suppress(OSError):
            self._ring.send(b"!", socket.MSG_DONTWAIT)

    @property
    def ranks(self) -> frozenset[int]:
        return frozenset(self._sockets)

    def post(self, rank: int, channel: int, content: bytes, files: Sequence[int] = ()) -> None:
        """Send a packet; it has left when this returns.

        Raises:
            ConnectionError: the rank has ended.
        """
        assert len(content) <= MOST_BYTES, f"{len(content)} bytes are too many for a packet"
        sock, packet = self._sockets[rank], _CHANNEL.pack(channel) + content
        while True:
            try:
                if files:
                    socket.send_fds(sock, [packet], files)
                else:
                    sock.send(packet)
                return
            except BlockingIOError:
                with self._doing.waiting((rank,)):
                    self._wait(room_in=sock)
            except OSError as error:
                raise _ended(rank) from error

    def ask(self, rank: int, channel: int) -> Ticket:
        """For the next packet that nobody has asked for."""
        number = self._asked[rank, channel]
        self._asked[rank, channel] += 1
        return Ticket(rank, channel, number)

    def take(self, ticket: Ticket) -> Packet:
        """Wait for a packet.

        Raises:
            ConnectionError: the rank has ended without posting it.
        """
        if ticket not in self._inbox and not self._at_hand(ticket):
            with self._doing.waiting((ticket.rank,)):
                while not self._at_hand(ticket):
                    self._wait()
        return self._inbox.pop(ticket)

    def _at_hand(self, ticket: Ticket) -> bool:
        """Whether the packet is among those that have arrived by now."""
        while ticket not in self._inbox:
            if self._sockets[ticket.rank].fileno() < 0:
                raise _ended(ticket.rank)
            if not self._read(ticket.rank):
                return False
        return True

    def gather(self, value: Any) -> list[Any]:
        """This value of every one of these ranks and of this one, in rank order.

        A collective: every one of them calls it.

        Raises:
            ConnectionError: a rank has ended.
        """
        return self.tell(value, sorted({self.rank, *self._sockets}))()

    def tell(self, value: Any, speakers: Sequence[int]) -> Callable[[], list[Any]]:
        """What each of some ranks tells all others; what is returned waits for it.

        A collective: every rank calls it, with the same speakers.

        Args:
            value: what this rank tells, if it is one of them.
        """
        if self.rank in speakers:
            self._tell(pickle.dumps(value), self._sockets)
        tickets = [None if each == self.rank else self.ask(each, CONTROL) for each in speakers]
        return lambda: [value if each is None else self._hear(each) for each in tickets]

    def report(self, content: bytes) -> Callable[[], dict[int, bytes]]:
        """Tell rank 0 something; what is returned there waits for that of all others, and is empty
        elsewhere. A collective that waits for nobody.

        Args:
            content: a packet at most.
        """
        if self.rank:
            self.post(0, REPORTS, content)
            return dict
        tickets = [self.ask(each, REPORTS) for each in sorted(self._sockets)]
        return lambda: {each.rank: self.take(each).content for each in tickets}

    def collect(self, value: Any) -> list[Any] | None:
        """This value of every one of these ranks and of this one, in rank order, on rank 0; None on
        the others, which wait for nobody. A collective.

        Raises:
            ConnectionError: a rank has ended.
        """
        if self.rank:
            self._tell(pickle.dumps(value), (0,))
            return None
        tickets = [self.ask(each, CONTROL) for each in sorted(self._sockets)]
        return [value, *map(self._hear, tickets)]

    def _tell(self, content: bytes, ranks: Iterable[int]) -> None:
        fits = len(content) <= MOST_BYTES
        file = -1 if fits else _file_of(content)
        try:
            for rank in ranks:
                self.post(rank, CONTROL, content if fits else b"", () if fits else [file])
        finally:
            if file >= 0:
                os.close(file)

    def _hear(self, ticket: Ticket) -> Any:
        content, files = self.take(ticket)
        if not files:
            return pickle.loads(content)
        with mmap.mmap(files[0], 0, access=mmap.ACCESS_READ) as large:
            os.close(files[0])
            return pickle.loads(large)

    def _wait(self, room_in: socket.socket | None = None) -> None:
        """Until something has arrived, or there is room in a socket."""
        if room_in is not None:
            self._poll.modify(room_in.fileno(), select.EPOLLIN | select.EPOLLOUT)
        for number, event in self._poll.poll():
            if number == self._bell.fileno():
                raise ConnectionError("another rank has failed")
            if event & ~select.EPOLLOUT:
                self._read(self._ranks[number])
        if room_in is not None and room_in.fileno() >= 0:
            self._poll.modify(room_in.fileno(), select.EPOLLIN)

    def _read(self, rank: int) -> bool:
        """Take in a packet of a rank, or its end; False if there is neither."""
        sock = self._sockets[rank]
        try:
            content, beside, _, _ = sock.recvmsg(MOST_BYTES + _CHANNEL.size, _ROOM)
        except BlockingIOError:
            return False
        except ConnectionResetError:  # what it had posted before can still be read
            return True
        if not content:
            self._poll.unregister(sock.fileno())
            sock.close()
            return True
        (channel,) = _CHANNEL.unpack_from(content)
        number = self._arrived[rank, channel]
        self._arrived[rank, channel] += 1
        files = _files(beside) if beside else []
        self._inbox[Ticket(rank, channel, number)] = Packet(content[_CHANNEL.size :], files)
        return True


def _files(beside: list[tuple[int, int, bytes]]) -> list[int]:
    """The open files that came with a packet."""
    found = array.array("i")
    for level, kind, data in beside:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            found.frombytes(data[: len(data) - len(data) % found.itemsize])
    return list(found)


def _file_of(content: bytes) -> int:
    """In memory, with what does not fit into a packet."""
    file = os.memfd_create("pipecompile")
    with open(file, "wb", closefd=False) as opened:
        opened.write(content)
    return file


def _ended(rank: int) -> ConnectionError:
    return ConnectionError(f"rank {rank} has ended, or has closed its connection")


def meet(rank: int, gather: Callable[[Any], list[Any]], switch: str = SWITCH) -> Neighbours | None:
    """Connect this process with the others of its machine; None where there are none.

    Processes are of one machine if one can connect to the other there: not from containers that
    have networks of their own, nor from another operating system than Linux. A collective: every
    rank calls it.

    Args:
        gather: exchanges a value between all processes.
    """
    mine, secret = _listening(switch), secrets.token_bytes(16)
    machine = _MACHINE.read_text() if mine is not None else ""
    told = gather((machine, secret, mine.getsockname() if mine is not None else b""))
    reached: dict[int, socket.socket] = {}
    for other, (where, key, address) in enumerate(told[:rank]):
        if machine and where == machine and (sock := _connected(address, key, rank)):
            reached[other] = sock
    expected = [other for other, ranks in enumerate(gather(set(reached))) if rank in ranks]
    if mine is not None:
        reached |= _accepted(mine, secret, expected)
        mine.close()
    return Neighbours(rank, reached) if reached else None


_HELLO = struct.Struct("<16sq")  # the key of who listens, the rank that connects


def _listening(switch: str) -> socket.socket | None:
    """A socket that processes of this machine can connect to, under a name that nobody guesses."""
    if os.environ.get(switch) == "off" or not hasattr(os, "memfd_create"):
        return None
    with suppress(OSError):
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        sock.bind(f"\0pipecompile-{secrets.token_hex(16)}")
        sock.listen(socket.SOMAXCONN)
        return sock
    return None


def _connected(address: bytes, key: bytes, rank: int) -> socket.socket | None:
    with suppress(OSError):
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        sock.connect(address)
        sock.send(_HELLO.pack(key, rank))
        return sock
    return None


def _accepted(
    mine: socket.socket, secret: bytes, expected: Iterable[int]
) -> dict[int, socket.socket]:
    """Those that have connected; who does not know the secret is turned away."""
    found: dict[int, socket.socket] = {}
    wanted = set(expected)
    while wanted:
        with HERE.waiting(sorted(wanted)):
            sock, _ = mine.accept()
        sock.settimeout(10.0)
        key, rank = _HELLO.unpack(sock.recv(_HELLO.size).ljust(_HELLO.size, b"\0"))
        if secrets.compare_digest(key, secret) and rank in wanted:
            wanted.remove(rank)
            found[rank] = sock
        else:
            sock.close()
    return found
