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
from ..page.page import Page, write_page
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
    subject = request.subject or load(request.spec, request.model)
    options = replace(request.options, loss_fn=subject.loss_fn)
    check_model(subject.model, subject.loss_fn)
    model = with_loss(subject.model, subject.loss_fn)
    _, whole = flatten(subject.batch)
    skeleton = _skeleton(model, options)
    trials: tuple[Trial, ...] = ()
    captured, told = Shared(), ""
    if request.open is None:
        compiled = _built(request, options, skeleton, whole, captured=captured)
    else:
        compiled, found = _chosen(request, options, skeleton, whole, request.open, captured)
        trials, told = found.trials, found.told
    plan = compiled.plan
    if request.save is not None:
        _written("--save", request.save, plan.save)
    if request.trace is not None:
        trace = planned_trace(plan, compiled.timeline)
        _written("--trace", request.trace, partial(write_trace, trace))
    if request.bare:
        return Inspection(plan, compiled.timeline, Extras(trials=trials, searched=told))
    problem = None if compiled.problem is None else as_programs(compiled.problem, plan)
    names = [name for name in request.compare if name != ORDERS]
    rows = compare(problem, plan.decision, names) if problem and names else ()
    if ORDERS in request.compare and not (request.open and request.open.orders):
        trials = _in_every_order(request, options, skeleton, whole, plan)
    seen = Subject(plan, compiled.timeline, request.device, problem, options.remat)
    seconds = plan.decision.search.seconds if request.given is None else None
    fp32 = _in_fp32(request, options, compiled, model, whole) if options.mixed else None
    passes = compiled.records if request.passes else ()
    said = verdict_of(_judged(request, options, compiled, skeleton, whole, captured))
    extras = Extras(seconds, trials, rows, tuple(hints(seen)), fp32, passes, said, told)
    if request.page is not None:
        shown = rows or (compare(problem, plan.decision, QUICK) if problem else ())
        page = Page(plan, compiled.timeline, replace(extras, comparison=shown), unit_names(problem))
        _written("--html", request.page, partial(write_page, page))
    return Inspection(plan, compiled.timeline, extras)


def _skeleton(model: nn.Module, options: CompileOptions) -> Skeleton:
    return skeleton_of(model, HOST, options.dtypes, options.eager_modules, options.training)


def _judged(
    request: Request,
    options: CompileOptions,
    compiled: Compiled,
    skeleton: Skeleton,
    whole: BatchSpec,
    captured: Shared,
) -> Judged:
    """The plan, with its stages and actions in both kinds of seconds."""
    plan = compiled.plan
    bare = replace(request.device, table=None)

    def priced(device: Device) -> Compiled:
        """As the plan, on a device with these prices, whatever memory it has."""
        own = _as_planned(compiled, options, memory=None)
        target = Target(HOST, device, math.inf)
        spec, microbatches = divide(whole, own, own.dp)
        builder = Builder(skeleton, own, target, captured=captured)
        return builder.build(main_mode(own), spec, microbatches, compiled.layout)

    bound = compiled if plan.costs == "roofline" else priced(bare)
    real = priced(request.real) if plan.costs == "roofline" else compiled
    peak = request.device.peak(computed_in(options.dtypes, skeleton.module))
    tried = plan.decision.unit_seconds and request.given is None
    change = _change(request, options, compiled, skeleton, whole, captured) if tried else None
    seconds = real.plan, real.timeline, bound.plan.step_s
    return Judged(plan, *seconds, peak, change, bool(tried))


