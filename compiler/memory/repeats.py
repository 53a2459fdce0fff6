"""Where a list repeats itself: the layers of a model make its parameters do so."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

ENOUGH = 4  # repeats that are worth being told from one and two of them
LONGEST = 256  # of what is repeated


@dataclass(frozen=True)
class Repeats:
    """A run of ``count`` equal pieces of ``length`` items, from item ``start`` on."""

    start: int
    length: int
    count: int

    def kept(self, count: int, size: int) -> list[int]:
        """The positions that are left of ``size`` items with fewer pieces in the run."""
        end = self.start + self.length * self.count
        return [*range(self.start + self.length * count), *range(end, size)]

    def twin(self, position: int, count: int) -> int:
        """Of an item of the whole list the position of its like, where so many pieces are left:
        items of the pieces between have it in the last piece but one, or in the only one."""
        length, gone = self.length, self.count - count
        piece = (position - self.start) // length
        if position < self.start or piece < count - 1:
            return position
        if piece < self.count - 1:
            return self.start + max(0, count - 2) * length + (position - self.start) % length
        return position - gone * length


def repeats_in(items: Sequence[Hashable]) -> Repeats | None:
    """The run of at least `ENOUGH` equal pieces that has most of the items; None if there is none.
    Of equals the one with the shortest pieces."""
    best: Repeats | None = None
    numbers: dict[Hashable, int] = {}
    kinds = [numbers.setdefault(each, len(numbers)) for each in items]  # compared more quickly
    for length in range(1, min(LONGEST, len(items) // ENOUGH) + 1):
        same = 0  # items before this one that are equal to those a piece later
        for i in range(len(items) - length + 1):
            if i < len(items) - length and kinds[i] == kinds[i + length]:
                same += 1
                continue
            count = same // length + 1
            if count >= ENOUGH and (best is None or count * length > best.count * best.length):
                best = Repeats(i - same, length, count)
            same = 0
    return best
