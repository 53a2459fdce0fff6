"""Metrics of a data set are those of one device over all rows, whatever replicas and batches."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import Any
from unittest import mock

import numpy as np
import pipecompile
import pytest
import torch
from pipecompile.errors import BatchError, OptionError
from pipecompile.runtime.transport.neighbours import SWITCH
from support import rated
from support.gang import Gang
from support.matrix import quickly
from torch import nn


def confusion(labels: torch.Tensor, classes: torch.Tensor) -> list[list[int]]:
    """As a report would need it: of all rows."""
    pairs = list(zip(labels.tolist(), classes.tolist(), strict=True))
    span = range(rated.CLASSES)
    return [[pairs.count((i, j)) for j in span] for i in span]


def margins(output: Any, _: Any) -> tuple[torch.Tensor, int]:
    """A sum, and what it is a mean over."""
    first = output["logits"].topk(2).values
    return (first[:, 0] - first[:, 1]).sum(), len(first)


METRICS: dict[str, Any] = {
    "accuracy": rated.accuracy,
    "margin": margins,
    "per class": lambda output, batch: output["logits"] > 0,  # (rows, classes)
    "of some": lambda output, batch: rated.accuracy(output, batch)[batch["labels"] > 1],
    "numpy": lambda output, batch: np.asarray(output["logits"][:, 0]),
    "confusion": pipecompile.Collected(
        lambda output, batch: (batch["labels"], output["logits"].argmax(-1)), confusion
    ),
    "rows": pipecompile.Collected(lambda output, batch: batch["labels"], len),
}


def scored(options: dict[str, Any], shared: str = "") -> dict[str, Any]:
    with mock.patch.dict(os.environ, {SWITCH: shared}):
        pipe = rated.pipeline(**options)
        loader = pipe.loader(rated.data_set(), rated.BATCH)
        found: dict[str, Any] = pipe.evaluate(loader, metrics=METRICS)
        assert found["loss"] == pytest.approx(float(pipe.evaluate(loader)), rel=1e-6)
        return found


def check(found: dict[str, Any]) -> None:
    logits, labels = rated.returned(rated.Classifier())
    right, top = logits.argmax(-1) == labels, logits.topk(2).values
    assert list(found) == ["loss", *METRICS]
    expected = float(nn.functional.cross_entropy(logits, labels))
    assert found["loss"] == pytest.approx(expected, rel=1e-6)
    assert found["accuracy"] == right.double().mean()
    assert found["margin"] == pytest.approx(float((top[:, 0] - top[:, 1]).mean()), rel=1e-6)
    assert found["per class"] == (logits > 0).double().mean()
    assert found["of some"] == right[labels > 1].double().mean()
    assert found["numpy"] == pytest.approx(float(logits[:, 0].mean()), rel=1e-5)
    assert found["confusion"] == confusion(labels, logits.argmax(-1))
    assert found["rows"] == rated.ROWS


def apart(output: Any, batch: Any) -> torch.Tensor:
    return nn.functional.cross_entropy(output["logits"], batch["labels"])


OPTIONS: dict[str, dict[str, Any]] = {
    "of the model": {},
    "loss_fn": {"loss_fn": apart},
    "loss_weight": {"loss_weight": lambda batch: len(batch["labels"])},
    "one microbatch": {"microbatches": 1},
}


@pytest.mark.parametrize("name", quickly(set(OPTIONS) - {"loss_weight"}, OPTIONS))
def test_one_process(name: str) -> None:
    check(scored(OPTIONS[name]))


@pytest.mark.parametrize(
    ("which", "shared"),
    quickly([("of the model", "")], [(w, s) for w in OPTIONS for s in ("", "off")]),
)
def test_many_processes(gang: Callable[[int], Gang], which: str, shared: str) -> None:
    """Batches of 5, 5, 5 and 1 rows: a replica has none in the last one."""
    for found in gang(4).run(in_gang, which, shared):
        check(found)


def in_gang(which: str, shared: str) -> dict[str, Any]:
    return scored(OPTIONS[which], shared)


def test_a_batch_is_scored_like_a_loader_of_one() -> None:
    pipe, batch = rated.pipeline(1, 1, 2), rated.batches()[0]
    one = pipe.evaluate(batch, metrics={"accuracy": rated.accuracy})
    assert one == pipe.evaluate(iter([batch]), metrics={"accuracy": rated.accuracy})
    assert one["loss"] == pytest.approx(float(pipe.evaluate(batch)), rel=1e-6)


def test_a_mean_over_nothing_is_no_number() -> None:
    pipe = rated.pipeline(1, 1, 1)
    nothing = {"none": lambda output, batch: output["logits"][:0]}
    assert math.isnan(pipe.evaluate(rated.batches()[0], metrics=nothing)["none"])


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        (lambda output, batch: output["logits"].mean(), "returned one number for rows that are"),
        (lambda output, batch: 0.5, "returned one number"),
        (lambda output, batch: "good", "returned a str for rows"),
        (lambda output, batch: output["scores"], "'it' raised KeyError: 'scores'"),
        (
            pipecompile.Collected(lambda output, _: output["loss"], len),
            "'it' returned a number",
        ),
        (
            pipecompile.Collected(lambda output, batch: batch["labels"], lambda _: 1 / 0),
            "compute of the metric 'it' raised ZeroDivisionError",
        ),
    ],
)
def test_what_a_metric_may_return(metric: Any, message: str) -> None:
    with pytest.raises(BatchError, match=message):
        rated.pipeline(1, 1, 1).evaluate(rated.batches()[0], metrics={"it": metric})


@pytest.mark.parametrize("metrics", [rated.accuracy, {"accuracy": 0.5}, {"loss": rated.accuracy}])
def test_metrics_that_are_none(metrics: Any) -> None:
    with pytest.raises(OptionError, match="metrics="):
        rated.pipeline(1, 1, 1).evaluate(rated.batches()[0], metrics=metrics)


def failing_on_one_rank() -> tuple[str, float]:
    """A metric fails on rank 3 in the second batch; all ranks hear of it, and go on."""
    pipe = rated.pipeline()
    loader = pipe.loader(rated.data_set(), rated.BATCH)
    calls: list[int] = []

    def failing(output: Any, batch: Any) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 2 and os.environ["RANK"] == "3":
            raise ArithmeticError("no numbers")
        return rated.accuracy(output, batch)

    with pytest.raises(BatchError, match="the metric 'it' raised ArithmeticError: no") as caught:
        pipe.evaluate(loader, metrics={"it": failing})
    assert pipe.state_dict()
    return str(caught.value), pipe.evaluate(loader, metrics={"it": rated.accuracy})["it"]


def test_a_metric_that_fails_on_one_rank(gang: Callable[[int], Gang]) -> None:
    answers = gang(4).run(failing_on_one_rank)
    logits, labels = rated.returned(rated.Classifier())
    assert {found for _, found in answers} == {float((logits.argmax(-1) == labels).double().mean())}


def without_data() -> str:
    pipe = pipecompile.compile(Unlabelled(), 2, microbatches=1, loss_fn=None)
    batch = torch.ones(2, 4)
    pipe.forward(batch)
    mine = batch if pipe.needs_data else None
    with pytest.raises(BatchError, match="given None as its batch") as caught:
        pipe.predict(mine, lambda output, batch: output["y"])
    return str(caught.value)


class Unlabelled(nn.Module):
    """Its last stage reads nothing of the batch."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(4))

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        for layer in self.layers:
            x = layer(x).tanh()
        return {"y": x, "loss": x.square().mean()}


def test_a_rank_that_has_outputs_and_no_batch(gang: Callable[[int], Gang]) -> None:
    assert len(set(gang(2).run(without_data))) == 1
