"""Peak memory of a rank: what it holds all the time, and what its actions hold at once.

The programs are walked operator by operator (`program_memory`). What one leaves in a microbatch's
environment stays until the step after which nothing needs it (`StageProgram.drops`).
"""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

import torch

from ..ir.actions import COMPUTE_OF, RECV, SEND, Action, Kind
from ..ir.program import PipelineProgram
from ..ir.shards import Departures, Entry
from .program_memory import Block, Effect, effect_of, leave

ALIGNMENT_BYTES = 64  # a cache line, and the widest vector load: where gradients start
SEGMENT_BYTES = 64 << 20  # how much of the gradients replicas exchange at once


@dataclass(frozen=True)
class Static:
    """Bytes that a rank holds all the time; ``copies`` are weights in the compute dtype, and the
    ``residue`` is what compression has not sent yet of gradients."""

    weights: int
    copies: int
    grads: int
    states: int
    buffers: int
    constants: int
    batch: int
    residue: int = 0

    @property
    def total(self) -> int:
        return sum(vars(self).values())


@dataclass(frozen=True)
class Traffic:
    """What replicas exchange where they divide gradients and parameters.

    Attributes:
        departures: in which parcels gradients leave.
        unshard_bytes: the most that is sent and received at once to make parameters whole.
        unshard_total: all of that.
        compressed_bytes: what the exchange of a rank takes where gradients are compressed.
    """

    departures: Departures = field(default_factory=Departures)
    unshard_bytes: int = 0
    unshard_total: int = 0
    compressed_bytes: int = 0

    @property
    def closing(self) -> list[Entry]:
        return [entry for entries in self.departures.closing.values() for entry in entries]


@dataclass(frozen=True)
class RankMemory:
    """Bytes of one rank through a step.

    Attributes:
        peak_bytes: the most at once.
        peak_at: the action that needs them ("OPTIM" for the optimizer's step).
        after_bytes: per action of the rank, what is held when it is done.
        device_bytes: of its device's own, where that counts; in what is needed, not in the peak.
    """

    static: Static
    peak_bytes: int
    peak_at: str
    after_bytes: tuple[int, ...]
    device_bytes: int = 0

    @property
    def needed_bytes(self) -> int:
        return self.peak_bytes + self.device_bytes


def rank_memory(
    program: PipelineProgram,
    actions: Sequence[Action],
    static: Static,
    dp: int = 1,
    optimizer_bytes: int = 0,
    traffic: Mapping[int, Traffic] = MappingProxyType({}),
) -> RankMemory:
    """Run one rank's actions on paper.

    Args:
        static: of all stages of the rank.
        optimizer_bytes: what the optimizer needs for a moment beyond its states.
        traffic: per stage of the rank, where replicas divide gradients or parameters.
    """
    last = max((action.microbatch or 0 for action in actions), default=0)
    stages = dict.fromkeys(action.stage for action in actions)
    walk = _Walk(program, {s: traffic.get(s, Traffic()) for s in stages}, last)
    peak, at = static.total + optimizer_bytes, "OPTIM"
    after = []
    for action in actions:
        if (most := static.total + walk.run(action, dp, static.grads)) >= peak:
            peak, at = most, str(action)
        after.append(static.total + walk.live)
    return RankMemory(static, peak, at, tuple(after))


def stage_holds(program: PipelineProgram, stage: int) -> dict[Kind, int]:
    """Bytes of one microbatch on a stage, after each of its programs.

    What it has sent has left, and what it will receive next is not there yet.
    """
    walk = _Walk(program, {stage: Traffic()}, 0)
    held: dict[Kind, int] = {}
    for kind in program.stages[stage].parts:
        for m in program.messages:
            if m.dst == stage and COMPUTE_OF[m.phase] is kind:
                walk.run(Action(stage, RECV[m.phase], 0, m.src), 1, 0)
        walk.run(Action(stage, kind, 0), 1, 0)
        for m in program.messages:
            if m.src == stage and COMPUTE_OF[m.phase] is kind:
                walk.run(Action(stage, SEND[m.phase], 0, m.dst), 1, 0)
        walk.deliver()
        held[kind] = walk.live
    return held