def _change(
    request: Request,
    options: CompileOptions,
    compiled: Compiled,
    skeleton: Skeleton,
    whole: BatchSpec,
    captured: Shared,
) -> Change | None:
    """What a single other choice would bring, for the same batch and devices."""
    plan = compiled.plan
    asked = _as_planned(compiled, options, time_limit_s=min(BRIEFLY_S, options.time_limit_s))
    if asked.kind.fixed:
        return None
    own = {name: getattr(asked, name) for name in OWN}
    way = Way(**own, zero=compiled.layout.zero.level, microbatches=plan.microbatches)
    searched = _searched(request, asked, skeleton, whole, captured, FEW)
    model = searched.model
    near = better_than(way, plan, not options.pin, model.bound, model.sketch)
    for each in near[:PLANNED]:
        with suppress(PipecompileError):
            step_s = model.plan(each.way).step_s
            if step_s < (1 - HELPS) * plan.step_s:
                return Change(each.flags, step_s, plan.step_s)
    return None


def _searched(
    request: Request,
    options: CompileOptions,
    skeleton: Skeleton,
    whole: BatchSpec,
    captured: Shared,
    most_traced: int | None = None,
) -> Searched:
    target = Target(HOST, request.device, request.limit_bytes)

    def builder(tried: CompileOptions) -> Builder:
        return Builder(skeleton, tried, target, captured=captured)

    def divided(tried: CompileOptions) -> tuple[BatchSpec, int, Sequence[torch.Tensor]]:
        return *divide(whole, tried, tried.dp), ()

    devices = options.n_stages * options.dp
    if request.open is not None and request.open.devices:
        devices = request.open.devices
    return Searched(options, target, devices, builder, divided, most_traced)


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
        "plan": None,
        "dump_dir": None,
        "skip": options.skip,
    }
    return replace(options, **given | more)


def _in_fp32(
    request: Request,
    options: CompileOptions,
    compiled: Compiled,
    model: nn.Module,
    whole: BatchSpec,
) -> Plan:
    """The plan of the same stages with all of the model in fp32, whatever memory it would need."""
    options = _as_planned(compiled, options, precision="fp32", memory=None)
    target = Target(HOST, request.device, math.inf)  # whether that fits is not asked
    skeleton = _skeleton(model, options)
    builder = Builder(skeleton, options, target)
    spec, microbatches = divide(whole, options, options.dp)
    return builder.build(main_mode(options), spec, microbatches, compiled.layout).plan


def _built(
    request: Request,
    options: CompileOptions,
    skeleton: Skeleton,
    whole: BatchSpec,
    finer: int = 1,
    captured: Shared | None = None,
) -> Compiled:
    spec, microbatches = divide(whole, options, options.dp, finer=finer)
    target = Target(HOST, request.device, request.limit_bytes)
    builder = Builder(skeleton, options, target, captured=captured)
    return builder.build(main_mode(options), spec, microbatches)


def _chosen(
    request: Request,
    options: CompileOptions,
    skeleton: Skeleton,
    whole: BatchSpec,
    open_: Open,
    captured: Shared,
) -> tuple[Compiled, Found]:
    """The best way to use the devices, and what was tried."""
    asked = _searched(request, options, skeleton, whole, captured)
    ways = ways_of(open_, options, asked.devices, whole.rows)
    found = search(ways, asked.model)
    made = asked.built[found.best.way]
    if options.dump_dir is not None:  # of the chosen one only
        made = _built(request, found.best.way.of(options), skeleton, whole)
    peak = request.device.peak(computed_in(options.dtypes, skeleton.module))
    return made, rated(found, made.plan, peak)


def _in_every_order(
    request: Request, options: CompileOptions, skeleton: Skeleton, whole: BatchSpec, plan: Plan
) -> tuple[Trial, ...]:
    """The same batch and ranks in every schedule, with as many microbatches."""
    captured = Shared()
    shape = {name: getattr(plan, name) for name in ("n_stages", "dp", "microbatches")}
    own = replace(options, **shape, dump_dir=None)

    def build(way: Way, finer: int) -> Compiled:
        return _built(request, way.of(own), skeleton, whole, finer, captured)

    return choose(Open(divides=False, orders=True).ways(own, 1), build)[1]


def _written(flag: str, path: Path, write: Callable[[Path], None]) -> None:
    try:
        write(path)
    except OSError as error:
        raise OptionError(f"{flag} {path}: {error.strerror or error}") from error
