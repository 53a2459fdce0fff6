"""What `pipecompile inspect` does: a request -> a plan, and what to say of it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import nn

from ...passes.schedule.simulate import Timeline
from ..capture.batch import BatchSpec, flatten
from ..capture.refusals import check_model
from ..capture.skeleton import Skeleton, skeleton_of
from ..capture.whole import with_loss
from ..driver.auto import Open, Trial, Way, choose
from ..driver.builder import Builder, Captures
from ..driver.compiled import Compiled, main_mode
from ..driver.record import prepare
from ..ir.errors import OptionError
from ..options.microbatches import divide
from ..options.options import CompileOptions
from ..page.page import Page, write_page
from ..plan.plan import Plan
from ..planning.target import Target
from ..report.compare import ORDERS, QUICK, calibrated, compare, unit_names
from ..report.hints import Subject, hints
from ..report.report import Extras
from ..trace.planned import planned_trace
from ..trace.writing import write_trace
from .request import Request
from .spec import load

HOST = torch.device("cpu")  # where graphs are traced, whatever they are priced for


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
    subject = load(request.spec, request.model)
    options = replace(request.options, loss_fn=subject.loss_fn)
    check_model(subject.model, subject.loss_fn)
    model = with_loss(subject.model, subject.loss_fn)
    _, whole = flatten(subject.batch)
    skeleton = _skeleton(model, options)
    trials: tuple[Trial, ...] = ()
    if request.open is None:
        compiled = _built(request, options, skeleton, whole)
    else:
        compiled, trials = _chosen(request, options, skeleton, whole, request.open)
    plan = compiled.plan
    if request.save is not None:
        _written("--save", request.save, plan.save)
    problem = None if compiled.problem is None else calibrated(compiled.problem, plan)
    names = [name for name in request.compare if name != ORDERS]
    rows = compare(problem, plan.decision, names) if problem and names else ()
    if ORDERS in request.compare and not (request.open and request.open.orders):
        trials = _in_every_order(request, options, skeleton, whole, plan)
    seen = Subject(plan, compiled.timeline, request.device, problem, options.remat)
    seconds = plan.decision.search.seconds if request.given is None else None
    fp32 = _in_fp32(request, options, compiled, model, whole) if options.mixed else None
    passes = compiled.records if request.passes else ()
    extras = Extras(seconds, trials, rows, tuple(hints(seen)), fp32, passes)
    if request.trace is not None:
        trace = planned_trace(plan, compiled.timeline)
        _written("--trace", request.trace, partial(write_trace, trace))
    if request.page is not None:
        shown = rows or (compare(problem, plan.decision, QUICK) if problem else ())
        page = Page(plan, compiled.timeline, replace(extras, comparison=shown), unit_names(problem))
        _written("--html", request.page, partial(write_page, page))
    return Inspection(plan, compiled.timeline, extras)


def _skeleton(model: nn.Module, options: CompileOptions) -> Skeleton:
    return skeleton_of(model, HOST, options.dtypes, options.eager_modules, options.training)


def _in_fp32(
    request: Request,
    options: CompileOptions,
    compiled: Compiled,
    model: nn.Module,
    whole: BatchSpec,
) -> Plan:
    """The plan of the same stages with all of the model in fp32, whatever memory it would need."""
    plan = compiled.plan
    options = replace(
        options,
        n_stages=plan.n_stages,
        dp=plan.dp,
        zero=compiled.layout.zero.level,
        zero_by=compiled.layout.zero.by,
        precision="fp32",
        memory=None,
        plan=None,
        dump_dir=None,
    )
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
    captured: Captures | None = None,
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
) -> tuple[Compiled, tuple[Trial, ...]]:
    """The best way to use the devices, and all that were tried."""
    captured: Captures = {}
    built: dict[tuple[Way, int | None], Compiled] = {}

    def build(way: Way, finer: int) -> Compiled:
        tried = way.of(options, dump_dir=None)
        made = _built(request, tried, skeleton, whole, finer, captured)
        built[way, made.plan.microbatches] = made
        return made

    chosen, trials = choose(open_.ways(options, open_.devices or 1), build, open_.orders)
    if options.dump_dir is not None:  # of the chosen one only
        final = chosen.way.of(options, microbatches=chosen.microbatches)
        return _built(request, final, skeleton, whole), trials
    return built[chosen.way, chosen.microbatches], trials


def _in_every_order(
    request: Request, options: CompileOptions, skeleton: Skeleton, whole: BatchSpec, plan: Plan
) -> tuple[Trial, ...]:
    """The same batch and ranks in every schedule, with as many microbatches."""
    captured: Captures = {}
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
