"""What the runtime executes: per stage a forward and a backward program, and who sends what.

A program is a torch.fx GraphModule in the boxed convention (one list of arguments, emptied at
the start), so that a value is freed as soon as the last operator that reads it has run.

torch's lazy graph modules have no public name; their import is here. Writing and compiling Python
is a fifth of compiling a model, and most programs never run: they are another rank's, or are only
timed node by node.
"""

from __future__ import annotations

import re
import traceback
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import cached_property
from typing import Any

import torch
from torch import fx, nn
from torch.fx._lazy_graph_module import _LazyGraphModule

from .actions import SEND, Kind, Phase
from .zero import NOTHING, Kept


class Role(StrEnum):
    """Where an argument of a program comes from, or where a result goes."""

    PARAM = "param"  # key: FQN
    COPY = "copy"  # key: FQN of a parameter; the copy of it in the compute dtype
    BUFFER = "buffer"  # key: FQN; as a result: its new value
    BATCH = "batch"  # key: index of the batch leaf
    CONSTANT = "constant"  # key: value name; made once by the stage's constants program
    VALUE = "value"  # key: value name; lives in the microbatch's environment
    SLOT = "slot"  # key: FQN of the parameter whose gradient adds up there
    TANGENT = "tangent"  # d(total loss)/d(microbatch loss)
    GROUP = "group"  # key: number of a group of parameters, which the program makes whole
    SEED = "seed"  # an int for the random ops of this microbatch
    LOSS = "loss"
    RESULT = "result"  # key: position among what the model returns


Key = str | int


@dataclass(frozen=True)
class Port:
    """One argument or result of a program."""

    role: Role
    key: Key = ""

    def __str__(self) -> str:
        return f"{self.role}({self.key})" if self.key != "" else str(self.role)


def on_demand(root: nn.Module, graph: fx.Graph) -> fx.GraphModule:
    """A graph module that becomes Python when it is first called or shown."""
    return _LazyGraphModule(root, graph)


@dataclass(frozen=True)
class Program:
    """A boxed graph module with its arguments and results in order."""

    module: fx.GraphModule
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]

    def prepare(self) -> None:
        """Write and compile its Python now, not in the midst of its first run."""
        _LazyGraphModule.force_recompile(self.module)

    def node_of(self, error: BaseException) -> fx.Node | None:
        """The node whose line raised an error: each has one, which begins with its name."""
        nodes: dict[str, fx.Node] = {node.name: node for node in self.module.graph.nodes}
        for frame in traceback.extract_tb(error.__traceback__):
            name = (frame.line or "").partition("=")[0].strip()
            if frame.filename.startswith("<") and name in nodes:
                return nodes[name]
        return None

    def text(self) -> str:
        """The program as Python, under a comment that names its arguments and results."""
        names = [n.name for n in self.module.graph.find_nodes(op="placeholder")]
        lines = [f"# in   {n}: {p}" for n, p in zip(names, self.inputs, strict=True)]
        lines += [f"# out  {port}" for port in self.outputs]
        return "\n".join(lines) + "\n" + self.module.code.strip() + "\n"


FUSION = "fusion_"
"""How the modules begin that programs call to have many operators done as one (`programs.fusions`);
boxed like programs, and equal where names are."""

ANY_STRIDES = "any_strides"
"""``meta`` of a fusion's results: nobody minds their strides, as they are only added to sums."""


def fusions_of(program: Program) -> dict[str, fx.GraphModule]:
    """The fusions that a program calls, by name, where they are not compiled."""
    children = program.module.named_children()
    return {n: m for n, m in children if n.startswith(FUSION) and isinstance(m, fx.GraphModule)}


@dataclass(frozen=True)
class ValueSpec:
    """What the receiver of a value must know to make room for it."""

    name: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass(frozen=True)
class Message:
    """The values that one stage sends to another after its forward or backward of a microbatch."""

    src: int
    dst: int
    phase: Phase
    values: tuple[ValueSpec, ...]

    @property
    def nbytes(self) -> int:
        return sum(value.nbytes for value in self.values)

    @cached_property
    def names(self) -> tuple[str, ...]:
        return tuple(value.name for value in self.values)


Step = tuple[str, int]
"""(a computing `Kind`, -1), ("SEND_F", dst) or ("SEND_B", dst): a point in a microbatch's life."""


Group = tuple[Port, ...]
"""Parameters, and copies of them, that a program makes whole together."""


