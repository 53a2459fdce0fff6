"""Buffers that one program updates and another reads on other stages, or in constants."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from ...compiler.ir.program import PipelineProgram, Role, ValueSpec
from ..exchange.mesh import Mesh
from .rank_state import RankState


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
        self._holders: dict[str, set[int]] = {}  # stages, of the buffers that not all have

    @property
    def stages(self) -> dict[str, int]:
        """The buffers that any run has updated, and for each a stage that has its latest value."""
        return {name: min(holders) for name, holders in self._holders.items()}

    def update(self, program: PipelineProgram) -> set[str]:
        """A program has run; the names of the buffers that it has updated."""
        written = _updates(program)
        self._holders |= written
        return set(written)

    def bring(self, program: PipelineProgram) -> None:
        """Give the stages of a program the latest values of the buffers that they use; every rank
        calls it. What they were given may be under way, until the transport is flushed."""
        missing = list(self._missing(program))
        for name, src, dst in missing:
            for state in self._states.values():
                if src in state.stages and dst not in state.stages:
                    buffer = state.buffers[name]
                    state.endpoint.send(src, dst, [buffer], [_spec(name, buffer)])
        for name, src, dst in missing:
            for state in self._states.values():
                if dst in state.stages and src not in state.stages:
                    buffer = state.buffers[name]
                    (value,) = state.endpoint.receive(src, dst, [_spec(name, buffer)]).wait()
                    buffer.copy_(value)
            self._holders[name].add(dst)

    def routes(self, program: PipelineProgram) -> set[tuple[int, int]]:
        """The stages between which `bring` sends now (from, to)."""
        return {(src, dst) for _, src, dst in self._missing(program)}

    def _missing(self, program: PipelineProgram) -> Iterator[tuple[str, int, int]]:
        """A buffer, a stage that has its latest value, and one that will read it."""
        for stage in program.stages:
            for name in stage.buffers:
                holders = self._holders.get(name)
                if holders and stage.stage not in holders:
                    yield name, min(holders), stage.stage


def _spec(name: str, buffer: torch.Tensor) -> ValueSpec:
    return ValueSpec(name, tuple(buffer.shape), buffer.stride(), buffer.dtype)


def _updates(program: PipelineProgram) -> dict[str, set[int]]:
    """The buffers that a program updates, and the stages that do."""
    found: dict[str, set[int]] = {}
    for stage in program.stages:
        for port in stage.forward.outputs:
            if port.role is Role.BUFFER:
                found.setdefault(str(port.key), set()).add(stage.stage)
    return found
