"""Metrics of a step are the numbers of a loop on one device; times and bytes are what was there."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from dataclasses import FrozenInstanceError, replace
from functools import partial
from typing import Any
from unittest import mock

import pipecompile
import pytest
import torch
from pipecompile.compiler.costs.hardware import CPU
from pipecompile.compiler.costs.topology import Numbering
from pipecompile.errors import StateError
from pipecompile.runtime.monitor.reports import Report, bubble_of
from pipecompile.runtime.transport.neighbours import REPORTS, SWITCH
from support import jobs, models, rated
from support.gang import Gang
from support.matrix import quickly
from torch.optim.lr_scheduler import LambdaLR

HALVED = partial(LambdaLR, lr_lambda=lambda step: 0.5**step)
PEAK = replace(CPU, flops_per_s={"float32": 1e9})


def trained(shared: str = "", **options: Any) -> list[dict[str, Any]]:
    """Metrics of all batches of the data set, the last of which has one row; read after each step
    but on rank 1, which reads none: reading is no collective."""
    with mock.patch.dict(os.environ, {SWITCH: shared}):
        pipe = rated.pipeline(lr_scheduler=HALVED, hardware=PEAK, **options)
        found = []
        for batch in pipe.loader(rated.data_set(), rated.BATCH):
            loss = pipe.step(batch)
            if os.environ.get("RANK") == "1":
                continue
            now = pipe.metrics
            assert now.loss == float(loss)
            values = {name: getattr(now, name) for name in ("rows", "tokens", "flops", "step")}
            found.append(now.numbers() | values | {"next": pipe.get_lr(), "devices": now.devices})
        return found


def check(found: list[dict[str, Any]], processes: int) -> None:
    losses, norms, _ = rated.train_plainly(4, HALVED)
    pipe = rated.pipeline(1, 1, 1, hardware=PEAK, example_batch=rated.batches()[3])
    (stage,) = pipe.plan.stages
    of_a_row = stage.forward_flops + stage.backward_flops
    assert [each["step"] for each in found] == [1, 2, 3, 4]
    assert [each["rows"] for each in found] == [5, 5, 5, 1]
    for i, each in enumerate(found):
        assert each["loss"] == pytest.approx(losses[i], rel=1e-5)
        assert each["grad_norm"] == pytest.approx(norms[i], rel=1e-5)
        assert each["lr"] == 0.1 * 0.5**i
        assert each["next"] == [0.1 * 0.5 ** (i + 1)]
        assert each["tokens"] == each["rows"] * rated.LENGTH
        assert each["flops"] == each["rows"] * of_a_row
        assert each["devices"] == processes
        assert each["tokens_per_s"] == pytest.approx(each["tokens"] / each["step_s"])
        assert each["tokens_per_s_per_device"] * processes == pytest.approx(each["tokens_per_s"])
        assert each["rows_per_s"] == pytest.approx(each["rows"] / each["step_s"])
        could = 1e9 * processes * each["step_s"]
        assert each["mfu"] == pytest.approx(each["flops"] / could)
        assert each["overflowed"] is False


def test_one_process() -> None:
    found = trained()
    check(found, 1)
    assert all(each["exchanged_bytes"] == 0 for each in found)
    assert all("bubble" not in each and "peak_bytes" not in each for each in found)


@pytest.mark.parametrize("shared", quickly([""], ["", "off"]))
def test_many_processes(gang: Callable[[int], Gang], shared: str) -> None:
    first, second, *others = gang(4).run(trained, shared)
    assert not second
    check(first, 4)
    for each in first:
        assert 0 < each["bubble"] < 1
    for metrics in others:  # what other ranks tell, rank 0 alone is told
        assert all("bubble" not in each and "exchanged_bytes" not in each for each in metrics)
        assert [each["loss"] for each in metrics] == [each["loss"] for each in first]


def exchanged(shared: str, zero: int) -> tuple[list[int | None], int]:
    """Bytes of steps; and of this rank what a step should send, by its plan and its buckets."""
    with mock.patch.dict(os.environ, {SWITCH: shared}):
        pipe = jobs.pipeline("gpt2", 2, 2, 2, zero=zero)
    batch = models.batches("gpt2", 4, 1)[0]
    found = []
    for _ in range(2):
        pipe.step(batch)
        found.append(pipe.metrics.exchanged_bytes)
    (rank,) = pipe._session.state.ranks.values()
    (stage,) = rank.stages
    values = sum(sent.bytes for sent in pipe.plan.stages[stage].sends) * pipe.plan.microbatches
    # the mean of n buckets: all-to-all and all-gather, (n - 1) / n of each; n is 2
    grads = sum(each.nbytes for each in rank.grads.buffers.values())
    # the total of a tied gradient goes back from the owner to the other stages
    tied = sum(t.bytes * (len(t.stages) - 1) for t in pipe.plan.tied if t.owner == stage)
    return found, values + grads + tied


@pytest.mark.parametrize("shared", quickly([""], ["", "off"]))
def test_exchanged_bytes_are_those_of_values_and_gradients(
    gang: Callable[[int], Gang], shared: str
) -> None:
    answers = gang(4).run(exchanged, shared, 0)
    expected = sum(mine for _, mine in answers)
    assert answers[0][0] == [expected, expected]
    assert answers[1][0] == [None, None]


@pytest.mark.slow
@pytest.mark.parametrize("zero", [1, 2, 3])
def test_exchanged_bytes_are_the_same_through_memory_and_over_gloo(
    gang: Callable[[int], Gang], zero: int
) -> None:
    through, over = (gang(4).run(exchanged, shared, zero)[0][0] for shared in ("", "off"))
    assert through == over


def test_the_bubble_is_the_share_of_time_without_computation() -> None:
    def report(busy_s: float, span_s: float) -> Report:
        return Report(busy_s, span_s, 0.0, math.nan)

    ranks = [report(3, 4), report(2, 3), report(4, 5), report(1, 2)]
    two = Numbering(2, 2)
    assert bubble_of([ranks], two) == pytest.approx(1 - 10 / (2 * 4 + 2 * 5))
    assert bubble_of([ranks, ranks], two) == bubble_of([ranks], two)
    assert bubble_of([[report(math.nan, math.nan)] * 4], two) is None
    mixed = [ranks[0], ranks[2], ranks[1], ranks[3]]
    assert bubble_of([mixed], Numbering(2, 2, "replicas")) == bubble_of([ranks], two)


def slow_stage() -> float | None:
    """The bubble, where stage 1 takes its time."""
    pipe = rated.pipeline(dp=1)
    batch = rated.batches()[0]
    pipe.step(batch)
    if os.environ["RANK"] == "1":
        (executor,) = next(reversed(pipe._session.loaded.values())).executors.values()
        compute = type(executor)._compute

        def slowly(*args: Any) -> None:
            time.sleep(0.02)
            compute(*args)

        with mock.patch.object(type(executor), "_compute", slowly):
            pipe.step(batch)
    else:
        pipe.step(batch)
    found: float | None = pipe.metrics.bubble
    return found


def test_a_stage_that_waits_is_seen(gang: Callable[[int], Gang]) -> None:
    """Stage 0 computes nearly nothing of the time: half of all is bubble."""
    bubble, other = gang(2).run(slow_stage)
    assert bubble == pytest.approx(0.5, abs=0.1)
    assert other is None


# -- loops of one's own -----------------------------------------------------------------------


def test_a_loop_of_ones_own() -> None:
    pipe, batches = rated.pipeline(), rated.batches()
    with pytest.raises(StateError, match=r"before a step has ended: call step\(\), or end_step"):
        _ = pipe.metrics
    with pytest.raises(StateError, match=r"end_step\(\) before forward_backward"):
        pipe.end_step()
    losses = [float(pipe.forward_backward(batch)) for batch in batches[:2]]
    norm = pipe.clip_grad_norm_(1.0)
    pipe.optimizer.step()
    pipe.zero_grad()
    metrics = pipe.end_step()
    assert metrics is pipe.metrics
    assert (metrics.step, metrics.rows) == (2, 10)
    assert metrics.loss == sum(losses) / 2
    assert metrics.grad_norm == float(norm)
    pipe.forward_backward(batches[0])
    pipe.end_step()
    assert pipe.metrics.grad_norm is None  # of the step before
    assert pipe.metrics.step == 3


def test_a_loop_that_never_ends_a_step_keeps_one() -> None:
    pipe, batch = rated.pipeline(), rated.batches()[0]
    for _ in range(3):
        pipe.forward_backward(batch)
        pipe.zero_grad()
    assert len(pipe._meter._step.runs) == 1
    assert pipe.end_step().rows == 5


def unread() -> int:
    """Packets that nobody reads, after steps of which nobody reads metrics."""
    pipe, batch = rated.pipeline(), rated.batches()[0]
    for _ in range(4):
        pipe.step(batch)
    (reports,) = pipe.metrics.sources.reports
    neighbours = pipe._world.agreement.neighbours
    pipe.evaluate(batch)  # what was reported has arrived
    waiting = sum(ticket.channel == REPORTS for ticket in neighbours._inbox)
    reports()
    return waiting


def test_reports_that_nobody_reads_do_not_pile_up(gang: Callable[[int], Gang]) -> None:
    assert gang(4).run(unread) == [3, 0, 0, 0]  # of the last step


def test_a_step_that_fails_is_no_step() -> None:
    pipe, batch = rated.pipeline(), rated.batches()[0]
    pipe.step(batch)
    with pytest.raises(pipecompile.errors.BatchError):
        pipe.step(batch | {"labels": batch["labels"] + rated.CLASSES})
    assert pipe.metrics.step == 1
    pipe.step(batch)
    assert (pipe.metrics.step, pipe.metrics.rows) == (2, 5)


def test_metrics_stay_as_they_were() -> None:
    pipe = rated.pipeline(
        optimizer=partial(torch.optim.SGD, lr=torch.tensor(0.25)),
        lr_scheduler=HALVED,
    )
    pipe.step(rated.batches()[0])
    first = pipe.metrics
    pipe.step(rated.batches()[1])
    assert (first.lr, pipe.metrics.lr) == (0.25, 0.125)
    assert first.loss != pipe.metrics.loss
    with pytest.raises(FrozenInstanceError):
        first.rows = 3  # type: ignore[misc]


def test_the_norm_without_clipping() -> None:
    pipe, plain = rated.pipeline(max_grad_norm=math.inf), rated.pipeline(max_grad_norm=None)
    for batch in rated.batches()[:2]:
        assert pipe.step(batch) == plain.step(batch)
        assert pipe.metrics.grad_norm is not None
        assert plain.metrics.grad_norm is None
    assert all(map(torch.equal, pipe.parameters(), plain.parameters()))


def test_what_is_not_known_is_none() -> None:
    pipe = rated.pipeline(max_grad_norm=None, optimizer=None)
    pipe.forward_backward(rated.batches()[0])
    metrics = pipe.end_step()
    assert (metrics.mfu, metrics.grad_norm, metrics.lr, metrics.bubble) == (None,) * 4
    assert (metrics.lrs, metrics.loss_scale) == ((), None)
    assert set(metrics.numbers()) == {
        "loss", "step_s", "rows_per_s", "tokens_per_s", "tokens_per_s_per_device", "overflowed",
        "exchanged_bytes",
    }  # fmt: skip
    assert metrics.planned.peak_bytes == max(s.memory.peak for s in pipe.plan.stages)
    assert metrics.planned.step_s == pipe.plan.step_s


def test_fp16_steps_that_are_skipped() -> None:
    pipe = rated.pipeline(1, 1, 1, precision="fp16")
    pipe.loss_scaler.scale = 2.0**60
    pipe.step(rated.batches()[0])
    assert pipe.metrics.overflowed
    assert pipe.metrics.loss_scale == 2.0**60
    assert pipe.metrics.grad_norm is None
    pipe.loss_scaler.scale = 8.0
    pipe.step(rated.batches()[0])
    assert not pipe.metrics.overflowed
    assert pipe.metrics.loss_scale == 8.0
