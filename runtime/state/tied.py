"""The gradients of parameters that stages on several ranks hold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ...compiler.ir.program import PipelineProgram, TiedGradient, ValueSpec
from ..transport.transport import Endpoint, Run
from .rank_state import RankState


@dataclass(frozen=True)
class _Shared:
    """A `TiedGradient` between ranks: the stages of one rank add up in one slot, so that one of
    them speaks for all.

    Attributes:
        parts, holders: on other ranks than the owner's, one stage per rank.
    """

    name: str
    owner: int
    parts: tuple[int, ...]
    holders: tuple[int, ...]


class TiedGradients:
    """Of one rank, all its stages'."""

    def __init__(self, program: PipelineProgram, state: RankState):
        self._grads, self._endpoint = state.grads, state.endpoint
        self._mine = set(state.stages)
        shared = [_between_ranks(tied, state.endpoint) for tied in program.tied]
        self._tied = [t for t in shared if self._mine & {t.owner, *t.parts, *t.holders}]

    def restart(self) -> None:
        """A part of a tied gradient is of this run alone: the sum so far is with its owner."""
        for tied in self._tied if self._grads.leads else ():
            if self._mine.intersection(tied.parts):
                self._grads.slots[tied.name].fresh = True

    def sync(self) -> Run:
        """Parts to the owner, who adds them up in stage order; the total back to all holders."""
        if not self._grads.leads:
            return
        for tied in self._tied:
            for part in self._mine.intersection(tied.parts):
                self._give(tied.name, part, tied.owner)
        for tied in self._tied:
            if tied.owner in self._mine:
                for part in tied.parts:
                    yield from self._take(tied.name, part, tied.owner)
                for holder in tied.holders:
                    self._give(tied.name, tied.owner, holder)
        for tied in self._tied:
            for holder in self._mine.intersection(tied.holders):
                self._grads.slots[tied.name].fresh = True
                yield from self._take(tied.name, tied.owner, holder)

    def _give(self, name: str, src: int, dst: int) -> None:
        copy = self._grads.summed(
            name
        ).clone()  # the slot is written again before the message has left
        self._endpoint.send(src, dst, [copy], [_spec(name, copy)])

    def _take(self, name: str, src: int, dst: int) -> Run:
        slot, total = self._grads.slots[name], self._grads.summed(name)
        pending = self._endpoint.receive(src, dst, [_spec(name, total)])
        while not pending.ready():
            yield
        slot.add(pending.wait()[0], total)


def _between_ranks(tied: TiedGradient, endpoint: Endpoint) -> _Shared:
    def others(stages: Sequence[int]) -> tuple[int, ...]:
        speakers = {endpoint.rank_of(tied.owner): tied.owner}
        for stage in stages:
            speakers.setdefault(endpoint.rank_of(stage), stage)
        return tuple(speakers.values())[1:]

    return _Shared(tied.name, tied.owner, others(tied.parts), others(tied.holders))


def _spec(name: str, tensor: torch.Tensor) -> ValueSpec:
    return ValueSpec(name, tuple(tensor.shape), tensor.stride(), tensor.dtype)