def bucket_bytes(specs: Iterable[tuple[int, torch.dtype]], parts: int) -> int:
    """Bytes of the buffers in which a rank adds up gradients of (elements, dtype)."""
    ends: dict[torch.dtype, int] = defaultdict(int)
    for count, dtype in specs:
        align = max(1, ALIGNMENT_BYTES // dtype.itemsize)
        ends[dtype] += -(-count // align) * align
    total = 0
    for dtype, end in ends.items():
        whole = max(1, ALIGNMENT_BYTES // dtype.itemsize) * parts
        total += -(-end // whole) * whole * dtype.itemsize
    return total


# -- one rank -------------------------------------------------------------------------------------

Environment = dict[str, int | None]
"""Of one stage and microbatch: value name -> the block in which it lies."""


class _Walk:
    """The environments of the stages and microbatches of one rank, as blocks of memory.

    Args:
        traffic: of each stage of the rank.
        last: the number of the last microbatch.
    """

    def __init__(self, program: PipelineProgram, traffic: Mapping[int, Traffic], last: int):
        self.traffic, self.last = traffic, last
        self.stages = {s: program.stages[s] for s in traffic}
        self.drops = {s: program.drops(s, traffic) for s in traffic}
        self.flying = 0
        self.messages = {(m.src, m.dst, m.phase): m for m in program.messages}
        self.environments: dict[tuple[int, int], Environment] = defaultdict(dict)
        self.arriving: dict[tuple[int, Kind, int], Environment] = defaultdict(dict)
        self.outbox: list[int | None] = []  # sent after the last computation
        self.sizes: dict[int, int] = {}
        self.refs: Counter[int] = Counter()
        self.live = 0
        self.numbers = itertools.count()
        # of all microbatches alike that find the same under way
        self.effects: dict[tuple[int, Kind, bool, int], Effect] = {}

    def run(self, action: Action, dp: int, grad_bytes: int) -> int:
        """Apply an action; returns the most bytes that are held at once meanwhile."""
        kind, stage, index = action.kind, action.stage, action.microbatch
        traffic = self.traffic[stage]
        if kind is Kind.UNSHARD:
            return self.live + traffic.unshard_bytes
        if kind is Kind.REDUCE_GRAD and traffic.departures.during:
            return self._drain(traffic)
        if kind is Kind.REDUCE_GRAD and traffic.compressed_bytes:
            return self.live + traffic.compressed_bytes
        if kind is Kind.REDUCE_GRAD:
            segment = min(grad_bytes, SEGMENT_BYTES)
            return self.live + segment + segment // dp
        if index is None or kind in (Kind.REDUCE_B, Kind.REDUCE_W):
            return self.live
        if kind.computes:
            sent, self.outbox = self.outbox, []
            most = self._compute(stage, kind, index)
            self.deliver(sent)  # it left meanwhile
            self._hand_over(stage, kind, index)
            return most
        assert action.peer is not None
        if kind in SEND.values():
            self.outbox += self._take(stage, kind, action.peer, index)
        else:
            message = self.messages[action.peer, stage, kind.phase]
            reader = COMPUTE_OF[kind.phase]
            for spec in message.values:
                self.arriving[stage, reader, index][spec.name] = self._new(spec.nbytes)
        return self.live

    def deliver(self, sent: list[int | None] | None = None) -> None:
        """Let go of what has left: by default of all that was sent."""
        if sent is None:
            sent, self.outbox = self.outbox, []
        for block in sent:
            self._release(block)

    def _compute(self, stage: int, kind: Kind, index: int) -> int:
        values = self.environments[stage, index]
        values.update(self.arriving.pop((stage, kind, index), {}))
        dropped = self.stages[stage].drops.get((kind.value, -1), ())
        effect = self._effect(stage, kind, index, values, dropped)
        most = self.live + effect.extra_bytes
        self.live += effect.flying_bytes - self.flying
        self.flying = effect.flying_bytes
        kept = {block for block in effect.made.values() if isinstance(block, int)}
        fresh = {block: self._new(effect.sizes[block]) for block in kept}
        made = {
            n: fresh[b] if isinstance(b, int) else values[b]
            for n, b in effect.made.items()
            if b is not None
        }
        self.refs.update(block for block in made.values() if block is not None)
        for name in dropped:
            self._release(values.pop(name))
        values.update(dict.fromkeys(effect.made) | made)
        for block in fresh.values():
            self._release(block)  # held by its maker until here
        return most

    def _hand_over(self, stage: int, kind: Kind, index: int) -> None:
        """What other stages of this rank read of what was made: the same memory."""
        if kind not in COMPUTE_OF.values():
            return
        for (src, dst, phase), message in self.messages.items():
            if src == stage and phase is kind.phase and dst in self.stages:
                blocks = self._take(stage, SEND[phase], dst, index)
                names = (spec.name for spec in message.values)
                self.arriving[dst, kind, index].update(zip(names, blocks, strict=True))

    def _take(self, stage: int, send: Kind, dst: int, index: int) -> list[int | None]:
        """One more holder for each value of a message; what nothing else needs loses its own."""
        values = self.environments[stage, index]
        blocks = [values[spec.name] for spec in self.messages[stage, dst, send.phase].values]
        self.refs.update(block for block in blocks if block is not None)
        for name in self.drops[stage].get((send.value, dst), ()):
            self._release(values.pop(name))
        return blocks

    def _drain(self, traffic: Traffic) -> int:
        """The gradients that waited for their tied parts leave; then nothing is under way."""
        most = self.live
        for entry in traffic.closing:
            self.live, self.flying, peak = leave(entry, self.live, self.flying)
            most = max(most, peak)
        self.live -= self.flying
        self.flying = 0
        return most

    def _effect(
        self, stage: int, kind: Kind, index: int, values: Environment, dropped: Iterable[str]
    ) -> Effect:
        traffic = self.traffic[stage]
        ends = bool(traffic.departures.last) and index == self.last
        key = (stage, kind, ends, self.flying)
        if key not in self.effects:
            names: dict[int, str] = {}
            for name, block in values.items():
                if block is not None:
                    names.setdefault(block, name)
            inputs = {name: None if b is None else names[b] for name, b in values.items()}
            sizes: dict[Block, int] = {name: self.sizes[block] for block, name in names.items()}
            leaving = traffic.departures.leaving(kind, ends)
            every = traffic.departures.every.get(kind, ())
            packed = {i for i, entries in enumerate(every) if entries}
            program = self.stages[stage].parts[kind]
            self.effects[key] = effect_of(
                program, dropped, inputs, sizes, leaving, self.flying, packed
            )
        return self.effects[key]

    def _new(self, size: int) -> int:
        block = next(self.numbers)
        self.sizes[block] = size
        self.refs[block] = 1
        self.live += size
        return block

    def _release(self, block: int | None) -> None:
        if block is None:
            return
        self.refs[block] -= 1
        if self.refs[block] == 0:
            self.live -= self.sizes.pop(block)
            del self.refs[block]
