"""What is legal for stage programs, checked after every pass."""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from ...compiler.ir import ops
from ...compiler.ir.actions import Kind
from ...compiler.ir.errors import VerificationError
from ...compiler.ir.graph import Phase, overwritten, viewed
from ...compiler.ir.program import PipelineProgram, Role


def verify_program(program: PipelineProgram) -> None:
    """Every value that a program reads is made, received or stashed on its stage before."""
    for stage in program.stages:
        known = _received(program, stage.stage, Phase.FORWARD)
        constants = {port.key for port in stage.constants.outputs}
        for part, code in stage.parts.items():
            if part is Kind.B:
                known |= _received(program, stage.stage, part.phase)
            for port in code.inputs:
                missing = port.role is Role.VALUE and port.key not in known
                missing |= port.role is Role.CONSTANT and port.key not in constants
                if missing:
                    raise VerificationError(f"stage {stage.stage} {part} reads unknown {port}")
            known |= {port.key for port in code.outputs if port.role is Role.VALUE}
            for message in program.messages:
                if part is not Kind.W and (message.src, message.phase) == (stage.stage, part.phase):
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


def _received(program: PipelineProgram, stage: int, phase: Phase) -> set[object]:
    return {
        value.name
        for message in program.messages
        if message.dst == stage and message.phase is phase
        for value in message.values
    }
