"""What is ready to run: compiled graphs with what runs them, and the graphs of one batch."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..compiler.answers.guards import unlike
from ..compiler.capture.batch import BatchSpec
from ..compiler.driver.compiled import Compiled
from ..compiler.ir import ops
from ..compiler.ir.errors import BatchError
from .batch_loss import BatchLoss
from .executor import Executor, PieceKind
from .loader import Step
from .monitor.meter import Amounts, amounts_of
from .state.buffers import BufferUse


@dataclass(frozen=True)
class Loaded:
    """A compiled graph, and per rank of this process what runs it.

    Attributes:
        buffers: what it does with buffers.
        stale: those that other graphs have updated since its constants were made.
    """

    compiled: Compiled
    executors: Mapping[int, Executor]
    buffers: BufferUse
    stale: set[str]

    def refresh(self) -> None:
        """Make its constants anew."""
        self.stale.clear()
        for executor in self.executors.values():
            executor.refresh()


@dataclass(frozen=True)
class Ready:
    """What runs a batch.

    Attributes:
        graphs: kind of a microbatch -> the graph for it, the one with the most rows first.
        loss: of the batch.
        specs: of microbatches of each kind.
        step: how it is run.
    """

    graphs: Mapping[PieceKind, Loaded]
    loss: BatchLoss
    specs: Sequence[BatchSpec]
    step: Step

    @property
    def first(self) -> Loaded:
        return next(iter(self.graphs.values()))

    @property
    def amounts(self) -> Amounts:
        """Of all replicas, without microbatches that have no rows."""
        step, counts = self.step, Counter[PieceKind]()
        for sizes, kinds in zip(step.sizes, step.kinds, strict=True):
            counts.update(kind for n, kind in zip(sizes, kinds, strict=True) if n)
        plans = ((self.graphs[kind].compiled.plan, count) for kind, count in counts.items())
        return amounts_of(sum(map(sum, step.sizes)), plans)

    def executors(self) -> Iterator[Executor]:
        """Of all graphs, on the ranks of this process."""
        for loaded in self.graphs.values():
            yield from loaded.executors.values()


def check_together(graphs: Mapping[PieceKind, Compiled]) -> None:
    """Raises BatchError if the graphs for microbatches of some kinds cannot share a step."""
    (first, one), *others = graphs.items()
    for kind, other in others:
        if _order(other) == _order(one):
            continue
        if kind[:2] == first[:2]:
            heard = zip(one.guards.heard, other.guards.heard, strict=False)
            where, mine, theirs = next((w, a, b) for (w, a), (_, b) in heard if a != b)
            raise BatchError(unlike(where, ("one microbatch", mine), ("another", theirs)))
        sized = kind.shape == first.shape
        which = f"{kind.rows} rows" if sized else "one length"
        raise BatchError(
            f"microbatches of {which} run other operators than those of "
            f"{first.rows if sized else 'another'}, with other "
            "messages or gradients, and cannot share a step with them: give batches whose rows "
            "microbatches= × dp= divides, and replicas, or pieces of cut=, the same lengths"
        )


def _order(compiled: Compiled) -> tuple[Any, ...]:
    """What ranks do in lockstep while a batch runs: actions, and what is exchanged in programs."""
    stages = compiled.program.stages
    within = [
        (stage.stage, kind, str(node.args[0]), node.target.__name__)
        for stage in stages
        for kind, program in stage.parts.items()
        for node in program.module.graph.nodes
        if node.target in (*ops.ADDING, ops.gather, ops.unshard)
    ]
    held = [(stage.params, stage.groups, stage.grads) for stage in stages]
    return compiled.schedule, compiled.program.tied, within, held


@contextlib.contextmanager
def kept_generators(ready: Ready) -> Iterator[None]:
    """The user's own random streams go on as if nothing had been drawn."""
    devices = {each.state.device for each in ready.executors() if each.draws}
    kept = [(ops.generator_of(d), ops.generator_of(d).get_state()) for d in devices]
    try:
        yield
    finally:
        for generator, state in kept:
            generator.set_state(state)
