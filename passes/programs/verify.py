"""What is legal, checked after every pass: graphs, stage programs, schedules.

A schedule is legal when
  - every stage runs F of every microbatch once and in order, B (if it trains) after it, and W
    (if it has one) after that;
  - every message has one send after the action that makes it and one receive before the action
    that reads it, and both ends agree on the order;
  - no action waits, through others, for itself;
  - no stage holds more microbatches than the plan says.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import networkx as nx
import torch
from torch import fx

from ...compiler.ir import ops
from ...compiler.ir.actions import (
    RECV,
    SEND,
    Action,
    Kind,
    Schedule,
    max_in_flight,
)
from ...compiler.ir.errors import VerificationError
from ...compiler.ir.graph import (
    JointGraph,
    Phase,
    overwritten,
    phase_of,
    viewed,
)
from ...compiler.ir.precision import REDUCED
from ...compiler.ir.program import (
    Message,
    Part,
    PipelineProgram,
    Role,
)

_COMPUTE = {Phase.FORWARD: Kind.F, Phase.BACKWARD: Kind.B}


def verify_graph(graph: JointGraph) -> None:
    """Raises VerificationError where a joint graph breaks the table in `compiler.ir.graph`."""
    graph.graph.lint()
    for node in graph.graph.nodes:
        if node.op not in ("placeholder", "get_attr", "call_function", "output"):
            raise VerificationError(f"{node} is a {node.op}")
        if node.op == "call_function" and "val" not in node.meta:
            raise VerificationError(f"{node} has no shape")
        reads_backward = [a for a in node.all_input_nodes if phase_of(a) is Phase.BACKWARD]
        if node.op != "output" and phase_of(node) is Phase.FORWARD and reads_backward:
            raise VerificationError(f"the forward node {node} reads {reads_backward[0]}")
    for name, grad in graph.grads.items():
        param, found = graph.params[name].meta["val"], grad.meta["val"]
        narrow = param.dtype is torch.float32 and found.dtype in REDUCED  # widened by its sum
        if param.shape != found.shape or not (param.dtype is found.dtype or narrow):
            raise VerificationError(f"the gradient of {name} is {found.shape}, {found.dtype}")


def verify_placement(graph: JointGraph, stage: dict[fx.Node, int]) -> None:
    """Forward edges go up the stages, backward edges down."""
    for node, here in stage.items():
        for source in node.all_input_nodes:
            if source not in stage or phase_of(source) is not phase_of(node):
                continue
            rising = phase_of(node) is Phase.FORWARD
            if stage[source] > here if rising else stage[source] < here:
                raise VerificationError(
                    f"{source} (stage {stage[source]}) is read by {node} (stage {here})"
                )


def verify_program(program: PipelineProgram) -> None:
    """Every value that a program reads is made, received or stashed on its stage before."""
    for stage in program.stages:
        known = _received(program, stage.stage, Phase.FORWARD)
        constants = {port.key for port in stage.constants.outputs}
        for part, code in stage.parts.items():
            phase = Phase.FORWARD if part is Part.F else Phase.BACKWARD
            if part is Part.B:
                known |= _received(program, stage.stage, phase)
            for port in code.inputs:
                missing = port.role is Role.VALUE and port.key not in known
                missing |= port.role is Role.CONSTANT and port.key not in constants
                if missing:
                    raise VerificationError(f"stage {stage.stage} {part} reads unknown {port}")
            known |= {port.key for port in code.outputs if port.role is Role.VALUE}
            for message in program.messages:
                if part is not Part.W and (message.src, message.phase) == (stage.stage, phase):
                    lost = {value.name for value in message.values} - known
                    if lost:
                        raise VerificationError(f"{stage.stage}→{message.dst} sends {lost}")


def verify_writes(program: PipelineProgram) -> None:
    """No operator of a stage program writes over what somebody still reads, or has from outside."""
    for stage in program.stages:
        for part, code in stage.parts.items():
            try:
                _check_writes(list(code.module.graph.nodes))
            except VerificationError as error:
                raise VerificationError(f"stage {stage.stage} {part}: {error}") from None


def _check_writes(nodes: Sequence[fx.Node]) -> None:
    found: dict[fx.Node, tuple[fx.Node, int]] = {}  # node -> (who made its memory, which value)
    newest: dict[fx.Node, int] = {}
    given: set[fx.Node] = set()
    for node in nodes:
        for source in node.all_input_nodes:
            block, version = found[source]
            if version != newest[block]:
                raise VerificationError(f"{node} reads {source}, which was written over")
        if (target := overwritten(node)) is not None:
            block = found[target][0]
            if block.op != "call_function" or block in given:
                raise VerificationError(f"{node} writes over {target}, which others have")
            newest[block] += 1
            found[node] = (block, newest[block])
        elif (viewed_node := viewed(node)) is not None:
            found[node] = found[viewed_node]
        else:
            found[node], newest[node] = (node, 0), 0
        if node.target is ops.accumulate:
            given.add(found[node.all_input_nodes[1]][0])


def verify_schedule(
    schedule: Schedule, messages: Sequence[Message], microbatches: int, trains: bool
) -> None:
    """Raises VerificationError, with the schedule's lines, where it is not legal."""
    try:
        for stage, actions in enumerate(schedule):
            _check_compute(stage, actions, microbatches, trains)
        for message in messages:
            _check_message(schedule, message, microbatches)
        _check_no_stray(schedule, messages)
        _check_no_cycle(schedule)
    except VerificationError as error:
        lines = [f"  {s}: {' '.join(map(str, row))}" for s, row in enumerate(schedule)]
        raise VerificationError("\n".join([str(error), *lines])) from None


