"""Seconds of each rank after its last microbatch: worked out, or its optimizer measured."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from ...passes.schedule.simulate import simulate
from ..costs.closing import exchange_s, optimizer_s
from ..costs.cluster import kinds_at
from ..ir.actions import homes_of, placement_of
from ..ir.zero import Kept
from ..memory.optimizer_cost import Factory, optimizer_seconds
from ..planning.keeping import Trial
from ..planning.target import Target
from ..planning.team import Team, worst
from ..tensors.norms import own_powers
from .assembly import Assembly, kept_with
from .work import Settings

AGREEMENTS = 2  # of each step: on the batch, and on its loss
Norm = Callable[[torch.Tensor], Any] | None


class Closing:
    """Asked once per training graph; what was measured holds for batches of all shapes."""

    def __init__(self, target: Target, team: Team):
        self._target, self._team = target, team
        self._measured: list[float] | None = None

    def seconds(self, assembly: Assembly, settings: Settings) -> list[float]:
        """Per rank of a replica."""
        program = assembly.program
        if not program.trains:
            return [0.0] * len(assembly.schedule)
        stepping_s = self._optimizer_s(assembly, settings)
        measured = self._measured is not None  # the optimizer, with clipping
        return _closed(assembly, settings, stepping_s, clips=not measured)

    def _optimizer_s(self, assembly: Assembly, settings: Settings) -> list[float]:
        """Measured, or what the optimizer reads and writes at the peak rate of the memory."""
        factory = settings.options.optimizer
        if factory is None:
            return [0.0] * len(assembly.schedule)
        if not self._target.measures:
            return worked_out(assembly, settings)
        if self._measured is None:
            footprint, program = settings.footprint, assembly.program
            params = [footprint.trainable(program, mine) for mine in _stages(assembly)]
            norm, rates = _norm(settings), settings.rates
            own = {
                kind: [_time(factory, each, profiler.device, norm) for each in params]
                for kind, profiler in self._target.profilers.items()
            }
            pooled = self._team.pool(own)
            pairs = [worst(pooled, kinds_at(rates, rank)) for rank in range(len(params))]
            self._measured = [each[rank] for rank, each in enumerate(pairs)]
        return list(self._measured)


def _time(
    factory: Factory, params: dict[str, torch.Tensor], device: torch.device, norm: Norm
) -> float:
    """0 for an optimizer that cannot be made: its error comes where it is needed."""
    with contextlib.suppress(Exception):
        return optimizer_seconds(factory, params, device, norm) if params else 0.0
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


def worked_out(assembly: Assembly, settings: Settings) -> list[float]:
    """Per rank, in what an optimizer reads and writes what it must."""
    if settings.options.optimizer is None:
        return [0.0] * len(assembly.schedule)
    footprint, program = settings.footprint, assembly.program
    return [
        optimizer_s(
            footprint.static(program, mine, 0),
            footprint.stepped_bytes(program, mine),
            footprint,
            settings.rates.at(rank),
            footprint.left_alone_bytes(program, mine),
        )
        for rank, mine in enumerate(_stages(assembly))
    ]


def _closed(
    assembly: Assembly, settings: Settings, stepping_s: Sequence[float], clips: bool = True
) -> list[float]:
    """Per rank, the optimizer and what is exchanged before it and after it."""
    pairs = zip(stepping_s, exchanged(assembly, settings, clips=clips), strict=True)
    return [sum(pair) for pair in pairs]


def exchanged(
    assembly: Assembly,
    settings: Settings,
    parts: Sequence[Sequence[int]] = (),
    clips: bool = True,
) -> list[float]:
    """Per rank, what replicas exchange and nothing hides, what all ranks tell each other, and
    clipping.

    Args:
        parts: the stages of each; empty for those that it has.
        clips: whether what clipping computes counts, where there is any.
    """
    agreements = AGREEMENTS + (settings.options.max_grad_norm is not None)  # on the norm of all
    agreed_s = agreements * settings.rates.agree_s
    clips &= settings.options.max_grad_norm is not None
    late_s = assembly.timing.late_s()
    footprint, program, homes = settings.footprint, assembly.program, settings.shape.homes
    found = []
    for stages in parts or _stages(assembly):
        device = settings.rates.at(homes[stages[0]])
        grads = footprint.static(program, stages, 0).grads
        exchange = exchange_s(program, stages, grads, footprint, device, clips)
        found.append(exchange + math.fsum(late_s[s] for s in stages) + agreed_s)
    return found


def trial_of(draft: Assembly, settings: Settings) -> Trial:
    """What the programs of a draft take if ranks keep something."""
    made: dict[tuple[Kept, ...], Assembly] = {}

    def of(kept: Sequence[Kept]) -> Assembly:
        if tuple(kept) not in made:
            made[tuple(kept)] = kept_with(draft, kept)
        return made[tuple(kept)]

    def peaks(kept: Sequence[Kept]) -> list[int]:
        found = of(kept)
        return [memory.needed_bytes for memory in found.work.memories(found.schedule)]

    def stages_s(kept: Sequence[Kept]) -> list[float]:
        found, m = of(kept), settings.microbatches
        seconds = exchanged(found, settings, [(s,) for s in range(settings.options.stage_count)])
        for (stage, _), each in found.timing.compute_s().items():
            seconds[stage] += m * each
        return seconds

    def step_s(kept: Sequence[Kept]) -> float:
        found = of(kept)
        timing, closing_s = found.timing, _closed(found, settings, worked_out(found, settings))
        of_all = timing.compute_s(), timing.transfer_s(), closing_s
        return simulate(found.schedule, *of_all, send_s=timing.send_s()).step_s

    return Trial(peaks, stages_s, step_s)


def _stages(assembly: Assembly) -> tuple[tuple[int, ...], ...]:
    """Per rank, its stages in order."""
    homes = homes_of(assembly.schedule)
    return placement_of([homes[stage] for stage in sorted(homes)])
