"""Metrics of a data set, from what the model returns for its batches: means over all rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ...compiler.ir.errors import BatchError, OptionError
from ..exchange.agreement import Agreement
from .parts import Part
from .predictions import Given, Predictions, as_trouble, said_of
from .sharing import MAIN


@dataclass(frozen=True)
class Collected:
    """A metric that needs all predictions at once, such as a report per class or an AUC.

        Collected(
            lambda output, batch: (batch["labels"], output.logits.argmax(-1)),
            sklearn.metrics.classification_report,
        )

    Attributes:
        values: (output, batch) -> a tensor with the rows in dim 0, or a tuple of such. What is
            returned here is all that leaves the rank.
        compute: called once, on rank 0, with these tensors of all rows in their order, on the CPU;
            what it returns is the metric on every rank, and can be anything that pickles.
    """

    values: Callable[[Any, Any], Any]
    compute: Callable[..., Any]


Metric = Callable[[Any, Any], Any] | Collected
"""(output, batch) -> a tensor, whose elements are averaged; or (sum, count)."""


class Scores:
    """Of the batches that have run so far.

    Args:
        metrics: name -> how it is computed.

    Raises:
        OptionError: what is given is no such thing.
    """

    def __init__(self, metrics: Mapping[str, Metric]):
        _check(metrics)
        self._means = {n: m for n, m in metrics.items() if not isinstance(m, Collected)}
        self._collected = {n: m for n, m in metrics.items() if isinstance(m, Collected)}
        self._sums: dict[str, Any] = dict.fromkeys(self._means, 0.0)
        self._counts: dict[str, Any] = dict.fromkeys(self._means, 0)
        self._kept = {
            name: Predictions(metric.values, f"the values of the metric {name!r}")
            for name, metric in self._collected.items()
        }
        self._order = tuple(metrics)
        self._trouble: BatchError | None = None

    @property
    def trouble(self) -> BatchError | None:
        """What a metric has raised here, which every rank is to hear of."""
        kept = (each.trouble for each in self._kept.values())
        return self._trouble or next(filter(None, kept), None)

    def add(self, part: Part, given: Given) -> None:
        """One more; an error of a metric is kept in `trouble`, as other ranks go on."""
        for predictions in self._kept.values():
            predictions.add(part, given)
        if not part.has_rows or self.trouble:
            return
        for name, metric in self._means.items():
            what = f"the metric {name!r}"
            try:
                total, count = _sum_and_count(metric(*given()), what)
            except Exception as error:
                self._trouble = as_trouble(error, what)
                return
            self._sums[name] = self._sums[name] + total
            self._counts[name] = self._counts[name] + count

    def results(self, agreement: Agreement) -> dict[str, Any]:
        """Name -> the metric, the same on every rank. A collective.

        Raises:
            BatchError: a ``compute`` fails, on rank 0.
        """
        mine = {name: (float(self._sums[name]), float(self._counts[name])) for name in self._means}
        everyone = agreement.gather(mine)
        found: dict[str, Any] = {}
        for name in self._means:
            total = sum(each[name][0] for each in everyone)
            count = sum(each[name][1] for each in everyone)
            found[name] = total / count if count else float("nan")
        for name, metric in self._collected.items():
            found[name] = self._computed(name, metric, agreement)
        return {name: found[name] for name in self._order}

    def _computed(self, name: str, metric: Collected, agreement: Agreement) -> Any:
        values = self._kept[name].joined(agreement, MAIN)

        def compute() -> Any:
            if values is None:
                return None
            return metric.compute(*values) if isinstance(values, tuple) else metric.compute(values)

        what = f"compute of the metric {name!r}"
        return agreement.gather(agreement.together(lambda: said_of(compute, what)))[0]


def _sum_and_count(value: Any, what: str) -> tuple[Any, Any]:
    """What a metric returned, for some rows.

    Raises:
        BatchError: neither a tensor of values nor (sum, count).
    """
    if isinstance(value, tuple) and len(value) == 2:
        total, count = (torch.as_tensor(each).double() for each in value)
        if not total.dim() and not count.dim():
            return total, count
    try:
        values = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError):
        values = None
    if values is None or not values.dim():
        shown = "one number" if values is not None else f"a {type(value).__name__}"
        raise BatchError(
            f"{what} returned {shown} for rows that are a part of the data, and means of parts "
            "make no mean: return a value for each row (output.logits.argmax(-1) == "
            'batch["labels"]), or (sum, count); what needs all rows at once is '
            "pipecompile.Collected(values, compute)"
        )
    return values.double().sum(), values.numel()


def _check(metrics: object) -> None:
    known = isinstance(metrics, Mapping) and all(
        isinstance(name, str) and (callable(each) or isinstance(each, Collected))
        for name, each in metrics.items()
    )
    if not known:
        raise OptionError(
            f"metrics={metrics!r}: give a dict of functions of (output, batch), such as "
            '{"accuracy": lambda output, batch: output.logits.argmax(-1) == batch["labels"]}'
        )
    assert isinstance(metrics, Mapping)
    if "loss" in metrics:
        raise OptionError('metrics={"loss": ...}: the loss is among the results as it is: rename')
