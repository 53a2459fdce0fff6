"""Counts and times the steps of a pipeline."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, NamedTuple

import torch

from ...compiler.ir.errors import StateError
from ...compiler.plan.plan import Plan
from .machine import Machine
from .metrics import Metrics, Planned, Sources
from .moments import Moment, Stopwatch
from .reports import Report


class Amounts(NamedTuple):
    """Of the global batch of a run."""

    rows: int
    tokens: int
    flops: int


def amounts_of(rows: int, pieces: Iterable[tuple[Plan, int]]) -> Amounts:
    """Of a run.

    Args:
        rows: of all microbatches of all replicas.
        pieces: the plans of graphs, and how many microbatches that have rows ran each.
    """
    tokens = flops = 0
    for plan, count in pieces:
        tokens += count * plan.microbatch_tokens
        flops += count * sum(each.forward_flops + each.backward_flops for each in plan.stages)
    return Amounts(rows, tokens, flops)


def planned_of(plan: Plan) -> Planned:
    return Planned(plan.step_s, plan.bubble, max(each.memory.peak for each in plan.stages))


@dataclass
class _Step:
    """A step that is under way."""

    begun: Moment
    runs: list[Amounts] = field(default_factory=list)
    losses: list[Callable[[], torch.Tensor]] = field(default_factory=list)
    reports: list[Callable[[], Sequence[Report]]] = field(default_factory=list)
    lrs: Sequence[Any] = ()
    norm: torch.Tensor | None = None
    overflowed: bool = False
    loss_scale: float | None = None
    over: bool = False


MOST_RUNS = 4096  # of a step: a loop that never ends one keeps no more


class Meter:
    """Of one process.

    Attributes:
        latest: metrics of the step that ended last.
        planned: what the plan says of a step; it is given with the first run.
    """

    def __init__(self, machine: Machine):
        self._machine, self._watch = machine, Stopwatch(machine.device)
        self._step: _Step | None = None
        self._unread: Callable[[], Sequence[Report]] = list
        self.latest: Metrics | None = None
        self.planned: Planned | None = None

    def begin(self) -> None:
        """A run begins; with it a step, unless it adds to the gradients of one."""
        step = self._step
        if step is None or step.over or not step.runs or len(step.runs) == MOST_RUNS:
            self._step = _Step(self._watch.now())

    def ran(
        self,
        amounts: Amounts,
        loss: Callable[[], torch.Tensor],
        reports: Callable[[], Sequence[Sequence[float]]],
        optimizer: torch.optim.Optimizer | None,
    ) -> None:
        """A run is over, on this rank.

        Args:
            loss: gives that of the batch.
            reports: gives what each rank reports of it.
            optimizer: whose learning rates the step will take.
        """
        step = self._step
        assert step is not None, "a run has begun"
        if self._watch.on_host:  # what ranks have reported of the run before has arrived
            self._unread()
        if not step.runs and optimizer is not None:
            step.lrs = lrs_of(optimizer)
        step.runs.append(amounts)
        step.losses.append(loss)
        read = cache(lambda: [Report(*each) for each in reports()])
        step.reports.append(read)
        self._unread = read

    def cleared(self) -> None:
        """Gradients were dropped: the next run is another step's."""
        if self._step is not None:
            self._step.over = True

    def scaled(self, loss_scale: float, overflowed: bool) -> None:
        """By which the loss was multiplied, and whether a gradient has overflowed in the step."""
        if self._step is not None:
            self._step.loss_scale, self._step.overflowed = loss_scale, overflowed

    def clipped(self, norm: torch.Tensor) -> None:
        """The norm that the gradients had."""
        if self._step is not None:
            self._step.norm = norm

    def end(self, number: int) -> Metrics:
        """The step is over.

        Raises:
            StateError: it has run nothing.
        """
        step, planned, machine = self._step, self.planned, self._machine
        if step is None or not step.runs or planned is None:
            raise StateError("end_step() before forward_backward(): there is no step to end")
        self._step = None
        sources = Sources(
            self._watch,
            step.begun,
            self._watch.now(),
            [loss() for loss in step.losses],
            step.norm,
            step.lrs,
            step.reports,
            machine.ranks,
        )
        rows, tokens, flops = (sum(each) for each in zip(*step.runs, strict=True))
        self.latest = Metrics(
            number,
            rows,
            tokens,
            flops,
            machine.devices,
            machine.peak_flops_per_s,
            step.overflowed,
            step.loss_scale,
            planned,
            sources,
        )
        return self.latest


def lrs_of(optimizer: torch.optim.Optimizer) -> list[float | torch.Tensor]:
    """The learning rates of its groups, as they are now: schedulers change tensors in place."""
    given = [group["lr"] for group in optimizer.param_groups if "lr" in group]
    return [lr.detach().clone() if isinstance(lr, torch.Tensor) else float(lr) for lr in given]
