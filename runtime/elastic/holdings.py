"""Which snapshot a run goes on from, by what each machine still holds, and who keeps whose copy.

A snapshot is made by all ranks of an attempt, each its piece. It can be loaded when every piece is
on some machine. Nothing here touches a process or a file.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, order=True)
class Held:
    """A rank's piece of a snapshot, as a machine has it.

    Attributes:
        attempt: whose it is; later attempts have greater names.
        sequence: of the snapshot in its attempt.
        steps: of the pipeline, when it was made.
        size: how many ranks have made a piece each.
        rank: of those, whose this is.
    """

    attempt: str
    sequence: int
    steps: int
    size: int
    rank: int


@dataclass(frozen=True)
class Snapshot:
    """One of which every piece is there.

    Attributes:
        holders: of each rank's piece the machines that have it.
    """

    attempt: str
    sequence: int
    steps: int
    holders: tuple[tuple[int, ...], ...]

    @property
    def size(self) -> int:
        return len(self.holders)

    def piece(self, rank: int) -> Held:
        return Held(self.attempt, self.sequence, self.steps, self.size, rank)


def complete(machines: Sequence[Collection[Held]]) -> list[Snapshot]:
    """The snapshots that all machines hold together, the newest first.

    The newest is that of the last attempt, and there the last: an attempt goes on from the newest
    that there was, and steps may have gone back since, where a user has loaded an older checkpoint.
    """
    found: dict[tuple[str, int, int, int], dict[int, list[int]]] = defaultdict(dict)
    for machine, held in enumerate(machines):
        for piece in held:
            whole = (piece.attempt, piece.sequence, piece.steps, piece.size)
            found[whole].setdefault(piece.rank, []).append(machine)
    return [
        Snapshot(attempt, sequence, steps, tuple(tuple(pieces[rank]) for rank in range(size)))
        for (attempt, sequence, steps, size), pieces in sorted(found.items(), reverse=True)
        if size > 0 and pieces.keys() >= set(range(size))
    ]


def next_attempt(known: Iterable[str], token: str) -> str:
    """A name that is greater than all of these.

    Args:
        token: makes it another than that of an attempt which nobody here knows of.
    """
    last = max((int(each.partition("-")[0]) for each in known), default=0)
    return f"{last + 1:08d}-{token}"


def neighbours(machines: Sequence[str]) -> list[int | None]:
    """Of each rank another one, of another machine, that keeps a copy of its pieces.

    Ranks of a machine have neighbours on the next machine, each its own as far as there are as
    many, so that no machine keeps more copies than it has to. None where there is one machine.

    Args:
        machines: where each rank is.
    """
    order = list(dict.fromkeys(machines))
    if len(order) < 2:
        return [None] * len(machines)
    members = {name: [r for r, m in enumerate(machines) if m == name] for name in order}
    found: list[int | None] = []
    for rank, name in enumerate(machines):
        beyond = members[order[(order.index(name) + 1) % len(order)]]
        found.append(beyond[members[name].index(rank) % len(beyond)])
    return found


def server(snapshot: Snapshot, rank: int, machines: Sequence[int]) -> int | None:
    """Which of the ranks of now gives a piece to those of other machines; None where nobody has it.

    Args:
        rank: whose piece it is.
        machines: of each rank of now, the number of its machine.
    """
    able = [now for now, machine in enumerate(machines) if machine in snapshot.holders[rank]]
    return able[rank % len(able)] if able else None
