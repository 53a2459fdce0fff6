"""From ``with pipe.trace("run.json")`` to a file: who records, whose clock counts, who writes."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import torch

from ...compiler.driver.compiled import Compiled
from ...compiler.ir.errors import TraceError
from ...compiler.trace.planned import header_of, planned_trace
from ...compiler.trace.trace import Held, Lane, Origin, Span, Trace
from ...compiler.trace.writing import check_writable, write_trace
from ..exchange.agreement import Agreement
from ..transport.mesh import Mesh
from .clocks import ahead_ns
from .log import Entry, ProcessLog, RankLog

_NOTHING = contextlib.nullcontext()
_ALONE = "of one process: nothing to bring together"
_BROUGHT = (
    "time.perf_counter of each process, moved onto rank 0's by the quickest of 10 questions at the "
    "start and at the end; what half a round trip explains is left"
)
_APART = "of this process alone: its steps failed before ranks could compare their clocks"


class Logged(Protocol):
    """What a rank's executor looks at."""

    log: RankLog | None


@dataclass(frozen=True)
class Moment:
    """A rank's clock beside rank 0's.

    Attributes:
        here_ns: `time.perf_counter_ns` of this process.
        ahead_ns: how far it is ahead of rank 0's.
    """

    here_ns: int
    ahead_ns: int


@dataclass(frozen=True)
class Part:
    """What one process has recorded."""

    entries: list[Entry]
    before: Moment
    after: Moment

    def on_first(self, here_ns: int) -> int:
        """A time of this process's clock on rank 0's: clocks drift evenly from one moment to the
        other."""
        span = self.after.here_ns - self.before.here_ns
        share = (here_ns - self.before.here_ns) / span if span else 0.0
        drift = self.after.ahead_ns - self.before.ahead_ns
        return here_ns - self.before.ahead_ns - round(share * drift)


