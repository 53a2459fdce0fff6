"""Python between the programs of a step: of many stages and microbatches that compute little."""

from __future__ import annotations

from functools import partial
from time import thread_time
from typing import Any
from unittest import mock

import pipecompile
import torch
from pipecompile.runtime import session
from torch import nn

STEPS, WARM_UP = 40, 5
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
