"""A fault of a schedule, drawn: ranks as lines, time as columns, the faulty action as ``»2B3«``.

    time          3     4     5     6     7
    rank 0      0B0   0F3   0B1         0B2
    rank 1      1F2 »1B1«         1B2   1F3

Every computation is one column long, and messages take no time. Ranks are drawn as far as they get,
around the fault.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence

from ...compiler.ir.actions import Schedule
from ...compiler.ir.errors import VerificationError
from .clock import Run, run

WIDTH = 100
LINES = 16  # ranks, at most

Place = tuple[int, int]
"""A rank and the position of an action in its list."""


class FaultError(VerificationError):
    """What is wrong, in a sentence, and the places of the actions that show it."""

    def __init__(self, sentence: str, *places: Place):
        super().__init__(sentence)
        self.places = places


def drawn(schedule: Schedule, fault: FaultError) -> VerificationError:
    """The error that people read."""
    return VerificationError(f"{fault}\n\n{draw(schedule, fault.places)}")


def draw(schedule: Schedule, marked: Collection[Place], width: int = WIDTH) -> str:
    """The schedule around the marked actions, without a fault around its beginning."""
    found = run(schedule)
    cells: list[dict[int, str]] = [
        _row(schedule, rank, found, {i for r, i in marked if r == rank})
        for rank in range(len(schedule))
    ]
    at = min((_column(schedule, found, *place) for place in marked), default=0)
    rows = _nearby(len(schedule), {rank for rank, _ in marked})
    columns = _window(cells, rows, at, width - _head(len(schedule)))
    return "\n".join(_lines(cells, rows, columns, _head(len(schedule))))


def _head(ranks: int) -> int:
    return len(f"rank {ranks - 1}  ")


def _column(schedule: Schedule, found: Run, rank: int, index: int) -> int:
    """Where an action is drawn; what never runs stands behind all that does."""
    starts = found.start_s[rank]
    if index >= len(starts):
        return _end(found)
    if schedule[rank][index].kind.computes:
        return int(starts[index])
    return max(int(starts[index]) - 1, 0)  # beside the computation before it


def _end(found: Run) -> int:
    return int(max((ends[-1] for ends in found.end_s if ends), default=0))


def _row(schedule: Schedule, rank: int, found: Run, marked: Collection[int]) -> dict[int, str]:
    """Column -> what a rank does then."""
    cells: dict[int, list[str]] = defaultdict(list)
    for index, action in enumerate(schedule[rank]):
        if index in marked:
            cells[_column(schedule, found, rank, index)].append(f"»{action}«")
        elif action.kind.computes:
            if index > len(found.start_s[rank]):
                break
            cells[_column(schedule, found, rank, index)].append(str(action))
    made = {column: " ".join(words) for column, words in cells.items()}
    if len(found.start_s[rank]) < len(schedule[rank]):
        made[_end(found) + 1] = "…"
    return made


def _nearby(ranks: int, marked: Collection[int]) -> list[int]:
    """The marked ranks, and as many of their neighbours as there are lines for."""
    near = sorted(range(ranks), key=lambda r: min((abs(r - m) for m in marked), default=r))
    return sorted(near[:LINES])


def _window(
    cells: Sequence[Mapping[int, str]], rows: Sequence[int], at: int, width: int
) -> dict[int, int]:
    """Column -> its width: as many around one of them as there is room for, most of them before."""
    last = max((column for row in cells for column in row), default=0)

    def room(column: int) -> int:
        return 2 + max(len(str(column)), *(len(cells[row].get(column, "")) for row in rows))

    widths = {at: room(at)}
    before, after = at - 1, at + 1
    while before >= 0 or after <= last:
        earlier = before >= 0 and (len(widths) % 3 != 0 or after > last)
        column = before if earlier else after
        if sum(widths.values()) + room(column) > width:
            break
        widths[column] = room(column)
        before, after = (before - 1, after) if earlier else (before, after + 1)
    return dict(sorted(widths.items()))


def _lines(
    cells: Sequence[Mapping[int, str]],
    rows: Sequence[int],
    columns: Mapping[int, int],
    head: int,
) -> list[str]:
    lines = ["time".ljust(head) + "".join(str(c).rjust(w) for c, w in columns.items())]
    for before, rank in zip([-1, *rows], rows, strict=False):
        if rank != before + 1:
            lines.append("  ⋮")
        words = "".join(cells[rank].get(c, "").rjust(w) for c, w in columns.items())
        lines.append(f"{f'rank {rank}'.ljust(head)}{words}".rstrip())
    if rows and rows[-1] != len(cells) - 1:
        lines.append("  ⋮")
    return lines
