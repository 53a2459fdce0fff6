"""Interprets one rank's list of actions: the only place where programs run.

`run` is a generator: it yields where it needs a message that another rank of the same process
has yet to send, so that all ranks can share one thread. Between processes it never yields; it
blocks in the transport instead.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any, NamedTuple

import torch
from torch import fx

from ..compiler.host.frames import with_room
from ..compiler.ir.actions import COMPUTE_OF, RECV, SEND, Action, Kind, Phase
from ..compiler.ir.errors import BatchError, VerificationError
from ..compiler.ir.graph import module_of
from ..compiler.ir.program import Message, PipelineProgram, Program, Role
from ..compiler.ir.shards import late_gradients
from ..compiler.losses import pieces
from .binding import Bound, BoundStage
from .graphs.graphs import Graphs, addresses, copied
from .graphs.recorder import Recorder
from .recording.ranges import in_ranges, named
from .state.filled import numbers_on
from .state.rank_state import RankState
from .state.reached import reached_by_data
from .state.tied import TiedGradients
from .transport import wire
from .transport.doing import HERE, NOTHING, told
from .transport.transport import Pending, Run

Values = dict[str, torch.Tensor]
"""Of one stage and microbatch: what a program has made, or a message brought, by name."""


_SENDS, _RECEIVES = frozenset(SEND.values()), frozenset(RECV.values())
_OUT_OF_RANGE = re.compile("out of (bounds|range)|^Class values must be")
"""How operators say that of an index."""


class PieceKind(NamedTuple):
    """Of a microbatch.

    Attributes:
        rows: at least one.
        shape: which of the batch's shapes it has besides.
        outcome: which of the graphs for such microbatches, where their values decide.
    """

    rows: int
    shape: int = 0
    outcome: int = 0


@dataclass
class Job:
    """One run of a rank's actions: what goes in, and what comes out.

    Attributes:
        batches: per microbatch, the batch leaves on this rank's device.
        seeds: per microbatch, the seed of its random ops.
        sizes: per microbatch, its rows; 0 of one that stands in for none.
        kinds: per microbatch, which graph it runs.
        weights: per microbatch, what the gradient of its loss is multiplied by; empty where all
            count as much.
        numbers: per microbatch, further arguments: the floats that its graph is given.
        given: per microbatch, the batch leaves where the user had them.
        shares: per microbatch, those that follow: what terms of its loss are multiplied by.
        scale: what the user multiplies the loss by before it is differentiated.
        awaited: waits for what ranks tell each other of the batch, ``weights`` among it, and raises
            what they refuse it for; called before anything leaves the rank or is changed.
        refused: whether it did.
        losses: per microbatch, on the stage that computes it.
        results: per microbatch, what the model returned, on the last stage.
        busy_s, begun_s, ended_s: what the calls of its programs took together, when the first one
            began and when the last one ended, by `time.perf_counter`.
    """

    batches: Sequence[Sequence[torch.Tensor]]
    seeds: Sequence[int]
    sizes: Sequence[int]
    kinds: Sequence[PieceKind]
    numbers: Sequence[Sequence[float]]
    given: Sequence[Sequence[torch.Tensor]]
    weights: Sequence[float] = ()
    shares: Sequence[Sequence[torch.Tensor]] = ()
    scale: float = 1.0
    awaited: Callable[[], object] | None = None
    refused: bool = False
    losses: list[torch.Tensor] = field(default_factory=list)
    results: list[dict[int, torch.Tensor]] = field(default_factory=list)
    busy_s: float = 0.0
    begun_s: float = 0.0
    ended_s: float = 0.0

    def agree(self) -> None:
        """With all ranks that the batch is run."""
        awaited, self.awaited = self.awaited, None
        if awaited is not None:
            self.refused = True
            awaited()
            self.refused = False

    def called(self, begun_s: float, ended_s: float) -> None:
        """A program was, from then to then."""
        self.begun_s = self.begun_s or begun_s
        self.busy_s += ended_s - begun_s
        self.ended_s = ended_s

    def argument(self, index: int, number: int) -> torch.Tensor | float:
        """One of a microbatch."""
        for given in (self.batches[index], self.numbers[index]):
            if number < len(given):
                return given[number]
            number -= len(given)
        return self.shares[index][number]


class Executor:
    """Runs the stages of one rank, of one compiled graph.

    Stages of the rank hand their values over in memory. What concerns the rank's gradients as a
    whole, the sum of tied ones and the mean of a bucket, is done at the last action that asks for
    it.

    Args:
        actions: of the rank.
        fused: the programs to run, where they are not those of the pipeline itself.
        recorder: of programs that are replayed; None where they run as they are.

    Attributes:
        scale: what loss scaling multiplies the loss by before it is differentiated.
        by_data: the parameters, of all stages, that a step's gradients may not reach.
    """

    def __init__(
        self,
        pipeline: PipelineProgram,
        actions: Sequence[Action],
        state: RankState,
        microbatches: int,
        fused: PipelineProgram | None = None,
        recorder: Recorder | None = None,
    ):
        self.actions, self.state, self.microbatches = actions, state, microbatches
        self.scale = 1.0
        self._loss_dtype = pipeline.loss_dtype
        self.messages: dict[tuple[int, int | None, Phase], Message] = {
            (m.src, m.dst, m.phase): m for m in pipeline.messages
        }
        self.by_data = reached_by_data(pipeline)
        self.stages = {
            stage: BoundStage((fused or pipeline).stages[stage], state, self.by_data)
            for stage in state.stages
        }
        self.leaving = {
            stage: state.grads.departures(
                pipeline.stages[stage], late_gradients(pipeline, stage, state.stages)
            )
            for stage in self.stages
        }
        self._drops = {stage: pipeline.drops(stage, state.stages) for stage in state.stages}
        self._handed: dict[tuple[int, Kind], list[Message]] = defaultdict(list)
        for message in sorted(pipeline.messages, key=lambda m: m.dst):
            if {message.src, message.dst} <= self.stages.keys():
                self._handed[message.src, COMPUTE_OF[message.phase]].append(message)
        self.tied = TiedGradients(pipeline, state)
        self._graphs = Graphs(recorder, actions) if recorder is not None else None
        self._last = {action.kind: action for action in actions}
        self._told = [told(action) for action in actions]

    @property
    def draws(self) -> bool:
        """Whether a program has random ops."""
        return any(bound.draws for bound in self.stages.values())

    def refresh(self) -> None:
        """Make what was computed from buffers anew."""
        for bound in self.stages.values():
            bound.refresh()

    def run(self, job: Job, others: Mapping[PieceKind, Executor]) -> Run:
        """Execute every action in order. Call under `torch.no_grad()`.

        Args:
            others: kind of a microbatch -> the executor of the graph for it; this one included.
        """
        made = [others[kind] for kind in job.kinds]
        for bound in {stage for each in made for stage in each.stages.values()}:
            bound.settle()
        alive: dict[tuple[int, int], Values] = defaultdict(dict)
        arriving: dict[tuple[int, Kind, int], list[tuple[Message, Pending]]] = defaultdict(list)
        tangents: Sequence[torch.Tensor] | None = None
        log, start = self.state.log, None
        for action, text in zip(self.actions, self._told, strict=True):
            HERE.act(text)
            if tangents is None and not self._may_precede(action, job, made):
                tangents = self._begun(job, made)
            if log is not None:
                start = log.now()
            kind, stage, index = action.kind, action.stage, action.microbatch
            if kind.computes:
                assert index is not None
                values = alive[stage, index]
                for message, pending in arriving.pop((stage, kind, index), ()):
                    while not pending.ready():
                        yield
                    values.update(zip(message.names, pending.wait(), strict=True))
                    del pending  # it holds what has arrived
                    if log is not None:
                        start = log.waited(message, index, start)
                if kind is not Kind.F:
                    last = index == self.microbatches - 1
                    self.state.grads.begin(made[index].leaving[stage], kind, last)
                with named(action):
                    begun_s = perf_counter()
                    made[index]._compute(action, index, values, job, tangents)
                    job.called(begun_s, perf_counter())
                    made[index]._hand_over(stage, kind, index, alive)
            elif kind in _SENDS:
                assert index is not None
                with named(action):
                    made[index]._send(action, alive[stage, index])
            elif kind in _RECEIVES:
                assert index is not None
                arriving[stage, COMPUTE_OF[kind.phase], index].append(made[index]._receive(action))
                continue  # posted; it is over when somebody has waited for it
            else:
                yield from in_ranges(action, self._exchange(action))
            if log is not None:
                log.add(action, start, self.messages.get((stage, action.peer, kind.phase)))
        if tangents is None:
            self._begun(job, made)
        HERE.act(NOTHING)

    def _may_precede(self, action: Action, job: Job, made: Sequence[Executor]) -> bool:
        """Whether an action leaves all as it is, so that ranks may yet refuse the batch: what a
        forward makes for its own rank is let go of, and parameters are gathered as they are. All
        replicas do it at the same place, or wait there."""
        if job.awaited is None or self.state.log is not None:
            return False
        if action.kind is not Kind.F:
            return action.kind is Kind.UNSHARD
        return not any(each._graphs or each.stages[action.stage].updates for each in made)

    def _begun(self, job: Job, made: Sequence[Executor]) -> Sequence[torch.Tensor]:
        """From here on it runs; the tangents."""
        job.agree()
        self.tied.restart()
        for executor in dict.fromkeys(made):
            executor.begin_graphs()
        return self._tangents(job)

    def _tangents(self, job: Job) -> Sequence[torch.Tensor]:
        """Of the losses of the microbatches.

        Rounded after each factor, as autograd does in ``(loss / microbatches * scale).backward()``,
        or with a weight in the place of the division: other orders have other last bits. Loss
        scaling comes last, and wide: on its way it may be more than the loss's dtype holds.
        """
        if self._loss_dtype is None:
            return ()
        tangents = torch.ones(self.microbatches, dtype=self._loss_dtype) * job.scale
        if job.weights:
            wide = torch.promote_types(self._loss_dtype, torch.float32)
            weights = torch.tensor(job.weights, dtype=wide)
            tangents = (tangents.to(wide) * weights).to(self._loss_dtype)
        else:
            tangents = tangents / self.microbatches
        if self.scale != 1.0:
            tangents = (tangents.double() * self.scale).to(self._loss_dtype)
        return numbers_on(self.state.device, tangents.tolist(), self._loss_dtype)

    def _compute(
        self,
        action: Action,
        index: int,
        values: Values,
        job: Job,
        tangents: Sequence[torch.Tensor] | None,
    ) -> None:
        bound = self.stages[action.stage].parts[action.kind]
        arguments = bound.fixed.copy()
        for position, name in bound.values:
            arguments[position] = values[name]
        for position, leaf in bound.batch:
            arguments[position] = job.argument(index, leaf)
        if bound.tangent is not None:
            assert tangents is not None
            arguments[bound.tangent] = tangents[index]
        if bound.seed is not None:
            arguments[bound.seed] = job.seeds[index]
        for name in bound.drops:
            del values[name]
        try:
            made = self._made(action, bound, arguments, values, job)
        except (IndexError, RuntimeError) as error:
            raise self._explained(error, action, bound.program) from error
        for (role, name), value in zip(bound.results, made, strict=True):
            if role is Role.VALUE:
                values[name] = value
            elif role is Role.LOSS:
                job.losses.append(value.clone() if self._graphs else value)
            elif role is Role.RESULT:
                while len(job.results) <= index:
                    job.results.append({})
                job.results[index][int(name)] = value
            elif role is Role.BUFFER:
                self.state.buffers[name].copy_(value)

    def _made(
        self, action: Action, bound: Bound, arguments: list[Any], values: Values, job: Job
    ) -> Sequence[torch.Tensor]:
        """What a program makes: it runs, or is replayed."""
        graphs, index = self._graphs, action.microbatch
        assert index is not None
        leave = action.kind is not Kind.F and index == self.microbatches - 1
        if graphs is None or not graphs.recording or (leave and self.state.grads.closes):
            made: Sequence[torch.Tensor] = bound.program.module.forward(arguments)
            return made
        seed = 0 if bound.seed is None else job.seeds[index]
        made = graphs.compute(action, bound.program, arguments, bound.inputs, seed)
        for position, name in bound.values:
            if name in values:
                values[name] = arguments[position]  # what has arrived can go
        return made

    def begin_graphs(self) -> None:
        """Before a run: recorded programs read and add where they did."""
        if self._graphs is None:
            return
        bounds = [bound for stage in self.stages.values() for bound in stage.parts.values()]
        fixed = (each for bound in bounds for each in bound.fixed)
        self._graphs.begin(addresses(t for t in fixed if isinstance(t, torch.Tensor)))
        for bound in bounds:
            for port in bound.program.inputs if self._graphs.recording else ():
                if port.role is Role.SLOT:
                    self.state.grads.slots[str(port.key)].clear()

    def _explained(self, error: Exception, action: Action, program: Program) -> Exception:
        """An operator's error with its place; where a batch is to blame, as an error of its."""
        node = program.node_of(error)
        where = f"rank {self.state.rank}, {action}"
        if node is not None:
            module = f"module {module_of(node)!r}" if module_of(node) else "the model or loss_fn"
            where += f", {module} ({node.target})"
        if node is not None and str(node.target).startswith("pipecompile.require"):
            return BatchError(f"{where}: {error}")
        if isinstance(error, IndexError) or _OUT_OF_RANGE.search(str(error)):
            return BatchError(
                f"{where}: a token id, a label or another index in the batch is out of range for "
                f"{_table(node)}: {error}"
            )
        error.add_note(f"in {where}")
        return error

    # -- values between stages --------------------------------------------------------------

    def _hand_over(
        self, stage: int, kind: Kind, index: int, alive: dict[tuple[int, int], Values]
    ) -> None:
        """Give other stages of this rank what they will read of what was made."""
        for message in self._handed.get((stage, kind), ()):
            taken = self._take(message, SEND[message.phase], alive[stage, index])
            pairs = zip(taken, message.values, strict=True)
            conformed = [wire.conform(value, spec) for value, spec in pairs]
            alive[message.dst, index].update(zip(message.names, conformed, strict=True))

    def _take(self, message: Message, send: Kind, values: Values) -> list[torch.Tensor]:
        """The values of a message; what nothing else needs is dropped."""
        taken = [values[name] for name in message.names]
        for name in self._drops[message.src].get((send, message.dst), ()):
            del values[name]
        return [copied(value) for value in taken] if self._graphs else taken

    def _send(self, action: Action, values: Values) -> None:
        assert action.peer is not None
        message = self.messages[action.stage, action.peer, action.kind.phase]
        taken = self._take(message, action.kind, values)
        self.state.endpoint.send(message.src, message.dst, taken, message.values)

    def _receive(self, action: Action) -> tuple[Message, Pending]:
        assert action.peer is not None
        message = self.messages[action.peer, action.stage, action.kind.phase]
        return message, self.state.endpoint.receive(message.src, message.dst, message.values)

    # -- gradients and parameters between replicas ------------------------------------------

    def _exchange(self, action: Action) -> Run:
        kind, stage, grads = action.kind, action.stage, self.state.grads
        last = action is self._last[kind]
        if kind is Kind.SYNC_TIED and last:
            yield from self.tied.sync()
        elif kind in (Kind.REDUCE_B, Kind.REDUCE_W):
            yield from grads.collect()
        elif kind is Kind.REDUCE_GRAD:
            yield from grads.reduce(self.leaving[stage], last)
        elif kind is Kind.UNSHARD and self.state.shards is not None:
            self.state.shards.unshard(stage)


def _table(node: fx.Node | None) -> str:
    """What an operator's first operand is, where indices into it are refused."""
    if node is None or node.op != "call_function":
        return "its operand"
    if node.target is pieces.FORWARD:
        weight = node.args[1]
        assert isinstance(weight, fx.Node)
        return f"{weight.meta['val'].shape[0]} classes"
    first = node.args[0] if node.args else None
    value = first.meta.get("val") if isinstance(first, fx.Node) else None
    return f"shape {list(value.shape)}" if isinstance(value, torch.Tensor) else "its operand"


@with_room
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
