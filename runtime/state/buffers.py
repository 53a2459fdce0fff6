"""Buffers that one program updates and another reads on other stages, or in constants."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from ...compiler.ir.program import PipelineProgram, Role, ValueSpec
from ..transport.mesh import Mesh
from .rank_state import RankState


@dataclass(frozen=True)
class BufferUse:
    """What a program does with buffers.

    Attributes:
        needed: (buffer, stage), of each stage that uses it.
        constant: the buffers that constants are made of.
        updated: buffer -> the stages that compute its new value.
    """

    needed: tuple[tuple[str, int], ...]
    constant: frozenset[str]
    updated: Mapping[str, frozenset[int]]

    @staticmethod
    def of(program: PipelineProgram) -> BufferUse:
        updated: dict[str, frozenset[int]] = {}
        for stage in program.stages:
            for port in stage.forward.outputs:
                if port.role is Role.BUFFER:
                    name = str(port.key)
                    updated[name] = updated.get(name, frozenset()) | {stage.stage}
        return BufferUse(
            tuple((name, stage.stage) for stage in program.stages for name in stage.buffers),
            frozenset(str(p.key) for stage in program.stages for p in stage.constants.inputs),
            updated,
        )


@dataclass(frozen=True)
class Missing:
    """A buffer, a stage that has its latest value, and one that will read it."""

    name: str
    src: int
    dst: int


class LatestBuffers:
    """Where the latest value of each buffer is.

    Every rank has a tensor for every buffer. A program updates those of the stages that compute the
    new value; before another one reads it elsewhere, its replica's ranks pass it on. All ranks know
    this of the programs alone, so they agree without asking.

    Args:
        states: of the ranks that this process plays.
    """

    def __init__(self, mesh: Mesh, states: Mapping[int, RankState]):
        self._mesh, self._states = mesh, states
        self._holders: dict[str, frozenset[int]] = {}  # stages, of the buffers that not all have

    @property
    def stages(self) -> dict[str, int]:
        """The buffers that any run has updated, and for each a stage that has its latest value."""
        return {name: min(holders) for name, holders in self._holders.items()}

    def update(self, use: BufferUse) -> None:
        """A program has run."""
        self._holders |= use.updated

    def missing(self, use: BufferUse) -> list[Missing]:
        """What the stages of a program use and have no latest value of; the same on every rank."""
        return [
            Missing(name, min(holders), stage)
            for name, stage in (use.needed if self._holders else ())
            if (holders := self._holders.get(name)) is not None and stage not in holders
        ]

    def bring(self, missing: Sequence[Missing]) -> None:
        """Give stages what they miss; every rank calls it, with the routes open. What they were
        given may be under way, until the transport is flushed."""
        for each in missing:
            for state in self._states.values():
                if each.src in state.stages and each.dst not in state.stages:
                    buffer = state.buffers[each.name]
                    state.endpoint.send(each.src, each.dst, [buffer], [_spec(each.name, buffer)])
        for each in missing:
            for state in self._states.values():
                if each.dst in state.stages and each.src not in state.stages:
                    buffer = state.buffers[each.name]
                    specs = [_spec(each.name, buffer)]
                    (value,) = state.endpoint.receive(each.src, each.dst, specs).wait()
                    buffer.copy_(value)
            self._holders[each.name] |= {each.dst}


def _spec(name: str, buffer: torch.Tensor) -> ValueSpec:
    return ValueSpec(name, tuple(buffer.shape), buffer.stride(), buffer.dtype)
