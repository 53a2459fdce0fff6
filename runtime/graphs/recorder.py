"""What records a run of a program: CUDA graphs, behind a small interface.

What is recorded reads and writes the same memory in every replay. Random operators keep seeds of
their own: each is recorded with a generator that belongs to it alone, and gets its seed before
every replay, so that masks are those of eager programs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from ...compiler.ir.ops import Draw, generator_of, mix

Values = Sequence[torch.Tensor]
Run = Callable[[Draw], Values]
"""Runs a program over arguments that keep their place, with what draws for its random operators."""


class Recording(Protocol):
    """A run that can be had again."""

    def replay(self, seed: int) -> None:
        """Run it; results are where they were."""
        ...


class Recorder(Protocol):
    """Of one rank. All that it records takes turns on one stream, and may share scratch memory."""

    def record(self, run: Run, seed: int, draws: int) -> tuple[Recording, Values]:
        """Record a run, which has happened once when this returns.

        Args:
            draws: how many random operators it has.

        Returns:
            Its results as well, which stay in their place as long as somebody holds them.
        """
        ...


class CudaRecorder:
    """Records on a stream of its own, into a pool of memory that all recordings of a rank share."""

    def __init__(self, device: torch.device):
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()

    def record(self, run: Run, seed: int, draws: int) -> tuple[Recording, Values]:
        graph, chances = torch.cuda.CUDAGraph(), _Chances(self._device, draws)
        for generator in chances.generators:
            graph.register_generator_state(generator)
        with torch.cuda.device(self._device):
            # threads of NCCL and of data loaders go on meanwhile
            with torch.cuda.graph(
                graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
            ):
                made = run(chances)
            recording = _CudaRecording(graph, chances, self._device)
            recording.replay(seed)
        return recording, made


class _CudaRecording:
    def __init__(self, graph: torch.cuda.CUDAGraph, chances: _Chances, device: torch.device):
        self._graph, self._chances, self._device = graph, chances, device

    def replay(self, seed: int) -> None:
        self._chances.seed(seed)
        with torch.cuda.device(self._device):
            self._graph.replay()


class _Chances:
    """The generators of the random operators of one recording, each with its operator's number.

    An operator draws from the device's default generator and takes no other, so that one has the
    state of the operator's own while it is recorded.
    """

    def __init__(self, device: torch.device, count: int):
        self._default = generator_of(device)
        self.generators = [torch.Generator(device) for _ in range(count)]
        self._sites: list[int] = []

    def draw(self, site: int, op: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        own = self.generators[len(self._sites)]
        self._sites.append(site)
        kept = self._default.graphsafe_get_state()
        self._default.graphsafe_set_state(own)
        try:
            return op(*args, **kwargs)
        finally:
            self._default.graphsafe_set_state(kept)

    def seed(self, seed: int) -> None:
        """Before a replay, which reads it."""
        for site, generator in zip(self._sites, self.generators, strict=True):
            generator.manual_seed(mix(seed, site))


RECORDERS: dict[str, Callable[[torch.device], Recorder]] = {"cuda": CudaRecorder}
"""Type of device -> what records there."""
