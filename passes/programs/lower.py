"""A placed joint graph -> stage programs and the messages between them.

A value made in the forward of stage s reaches its readers like this:

===================  =======================================================================
reader               way
===================  =======================================================================
forward of s         [1] inside the program
forward of t > s     [2] message s → t in the forward phase
backward of s        [3] stashed by s
backward of t > s    [4] message s → t in the forward phase, stashed by t
backward of t < s    [5] stashed by s, message s → t in the backward phase
===================  =======================================================================

A backward value goes to the backward of the same stage [1] or of a lower one [5]. Where the weight
gradients have a program of their own, it gets what the backward made from that [6]. Free values
(`locality`) are copied into each program that reads them; constants are made once per stage.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

from torch import fx

from ...compiler.ir.actions import COMPUTE, Kind
from ...compiler.ir.errors import PartitionError, VerificationError
from ...compiler.ir.graph import (
    JointGraph,
    Phase,
    nbytes,
    phase_of,
    root_bytes,
    storage_root,
    viewed,
)
from ...compiler.ir.locality import Locality, awaited, is_gradient_sum
from ...compiler.ir.program import (
    Message,
    PipelineProgram,
    Port,
    Program,
    Role,
    StageProgram,
    Step,
    TiedGradient,
    ValueSpec,
)
from .emit import Emitter

Spot = tuple[Kind, int]
"""Where a value is needed or made: a part and a stage."""


def lower(
    graph: JointGraph,
    locality: Locality,
    stage: dict[fx.Node, int],
    n_stages: int,
    tied_grads: str = "per_microbatch",
    split_backward: bool = False,
    keep_views: bool = True,
) -> PipelineProgram:
    """Cut a placed graph into one program set per stage.

    Args:
        stage: the stage of every staged node.
        tied_grads: "per_microbatch" adds the gradients of a weight that several stages read in
            autograd's own order, by sending them along with every microbatch; "per_step" keeps
            a partial sum on each stage and adds these once per step.
        split_backward: make a program of its own (W) of what a stage's backward computes that
            no other stage waits for: most weight gradients.
        keep_views: let the backward read the forward's views of parameters; otherwise it makes
            its own, and keeps no parameter alive.
    """
    made = _Lowering(graph, locality, stage, n_stages, tied_grads, split_backward, keep_views)
    return made.run()


class _Lowering:
    def __init__(
        self,
        graph: JointGraph,
        locality: Locality,
        stage: dict[fx.Node, int],
        n_stages: int,
        tied_grads: str,
        split_backward: bool,
        keep_views: bool,
    ):
        self.graph, self.locality, self.stage, self.n_stages = graph, locality, stage, n_stages
        self.keep_views = keep_views
        self.order = {node: i for i, node in enumerate(graph.graph.nodes)}
        self.names = {node.name: node for node in self.order}
        self.emitter = Emitter(graph, locality)
        self.parts = {
            name: self._parts(node) if tied_grads == "per_step" else [node]
            for name, node in graph.grads.items()
        }
        self.severed = {
            node
            for name, node in graph.grads.items()
            for node in self._between(node, set(self.parts[name]))
        }
        self.weight = self._weight_nodes() if split_backward else frozenset()
        # what must exist where: value -> spots; and per spot the extra results it has to give
        self.readers: dict[fx.Node, set[Spot]] = defaultdict(set)
        self.messages: dict[tuple[int, int, Phase], set[fx.Node]] = defaultdict(set)
        self.stash: dict[int, set[fx.Node]] = defaultdict(set)
        self.carry: dict[int, set[fx.Node]] = defaultdict(set)

    def run(self) -> PipelineProgram:
        parts = list(COMPUTE) if self.graph.trains else [Kind.F]
        self.body: dict[Spot, list[fx.Node]] = {
            (part, s): [] for part in parts for s in range(self.n_stages)
        }
        for node in self.locality.staged:
            if node not in self.severed:
                self.body[self._made(node)].append(node)
        for spot in self.body:
            self._close(spot)
        self._route()
        self._check_mutations()
        stages = tuple(self._stage(s) for s in range(self.n_stages))
        loss = self.graph.loss
        return PipelineProgram(
            stages,
            tuple(self._message(*key) for key in sorted(self.messages)),
            tuple(self._tied(stages)),
            self.n_stages - 1 if loss is None else self.stage.get(loss, self.n_stages - 1),
            None if loss is None else loss.meta["val"].dtype,
            frozenset(node.name for node in self.weight),
        )

    def _made(self, node: fx.Node) -> Spot:
        if phase_of(node) is Phase.FORWARD:
            return Kind.F, self.stage[node]
        return Kind.W if node in self.weight else Kind.B, self.stage[node]

    def _weight_nodes(self) -> frozenset[fx.Node]:
        """Backward nodes that nothing on another stage depends on, where anything does."""
        backward = [
            node
            for node in self.locality.staged
            if phase_of(node) is Phase.BACKWARD and node not in self.severed
        ]
        urgent = awaited(backward, {n: s for n, s in self.stage.items() if n not in self.severed})
        sending = {self.stage[node] for node in urgent}
        return frozenset(n for n in backward if n not in urgent and self.stage[n] in sending)

    # -- who needs what ---------------------------------------------------------------------

    def _parts(self, grad: fx.Node) -> list[fx.Node]:
        """The addends of a gradient that lie on different stages."""
        if grad in self.stage and is_gradient_sum(grad):
            operands = [a for a in grad.args if isinstance(a, fx.Node)]
            parts = [part for operand in operands for part in self._parts(operand)]
            if len({self.stage[part] for part in parts}) > 1 and len(grad.users) == 1:
                return parts
        return [grad]

    def _between(self, grad: fx.Node, parts: set[fx.Node]) -> list[fx.Node]:
        """The sums from a gradient down to its parts, which are made after the step instead."""
        if grad in parts:
            return []
        below = (self._between(operand, parts) for operand in grad.all_input_nodes)
        return [grad, *(node for nodes in below for node in nodes)]

    def _close(self, spot: Spot) -> None:
        """Add to a spot the free nodes that it reads, and note which staged values it lacks."""
        included = set(self.body[spot])
        pending = [a for node in included for a in node.all_input_nodes]
        pending.extend(self._extra(spot))
        seen = set(included)
        while pending:
            node = pending.pop()
            if node in seen:
                continue
            seen.add(node)
            if node in self.stage:
                self.readers[node].add(spot)
            elif self._replicated(node):
                included.add(node)
                pending.extend(node.all_input_nodes)
        self.body[spot] = self._sorted(included)

    def _replicated(self, node: fx.Node) -> bool:
        """Free and computed: not an argument of the program, nor a constant."""
        return (
            node in self.locality.free
            and node not in self.locality.constant
            and node.op != "placeholder"
        )

    def _extra(self, spot: Spot) -> Iterable[fx.Node]:
        """Results of the graph that this spot must return."""
        part, s = spot
        if part is not Kind.F:
            return
        if s == self.n_stages - 1:
            yield from self.graph.results
            if self.graph.loss is not None and self.graph.loss not in self.stage:
                yield self.graph.loss
        yield from (node for _, node in self._mutations(s))

    def _mutations(self, s: int) -> list[tuple[str, fx.Node]]:
        """The buffers whose new values stage s writes."""
        return [
            (name, node)
            for name, node in self.graph.mutations.items()
            if (s in self._writers(name) if node not in self.stage else self.stage[node] == s)
        ]

    def _writers(self, name: str) -> set[int]:
        """The stages that update a buffer by what each of them can make itself."""
        return self._readers(name) or {0}

    def _readers(self, name: str) -> set[int]:
        """Where a buffer is read: on the stages of the staged nodes behind it."""
        found: set[int] = set()
        pending = [self.graph.buffers[name]] if name in self.graph.buffers else []
        while pending:
            for user in pending.pop().users:
                if user in self.stage:
                    found.add(self.stage[user])
                elif user.op != "output":
                    pending.append(user)
        return found

    def _check_mutations(self) -> None:
        for name, node in self.graph.mutations.items():
            elsewhere = self._readers(name) - {self.stage[node]} if node in self.stage else ()
            if elsewhere:
                raise PartitionError(
                    f"buffer {name!r} is updated on stage {self.stage[node]} and read on stage "
                    f"{min(elsewhere)}: use fewer stages, or give each use a buffer of its own"
                )

    def _route(self) -> None:
        for value, spots in self.readers.items():
            for spot in spots:
                self._route_one(value, self._made(value), spot)

    def _route_one(self, value: fx.Node, made: Spot, spot: Spot) -> None:
        (part, s), (reads, t) = made, spot
        if part is Kind.F and reads is Kind.F:
            self._send(value, s, t, Phase.FORWARD)  # [2]
        elif part is Kind.F and s <= t:
            if s < t:
                self._send(value, s, t, Phase.FORWARD)  # [4]
            self.stash[t].add(value)  # [3]
        elif part is Kind.F:
            self._send(value, s, t, Phase.BACKWARD)  # [5]
            self.stash[s].add(value)
        elif part is Kind.B and reads is Kind.W and s == t:
            self.carry[s].add(value)  # [6]
        elif part is Kind.B and reads is not Kind.F:
            self._send(value, s, t, Phase.BACKWARD)  # [5]
        else:
            raise VerificationError(f"{value} is made in {part} and read in {reads}")

    def _send(self, value: fx.Node, s: int, t: int, phase: Phase) -> None:
        if not (s < t if phase is Phase.FORWARD else s > t):
            raise VerificationError(f"{value} goes from {phase} of stage {s} to {t}")
        self.messages[s, t, phase].add(value)

    # -- programs ---------------------------------------------------------------------------

    def _stage(self, s: int) -> StageProgram:
        shared = {part: self._free_stash(part, s) for part in (Kind.B, Kind.W)}
        self.stash[s] |= shared[Kind.B] | shared[Kind.W]
        parts = [part for part in COMPUTE if self._needs_program(part, s)]
        made = {part: self._program((part, s), shared.get(part, set())) for part in parts}
        programs = list(made.values())
        used = {port for p in programs for port in p.inputs}
        constants = self._constants({str(p.key) for p in used if p.role is Role.CONSTANT})
        used |= set(constants.inputs)
        buffers = {str(p.key) for p in used if p.role is Role.BUFFER}
        buffers |= {name for name, _ in self._mutations(s)}
        grads = [name for name, ns in self.parts.items() if any(self.stage[n] == s for n in ns)]
        order = {name: i for i, name in enumerate(self.graph.params)}
        copies = {str(p.key) for p in used if p.role is Role.COPY}
        params = {str(p.key) for p in used if p.role is Role.PARAM} | copies | set(grads)
        return StageProgram(
            s,
            constants,
            made[Kind.F],
            made.get(Kind.B),
            made.get(Kind.W),
            tuple(sorted(params, key=order.__getitem__)),
            tuple(sorted(buffers)),
            tuple(sorted(grads, key=order.__getitem__)),
            {n: self.graph.copies[n].meta["val"].dtype for n in order if n in copies},
            self._drops(s, made),
            self._stash_bytes(s),
            root_bytes(self.carry[s]),
            root_bytes(self.names[str(port.key)] for port in constants.outputs),
        )

    def _needs_program(self, part: Kind, s: int) -> bool:
        """Every stage has F, and B if it trains; W only where it has something to do."""
        return (part, s) in self.body and (part is not Kind.W or bool(self.body[part, s]))

    def _stash_bytes(self, s: int) -> int:
        """Memory of one microbatch's stash; views of arguments and constants cost nothing."""
        made = set(self.body[Kind.F, s])
        roots: set[fx.Node] = set()
        for node in self.stash[s]:
            while node in made and (source := viewed(node)) is not None:
                node = source
            if node not in self.emitter.ports and node not in self.locality.constant:
                roots.add(node)
        return sum(nbytes(root) for root in roots)

    def _free_stash(self, part: Kind, s: int) -> set[fx.Node]:
        """Free values that the forward and a later part of a stage use: kept, not made twice."""
        later = self.body.get((part, s), [])
        forward = {n for n in self.body[Kind.F, s] if n not in self.stage}
        both = {n for n in later if n in forward}
        if not self.keep_views:
            both = {n for n in both if storage_root(n) not in self.graph.owners}
        # only those that something not itself kept reads
        return {n for n in both if any(u in later and u not in both for u in n.users)}

    def _program(self, spot: Spot, given: set[fx.Node]) -> Program:
        """The program of a spot; ``given`` are free values that come from the stash."""
        part, s = spot
        nodes = [n for n in self.body[spot] if n not in given]
        if given:
            nodes = self._needed(nodes)
        outputs = [(Port(Role.VALUE, n.name), n) for n in self._sorted(self._kept(spot))]
        slots: dict[fx.Node, list[str]] = defaultdict(list)
        if part is Kind.F:
            if self.graph.loss is not None and self._loss_here(s):
                outputs.append((Port(Role.LOSS), self.graph.loss))
            if s == self.n_stages - 1:
                results = enumerate(self.graph.results)
                outputs += [(Port(Role.RESULT, i), node) for i, node in results]
            outputs += [(Port(Role.BUFFER, name), node) for name, node in self._mutations(s)]
        else:
            for name, addends in self.parts.items():
                for addend in addends:
                    slots[addend].append(name)
        return self.emitter.program(nodes, outputs, slots)

    def _loss_here(self, s: int) -> bool:
        assert self.graph.loss is not None
        return self.stage.get(self.graph.loss, self.n_stages - 1) == s

    def _needed(self, nodes: list[fx.Node]) -> list[fx.Node]:
        """Without the free nodes that nothing in the program reads any more."""
        kept: set[fx.Node] = set()
        for node in reversed(nodes):
            if node in self.stage or any(user in kept for user in node.users):
                kept.add(node)
        return [node for node in nodes if node in kept]

    def _kept(self, spot: Spot) -> set[fx.Node]:
        """Values made in this program that outlive it: sent, or needed by a later part."""
        part, s = spot
        wanted = set(self.stash[s]) if part is Kind.F else set(self.carry[s])
        for (src, _, sent), values in self.messages.items():
            if src == s and sent is part.phase:
                wanted |= values
        return wanted & set(self.body[spot])

    def _constants(self, names: set[str]) -> Program:
        wanted = self._sorted(self.names[name] for name in names)
        included: set[fx.Node] = set()
        pending = list(wanted)
        while pending:
            node = pending.pop()
            if node.op != "placeholder" and node not in included:
                included.add(node)
                pending.extend(node.all_input_nodes)
        return self.emitter.program(
            self._sorted(included), [(Port(Role.CONSTANT, n.name), n) for n in wanted], {}
        )

    def _sorted(self, nodes: Iterable[fx.Node]) -> list[fx.Node]:
        return sorted(nodes, key=self.order.__getitem__)

    # -- what the runtime needs to know -----------------------------------------------------

    def _message(self, src: int, dst: int, phase: Phase) -> Message:
        values = self._sorted(self.messages[src, dst, phase])
        return Message(src, dst, phase, tuple(_spec(value) for value in values))

    def _drops(self, s: int, made: dict[Kind, Program]) -> dict[Step, tuple[str, ...]]:
        """For every value in a microbatch's environment, the step after which nothing needs it."""
        last: dict[str, Step] = {}
        for step, names in self._reads(s, made):
            for name in names:
                last[name] = step
        drops: dict[Step, list[str]] = defaultdict(list)
        for name, step in last.items():
            drops[step].append(name)
        return {step: tuple(names) for step, names in drops.items()}

    def _reads(self, s: int, made: dict[Kind, Program]) -> Iterable[tuple[Step, list[str]]]:
        sent_after = {Kind.F: Phase.FORWARD, Kind.B: Phase.BACKWARD}
        for part, program in made.items():
            yield (part, -1), [str(p.key) for p in program.inputs if p.role is Role.VALUE]
            for (src, dst, phase), values in sorted(self.messages.items(), key=lambda x: x[0]):
                if src == s and phase is sent_after.get(part):
                    yield (f"SEND_{part}", dst), [value.name for value in values]

    def _tied(self, stages: tuple[StageProgram, ...]) -> Iterable[TiedGradient]:
        for name, nodes in self.parts.items():
            parts = tuple(sorted({self.stage[node] for node in nodes}))
            holders = tuple(p.stage for p in stages if name in p.params)
            if len(holders) > 1:
                yield TiedGradient(name, parts[0], parts, holders)


def _spec(node: fx.Node) -> ValueSpec:
    value = node.meta["val"]
    return ValueSpec(node.name, tuple(value.shape), tuple(value.stride()), value.dtype)
