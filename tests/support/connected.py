"""Ends of connections between processes of one machine, all in this process."""

from __future__ import annotations

import socket
from itertools import combinations
from pathlib import Path

from pipecompile.runtime.transport.neighbours import Neighbours


def of(ranks: int) -> list[Neighbours]:
    """As many as there are ranks, connected in one process."""
    sockets: list[dict[int, socket.socket]] = [{} for _ in range(ranks)]
    for a, b in combinations(range(ranks), 2):
        sockets[a][b], sockets[b][a] = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    return [Neighbours(rank, each) for rank, each in enumerate(sockets)]


def open_files() -> int:
    """Of this process."""
    return len(list(Path("/proc/self/fd").iterdir()))
