"""What a process really holds during a step, counted storage by storage."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import Any
from unittest import mock

import pipecompile
import torch
from bench import models as larger
from pipecompile.compiler.memory.meter import StorageMeter
from pipecompile.runtime.state import model_state as state
from pipecompile.runtime.transport.neighbours import SWITCH
from torch.profiler import ProfilerActivity, profile

from support import jobs, models


def held(pipe: Any, batch: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """What a process holds between steps."""
    tensors = list(batch.values())
    for rank in pipe._session.state.ranks.values():
        tensors += [*rank.params.values(), *rank.buffers.values(), *rank.grads.buffers.values()]
        tensors += rank.shards.masters.values() if rank.shards is not None else ()
    for states in pipe.optimizer.state.values():
        tensors += [value for value in states.values() if isinstance(value, torch.Tensor)]
    for loaded in pipe._session.loaded.values():
        for executor in loaded.executors.values():
            for stage in executor.stages.values():
                for bound in stage.parts.values():
                    tensors += [value for value in bound.fixed if isinstance(value, torch.Tensor)]
    return tensors


def peak_bytes(pipe: Any, batch: dict[str, torch.Tensor]) -> int:
    """The most that is alive at once during a step; the first step must have been taken."""
    meter = StorageMeter()
    meter.hold(held(pipe, batch))
    with meter:
        pipe.step(batch)
    return meter.peak_bytes


def shares(
    name: str, n_stages: int, dp: int, microbatches: int, length: int, **options: Any
) -> dict[str, int]:
    """Of this process: measured and predicted peak, and what it holds, by kind and predicted.

    Exchanged over gloo, as plans have it: through shared memory some is not allocated by torch.
    """
    torch.manual_seed(1)
    batch = models.tokens(2 * microbatches, length)
    with mock.patch.dict(os.environ, {SWITCH: "off"}):
        pipe = jobs.pipeline(name, n_stages, dp, microbatches, example_batch=batch, **options)
    pipe.step(batch)
    (rank,) = pipe._session.state.ranks.values()
    memory = pipe.plan.stages[rank.stages[0]].memory
    weights = [*rank.params.values(), *(rank.shards.masters.values() if rank.shards else ())]
    states = [t for s in pipe.optimizer.state.values() for t in s.values()]
    return {
        "peak": peak_bytes(pipe, batch),
        "predicted peak": memory.peak,
        "weights": distinct_bytes(weights),
        "predicted weights": memory.weights,
        "copies": distinct_bytes(rank.copies.values()),
        "predicted copies": memory.copies,
        "grads": rank.grads.nbytes,
        "predicted grads": memory.grads,
        "states": distinct_bytes(states),
        "predicted states": memory.states,
    }


class RealMeter(StorageMeter):
    """Leaves out what has no data."""

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage.device.type != "meta":
            super()._count(storage)


def loading(pipe: Any, batch: dict[str, torch.Tensor]) -> tuple[int, int]:
    """Bytes beyond those of the user's model, while a pipeline's values are made: the most that
    are alive at once, and what is left of them afterwards."""
    meter, materialize, kept = RealMeter(), state.materialize, []

    def watched(*args: Any) -> Any:
        with meter:
            made = materialize(*args)
        kept.append(meter.current_bytes)
        return made

    with mock.patch.object(state, "materialize", watched):
        pipe.compile_for(batch)
    return meter.peak_bytes, kept[0]


def distinct_bytes(tensors: Iterable[Any]) -> int:
    """Of distinct storages."""
    kept = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(kept.values())


def peaks(name: str, microbatches: int, length: int, **options: Any) -> tuple[int, int, int]:
    """Of this process's stage: measured peak, predicted peak, and bytes of its largest message.

    Exchanged over gloo, as in `shares`.
    """
    torch.manual_seed(1)
    batch = models.tokens(2 * microbatches, length)
    with mock.patch.dict(os.environ, {SWITCH: "off"}):
        pipe = jobs.pipeline(name, 2, 1, microbatches, example_batch=batch, **options)
    pipe.step(batch)
    stage = pipe.plan.stages[pipe._world.mesh.rank]
    return peak_bytes(pipe, batch), stage.memory.peak, max(sent.bytes for sent in stage.sends)


def allocated(run: Callable[[], Any]) -> tuple[int, int, Any]:
    """Peak and final bytes by what torch's allocator reports to its profiler, and the result."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = run()
    found: Any = profiler.profiler  # the events one by one have no public way out
    events = [e for e in found.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak, live, result


def allocated_peak(pipe: Any, batch: dict[str, torch.Tensor]) -> int:
    """`peak_bytes` with what compiled kernels allocate, which the meter does not see; two steps
    must have been taken, as kernels keep what they make at first."""
    before = distinct_bytes(held(pipe, batch))
    more, _, _ = allocated(lambda: pipe.step(batch))
    return before + more


def compiled_peaks(name: str, **options: Any) -> tuple[int, int, int]:
    """`peaks` of two stages with Inductor's kernels, of a model that is larger than what these
    allocate inside."""
    given = larger.batch(16)
    options |= {"optimizer": jobs.OPTIMIZERS["adamw"], "backend": "inductor"}
    with mock.patch.dict(os.environ, {SWITCH: "off"}):
        pipe = pipecompile.compile(
            larger.build(name), 2, microbatches=4, example_batch=given, **options
        )
    for _ in range(2):
        pipe.step(given)
    stage = pipe.plan.stages[pipe._world.mesh.rank]
    largest = max(sent.bytes for sent in stage.sends)
    return allocated_peak(pipe, given), stage.memory.peak, largest
