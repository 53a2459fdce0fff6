"""The loss of several batches, as if they were one: that of a data set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from ..ir.errors import BatchError
from .loss import Counts, LossForm, Weighing, amounts, total_of
from .terms import Way

Losses = Mapping[int, Sequence[torch.Tensor]]
"""Replica -> the losses of its microbatches, of the replicas whose losses this process has."""


class Sums:
    """Of a data set, batch by batch.

    Where terms of the loss count differently, a graph gives their sum alone. It is run once for
    each kind of terms, with shares that leave out the others, and once without any.

    Attributes:
        runs: the shares of each run of a batch; empty where terms have none.
    """

    def __init__(self, form: LossForm):
        self._form = form
        self._terms: tuple[Weighing, ...] = form.terms
        self.runs: list[list[float]] = [[]]
        if form.factored:
            kinds = tuple(dict.fromkeys(form.terms))
            self.runs = [[float(term == kind) for term in form.terms] for kind in kinds]
            self.runs.append([0.0] * len(form.terms))
            self._terms = (*kinds, Weighing(Way.OWN))
        self._amounts = [0.0] * len(self._terms)
        self._sums = [torch.zeros((), dtype=torch.float64) for _ in self._terms]

    def check(self, form: LossForm) -> None:
        """Raises BatchError if another batch has another loss."""
        if (form.terms, form.factored) != (self._form.terms, self._form.factored):
            raise BatchError(
                "the batches of the loader have different losses, which have no mean: evaluate "
                "them one by one"
            )

    def add(self, counts: Counts, rows: Sequence[Sequence[int]], losses: Sequence[Losses]) -> None:
        """One more batch.

        Args:
            counts, rows: per replica and microbatch, of all replicas.
            losses: of each run.
        """
        flat = [each for replica in counts for each in replica]
        sizes = [n for replica in rows for n in replica]
        *apart, rest = losses
        for i, term in enumerate(self._terms):
            mine, amount = amounts(term, flat, sizes)
            if term.by >= 0:  # a sum that is divided by a number of the batch
                number = flat[0][term.by]
                mine, amount = [each * number for each in mine], number
            self._amounts[i] += amount
            found = iter(mine)
            factors = [[next(found) for _ in replica] for replica in rows]
            for replica, values in rest.items():
                run = apart[i][replica] if i < len(apart) else None
                for j, factor in enumerate(factors[replica]):
                    if factor:
                        loss = values[j] if run is None else run[j].double() - values[j].double()
                        self._sums[i] = self._sums[i].to(loss.device) + factor * loss.double()

    @property
    def here(self) -> list[float]:
        """What this process has added up, per kind of terms."""
        return [float(each) for each in self._sums]

    def total(self, everyone: Sequence[Sequence[float]]) -> float:
        """The loss.

        Args:
            everyone: what each process has added up.

        Raises:
            BatchError: nothing counts in any batch.
        """
        total = 0.0
        for i, term in enumerate(self._terms):
            amount = self._amounts[i] if term.by >= 0 else total_of(term, self._amounts[i])
            if not amount:
                raise BatchError(
                    "nothing in this data set counts in the loss: all its labels are ignored, or "
                    "loss_weight returns 0 for all of it"
                )
            total += sum(each[i] for each in everyone) / amount
        return total
