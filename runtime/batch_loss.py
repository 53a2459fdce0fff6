"""The loss of a batch out of those of its microbatches: what each counts, and their sum."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from ..compiler.ir.errors import BatchError
from ..compiler.ir.program import PipelineProgram
from ..compiler.rows.loss import (
    Counts,
    LossForm,
    Weighing,
    Weights,
    loss_of_batch,
    loss_of_replica,
    weights_of,
)
from ..compiler.rows.sums import Sums
from ..compiler.rows.terms import Way
from .executor import Job, PieceKind
from .loader import Step
from .state.filled import numbers_on
from .transport.doing import HERE
from .world import World

PADDED = (
    "replicas were padded to lengths of their own, and the loss has a mean over rows, or over all "
    "that rows have: where it counts padding, it is not that of one device, which would pad all "
    "rows alike. Leave padding out of it, or pad alike: pipe.loader(whole_batches=True), or "
    "pipecompile.data.pad_to_multiple"
)
LossWeight = Callable[[Any], Any]
Reports = Callable[[], list[tuple[float, ...]]]
"""Gives what each rank has reported of a run, on rank 0; nothing on others. It waits for that."""
Buffers = Mapping[str, torch.Tensor]


class Told(NamedTuple):
    """Attributes:
    loss: gives the loss of the batch; waits for it.
    """

    loss: Callable[[], torch.Tensor]
    reports: Reports


class BatchLoss:
    """Of a batch whose microbatches run one graph, or one for each number of rows.

    Args:
        program: one of them.
        forms: kind of a microbatch -> what its graph tells of the loss; None where that was not
            asked.
        weight: what the user says that a microbatch counts.
        step: how the batch is run.
    """

    def __init__(
        self,
        world: World,
        program: PipelineProgram,
        forms: Mapping[PieceKind, LossForm | None],
        weight: LossWeight | None,
        step: Step,
    ):
        self._world, self._program, self._weight, self._step = world, program, weight, step
        plain = LossForm((Weighing(Way.KEPT if weight else Way.OWN, 0),))
        self._forms = {kind: form or plain for kind, form in forms.items()}
        self._form = next(iter(self._forms.values()))
        for kind, form in self._forms.items():
            if (form.terms, form.factored) != (self._form.terms, self._form.factored):
                mine, first = (step.requests[each].spec for each in (kind, next(iter(self._forms))))
                raise BatchError(
                    f"microbatches of ({mine}) have another loss than those of ({first}): give "
                    "batches whose microbatches are of equal sizes"
                )
        terms = self._form.terms
        self._counts = any(term.way is Way.KEPT or term.by >= 0 for term in terms)
        if step.unlike and any(term.way is Way.ROWS for term in terms):
            warnings.warn(PADDED, stacklevel=2)

    def weigh(self, jobs: Mapping[int, Job], buffers: Mapping[int, Buffers]) -> Weights:
        """What the microbatches of all replicas count; jobs are told.

        Args:
            buffers: of each rank.

        Raises:
            BatchError: nothing counts in any of them, or what ``loss_weight`` returns is no
                number that could; on all ranks.
        """
        return self.weighing(jobs, buffers)()

    def weighing(
        self, jobs: Mapping[int, Job], buffers: Mapping[int, Buffers]
    ) -> Callable[[], Weights]:
        """As `weigh`, which what is returned waits for, where programs of the forward do not depend
        on it."""
        mesh, counted = self._world.mesh, self._counting(jobs, buffers)

        @functools.cache
        def weighed() -> Weights:
            try:
                weights = weights_of(self._form, counted(), self._step.sizes)
            except ZeroDivisionError as error:
                raise BatchError(
                    "nothing in this batch counts in the loss: all its labels are ignored, or "
                    "loss_weight returns 0 for all of it, and one device would divide zero by "
                    "zero: leave the batch out"
                ) from error
            for rank, job in jobs.items():
                self._tell(job, weights, rank, mesh.replica_of(rank))
            return weights

        if self._form.factored or not self._counts or not mesh.distributed:
            weighed()
        return weighed

    def counts(self, jobs: Mapping[int, Job], buffers: Mapping[int, Buffers]) -> Counts:
        """What is kept in the microbatches of all replicas; of nothing, if nothing is asked for.

        Raises:
            BatchError: as `weigh` does.
        """
        return self._counting(jobs, buffers)()

    def _counting(
        self, jobs: Mapping[int, Job], buffers: Mapping[int, Buffers]
    ) -> Callable[[], Counts]:
        """The same; what is returned waits for other ranks."""
        if not self._counts:
            return lambda: [[[]] * len(replica) for replica in self._step.sizes]
        gathered = self._gathered(jobs, buffers)

        def counted() -> Counts:
            counts = gathered()
            self._check(counts)
            return counts

        return counted

    def sums(self, before: Sums | None) -> Sums:
        """What this batch is added to; None if it is the first of a data set.

        Raises:
            BatchError: those before have another loss.
        """
        if before is None:
            return Sums(self._form)
        before.check(self._form)
        return before

    def add(
        self,
        sums: Sums,
        jobs: Mapping[int, Job],
        buffers: Mapping[int, Buffers],
        run: Callable[[], None],
    ) -> None:
        """Run a batch, once or for each kind of terms, and add its loss.

        Args:
            run: runs the jobs.
        """
        mesh, counts = self._world.mesh, self.counts(jobs, buffers)
        losses = []
        for shares in sums.runs:
            for rank, job in jobs.items():
                given = self._arguments(rank, shares)
                job.shares, job.losses = [given] * len(job.sizes), []
            run()
            here = {mesh.replica_of(rank): job.losses for rank, job in jobs.items() if job.losses}
            losses.append(here)
        sums.add(counts, self._step.sizes, losses)

    def weigh_outputs(
        self, jobs: Mapping[int, Job], buffers: Mapping[int, Buffers], here: Sequence[int]
    ) -> Weights:
        """As `weigh`, of the loss among what the model returns for the rows of some replicas.

        Where nothing counts it is what one device would return: no number.

        Args:
            here: these replicas, those of this process among them.
        """
        sizes = [self._step.sizes[replica] for replica in here]
        counts: Counts = [[[]] * len(replica) for replica in sizes]
        if self._counts:
            everyone = self._gathered(jobs, buffers)()
            counts = [everyone[replica] for replica in here]
        try:
            weights = weights_of(self._form, counts, sizes)
        except ZeroDivisionError:
            weights = weights_of(LossForm(), counts, [[1] * len(replica) for replica in sizes])
        for rank, job in jobs.items():
            self._tell(job, weights, rank, here.index(self._world.mesh.replica_of(rank)))
        return weights

    def _tell(self, job: Job, weights: Weights, rank: int, replica: int) -> None:
        job.weights = () if weights.factors is None else weights.tangents[replica]
        job.shares = [self._arguments(rank, each) for each in weights.shares[replica]]

    def _arguments(self, rank: int, shares: Sequence[float]) -> list[torch.Tensor]:
        """What terms are multiplied by, as exact as the loss, and no less than float32 is."""
        loss_dtype = self._program.loss_dtype
        dtype = torch.promote_types(loss_dtype or torch.float32, torch.float32)
        device = self._world.endpoints[rank].device
        return numbers_on(device, shares, dtype)

    def _gathered(
        self, jobs: Mapping[int, Job], buffers: Mapping[int, Buffers]
    ) -> Callable[[], Counts]:
        """Per replica and microbatch; the ranks of the loss's stage count, and tell the others."""
        mesh, stage = self._world.mesh, self._program.loss_stage
        mine: dict[int, list[list[float]]] = {}
        obstacle = ""
        for rank, job in jobs.items():
            if stage in mesh.stages_of(rank):
                try:
                    mine[mesh.replica_of(rank)] = [
                        self._count(job, i, buffers[rank]) for i in range(len(job.kinds))
                    ]
                except BatchError as error:
                    obstacle = str(error)
        told = self._world.agreement.tell((mine, obstacle), mesh.replicas_of(stage))

        def heard() -> Counts:
            by_replica: dict[int, list[list[float]]] = {}
            for found, why in told():
                if why:
                    raise BatchError(why)
                by_replica |= found
            return [by_replica[replica] for replica in range(mesh.dp)]

        return heard

    def _check(self, counts: Counts) -> None:
        """Raises BatchError where a sum is divided by the number of items of a part."""
        flat = [
            each
            for replica, sizes in zip(counts, self._step.sizes, strict=True)
            for each, size in zip(replica, sizes, strict=True)
            if size
        ]
        for term in self._form.terms:
            odd = term.misgiven(flat)
            if odd is not None:
                raise BatchError(
                    "the loss is a sum divided by a number in the batch (num_items_in_batch), "
                    f"which is {odd[0]:g}, and {odd[1]:g} over all replicas: give every rank that "
                    "of the global batch, or leave it out"
                )

    def _count(self, job: Job, index: int, buffers: Buffers) -> list[float]:
        kind, leaves = job.kinds[index], job.batches[index]
        form = self._forms[kind]
        if form.counting is not None:
            given: list[Any] = [*job.given[index], *job.numbers[index]]
            return [*form.sizes, *form.counting(given, buffers)]
        if form.sizes:
            return list(form.sizes)
        assert self._weight is not None
        try:
            found = self._weight(self._step.requests[kind].spec.build(leaves))
        except Exception as error:
            raise BatchError(f"loss_weight raised {type(error).__name__}: {error}") from error
        try:
            number = float(found)
        except (TypeError, ValueError, RuntimeError) as error:
            returned = type(found).__name__
            raise BatchError(
                f"loss_weight returned a {returned}, which is no number: return what the "
                "microbatch counts, such as (batch['labels'] != -100).sum()"
            ) from error
        if not math.isfinite(number) or number < 0:
            raise BatchError(
                f"loss_weight returned {number} for a microbatch: return 0 or more, such as the "
                "number of its tokens"
            )
        return [number]

    def total(
        self, jobs: Mapping[int, Job], weights: Weights, report: Sequence[float] = ()
    ) -> Told:
        """Tells the loss of the batch to every rank.

        Args:
            report: further numbers, which rank 0 is told.
        """
        stage, mesh, dtype = self._program.loss_stage, self._world.mesh, self._program.loss_dtype
        mine = {
            mesh.replica_of(rank): torch.stack(job.losses)
            for rank, job in jobs.items()
            if stage in mesh.stages_of(rank)
        }
        parts = {r: loss_of_replica(losses, weights, r) for r, losses in mine.items()}
        assert dtype is not None
        found, reports = self._told(parts, mesh.replicas_of(stage), report)
        return Told(functools.cache(lambda: loss_of_batch(found(), weights, dtype)), reports)

    def _told(
        self, parts: Mapping[int, torch.Tensor], speakers: Sequence[int], report: Sequence[float]
    ) -> tuple[Callable[[], torch.Tensor], Reports]:
        """Those of all replicas, (dp,), each told by the rank that has it; and what ranks report.

        Args:
            parts: replica -> what this process has.
        """
        mesh, device, agreement = self._world.mesh, self._world.device, self._world.agreement
        if not mesh.distributed:
            here = torch.stack([parts[replica].to(device) for replica in sorted(parts)])
            return lambda: here, lambda: [tuple(report)]
        if agreement.neighbours is not None and device.type == "cpu":
            mine = next((float(part) for part in parts.values()), None)
            told = agreement.tell(mine, speakers)
            reports = agreement.report(report) if report else list
            return lambda: torch.tensor(told(), dtype=torch.float64), reports
        # (ranks, the loss and what is reported)
        slots = torch.zeros(mesh.size, 1 + len(report), dtype=torch.float64, device=device)
        for replica, part in parts.items():
            slots[speakers[replica], 0] = part
        for place, number in enumerate(report, 1):  # a kernel each: a copy would wait for a device
            slots[mesh.rank, place] = number
        work = dist.all_reduce(slots, async_op=True)  # adds zeros: exact

        def summed() -> torch.Tensor:
            with HERE.waiting(speakers):
                work.wait()
            return torch.stack([slots[rank, 0] for rank in speakers])  # no indices to bring there

        def reported() -> list[tuple[float, ...]]:
            summed()
            return [tuple(each) for each in slots[:, 1:].tolist()]

        return summed, list if mesh.rank else reported
