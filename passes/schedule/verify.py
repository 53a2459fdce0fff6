"""What is legal for a schedule.

- Every stage is on one rank, and runs F of every microbatch once and in order, B (if it trains)
  after it, and W (if it has one) after that;
- every message has one send after the action that makes it and one receive before the action
  that reads it, and both ends agree on the order;
- no action waits, through others, for itself;
- no stage holds more microbatches than the plan says.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

import networkx as nx

from ...compiler.ir.actions import (
    COMPUTE_OF,
    RECV,
    SEND,
    Action,
    Kind,
    Schedule,
    homes_of,
    max_in_flight,
)
from ...compiler.ir.errors import VerificationError
from ...compiler.ir.program import Message, PipelineProgram
from ...compiler.ir.zero import Zero
from .communication import between_ranks


def verify_schedule(
    schedule: Schedule, messages: Sequence[Message], microbatches: int, trains: bool
) -> None:
    """Raises VerificationError, with the schedule's lines, where it is not legal."""
    try:
        homes = _homes(schedule)
        for stage, rank in homes.items():
            mine = [action for action in schedule[rank] if action.stage == stage]
            _check_compute(stage, mine, microbatches, trains)
        between = between_ranks(schedule, messages)
        for message in messages:
            if message in between:
                _check_message(schedule, homes, message, microbatches)
            else:
                _check_hand_over(schedule[homes[message.src]], message, microbatches)
        _check_no_stray(schedule, between)
        _check_no_cycle(schedule)
    except VerificationError as error:
        lines = [f"  {s}: {' '.join(map(str, row))}" for s, row in enumerate(schedule)]
        raise VerificationError("\n".join([str(error), *lines])) from None


def verify_exchange(schedule: Schedule, program: PipelineProgram, dp: int, zero: Zero) -> None:
    """Replicas exchange gradients when all are added, tied ones where `exchange` says so.

    Raises:
        VerificationError: with the action that stands in the wrong place.
    """
    for stage, rank in homes_of(schedule).items():
        actions = [action for action in schedule[rank] if action.stage == stage]
        kinds = [action.kind for action in actions]
        computes = [i for i, action in enumerate(actions) if action.kind.computes]
        if Kind.UNSHARD in kinds and kinds.index(Kind.UNSHARD) > computes[0]:
            raise VerificationError(f"stage {stage} computes before {stage}UNSHARD")
        adds = bool(program.stages[stage].grads) and program.trains
        reduces = [i for i, kind in enumerate(kinds) if kind is Kind.REDUCE_GRAD]
        if dp > 1 and adds and len(reduces) != 1:
            raise VerificationError(f"stage {stage} has {len(reduces)} REDUCE_GRAD")
        if reduces and reduces[0] < computes[-1]:
            raise VerificationError(f"{stage}REDUCE_GRAD comes before {actions[computes[-1]]}")
        for i, action in enumerate(actions):
            if action.kind in (Kind.REDUCE_B, Kind.REDUCE_W):
                made = Action(stage, Kind(action.kind[-1]), action.microbatch)
                if actions[i - 1] != made:
                    raise VerificationError(f"{action} does not follow {made}")
    for row in schedule:
        _check_order(row, Kind.REDUCE_GRAD if zero.streams else Kind.SYNC_TIED)


def _check_order(actions: Sequence[Action], first: Kind) -> None:
    """A rank's tied gradients are all summed before, or all after, its replicas' are averaged."""
    closing = [action for action in actions if action.kind in (Kind.REDUCE_GRAD, Kind.SYNC_TIED)]
    for before, after in pairwise(closing):
        if after.kind is first is not before.kind:
            raise VerificationError(f"{after} is on the wrong side of {before}")


def _homes(schedule: Schedule) -> dict[int, int]:
    """Stage -> its rank; each stage has one, and their numbers have no gap."""
    homes = homes_of(schedule)
    for rank, actions in enumerate(schedule):
        stray = next((action for action in actions if homes[action.stage] != rank), None)
        if stray is not None:
            raise VerificationError(
                f"{stray} is in the list of rank {rank}, and stage {stray.stage} is on rank "
                f"{homes[stray.stage]}"
            )
    if sorted(homes) != list(range(len(homes))):
        raise VerificationError(f"only stages {sorted(homes)} have actions")
    return homes


