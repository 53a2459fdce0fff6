"""The ranks of a run while they compile: rank 0 decides, all measure."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from typing import TypeVar

from torch import nn

from ...compiler.answers.guards import Guards, unlike
from ...compiler.ir.errors import BatchError, CaptureError, PipecompileError
from ...compiler.options.options import CompileOptions
from ...compiler.planning.team import Measured, StageSeconds, StagesMeasured, medians
from ..transport.mesh import Mesh
from .agreement import Agreement

T = TypeVar("T")


class Ranks:
    """A `compiler.planning.team.Team` between processes; every rank makes the same calls."""

    def __init__(self, mesh: Mesh, agreement: Agreement, model: nn.Module, options: CompileOptions):
        self._mesh, self._agreement, self._options = mesh, agreement, options
        self._model: nn.Module | None = model

    def agree(self, fingerprint: str) -> None:
        """Equal graphs and weights on all ranks, or an error on all; asked once."""
        if self._model is not None:
            self._agreement.check_ranks(fingerprint, self._model, self._options)
            self._model = None

    def together(self, act: Callable[[], T]) -> T:
        """What ``act`` returns here, once it has succeeded on every rank; else its error on all."""
        return act() if self._mesh.rank is None else self._agreement.together(act, CaptureError)

    def alike(self, guards: Guards) -> None:
        """Raises BatchError on every rank where ranks have heard different answers."""
        first, *others = self._agreement.gather(guards.heard)
        for rank, heard in enumerate(others, 1):
            for (where, answer), (_, theirs) in zip(first, heard, strict=False):
                if answer != theirs:
                    raise BatchError(unlike(where, ("rank 0", answer), (f"rank {rank}", theirs)))

    def share(self, decide: Callable[[], T]) -> T:
        """What rank 0 decides, on every rank.

        Raises:
            PipecompileError: what rank 0 raised, on every rank.
        """
        mine: T | PipecompileError | None = None
        if self._mesh.rank in (None, 0):
            try:
                mine = decide()
            except PipecompileError as error:
                mine = error
        made: T | PipecompileError = self._agreement.gather(mine)[0]
        if isinstance(made, PipecompileError):
            raise made
        return made

    def stages(self, n_stages: int) -> tuple[int, ...]:
        """Those of this process's ranks."""
        here = {stage for rank in self._mesh.local_ranks for stage in self._mesh.stages_of(rank)}
        return tuple(stage for stage in range(n_stages) if stage in here)

    def pool_stages(self, seconds: StagesMeasured) -> dict[int, StageSeconds]:
        """The medians over the replicas of each stage."""
        return medians(self._agreement.gather(seconds))

    def pool(self, seconds: Measured) -> Measured:
        """The medians over the ranks of each kind of device: they ran side by side, as they will
        when they train."""
        ranks = self._agreement.gather(seconds)
        rows = {kind: [r[kind] for r in ranks if kind in r] for each in ranks for kind in each}
        return {
            kind: [median(each) for each in zip(*rows[kind], strict=True)] for kind in sorted(rows)
        }
