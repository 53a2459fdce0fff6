"""Adds sends and receives to a schedule of compute actions.

Stages of one rank hand their values over in memory: there is nothing to send.
"""

from __future__ import annotations

from collections.abc import Sequence

from ...compiler.ir.actions import COMPUTE_OF, RECV, SEND, Action, Schedule, homes_of
from ...compiler.ir.program import Message


def add_communication(schedule: Schedule, messages: Sequence[Message]) -> Schedule:
    """Insert what the messages between programs need.

    A send follows the action that makes its values. A receive is posted one compute action
    before the one that reads it, so that the transfer runs beside that computation.
    """
    between = between_ranks(schedule, messages)
    return tuple(tuple(_rank(actions, between)) for actions in schedule)


def between_ranks(schedule: Schedule, messages: Sequence[Message]) -> list[Message]:
    """Those messages whose ends are on two ranks."""
    homes = homes_of(schedule)
    return [m for m in messages if homes[m.src] != homes[m.dst]]


def _rank(actions: Sequence[Action], messages: Sequence[Message]) -> list[Action]:
    result: list[Action] = []
    received = [_receives(action, messages) for action in actions]
    for i, action in enumerate(actions):
        if i == 0:
            result += received[0]
        if i + 1 < len(actions):
            result += received[i + 1]
        result.append(action)
        result += [
            Action(action.stage, SEND[action.kind.phase], action.microbatch, m.dst)
            for m in messages
            if m.src == action.stage and action.kind is COMPUTE_OF[m.phase]
        ]
    return result


def _receives(action: Action, messages: Sequence[Message]) -> list[Action]:
    return [
        Action(action.stage, RECV[action.kind.phase], action.microbatch, m.src)
        for m in messages
        if m.dst == action.stage and action.kind is COMPUTE_OF[m.phase]
    ]
