"""Programs that are recorded as CUDA graphs: which can be, and what they hold.

A microbatch in flight has memory that no other one has, for all that its programs read and leave.
It is never given back. What is alive within a program is scratch, which all recordings of a rank
share.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from ..ir import ops
from ..ir.actions import Action, slots_of
from ..ir.graph import tensors
from ..ir.program import PipelineProgram, Program, Role, StageProgram
from ..ir.region import work_of
from .program_memory import effect_of

_INDEXING = ("aten.index.Tensor", "aten.index_put", "aten._unsafe_index")
"""By numbers, or by a mask, of which they first find where it is."""
_TOLD = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)


def obstacle(program: PipelineProgram, zero: int) -> str:
    """Why programs cannot be recorded; "" if they can."""
    if zero > 1:
        return f"replicas exchange while programs run with zero={zero}"
    parts = [part for stage in program.stages for part in stage.parts.values()]
    return next(filter(None, (_obstacle(part, zero) for part in parts)), "")


def _obstacle(program: Program, zero: int) -> str:
    nodes = program.module.graph.nodes
    for node, port in zip(nodes, program.inputs, strict=False):
        if port.role is Role.BATCH and not isinstance(node.meta.get("val"), torch.Tensor):
            return "a number of the batch is an argument, which would be recorded with its value"
    for node in nodes:
        if work_of(node) is not None:
            return f"{node.meta.get('module') or 'a submodule'} runs eagerly, in Python"
        if _is_told(node):
            return f"{node.target} makes as much as values say"
        # its last backward is not recorded, and keeps seeds elsewhere than a recorded forward
        if zero and node.target is ops.seeded and "attention" in str(node.args[2]):
            return f"attention has dropout, with zero={zero}"
    return ""


def _is_told(node: fx.Node) -> bool:
    """Whether the host has to know values before it goes on."""
    if str(node.target).startswith(_INDEXING):
        indices: Any = node.args[1]
        found = [index.meta["val"].dtype for index in indices if index is not None]
        return any(dtype in (torch.bool, torch.uint8) for dtype in found)
    return any(tag in getattr(node.target, "tags", ()) for tag in _TOLD)


def graphed_bytes(program: PipelineProgram, actions: Sequence[Action]) -> int:
    """What recorded programs of a rank hold at most, beyond what it holds all the time."""
    held, scratch = 0, 0
    for stage in dict.fromkeys(action.stage for action in actions):
        code = program.stages[stage]
        made = {kind: _made(part) for kind, part in code.parts.items()}
        brought = sum(m.nbytes for m in program.messages if m.dst == stage)
        sent = sum(m.nbytes for m in program.messages if m.src == stage)
        mine = brought + _batch_bytes(code) + sum(kept for kept, _ in made.values())
        held += mine * (1 + max(slots_of(actions, stage).values(), default=-1)) + sent
        scratch = max([scratch, *(extra - kept for kept, extra in made.values())])
    return held + scratch


def _made(program: Program) -> tuple[int, int]:
    """Bytes of what a program leaves, and the most that it holds at once with it."""
    given = {str(p.key): None for p in program.inputs if p.role is Role.VALUE}
    effect = effect_of(program, (), given, {})
    blocks = {block for block in effect.made.values() if block is not None}
    return sum(effect.sizes[block] for block in blocks), effect.extra_bytes


def _batch_bytes(code: StageProgram) -> int:
    """Of what a stage's programs read of a microbatch."""
    read = {
        port.key: sum(t.nbytes for t in tensors(node.meta.get("val")))
        for part in code.parts.values()
        for node, port in zip(part.module.graph.nodes, part.inputs, strict=False)
        if port.role is Role.BATCH
    }
    return sum(read.values())
