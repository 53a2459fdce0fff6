"""The numbers of one step, of which those that have to be waited for are read when asked for."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch

from ...compiler.costs.topology import Numbering
from .moments import Moment, Stopwatch
from .reports import Report, bubble_of


@dataclass(frozen=True)
class Planned:
    """What the plan says of a step.

    Attributes:
        step_s, bubble: as `Plan` has them.
        peak_bytes: of the rank that needs most.
    """

    step_s: float
    bubble: float
    peak_bytes: int


@dataclass(frozen=True)
class Sources:
    """Where numbers come from that are not at hand yet.

    Attributes:
        losses: of each run.
        norm: None where gradients were not clipped.
        lrs: of the optimizer's groups, as the step began.
        reports: per run, gives those of all ranks, on rank 0.
        ranks: of the replicas; None where one process plays all ranks.
    """

    watch: Stopwatch
    begun: Moment
    ended: Moment
    losses: Sequence[torch.Tensor]
    norm: torch.Tensor | None
    lrs: Sequence[float | torch.Tensor]
    reports: Sequence[Callable[[], Sequence[Report]]]
    ranks: Numbering | None


@dataclass(frozen=True)
class Metrics:
    """What one training step did; `Pipeline.metrics` has those of the last one.

    Taking them waits for nothing. A number that a device is still computing, or that other ranks
    tell rank 0, is waited for when it is read first; reading is no collective, so one rank may read
    alone. What is not known is None: see each. FLOPs and tokens are those of the rows that there
    were, padding inside of rows included.

    Attributes:
        step: calls of `step` or `forward_backward` so far, those before a resume included.
        rows: of the global batch; of batches that a ``cut=`` cuts, its pieces.
        tokens: ids in the first leaf of the global batch, if that is one of (rows, tokens); else 0.
        flops: of forward and backward of all replicas, as the plan counts them; what is recomputed
            is left out.
        devices: those that the ranks compute on; processes on the CPU, 1 for one process there.
        peak_flops_per_s: of one device, in the dtype that is computed in: by its data sheet, or as
            ``hardware=`` has it; None where neither tells.
        overflowed: an fp16 gradient did, so that nothing was stepped.
        loss_scale: that the loss was multiplied by; None without scaling.
        planned: what the plan says of a step.
    """

    step: int
    rows: int
    tokens: int
    flops: int
    devices: int
    peak_flops_per_s: float | None
    overflowed: bool
    loss_scale: float | None
    planned: Planned
    sources: Sources = field(repr=False)

    @cached_property
    def loss(self) -> float:
        """Of the global batch, as `step` returns it; of several calls of `forward_backward` their
        mean."""
        return sum(map(float, self.sources.losses)) / len(self.sources.losses)

    @cached_property
    def grad_norm(self) -> float | None:
        """Of all gradients before they were clipped; None where they were not.

        ``max_grad_norm=math.inf`` has it taken without clipping.
        """
        return None if self.sources.norm is None else float(self.sources.norm)

    @cached_property
    def lrs(self) -> tuple[float, ...]:
        """Learning rates that the step took, of the optimizer's groups; () without an optimizer of
        `compile`."""
        return tuple(map(float, self.sources.lrs))

    @property
    def lr(self) -> float | None:
        """That of the first group."""
        return self.lrs[0] if self.sources.lrs else None

    @cached_property
    def step_s(self) -> float:
        """Seconds from the call's beginning to its end, on this rank; on CUDA from when the device
        came to the one to when it came to the other. A first step compiles, which counts."""
        return self.sources.watch.between_s(self.sources.begun, self.sources.ended)

    @property
    def tokens_per_s(self) -> float | None:
        """Of all replicas; None where `tokens` is 0."""
        return self.tokens / self.step_s if self.tokens else None

    @property
    def tokens_per_s_per_device(self) -> float | None:
        return None if self.tokens_per_s is None else self.tokens_per_s / self.devices

    @property
    def rows_per_s(self) -> float:
        return self.rows / self.step_s

    @property
    def mfu(self) -> float | None:
        """Model FLOPs utilization: `flops` over what all devices could do in the step's seconds
        (Chowdhery et al., PaLM, 2022). None where `peak_flops_per_s` is."""
        if self.peak_flops_per_s is None:
            return None
        return self.flops / (self.step_s * self.devices * self.peak_flops_per_s)

    @cached_property
    def bubble(self) -> float | None:
        """The share of the ranks' time, from the first computation of each to its last, in which it
        computed nothing. On rank 0 alone, and where ranks are processes that compute on CPUs: a
        trace measures it on CUDA."""
        runs = self._reports
        ranks = self.sources.ranks
        return bubble_of(runs, ranks) if ranks is not None and runs else None

    @cached_property
    def peak_bytes(self) -> int | None:
        """The most that torch has held on a device since the process began, of the rank that held
        most, as each saw it when its gradients were done. On rank 0 alone, and on CUDA: the CPU's
        allocator keeps no count."""
        known = [r.peak_bytes for run in self._reports for r in run if not math.isnan(r.peak_bytes)]
        return int(max(known)) if known else None

    @cached_property
    def exchanged_bytes(self) -> int | None:
        """Values, gradients and gathered parameters that ranks have sent each other; 0 in one
        process. On rank 0 alone."""
        runs = self._reports
        return int(sum(report.sent_bytes for run in runs for report in run)) if runs else None

    @property
    def waits(self) -> bool:
        """Whether reading may wait for a device."""
        return not self.sources.watch.on_host

    def numbers(self) -> dict[str, float]:
        """Those that are known, by name, for a logger."""
        return {name: value for name in NUMBERS if (value := getattr(self, name)) is not None}

    @cached_property
    def _reports(self) -> list[Sequence[Report]]:
        """Per run, of all ranks; nothing on other ranks than 0, or where a rank has ended: what
        comes next says so."""
        try:
            return [found for each in self.sources.reports if (found := each())]
        except ConnectionError:
            return []


NUMBERS = (
    "loss",
    "grad_norm",
    "lr",
    "step_s",
    "rows_per_s",
    "tokens_per_s",
    "tokens_per_s_per_device",
    "mfu",
    "bubble",
    "peak_bytes",
    "exchanged_bytes",
    "overflowed",
    "loss_scale",
)
"""What loggers write of each step, in this order."""
