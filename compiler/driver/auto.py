"""n_stages, schedule and chunked_loss that are "auto": every way there is, and the best."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from ...passes.schedule.registry import DEFAULT, SCHEDULES
from ..costs.topology import ORDERS
from ..ir.errors import (
    BatchError,
    MemoryBudgetError,
    OptionError,
    PartitionError,
    PipecompileError,
)
from ..losses.logits import Chunks
from ..options.options import OF_SCHEDULE, CompileOptions
from ..options.parsing import AUTO
from ..plan.plan import Plan
from ..planning.advice import gib
from ..planning.team import Team
from .compiled import Compiled
from .layout import Layout
from .record import PassRecord

FINER = (1, 2, 4, 8)
MOST_VIRTUAL = 3
"""Stages per rank that are tried; more send more, and the bubble is small already."""
OWN = ("n_stages", "dp", *OF_SCHEDULE)
"""Options that every way has of its own."""
BACKENDS = "inductor", "eager"
"""Who may run operators: the one that is looked at first, as by what devices reach its kernels take
no longer, and the other."""
LEFT_OUT = ("gpipe", 2), ("gpipe", 3), ("interleaved", 1)
"""(schedule, stages per rank) that are not tried: ones that hold all microbatches and wait as often
as interleaved does, and one that is another by its name."""


@dataclass(frozen=True)
class Way:
    """How devices are used.

    Attributes:
        n_stages, dp: ranks of a replica, and replicas.
        virtual_stages: on a rank; None for what is usual for the schedule.
        zero, microbatches, placement: a level, their number per replica, and what ranks that are
            neighbours have in common; None for what options say.
        backend: who runs operators, where that is weighed; None for what options say.
    """

    n_stages: int
    dp: int
    schedule: str
    virtual_stages: int | None = None
    schedule_memory: str = AUTO
    zero: int | None = None
    microbatches: int | None = None
    placement: str | None = None
    backend: str | None = None

    def __str__(self) -> str:
        together = f", {self.placement} together" if self.placement else ""
        return f"{self.n_stages} × dp {self.dp}{together}"

    @property
    def order(self) -> str:
        """The schedule, for people."""
        several = f", {self.virtual_stages} stages per rank" if self.virtual_stages else ""
        return f"{self.schedule}{several}"

    def of(self, options: CompileOptions, **more: Any) -> CompileOptions:
        """Options that use them so."""
        given = dict(vars(self))
        for name in ("zero", "microbatches", "placement", "backend"):
            if given[name] is None:
                del given[name]
        if self.zero == 0:
            given["zero_by"] = AUTO
        return replace(options, **given | more)


@dataclass(frozen=True)
class Trial:
    """One way.

    Attributes:
        microbatches: per replica.
        step_s: predicted; None where it cannot be.
        reason: why it cannot be, in one line; beside a step, which is a sketch's then, why there is
            no plan.
        bubble, peak_bytes: of its plan; the peak of the fullest rank.
        zero: the level of its plan.
        about: its numbers are a sketch's: no programs were made for it.
        mfu, device_hours: model FLOPs utilization, and hours of all devices for 10⁹ tokens; 0 where
            that was not asked.
        parts: of its plan, what the step's seconds go to on the rank that computes longest.
    """

    way: Way
    microbatches: int | None
    step_s: float | None
    reason: str = ""
    bubble: float = 0.0
    peak_bytes: int = 0
    zero: int = 0
    about: bool = False
    mfu: float = 0.0
    device_hours: float = 0.0
    parts: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, way: Way, plan: Plan) -> Trial:
        """One that was planned."""
        peak = max(stage.memory.peak for stage in plan.stages)
        figures = plan.bubble, peak, int(plan.options["zero"])
        return cls(way, plan.microbatches, plan.step_s, "", *figures, parts=_parts(plan))

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        figures = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "way"}
        return vars(self.way) | figures

    def told(self, orders: bool) -> str:
        """In one line; ``orders``: with its schedule."""
        named = f"{self.way}, {self.way.order}" if orders else str(self.way)
        return f"{named}: {self.reason or f'{self.step_s:.4g} s'}"


def _parts(plan: Plan) -> dict[str, float]:
    """Waiting is the rest: for messages, in the bubble, for what replicas exchange."""
    m = plan.microbatches
    computing_s, again_s = max(
        (
            m * sum(s.forward_s + s.backward_s for s in stages),
            m * sum(s.recompute_s for s in stages),
        )
        for stages in plan.ranks
    )
    end_s = max(stage.closing_s for stage in plan.stages)
    waiting_s = max(0.0, plan.step_s - computing_s - again_s - end_s)
    return {
        "computing": computing_s,
        "recomputing": again_s,
        "waiting": waiting_s,
        "exchange and optimizer at the end": end_s,
    }


@dataclass(frozen=True)
class Open:
    """What options leave open.

    Attributes:
        divides: whether stages and replicas are.
        orders: whether the schedule is.
        devices: to be divided; None for all that there are.
        virtual_stages, schedule_memory: what every schedule is held to that can be; as options.
        stages: the fewest and the most ranks that a replica may have; None for any number.
        global_microbatches: into how many the global batch is cut, whatever the replicas; None for
            a number of each replica's own.
        places: whether the ranks may be put on machines in either order.
        weighs: whether the backend is.
    """

    divides: bool
    orders: bool
    devices: int | None = None
    virtual_stages: int | None = None
    schedule_memory: str = AUTO
    stages: tuple[int, int] | None = None
    global_microbatches: int | None = None
    places: bool = False
    weighs: bool = False

    def divisions(self, devices: int) -> list[tuple[int, int]]:
        """(ranks of a replica, replicas) of so many devices, of those that are allowed."""
        least, most = self.stages or (1, devices)
        counts = [n for n in range(least, min(most, devices) + 1) if devices % n == 0]
        whole = self.global_microbatches
        return [(n, devices // n) for n in counts if not whole or whole % (devices // n) == 0]

    def ways(self, options: CompileOptions, devices: int) -> list[Way]:
        """All of them."""
        own = Way(**{name: getattr(options, name) for name in OWN})
        whole, count = self.global_microbatches, options.microbatches
        own = replace(own, microbatches=count, backend=BACKENDS[0] if self.weighs else None)
        ways = [
            replace(own, n_stages=n, dp=dp, microbatches=whole // dp if whole else count)
            for n, dp in self.divisions(devices)
        ]
        ways = ways if self.divides else [own]
        ways = [placed for way in ways for placed in self._places(way)]
        return [order for way in ways for order in self._orders(way)] if self.orders else ways

    def _places(self, way: Way) -> list[Way]:
        """Where there is one replica, or one stage, all neighbours have the same in common."""
        if not self.places or way.n_stages == 1 or way.dp == 1:
            return [way]
        return [replace(way, placement=order) for order in ORDERS]

    def _orders(self, way: Way) -> Iterator[Way]:
        """A way in every schedule, with so many stages per rank as it may have."""
        for kind in SCHEDULES.values():
            for virtual in kind.virtual or range(1, MOST_VIRTUAL + 1):
                asked = self.virtual_stages in (None, virtual)
                waits = way.n_stages > 1 or kind.name == DEFAULT  # one rank waits for nobody
                tried = (kind.name, virtual) not in LEFT_OUT
                if asked and waits and tried:
                    several = virtual if virtual > 1 else None
                    memory = self.schedule_memory if kind.takes_limit else AUTO
                    yield replace(
                        way, schedule=kind.name, virtual_stages=several, schedule_memory=memory
                    )


def weighing(open_: Open, options: CompileOptions, is_cpu: bool) -> Open:
    """What is open, with the backend where that is weighed: nobody has named it, what is reached of
    a device tells the seconds of compiled kernels from those of others, and no bits are promised,
    as they are on CPUs."""
    free = options.backend == AUTO and options.costs == "calibrated" and not is_cpu
    return replace(open_, weighs=True) if free else open_


Build = Callable[[Way, int], Compiled]
"""(way, n) -> the compiled step of one and the same global batch, cut into n times as many
microbatches as usual."""


def choose(
    ways: Sequence[Way], build: Build, finer: bool = False
) -> tuple[Trial, tuple[Trial, ...]]:
    """Try every way.

    Args:
        finer: also with finer microbatches than usual, as long as that shortens the step.

    Returns:
        The one with the shortest predicted step, and all that were tried.

    Raises:
        OptionError: none is possible; with the reason of each.
    """
    trials = tuple(_tried(way, build, finer) for way in ways)
    possible = [trial for trial in trials if trial.step_s is not None]
    if not possible:
        what = "division" if len({way.schedule for way in ways}) == 1 else "schedule"
        raise OptionError(f'"auto": no {what} of the devices is possible: {listed(trials)}')
    return min(possible, key=lambda trial: trial.step_s or 0.0), trials


def listed(trials: Sequence[Trial]) -> str:
    orders = len({(t.way.schedule, t.way.virtual_stages) for t in trials}) > 1
    return "; ".join(trial.told(orders) for trial in trials)


def _tried(way: Way, build: Build, finer: bool) -> Trial:
    """One way; with finer microbatches where it does not fit into memory otherwise, too."""
    best = Trial(way, None, None)
    for times in FINER:
        try:
            plan = build(way, times).plan
        except MemoryBudgetError as error:
            best = replace(best, reason=best.reason or " ".join(str(error).split()))
        except (BatchError, PartitionError, OptionError) as error:
            reason = best.reason or " ".join(str(error).split())
            return best if best.step_s is not None else replace(best, reason=reason)
        else:
            if plan.step_s >= (best.step_s or math.inf):
                break
            best = Trial.of(way, plan)
            if not finer:
                break
    return best


# -- chunked_loss --------------------------------------------------------------------------------

BuildLoss = Callable[[Chunks | None, bool], Compiled]
"""(how losses are computed in pieces, whether files are written) -> the compiled step."""


class WholeError(PipecompileError):
    """No loss of the graph can be computed in pieces; the text says why."""


def chunks_of(options: CompileOptions, plan: Plan | None, layout: Layout | None) -> Chunks | None:
    """What a graph's losses are to be, where that is settled.

    Args:
        plan: that decides, if there is one.
        layout: of the graph that this one follows, if it follows one.
    """
    asked = options.chunked_loss
    if layout is not None:
        rows = layout.chunk_rows
    elif asked == AUTO:
        rows = 0 if plan is None else plan.decision.chunk_rows
    else:
        rows = 0 if isinstance(asked, str) else asked
    return Chunks(rows, layout is None and asked != AUTO) if rows else None


def check_pieces(chunks: Chunks | None, rows: int, records: Sequence[PassRecord]) -> None:
    """Raises WholeError where losses were to be in pieces of any size, and none is.

    Args:
        rows: of the graph.
        records: of the passes that made it; one for many sizes has none.
    """
    if chunks == Chunks() and not rows:
        said = (each.note for each in records if each.name == "chunks")
        raise WholeError(next(said, "logits stay whole"))


def chosen(build: BuildLoss, options: CompileOptions, team: Team, dump: bool) -> Compiled:
    """The better of whole logits and of pieces.

    Pieces are tried where whole logits do not fit, or where others have to be recomputed or
    divided for them.

    Raises:
        MemoryBudgetError: neither fits.
    """
    refused: MemoryBudgetError | None = None
    whole: Compiled | None = None
    try:
        whole = build(None, False)
    except MemoryBudgetError as error:
        refused = error
    if whole is not None and not _pays(whole, options):
        return _told(build, None, whole, dump, "logits stay whole: nothing is given up for them")
    try:
        pieces = build(Chunks(), False)
    except WholeError as why:
        if refused is not None:
            raise refused from None
        assert whole is not None
        return _told(build, None, whole, dump, str(why))
    except MemoryBudgetError:
        if whole is None:
            raise
        return _told(build, None, whole, dump, "logits stay whole: in pieces nothing fits")
    rows = pieces.layout.chunk_rows
    if whole is None:
        assert refused is not None
        first = str(refused).partition(":")[0]
        note = f"{_said('in pieces', pieces)}; whole logits do not fit: {first}"
        return _told(build, Chunks(rows), pieces, dump, note)
    both = f"{_said('in pieces', pieces)}; {_said('whole', whole)}"
    better = team.share(lambda: pieces.plan.step_s < whole.plan.step_s)
    if better:
        return _told(build, Chunks(rows), pieces, dump, both)
    return _told(build, None, whole, dump, f"logits stay whole: {both}")


def _pays(compiled: Compiled, options: CompileOptions) -> bool:
    """Whether something was given up for memory."""
    again = any(stage.recompute_s > 0 for stage in compiled.plan.stages)
    return again or compiled.layout.zero.level > options.zero_levels[0]


def _said(how: str, compiled: Compiled) -> str:
    plan = compiled.plan
    peak = max(stage.memory.peak for stage in plan.stages)
    again_s = sum(stage.recompute_s for stage in plan.stages)
    return (
        f"{how}: a step of {plan.step_s:.4g} s, {gib(peak)} at most, "
        f"{again_s * 1e3:.3g} ms recomputed per microbatch"
    )


def _told(
    build: BuildLoss, chunks: Chunks | None, made: Compiled, dump: bool, note: str
) -> Compiled:
    if dump:
        made = build(chunks, True)
    plan = made.plan
    return replace(made, plan=replace(plan, notes=(*plan.notes, ("chunked_loss", note))))
