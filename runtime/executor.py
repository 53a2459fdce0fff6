"""Interprets one rank's list of actions: the only place where programs run.

`run` is a generator: it yields where it needs a message that another rank of the same process
has yet to send, so that all ranks can share one thread. Between processes it never yields; it
blocks in the transport instead.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..compiler.ir.actions import RECV, SEND, Action, Kind
from ..compiler.ir.errors import VerificationError
from ..compiler.ir.program import (
    Message,
    PipelineProgram,
    Port,
    Program,
    Role,
    TiedGradient,
    ValueSpec,
)
from .exchange.parcels import GatheredGroup, LocalGroup
from .exchange.transport import Pending, Transport
from .state.rank_state import RankState

Run = Generator[None, None, None]


@dataclass
class Job:
    """One run of a rank's actions: what goes in, and what comes out.

    Attributes:
        batches: per microbatch, the batch leaves on this rank's device.
        seeds: per microbatch, the seed of its random ops.
        losses: per microbatch, on the stage that computes it.
        results: per microbatch, what the model returned, on the last stage.
    """

    batches: Sequence[Sequence[torch.Tensor]]
    seeds: Sequence[int]
    losses: list[torch.Tensor] = field(default_factory=list)
    results: list[dict[int, torch.Tensor]] = field(default_factory=list)


@dataclass(frozen=True)
class _Bound:
    """A program with the arguments that never change already in place."""

    program: Program
    fixed: list[Any]
    values: tuple[tuple[int, str], ...]
    batch: tuple[tuple[int, int], ...]
    seed: int | None
    drops: tuple[str, ...]


class Executor:
    """Runs one stage of one compiled graph on one rank."""

    def __init__(
        self,
        pipeline: PipelineProgram,
        actions: Sequence[Action],
        state: RankState,
        transport: Transport,
        microbatches: int,
    ):
        self.pipeline, self.actions, self.state, self.transport = (
            pipeline,
            actions,
            state,
            transport,
        )
        self.program = pipeline.stages[state.stage]
        self.current: Action | None = None
        self.messages = {(m.src, m.dst, m.phase): m for m in pipeline.messages}
        tied = [t.name for t in pipeline.tied if state.stage in t.holders]
        self.leaving = state.grads.departures(self.program, tied)
        self.replicas = state.mesh.replicas_of(state.stage)
        self.groups = self._groups()
        self.microbatches = microbatches
        self.tangent: torch.Tensor | None = None
        if pipeline.loss_dtype is not None:
            self.tangent = torch.empty((), dtype=pipeline.loss_dtype, device=state.device)
            self.scale_loss(1.0)
        for program in (self.program.constants, *self.program.parts.values()):
            _retarget(program, state.device)
        self.refresh()

    def scale_loss(self, scale: float) -> None:
        """Multiply the loss that is differentiated, the mean over microbatches, by a number."""
        if self.tangent is not None:
            self.tangent.fill_(scale).div_(self.microbatches)

    @torch.no_grad()
    def refresh(self) -> None:
        """Make the constants anew and bind them: at first, and after buffers were loaded."""
        constants = self.program.constants
        arguments = [self.state.buffers[str(port.key)] for port in constants.inputs]
        made = constants.module.forward(arguments)
        values = dict(zip((p.key for p in constants.outputs), made, strict=True))
        self.bound = {
            part: self._bind(program, values, part) for part, program in self.program.parts.items()
        }

    def run(self, job: Job) -> Run:
        """Execute every action in order. Call under `torch.no_grad()`."""
        alive: dict[int, dict[str, torch.Tensor]] = defaultdict(dict)
        arriving: dict[tuple[Kind, int], list[tuple[Message, Pending]]] = defaultdict(list)
        self._restart_parts()
        for action in self.actions:
            self.current = action
            kind, index = action.kind, action.microbatch
            if kind.computes:
                assert index is not None
                for message, pending in arriving.pop((kind, index), ()):
                    while not pending.ready():
                        yield
                    names = (spec.name for spec in message.values)
                    alive[index].update(zip(names, pending.wait(), strict=True))
                    del pending  # it holds what has arrived
                if kind is not Kind.F:
                    last = index == self.microbatches - 1
                    self.state.grads.begin(self.leaving, kind, last)
                self._compute(kind, index, alive[index], job)
            elif kind in SEND.values():
                assert index is not None
                self._send(action, alive[index])
            elif kind in RECV.values():
                assert index is not None
                assert action.peer is not None
                message = self.messages[action.peer, self.state.stage, kind.phase]
                reader = Kind.F if kind is Kind.RECV_F else Kind.B
                arriving[reader, index].append((message, self._receive(message)))
            elif kind is Kind.SYNC_TIED:
                yield from self._sync_tied()
            elif kind in (Kind.REDUCE_B, Kind.REDUCE_W):
                yield from self.state.grads.collect(self.transport, self.state.rank, self.replicas)
            elif kind is Kind.REDUCE_GRAD:
                yield from self.state.grads.reduce(
                    self.leaving, self.transport, self.state.rank, self.replicas
                )
            elif kind is Kind.UNSHARD and self.state.shards is not None:
                self.state.shards.unshard()
        self.current = None

    def _compute(self, kind: Kind, index: int, values: dict[str, torch.Tensor], job: Job) -> None:
        bound = self.bound[kind]
        arguments = bound.fixed.copy()
        for position, name in bound.values:
            arguments[position] = values[name]
        for position, leaf in bound.batch:
            arguments[position] = job.batches[index][leaf]
        if bound.seed is not None:
            arguments[bound.seed] = job.seeds[index]
        for name in bound.drops:
            del values[name]
        made = bound.program.module.forward(arguments)
        for port, value in zip(bound.program.outputs, made, strict=True):
            if port.role is Role.VALUE:
                values[str(port.key)] = value
            elif port.role is Role.LOSS:
                job.losses.append(value)
            elif port.role is Role.RESULT:
                while len(job.results) <= index:
                    job.results.append({})
                job.results[index][int(port.key)] = value
            elif port.role is Role.BUFFER:
                self.state.buffers[str(port.key)].copy_(value)

    def _send(self, action: Action, values: dict[str, torch.Tensor]) -> None:
        assert action.peer is not None
        message = self.messages[self.state.stage, action.peer, action.kind.phase]
        chosen = [values[spec.name] for spec in message.values]
        self.transport.send(self.state.rank, self.state.peer(action.peer), chosen, message.values)
        for name in self.program.drops.get((action.kind.value, action.peer), ()):
            del values[name]

    def _receive(self, message: Message) -> Pending:
        src = self.state.peer(message.src)
        return self.transport.receive(src, self.state.rank, message.values, self.state.device)

    # -- gradients --------------------------------------------------------------------------

    def _restart_parts(self) -> None:
        """A part of a tied gradient is of this run alone: the sum so far is with its owner."""
        if not self.state.grads.leads:
            return
        for tied in self.pipeline.tied:
            if self.state.stage in tied.parts and self.state.stage != tied.owner:
                self.state.grads.slots[tied.name].fresh = True

    def _sync_tied(self) -> Run:
        """Parts to the owner, who adds them up in stage order; the total back to all holders."""
        if not self.state.grads.leads:
            return
        stage = self.state.stage
        mine = [tied for tied in self.pipeline.tied if stage in tied.holders]
        for tied in mine:
            if stage in tied.parts and stage != tied.owner:
                self._give(tied, tied.owner)
        for tied in mine:
            if stage == tied.owner:
                for part in tied.parts[1:]:
                    yield from self._take(tied, part)
                for holder in tied.holders:
                    if holder != stage:
                        self._give(tied, holder)
        for tied in mine:
            if stage != tied.owner:
                self.state.grads.slots[tied.name].fresh = True
                yield from self._take(tied, tied.owner)

    def _give(self, tied: TiedGradient, stage: int) -> None:
        slot = self.state.grads.slots[tied.name]
        spec = _spec(tied.name, slot.tensor)
        copy = slot.tensor.clone()  # the slot is written again before the message has left
        self.transport.send(self.state.rank, self.state.peer(stage), [copy], [spec])

    def _take(self, tied: TiedGradient, stage: int) -> Run:
        slot = self.state.grads.slots[tied.name]
        specs = [_spec(tied.name, slot.tensor)]
        pending = self.transport.receive(
            self.state.peer(stage), self.state.rank, specs, self.state.device
        )
        while not pending.ready():
            yield
        slot.add(pending.wait()[0])

    # -- binding ----------------------------------------------------------------------------

    def _groups(self) -> Sequence[GatheredGroup | LocalGroup]:
        if self.state.shards is not None:
            return self.state.shards.groups(self.program)
        return [
            LocalGroup([self._fixed(port, {}) for port in group], self.state.mesh.dp)
            for group in self.program.groups
        ]

    def _bind(self, program: Program, constants: dict[Any, torch.Tensor], part: Kind) -> _Bound:
        fixed = [self._fixed(port, constants) for port in program.inputs]
        at = [(i, port) for i, port in enumerate(program.inputs)]
        seeds = [i for i, port in at if port.role is Role.SEED]
        return _Bound(
            program,
            fixed,
            tuple((i, str(port.key)) for i, port in at if port.role is Role.VALUE),
            tuple((i, int(port.key)) for i, port in at if port.role is Role.BATCH),
            seeds[0] if seeds else None,
            self.program.drops.get((part, -1), ()),
        )

    def _fixed(self, port: Port, constants: dict[Any, torch.Tensor]) -> Any:
        if port.role is Role.PARAM:
            return self.state.params[str(port.key)]
        if port.role is Role.COPY:
            return self.state.copies[str(port.key)]
        if port.role is Role.BUFFER:
            return self.state.buffers[str(port.key)]
        if port.role is Role.CONSTANT:
            return constants[port.key]
        if port.role is Role.SLOT:
            return self.state.grads.inlets[str(port.key)]
        if port.role is Role.GROUP:
            return self.groups[int(port.key)]
        return self.tangent if port.role is Role.TANGENT else None


def _spec(name: str, tensor: torch.Tensor) -> ValueSpec:
    return ValueSpec(name, tuple(tensor.shape), tensor.stride(), tensor.dtype)


def _retarget(program: Program, device: torch.device) -> None:
    """Make a program's own tensors on this rank's device: it was traced for the type alone."""
    module, changed = program.module, False
    for node in module.graph.nodes:
        wanted = node.kwargs.get("device")
        if isinstance(wanted, torch.device) and wanted.type == device.type and wanted != device:
            node.kwargs = {**node.kwargs, "device": device}
            changed = True
    for name, tensor in list(module.named_buffers()):
        if tensor.device.type == device.type and tensor.device != device:
            setattr(module, name, tensor.to(device))
    if changed:
        module.recompile()


def drive(runs: Iterable[Run], progress: Callable[[], int]) -> None:
    """Run the ranks of one process in turn until all are done.

    Args:
        progress: a count that grows whenever one rank has done something for another.

    Raises:
        VerificationError: every rank waits for another.
    """
    active = list(runs)
    while active:
        before, finished = progress(), len(active)
        active = [run for run in active if _advance(run)]
        if progress() == before and len(active) == finished:
            raise VerificationError("every rank waits for another: the schedule deadlocks")


def _advance(run: Run) -> bool:
    """Run until the rank has to wait; False when it is done."""
    try:
        next(run)
    except StopIteration:
        return False
    return True