def _check_compute(stage: int, actions: Sequence[Action], microbatches: int, trains: bool) -> None:
    expected = list(range(microbatches))
    for kind in (Kind.F, Kind.B):
        found = [a.microbatch for a in actions if a.kind is kind]
        if found != (expected if kind is Kind.F or trains else []):
            raise VerificationError(f"stage {stage} runs {kind} of microbatches {found}")
    weights = [a.microbatch for a in actions if a.kind is Kind.W]
    if weights not in ([], expected):
        raise VerificationError(f"stage {stage} runs W of microbatches {weights}")
    order = {a: i for i, a in enumerate(actions)}
    for i in expected if trains else ():
        if order[Action(stage, Kind.F, i)] > order[Action(stage, Kind.B, i)]:
            raise VerificationError(f"{stage}B{i} comes before {stage}F{i}")
        if weights and order[Action(stage, Kind.B, i)] > order[Action(stage, Kind.W, i)]:
            raise VerificationError(f"{stage}W{i} comes before {stage}B{i}")


def _check_message(
    schedule: Schedule, homes: Mapping[int, int], message: Message, microbatches: int
) -> None:
    src, dst, phase = message.src, message.dst, message.phase
    sends = _ends(schedule[homes[src]], src, SEND[phase], dst)
    receives = _ends(schedule[homes[dst]], dst, RECV[phase], src)
    sent, received = [a.microbatch for a in sends], [a.microbatch for a in receives]
    if set(sent) != set(range(microbatches)) or len(sent) != microbatches:
        raise VerificationError(f"{src}→{dst} {phase}: microbatches {sent} are sent")
    if sent != received:
        raise VerificationError(f"{src}→{dst} {phase}: sent in order {sent}, received {received}")
    kind = COMPUTE_OF[phase]
    for stage, ends, before in ((src, sends, True), (dst, receives, False)):
        order = {a: i for i, a in enumerate(schedule[homes[stage]])}
        for end in ends:
            computed = order[Action(stage, kind, end.microbatch)]
            if (computed > order[end]) if before else (computed < order[end]):
                raise VerificationError(f"{end} is on the wrong side of its computation")


def _ends(actions: Sequence[Action], stage: int, kind: Kind, peer: int) -> list[Action]:
    return [a for a in actions if (a.stage, a.kind, a.peer) == (stage, kind, peer)]


def _check_hand_over(actions: Sequence[Action], message: Message, microbatches: int) -> None:
    """Between stages of one rank, what makes a value runs before what reads it."""
    order = {action: i for i, action in enumerate(actions)}
    kind = COMPUTE_OF[message.phase]
    for i in range(microbatches):
        made, read = Action(message.src, kind, i), Action(message.dst, kind, i)
        if order[made] > order[read]:
            raise VerificationError(f"{read} reads what {made} makes after it")


def _check_no_stray(schedule: Schedule, messages: Sequence[Message]) -> None:
    known = {(m.src, m.dst, m.phase) for m in messages}
    for actions in schedule:
        for action in actions:
            if action.peer is None:
                continue
            ends = (action.stage, action.peer)
            pair = ends if action.kind in SEND.values() else ends[::-1]
            if (*pair, action.kind.phase) not in known:
                raise VerificationError(f"{action} has no message")


def _check_no_cycle(schedule: Schedule) -> None:
    """A compute action waits for the one before it on its rank, and for its senders."""
    waits: nx.DiGraph[Action] = nx.DiGraph()
    for actions in schedule:
        waits.add_edges_from(pairwise(actions))
        for action in actions:
            if action.kind in RECV.values() and action.peer is not None:
                kind = COMPUTE_OF[action.kind.phase]
                send = Action(action.peer, SEND[action.kind.phase], action.microbatch, action.stage)
                waits.add_edge(send, Action(action.stage, kind, action.microbatch))
    if not nx.is_directed_acyclic_graph(waits):
        cycle = " → ".join(str(edge[0]) for edge in nx.find_cycle(waits))
        raise VerificationError(f"a wait cycle: {cycle}")


def verify_in_flight(schedule: Schedule, limits: Sequence[int]) -> None:
    """No stage stashes more microbatches than planned."""
    homes = homes_of(schedule)
    for stage, limit in enumerate(limits):
        if (most := max_in_flight(schedule[homes[stage]], stage)) > limit:
            raise VerificationError(f"stage {stage} holds {most} microbatches, planned {limit}")
