"""What a step takes beside its programs: Python between them, and what ranks agree on."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from statistics import median
from time import perf_counter, thread_time
from typing import Any
from unittest import mock

import pipecompile
import torch
from pipecompile.compiler.driver.compiled import Mode
from pipecompile.runtime import session
from pipecompile.runtime.batch_loss import BatchLoss
from pipecompile.runtime.transport import wire
from pipecompile.runtime.transport.neighbours import SWITCH
from torch import nn

from support import jobs, models, rivals

STEPS, WARM_UP = 40, 5
PAIRS, TIMES = 100, 300
ROWS, WIDTH, LAYERS = 16, 32, 16


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.relu(layer(x))
        return x.square().mean()


def seconds_per_action(n_stages: int = 2) -> float:
    """CPU seconds of this process's thread per action of a step, without those in programs: those
    of the step that took the fewest, as others compute on the same cores."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    batch = torch.randn(ROWS, WIDTH)
    pipe = pipecompile.compile(
        Small(),
        n_stages,
        microbatches=ROWS,
        schedule="interleaved",
        virtual_stages=4,
        optimizer=partial(torch.optim.SGD, lr=1e-3),
        example_batch=batch,
    )
    (loaded,) = pipe._session.loaded.values()
    (executor,) = loaded.executors.values()
    for _ in range(WARM_UP):
        pipe.step(batch)
    spent = {"programs": 0.0, "all": 0.0}

    def timed(what: str, call: Any) -> Any:
        def timing(*args: Any) -> Any:
            start = thread_time()
            made = call(*args)
            spent[what] += thread_time() - start
            return made

        return timing

    for stage in executor.stages.values():
        for bound in stage.parts.values():
            module = bound.program.module
            module.forward = timed("programs", module.forward)
    found = []
    with mock.patch.object(session, "drive", timed("all", session.drive)):
        for _ in range(STEPS):
            spent.update(programs=0.0, all=0.0)
            pipe.step(batch)
            found.append((spent["all"] - spent["programs"]) / len(executor.actions))
    return min(found)


def _pipeline(name: str, switch: str) -> tuple[Any, dict[str, torch.Tensor]]:
    """One that trains on two stages, and its batch.

    Args:
        switch: "off" for gloo, as between machines.
    """
    torch.set_num_threads(1)
    (batch,) = models.batches(name, 8, 1)
    with mock.patch.dict(os.environ, {SWITCH: switch}):
        pipe = jobs.pipeline(name, 2, 1, 4, schedule="1f1b")
        for _ in range(WARM_UP):
            pipe.step(batch)
    return pipe, batch


def seconds_per_agreement(switch: str) -> tuple[float, float]:
    """Of a small value that all ranks tell each other, if they come to it together; and of all that
    they compare before a step, with what a process does for that."""
    pipe, batch = _pipeline("llama", switch)
    agreement = pipe._world.agreement
    values, whole = pipe._flat(batch)

    def each_s(call: Callable[[], object]) -> float:
        agreement.gather(None)
        start = perf_counter()
        for _ in range(TIMES):
            call()
        return (perf_counter() - start) / TIMES

    calls = (
        lambda: agreement.gather((1, 2, False, 3)),
        lambda: agreement.check_batch(Mode.TRAIN, whole, values),
    )
    gather_s, check_s = (min(each_s(call) for _ in range(3)) for call in calls)
    return gather_s, check_s


def counted_later(switch: str) -> tuple[float, float]:
    """Seconds of a step that hears what microbatches count before it computes, and of one that
    computes a forward first; in turn."""
    pipe, batch = _pipeline("llama", switch)
    weighing = BatchLoss.weighing

    def at_once(*given: Any) -> Any:
        weighed = weighing(*given)
        weighed()
        return weighed

    def first() -> Any:
        return mock.patch.object(BatchLoss, "weighing", at_once)

    return _in_turn(pipe, batch, first, lambda: mock.patch.object(BatchLoss, "weighing", weighing))


def bundled(name: str) -> tuple[float, float]:
    """Seconds of a step over gloo in which each value is a message, and of one in which small
    values of an action travel together; in turn."""
    pipe, batch = _pipeline(name, "off")

    def small(nbytes: int) -> Any:
        pipe._world.transport._bundles = wire.Known(wire.Bundle)
        return mock.patch.object(wire, "SMALL", nbytes)

    return _in_turn(pipe, batch, lambda: small(0), lambda: small(32 << 10))


def _in_turn(
    pipe: Any, batch: dict[str, torch.Tensor], *ways: Callable[[], Any]
) -> tuple[float, float]:
    """Medians of a step in two ways, by turns A B B A."""
    times: tuple[list[float], list[float]] = ([], [])
    for pair in range(PAIRS):
        for which in (0, 1) if pair % 2 else (1, 0):
            with ways[which]():
                start = perf_counter()
                pipe.step(batch)
                times[which].append(perf_counter() - start)
    return median(times[0]), median(times[1])


def share_of_optimizer() -> float:
    """Of a step of two stages per rank: what the optimizer of this rank takes of it."""
    torch.set_num_threads(1)
    step = rivals.compiled("interleaved", virtual=2)
    for _ in range(2):
        step()
    inside: list[float] = []
    call = torch.optim.AdamW.step

    def timed(self: torch.optim.AdamW, *given: Any) -> Any:
        start = perf_counter()
        made = call(self, *given)
        inside.append(perf_counter() - start)
        return made

    with mock.patch.object(torch.optim.AdamW, "step", timed):
        start = perf_counter()
        for _ in range(10):
            step()
        whole = perf_counter() - start
    return sum(inside) / whole