class Recording:
    """Records one trace at a time.

    Args:
        devices: rank of this process -> where it computes.

    Attributes:
        log: where executors and the pipeline note what they do; None while nothing is recorded.
    """

    def __init__(
        self,
        mesh: Mesh,
        agreement: Agreement,
        devices: Mapping[int, torch.device],
    ):
        self._mesh, self._agreement, self._devices = mesh, agreement, devices
        self.log: ProcessLog | None = None
        self._attached: list[Logged] = []
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []

    @contextlib.contextmanager
    def trace(
        self,
        path: Path,
        planned: Path | None,
        first: Callable[[], Compiled],
        guard: Callable[[str], contextlib.AbstractContextManager[None]],
    ) -> Iterator[None]:
        """Record what happens inside, and write it.

        Args:
            planned: where to write what was predicted.
            first: the graph that runs; raises NotCompiledError where none has.
            guard: around what ranks do together.
        """
        if self.log is not None:
            raise TraceError("a trace is being recorded already: one ends before another begins")
        with guard("the beginning of trace()"):
            self._agreement.together(lambda: self._check(path, planned), TraceError)
            started_ns, before = time.time_ns() - time.perf_counter_ns(), self._moment()
            log = self.log = ProcessLog(self._devices)
        try:
            yield
        except BaseException:
            with contextlib.suppress(Exception):  # the error inside says more
                self._write_alone(path, log, before, first, started_ns)
            raise
        finally:
            self._detach()
        with guard("the end of trace()"):
            part = Part(log.entries(), before, self._moment())
            parts = self._agreement.collect(part)
            self._agreement.together(
                lambda: self._write(path, planned, parts, log, first, started_ns), TraceError
            )

    def range(self, name: str) -> contextlib.AbstractContextManager[None]:
        """A range of the trace; inside another one, or where nothing is recorded, nothing."""
        log = self.log
        return _NOTHING if log is None or log.busy else self._ranged(log, name)

    def closing(self, name: str) -> contextlib.AbstractContextManager[None]:
        """Something that is done once per step, by this process's first rank."""
        log = self.log
        return _NOTHING if log is None else self._closed(log, name)

    def attach(self, states: Mapping[int, Logged], optimizer: torch.optim.Optimizer | None) -> None:
        """Have executors note what they do, if anything is recorded, and the optimizer."""
        if self.log is None or self._attached:
            return
        for rank, state in states.items():
            state.log = self.log.ranks[rank]
            self._attached.append(state)
        if optimizer is not None:
            self._watch(self.log, optimizer)

    # -- the inside -------------------------------------------------------------------------

    def _watch(self, log: ProcessLog, optimizer: torch.optim.Optimizer) -> None:
        """Whoever steps it."""
        first = next(iter(log.ranks.values()))
        began = []

        def begin(*_: object) -> None:
            began.append(first.now())

        def end(*_: object) -> None:
            first.other(Lane.CLOSING, "optimizer", began.pop())

        self._hooks = [
            optimizer.register_step_pre_hook(begin),
            optimizer.register_step_post_hook(end),
        ]

    def _detach(self) -> None:
        for state in self._attached:
            state.log = None
        for hook in self._hooks:
            hook.remove()
        self.log, self._attached, self._hooks = None, [], []

    @contextlib.contextmanager
    def _ranged(self, log: ProcessLog, name: str) -> Iterator[None]:
        log.begin(name)
        try:
            yield
        finally:
            log.end()

    @contextlib.contextmanager
    def _closed(self, log: ProcessLog, name: str) -> Iterator[None]:
        first = next(iter(log.ranks.values()))
        start = first.now()
        yield
        first.other(Lane.CLOSING, name, start)

    def _check(self, path: Path, planned: Path | None) -> None:
        """Raises TraceError where rank 0 could not write a file."""
        if self._mesh.rank in (None, 0):
            check_writable(path, f"trace({str(path)!r})")
            if planned is not None:
                check_writable(planned, f"trace(plan={str(planned)!r})")

    def _moment(self) -> Moment:
        """Of this rank's clock; a collective."""
        ahead, _ = ahead_ns(self._mesh, self._agreement.control)
        return Moment(time.perf_counter_ns(), ahead)

    def _write(
        self,
        path: Path,
        planned: Path | None,
        parts: list[Part] | None,
        log: ProcessLog,
        first: Callable[[], Compiled],
        started_ns: int,
    ) -> None:
        """What all have recorded, on rank 0."""
        if parts is None:
            return
        clocks = _BROUGHT if self._mesh.distributed and self._mesh.size > 1 else _ALONE
        trace = _assembled(first, parts, log.memory, clocks, started_ns)
        shared = not self._mesh.distributed and self._mesh.size > 1
        write_trace(replace(trace, header=replace(trace.header, shared_thread=shared)), path)
        if planned is not None:
            compiled = first()
            write_trace(planned_trace(compiled.plan, compiled.timeline), planned)

    def _write_alone(
        self,
        path: Path,
        log: ProcessLog,
        before: Moment,
        first: Callable[[], Compiled],
        started_ns: int,
    ) -> None:
        """What this process has, after an error: other ranks may be anywhere."""
        part = Part(log.entries(), before, replace(before, here_ns=before.here_ns + 1))
        trace = _assembled(first, [part], log.memory, _APART, started_ns)
        header = replace(trace.header, complete=False, shared_thread=self._mesh.rank is None)
        write_trace(replace(trace, header=header), alone(path, self._mesh.rank))


def alone(path: Path, rank: int | None) -> Path:
    """Where a process writes its own part: ``run.rank3.json``; the only one to ``run.json``."""
    return path if rank is None else path.with_name(f"{path.stem}.rank{rank}{path.suffix}")


def _assembled(
    first: Callable[[], Compiled], parts: list[Part], memory: str, clocks: str, started_ns: int
) -> Trace:
    """One trace of what processes have recorded, from the first that happened.

    Args:
        started_ns: rank 0's nanoseconds since 1970 when its `time.perf_counter_ns` was 0.

    Raises:
        TraceError: there is nothing in it.
    """
    moved = [
        (entry, part.on_first(entry.start_ns), part.on_first(entry.end_ns))
        for part in parts
        for entry in part.entries
    ]
    if not moved:
        raise TraceError("nothing has run inside trace(): call step() or forward_backward() in it")
    zero = min(start for _, start, _ in moved)
    spans = [
        Span(e.rank, e.lane, e.name, e.step, (a - zero) / 1e9, (b - zero) / 1e9, e.nbytes)
        for e, a, b in moved
    ]
    held = [Held(e.rank, (b - zero) / 1e9, e.held) for e, _, b in moved if e.held is not None]
    compiled = first()
    header = header_of(compiled.plan, compiled.schedule, Origin.MEASURED, memory, clocks)
    header = replace(header, started_ns=started_ns + zero)
    ranks = tuple(sorted({entry.rank for entry, _, _ in moved}))
    return Trace(header, ranks, tuple(spans), tuple(held))