@dataclass(frozen=True)
class StageProgram:
    """All that one stage runs and holds.

    Attributes:
        constants: made once, when the programs are loaded; results are CONSTANT ports.
        backward: None in an evaluation program.
        weight: the part of the backward that no other stage waits for, where it is split off.
        params, buffers: FQNs that this stage reads.
        copies: FQN -> dtype of the parameters that it reads a copy of; among ``params`` too.
        grads: FQNs whose gradients this stage adds up, in parameter order.
        drops: step -> names of the values that nothing needs after it, where each stage has a rank
            of its own (else `PipelineProgram.drops`).
        stash_bytes: what one microbatch keeps between its forward and its backward.
        carry_bytes: what it keeps besides between backward and weight.
        constant_bytes: what the constants take.
        groups: what GROUP ports stand for, where replicas divide the parameters.
        kept: what its rank keeps whole over a step, of what replicas divide.
    """

    stage: int
    constants: Program
    forward: Program
    backward: Program | None
    weight: Program | None
    params: tuple[str, ...]
    buffers: tuple[str, ...]
    grads: tuple[str, ...]
    copies: dict[str, torch.dtype] = field(default_factory=dict)
    drops: dict[Step, tuple[str, ...]] = field(default_factory=dict)
    stash_bytes: int = 0
    carry_bytes: int = 0
    constant_bytes: int = 0
    groups: tuple[Group, ...] = ()
    kept: Kept = NOTHING

    @property
    def direct(self) -> set[str]:
        """Parameters that a program reads themselves, and not a copy of them."""
        ports = {port for program in self.parts.values() for port in program.inputs}
        ports |= {port for group in self.groups for port in group}
        return {str(port.key) for port in ports if port.role is Role.PARAM}

    @property
    def parts(self) -> dict[Kind, Program]:
        """The programs that a microbatch runs, in order."""
        given = {Kind.F: self.forward, Kind.B: self.backward, Kind.W: self.weight}
        return {kind: program for kind, program in given.items() if program is not None}

    def with_parts(self, parts: Mapping[Kind, Program]) -> StageProgram:
        """With these programs in the place of its own."""
        return replace(
            self, forward=parts[Kind.F], backward=parts.get(Kind.B), weight=parts.get(Kind.W)
        )


@dataclass(frozen=True)
class TiedGradient:
    """A parameter that several stages hold.

    The stages in ``parts`` each add up a part of its gradient; ``owner`` sums the parts once
    per step (where it alone adds up, there is nothing to sum) and gives the total to the rest.
    """

    name: str
    owner: int
    parts: tuple[int, ...]
    holders: tuple[int, ...]


@dataclass(frozen=True)
class PipelineProgram:
    """The stage programs of one graph, with the messages between them.

    Attributes:
        weight_nodes: names of the joint graph's nodes that are in weight programs.
    """

    stages: tuple[StageProgram, ...]
    messages: tuple[Message, ...]
    tied: tuple[TiedGradient, ...]
    loss_stage: int
    loss_dtype: torch.dtype | None
    weight_nodes: frozenset[str] = frozenset()

    @property
    def trains(self) -> bool:
        return self.stages[0].backward is not None

    @property
    def copied_alone(self) -> dict[str, torch.dtype]:
        """Parameters of which every stage reads the copy alone -> its dtype."""
        copies = {name: dtype for stage in self.stages for name, dtype in stage.copies.items()}
        direct = {name for stage in self.stages for name in stage.direct}
        return {name: dtype for name, dtype in copies.items() if name not in direct}

    def keeping(self, kept: Sequence[Kept]) -> PipelineProgram:
        """With what the rank of each stage keeps whole over a step; nothing for an empty list."""
        pairs = zip(self.stages, kept or [NOTHING] * len(self.stages), strict=True)
        return replace(self, stages=tuple(replace(stage, kept=each) for stage, each in pairs))

    def drops(self, stage: int, mates: Collection[int]) -> dict[Step, tuple[str, ...]]:
        """What a stage drops after each step, on a rank that holds others too.

        What these read is handed to them right after the computation, before anything is sent.

        Args:
            mates: the stages of the rank.
        """
        found: dict[Step, tuple[str, ...]] = {}
        for step, names in self.stages[stage].drops.items():
            kind, dst = step
            for name in names:
                later = self._sent(stage, kind, name, mates) if dst in mates else []
                last = (kind, max(later)) if later else step
                found[last] = (*found.get(last, ()), name)
        return found

    def _sent(self, stage: int, kind: str, name: str, mates: Collection[int]) -> list[int]:
        """The stages of other ranks that a value is sent to."""
        return [
            m.dst
            for m in self.messages
            if m.src == stage
            and m.dst not in mates
            and SEND[m.phase] == kind
            and any(value.name == name for value in m.values)
        ]

    @property
    def routes(self) -> set[tuple[int, int]]:
        """The pairs of stages (from, to) between which anything is sent."""
        routes = {(message.src, message.dst) for message in self.messages}
        for tied in self.tied:
            routes |= {(part, tied.owner) for part in tied.parts if part != tied.owner}
            routes |= {(tied.owner, holder) for holder in tied.holders if holder != tied.owner}
        return routes


class BoxedCodeGen(fx.graph.CodeGen):
    """Generates ``forward(self, boxed)``: one list in, emptied before the first operator."""

    def gen_fn_def(self, free_vars: list[str], maybe_return_annotation: str, **options: Any) -> str:
        names = [v.split(":")[0].split("=")[0].strip() for v in free_vars if v != "self"]
        unpack = f"\n    {', '.join(names)}, = boxed; boxed.clear()" if names else ""
        return f"def {self._func_name}(self, boxed):{unpack}"


_CALL = re.compile(rf"^(\w+) = self\.({FUSION}\w+)\((.*?)\)(?:;  (.*))?$")


def hand_over(body: list[str]) -> list[str]:
    """Generated code that hands boxed arguments to fusions, and lets go of those that it reads last
    before the call, not after it."""
    lines = []
    for line in "".join(body).splitlines():
        found = _CALL.match(line)
        if found is None:
            lines.append(line + "\n")
            continue
        name, fusion, given, freed = found.groups()
        lines.append(f"boxed = [{given}]; {freed or ''}\n{name} = self.{fusion}(boxed)\n")
    return lines
