"""What `pipecompile inspect` does: a request -> a plan, and what to say of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...passes.schedule.registry import DEFAULT
from ...passes.schedule.simulate import Timeline
from ..capture.batch import BatchSpec, flatten
from ..capture.exports import Exports
from ..capture.refusals import check_model
from ..capture.skeleton import Skeleton, skeleton_of
from ..capture.whole import with_loss
from ..costs.hardware import Device
from ..driver.auto import OWN, Open, Trial, Way, choose
from ..driver.builder import Builder
from ..driver.capturing import Shared
from ..driver.compiled import Compiled, main_mode
from ..driver.record import prepare
from ..ir.errors import OptionError, PipecompileError
from ..ir.precision import computed_in
from ..options.microbatches import divide
from ..options.options import CompileOptions
from ..options.parsing import AUTO
from ..plan.plan import Plan
from ..planning.target import Target
from ..report.compare import ORDERS, QUICK, compare, unit_names
from ..report.compare import calibrated as as_programs
from ..report.hints import Subject, hints
from ..report.report import Extras
from ..search.neighbours import HELPS, better_than
from ..search.search import Found, rated, search
from ..search.space import ways_of
from ..search.subject import Subject as Searched
from ..subjects.spec import load
from ..trace.planned import planned_trace
from ..trace.writing import write_trace
from ..tracing.collecting import settle, uncollected
from ..verdict.verdict import Change, Judged, verdict_of
from .request import Request

HOST = torch.device("cpu")  # where graphs are traced, whatever they are priced for


FEW = 6_000  # operators of graphs that are traced to see whether other microbatches help
BRIEFLY_S = 2.0  # of the solver, for each of them: a little less may be said to be gained
PLANNED = 2  # changes that seem to help most: they are planned, and the first that does is named


@dataclass(frozen=True)
class Inspection:
    """What was found."""

    plan: Plan
    timeline: Timeline
    extras: Extras


def inspect(request: Request) -> Inspection:
    """Compile what is asked for, and look at it.

    Raises:
        PipecompileError: a mistake of the user's, of any kind.
    """
    prepare(request.options.dump_dir)
    with uncollected():
        subject = request.subject or load(request.spec, request.model)
        settle()
    options = replace(request.options, loss_fn=subject.loss_fn)
    check_model(subject.model, subject.loss_fn)
    model = with_loss(subject.model, subject.loss_fn)
    _, whole = flatten(subject.batch)
    skeleton = _skeleton(model, options)
    several = request.open is not None  # sizes of microbatches
    asked = _Asked(request, skeleton, whole, Shared(Exports() if several else None))
    trials: tuple[Trial, ...] = ()
    told = ""
    if request.open is None:
        compiled = asked.built(options)
    else:
        compiled, found = _chosen(asked, options, request.open)
        trials, told = found.trials, found.told
        options = replace(options, backend=found.best.way.backend or options.backend)
    plan = compiled.plan
    if request.save is not None:
        _written("--save", request.save, plan.save)
    if request.trace is not None:
        trace = planned_trace(plan, compiled.timeline)
        _written("--trace", request.trace, partial(write_trace, trace))
    if request.bare:
        return Inspection(plan, compiled.timeline, Extras(trials=trials, searched=told))
    tried = compiled.problem
    problem = None if tried is None else as_programs(tried, plan)
    names = [name for name in request.compare if name != ORDERS]
    rows = compare(problem, plan.decision, names, tried) if problem and names else ()
    if ORDERS in request.compare and not (request.open and request.open.orders):
        trials = _in_every_order(asked, options, plan)
    seen = Subject(plan, compiled.timeline, request.device, problem, options.remat)
    seconds = plan.decision.search.seconds if request.given is None else None
    fp32 = _in_fp32(asked, options, compiled, model) if options.mixed else None
    passes = compiled.records if request.passes else ()
    said = verdict_of(_judged(asked, options, compiled))
    extras = Extras(seconds, trials, rows, tuple(hints(seen)), fp32, passes, said, told)
    if request.page is not None:
        from ..page.page import Page, write_page

        shown = rows or (compare(problem, plan.decision, QUICK, tried) if problem else ())
        page = Page(plan, compiled.timeline, replace(extras, comparison=shown), unit_names(problem))
        _written("--html", request.page, partial(write_page, page))
    return Inspection(plan, compiled.timeline, extras)


def _skeleton(model: nn.Module, options: CompileOptions) -> Skeleton:
    return skeleton_of(model, HOST, options.dtypes, options.eager_modules, options.training)


@dataclass(frozen=True)
class _Asked:
    """A model and a batch that divisions are made of, as they are asked for.

    Attributes:
        skeleton: of the model.
        whole: the batch.
        captured: graphs and what follows from them, which all divisions share; None for nothing.
    """

    request: Request
    skeleton: Skeleton
    whole: BatchSpec
    captured: Shared | None = None

    def target(self, device: Device | None = None) -> Target:
        """What plans are made for; another device without a limit of memory."""
        if device is None:
            own = self.request.device, self.request.limit_bytes
            return Target(HOST, *own, whole=self.request.whole)
        return Target(HOST, device, math.inf)

    def built(self, options: CompileOptions, finer: int = 1) -> Compiled:
        spec, microbatches = divide(self.whole, options, options.dp, finer=finer)
        builder = Builder(self.skeleton, options, self.target(), captured=self.captured)
        return builder.build(main_mode(options), spec, microbatches)

    def again(self, compiled: Compiled, options: CompileOptions, device: Device) -> Compiled:
        """As planned, on a device with these prices, whatever memory it has."""
        spec, microbatches = divide(self.whole, options, options.dp)
        builder = Builder(self.skeleton, options, self.target(device), captured=self.captured)
        return builder.build(main_mode(options), spec, microbatches, compiled.layout)

    def searched(
        self, options: CompileOptions, most_traced: int | None = None, roughly: bool = False
    ) -> Searched:
        target = replace(self.target(), roughly=roughly)

        def builder(tried: CompileOptions) -> Builder:
            return Builder(self.skeleton, tried, target, captured=self.captured)

        def divided(tried: CompileOptions) -> tuple[BatchSpec, int, Sequence[torch.Tensor]]:
            return *divide(self.whole, tried, tried.dp), ()

        devices = options.n_stages * options.dp
        if self.request.open is not None and self.request.open.devices:
            devices = self.request.open.devices
        return Searched(options, target, devices, builder, divided, most_traced)


def _judged(asked: _Asked, options: CompileOptions, compiled: Compiled) -> Judged:
    """The plan, with its stages and actions in both kinds of seconds."""
    plan, request = compiled.plan, asked.request
    bare = request.device.each(lambda each: replace(each, table=None))
    own = _as_planned(compiled, options, memory=None)
    is_bound = plan.costs == "roofline"
    bound = compiled if is_bound else asked.again(compiled, own, bare)
    real = asked.again(compiled, own, request.real) if is_bound else compiled
    peak = request.device.mean_peak(computed_in(options.dtypes, asked.skeleton.module))
    tried = plan.decision.unit_seconds and request.given is None
    change = _change(asked, options, compiled) if tried else None
    seconds = real.plan, real.timeline, bound.plan.step_s
    return Judged(plan, *seconds, peak, change, bool(tried))


def _change(asked: _Asked, options: CompileOptions, compiled: Compiled) -> Change | None:
    """What a single other choice would bring, for the same batch and devices."""
    plan = compiled.plan
    tried = _as_planned(compiled, options, time_limit_s=min(BRIEFLY_S, options.time_limit_s))
    if tried.kind.fixed:
        return None
    own = {name: getattr(tried, name) for name in OWN}
    way = Way(**own, zero=compiled.layout.zero.level, microbatches=plan.microbatches)
    roughly = not tried.fuses  # compiled kernels are timed when programs are whole
    searched = asked.searched(tried, FEW, roughly)
    near = better_than(way, plan, not options.pin, searched.model.bound, searched.model.sketch)
    models = [searched.model, *([asked.searched(tried, FEW).model] if roughly else [])]
    for each in near[:PLANNED]:
        with suppress(PipecompileError):
            for model in models:  # what does not help roughly may still
                step_s = model.plan(each.way).step_s
                if step_s < (1 - HELPS) * plan.step_s:
                    return Change(each.flags, step_s, plan.step_s)
    return None


def _as_planned(compiled: Compiled, options: CompileOptions, **more: Any) -> CompileOptions:
    """Options that ask for what was planned, and decide nothing."""
    plan, zero = compiled.plan, compiled.layout.zero
    given: dict[str, Any] = {
        "n_stages": plan.n_stages,
        "dp": plan.dp,
        "schedule": plan.options.get("schedule", DEFAULT),
        "virtual_stages": plan.virtual_stages,
        "microbatches": plan.microbatches,
        "zero": zero.level,
        "zero_by": zero.by if zero.level else AUTO,
        "zero_keep": options.zero_keep if zero.level > 1 else AUTO,
        "plan": None,
        "dump_dir": None,
        "skip": options.skip,
    }
    return replace(options, **given | more)


def _in_fp32(asked: _Asked, options: CompileOptions, compiled: Compiled, model: nn.Module) -> Plan:
    """The plan of the same stages with all of the model in fp32, whatever memory it would need."""
    options = _as_planned(compiled, options, precision="fp32", memory=None)
    wide = _Asked(asked.request, _skeleton(model, options), asked.whole)
    return wide.again(compiled, options, asked.request.device).plan


def _chosen(asked: _Asked, options: CompileOptions, open_: Open) -> tuple[Compiled, Found]:
    """The best way to use the devices, and what was tried."""
    searched = asked.searched(options)
    found = search(ways_of(open_, options, searched.devices, asked.whole.rows), searched.model)
    made = searched.built[found.best.way]
    if options.dump_dir is not None:  # of the chosen one only
        made = replace(asked, captured=None).built(found.best.way.of(options))
    if why := searched.weighed(found.best.way):
        made = replace(made, plan=replace(made.plan, notes=(*made.plan.notes, ("backend", why))))
    peak = asked.request.device.mean_peak(computed_in(options.dtypes, asked.skeleton.module))
    return made, rated(found, made.plan, peak)


def _in_every_order(asked: _Asked, options: CompileOptions, plan: Plan) -> tuple[Trial, ...]:
    """The same batch and ranks in every schedule, with as many microbatches."""
    shape = {name: getattr(plan, name) for name in ("n_stages", "dp", "microbatches")}
    own = replace(options, **shape, dump_dir=None)
    alone = replace(asked, captured=Shared())

    def build(way: Way, finer: int) -> Compiled:
        return alone.built(way.of(own), finer)

    return choose(Open(divides=False, orders=True).ways(own, 1), build)[1]


def _written(flag: str, path: Path, write: Callable[[Path], None]) -> None:
    try:
        write(path)
    except OSError as error:
        raise OptionError(f"{flag} {path}: {error.strerror or error}") from error
