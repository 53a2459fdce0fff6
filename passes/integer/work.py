"""Work that is counted: a search ends at the same place on a busy machine as on an idle one.

Searches add what they have done as the seconds that this takes on an idle core; the rates stand
beside the loops, and need be right to a factor only. A clock that runs along ends what is far
beyond: its limit is a last resort, and the result says so, as on another day it may be another.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field

PATIENCE = 4.0  # times the counted seconds, by the clock
PATIENCE_S = 20.0  # and that on top: starting a solver alone may take a while


@dataclass
class Work:
    """What a search may spend, and has spent.

    Attributes:
        limit_s: seconds of an idle core.
        whole: what this is a part of: it is spent there too.
        late: the clock has ended it.
    """

    limit_s: float
    whole: Work | None = None
    spent_s: float = 0.0
    late: bool = False
    started: float = field(default_factory=lambda: time.perf_counter())

    def part(self, limit_s: float) -> Work:
        """Some of it; what of that is not used is left."""
        return Work(min(limit_s, self.left_s), self)

    def spend(self, seconds: float) -> None:
        self.spent_s += seconds
        if self.whole is not None:
            self.whole.spend(seconds)

    @property
    def left_s(self) -> float:
        left = self.limit_s - self.spent_s
        return left if self.whole is None else min(left, self.whole.left_s)

    @property
    def clock_left_s(self) -> float:
        """Seconds by the clock until the last resort."""
        if self.whole is not None:
            return self.whole.clock_left_s
        return self.started + PATIENCE * self.limit_s + PATIENCE_S - time.perf_counter()

    @property
    def over(self) -> bool:
        """Whether to stop."""
        if self.left_s <= 0:
            return True
        if self.clock_left_s > 0:
            return False
        self.give_up()
        return True

    def give_up(self) -> None:
        """The clock has ended it."""
        self.late = True
        if self.whole is not None:
            self.whole.give_up()
