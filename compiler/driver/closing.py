"""Seconds of each rank after its last microbatch: worked out, or its optimizer measured."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from ..costs.closing import exchange_s, optimizer_s
from ..ir.actions import homes_of, placement_of
from ..memory.optimizer_cost import Factory, optimizer_seconds
from ..planning.target import Target
from ..planning.team import Team
from ..tensors.norms import own_powers
from .assembly import Assembly
from .work import Settings

Norm = Callable[[torch.Tensor], Any] | None


class Closing:
    """Asked once per training graph; what was measured holds for batches of all shapes."""

    def __init__(self, target: Target, team: Team):
        self._target, self._team = target, team
        self._measured: list[float] | None = None

    def seconds(self, assembly: Assembly, settings: Settings) -> list[float]:
        """Per rank of a replica."""
        program = assembly.program
        seconds = [0.0] * len(assembly.schedule)
        if not program.trains:
            return seconds
        seconds = self._optimizer_s(assembly, settings)
        measured = self._measured is not None  # the optimizer, with clipping
        clips = settings.options.max_grad_norm is not None and not measured
        for rank, stages in enumerate(_stages(assembly)):
            grads = assembly.memory[rank].static.grads
            device = settings.rates.at(rank)
            seconds[rank] += exchange_s(program, stages, grads, settings.footprint, device, clips)
        return seconds

    def _optimizer_s(self, assembly: Assembly, settings: Settings) -> list[float]:
        """Measured, or what the optimizer reads and writes at the peak rate of the memory."""
        factory = settings.options.optimizer
        if factory is None:
            return [0.0] * len(assembly.schedule)
        if self._target.profiler is None:
            footprint, program = settings.footprint, assembly.program
            pairs = zip(assembly.memory, _stages(assembly), strict=True)
            return [
                optimizer_s(
                    memory.static,
                    footprint.frozen_bytes(program, mine),
                    footprint,
                    settings.rates.at(rank),
                    footprint.left_alone_bytes(program, mine),
                )
                for rank, (memory, mine) in enumerate(pairs)
            ]
        if self._measured is None:
            footprint, program = settings.footprint, assembly.program
            params = [footprint.trainable(program, mine) for mine in _stages(assembly)]
            norm = _norm(settings)
            self._measured = self._team.pool([self._time(factory, each, norm) for each in params])
        return list(self._measured)

    def _time(self, factory: Factory, params: dict[str, torch.Tensor], norm: Norm) -> float:
        """0 for an optimizer that cannot be made: its error comes where it is needed."""
        with contextlib.suppress(Exception):
            return optimizer_seconds(factory, params, self._target.device, norm) if params else 0.0
        return 0.0


def _norm(settings: Settings) -> Norm:
    """What a step takes of each gradient to clip by the norm of all."""
    if settings.options.max_grad_norm is None:
        return None
    zero = settings.footprint.zero
    if zero.divides_states and not zero.matrices:
        return partial(own_powers, kind=2.0)
    norm: Norm = torch.linalg.vector_norm
    return norm


def _stages(assembly: Assembly) -> tuple[tuple[int, ...], ...]:
    """Per rank, its stages in order."""
    homes = homes_of(assembly.schedule)
    return placement_of([homes[stage] for stage in sorted(homes)])
