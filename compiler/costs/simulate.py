"""Runs a schedule against costs: when every action starts and ends.

A receive is complete at the sender's end + transfer time; transfers do not occupy the compute
stream; the makespan is max over ranks of (last end − first start). A step is over when every
rank has closed it: gradients reduced, optimizer run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..ir.actions import COMPUTE_OF, RECV, Action, Kind, Schedule
from ..ir.errors import VerificationError


@dataclass(frozen=True)
class Interval:
    """A compute action's time, in seconds from the start of the step.

    Attributes:
        held_bytes: what the rank holds when it is done; 0 where that was not asked for.
    """

    action: Action
    start_s: float
    end_s: float
    held_bytes: int = 0


@dataclass(frozen=True)
class Timeline:
    """Per rank of a replica, its compute actions in time, and what it does once per step then."""

    ranks: tuple[tuple[Interval, ...], ...]
    closing_s: tuple[float, ...] = ()

    @property
    def step_s(self) -> float:
        """From the first action to the end of the slowest optimizer; clipping waits for all."""
        end = max((row[-1].end_s for row in self.ranks if row), default=0.0)
        return end + max(self.closing_s, default=0.0)

    @property
    def makespan_s(self) -> float:
        return max((row[-1].end_s - row[0].start_s for row in self.ranks if row), default=0.0)

    def busy_s(self, rank: int) -> float:
        return sum(x.end_s - x.start_s for x in self.ranks[rank])

    @property
    def bubble(self) -> float:
        """The share of the ranks' time in which nothing is computed."""
        whole = self.makespan_s * len(self.ranks)
        busy = sum(self.busy_s(rank) for rank in range(len(self.ranks)))
        return 1 - busy / whole if whole else 0.0


def simulate(
    schedule: Schedule,
    compute_s: Mapping[tuple[int, Kind], float],
    transfer_s: Mapping[tuple[int, int], float],
    closing_s: Sequence[float] = (),
    held_bytes: Sequence[Sequence[int]] = (),
) -> Timeline:
    """The timeline of one replica.

    Args:
        compute_s: seconds of (stage, kind that computes) per microbatch.
        transfer_s: seconds of a message from one stage to another; 0 where not given.
        closing_s: per rank, seconds after its last action.
        held_bytes: per rank and action, what is held after it.
    """
    rows: list[list[Interval]] = [[] for _ in schedule]
    at = [0] * len(schedule)
    ends: dict[Action, float] = {}
    needs = _needs(schedule)
    while any(at[r] < len(schedule[r]) for r in range(len(schedule))):
        moved = False
        for rank, actions in enumerate(schedule):
            while at[rank] < len(actions):
                action = actions[at[rank]]
                if action.kind.computes:
                    senders = needs.get(action, [])
                    if any(sender not in ends for sender in senders):
                        break
                    pairs = ((x, transfer_s.get((x.stage, action.stage), 0.0)) for x in senders)
                    arrivals = [ends[sender] + seconds for sender, seconds in pairs]
                    free = rows[rank][-1].end_s if rows[rank] else 0.0
                    start = max([free, *arrivals])
                    ends[action] = start + compute_s[action.stage, action.kind]
                    held = held_bytes[rank][at[rank]] if held_bytes else 0
                    rows[rank].append(Interval(action, start, ends[action], held))
                at[rank] += 1
                moved = True
        if not moved:
            raise VerificationError("the schedule deadlocks")
    return Timeline(tuple(tuple(row) for row in rows), tuple(closing_s))


def _needs(schedule: Schedule) -> dict[Action, list[Action]]:
    """Compute action -> the compute actions of other ranks whose messages it reads."""
    needs: dict[Action, list[Action]] = {}
    for action in (action for actions in schedule for action in actions):
        if action.kind in RECV.values() and action.peer is not None:
            kind = COMPUTE_OF[action.kind.phase]
            reader = Action(action.stage, kind, action.microbatch)
            needs.setdefault(reader, []).append(Action(action.peer, kind, action.microbatch))
    return needs