def verify_sharding(schedule: Schedule, program: PipelineProgram, dp: int, zero: int) -> None:
    """Replicas exchange gradients when all are added, tied ones where `exchange` says so.

    Raises:
        VerificationError: with the action that stands in the wrong place.
    """
    for stage, actions in enumerate(schedule):
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
        if reduces and Kind.SYNC_TIED in kinds:
            summed_first = kinds.index(Kind.SYNC_TIED) < reduces[0]
            if summed_first != (zero < 2):
                raise VerificationError(f"{stage}SYNC_TIED is on the wrong side of REDUCE_GRAD")
        for i, action in enumerate(actions):
            if action.kind in (Kind.REDUCE_B, Kind.REDUCE_W):
                made = Action(stage, Kind(action.kind[-1]), action.microbatch)
                if actions[i - 1] != made:
                    raise VerificationError(f"{action} does not follow {made}")


def _received(program: PipelineProgram, stage: int, phase: Phase) -> set[object]:
    return {
        value.name
        for message in program.messages
        if message.dst == stage and message.phase is phase
        for value in message.values
    }


def _check_compute(stage: int, actions: Sequence[Action], microbatches: int, trains: bool) -> None:
    expected = list(range(microbatches))
    for kind in (Kind.F, Kind.B):
        found = [a.microbatch for a in actions if a.kind is kind]
        if found != (expected if kind is Kind.F or trains else []):
            raise VerificationError(f"stage {stage} runs {kind} of microbatches {found}")
    weights = [a.microbatch for a in actions if a.kind is Kind.W]
    if weights not in ([], expected):
        raise VerificationError(f"stage {stage} runs W of microbatches {weights}")
    if any(a.stage != stage for a in actions):
        raise VerificationError(f"an action of another stage is in the list of stage {stage}")
    order = {a: i for i, a in enumerate(actions)}
    for i in expected if trains else ():
        if order[Action(stage, Kind.F, i)] > order[Action(stage, Kind.B, i)]:
            raise VerificationError(f"{stage}B{i} comes before {stage}F{i}")
        if weights and order[Action(stage, Kind.B, i)] > order[Action(stage, Kind.W, i)]:
            raise VerificationError(f"{stage}W{i} comes before {stage}B{i}")


def _check_message(schedule: Schedule, message: Message, microbatches: int) -> None:
    src, dst, phase = message.src, message.dst, message.phase
    sends = [a for a in schedule[src] if a.kind is SEND[phase] and a.peer == dst]
    receives = [a for a in schedule[dst] if a.kind is RECV[phase] and a.peer == src]
    sent, received = [a.microbatch for a in sends], [a.microbatch for a in receives]
    if set(sent) != set(range(microbatches)) or len(sent) != microbatches:
        raise VerificationError(f"{src}→{dst} {phase}: microbatches {sent} are sent")
    if sent != received:
        raise VerificationError(f"{src}→{dst} {phase}: sent in order {sent}, received {received}")
    kind = _COMPUTE[phase]
    for stage, ends, before in ((src, sends, True), (dst, receives, False)):
        order = {a: i for i, a in enumerate(schedule[stage])}
        for end in ends:
            computed = order[Action(stage, kind, end.microbatch)]
            if (computed > order[end]) if before else (computed < order[end]):
                raise VerificationError(f"{end} is on the wrong side of its computation")


def _check_no_stray(schedule: Schedule, messages: Sequence[Message]) -> None:
    known = {(m.src, m.dst, m.phase) for m in messages}
    for stage, actions in enumerate(schedule):
        for action in actions:
            if action.peer is None:
                continue
            pair = (stage, action.peer) if action.kind in SEND.values() else (action.peer, stage)
            if (*pair, action.kind.phase) not in known:
                raise VerificationError(f"{action} has no message")


def _check_no_cycle(schedule: Schedule) -> None:
    """A compute action waits for the one before it on its stage, and for its senders."""
    waits: nx.DiGraph[Action] = nx.DiGraph()
    for actions in schedule:
        waits.add_edges_from(pairwise(actions))
        for action in actions:
            if action.kind in RECV.values() and action.peer is not None:
                kind = _COMPUTE[action.kind.phase]
                send = Action(action.peer, SEND[action.kind.phase], action.microbatch, action.stage)
                waits.add_edge(send, Action(action.stage, kind, action.microbatch))
    if not nx.is_directed_acyclic_graph(waits):
        cycle = " → ".join(str(edge[0]) for edge in nx.find_cycle(waits))
        raise VerificationError(f"a wait cycle: {cycle}")


def verify_in_flight(schedule: Schedule, limits: Sequence[int]) -> None:
    """No stage stashes more microbatches than planned."""
    for stage, (actions, limit) in enumerate(zip(schedule, limits, strict=True)):
        if (most := max_in_flight(actions)) > limit:
            raise VerificationError(f"stage {stage} holds {most} microbatches, planned {limit}")
