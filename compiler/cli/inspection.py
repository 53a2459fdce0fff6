"""What `pipecompile inspect` does: command-line arguments -> a plan, and what to say of it."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..capture.batch import BatchSpec, flatten
from ..capture.skeleton import Skeleton, skeleton_of
from ..costs.hardware import Device, parse_device
from ..costs.simulate import Timeline
from ..driver.auto import Trial, choose_stages
from ..driver.builder import Builder
from ..driver.compiled import Compiled, Mode
from ..ir.errors import OptionError, PlanError
from ..options.microbatches import divide
from ..options.options import CompileOptions
from ..plan.plan import Plan
from ..planning.target import Target
from ..report.compare import calibrated, check_names, compare
from ..report.hints import Subject, hints
from ..report.report import Extras
from .spec import ModelOptions, load

Factory = Callable[[Iterable[Any]], torch.optim.Optimizer]

OPTIMIZERS: dict[str, Factory | None] = {
    "adamw": torch.optim.AdamW,
    "sgd": torch.optim.SGD,
    "none": None,
}
HOST = torch.device("cpu")  # where graphs are traced, whatever they are priced for


@dataclass(frozen=True)
class Request:
    """The arguments, checked against each other.

    Attributes:
        devices: for automatic stages; None where the options' stages are given.
        options: without the model's loss; of automatic stages those for one stage.
        limit_bytes: of a stage; infinity for no limit.
        default_rows: of the batch of all replicas, where ``model`` says nothing.
        given: the plan to show.
    """

    spec: str
    model: ModelOptions
    options: CompileOptions
    device: Device
    limit_bytes: float
    devices: int | None
    compare: tuple[str, ...]
    save: Path | None
    given: Plan | None

    @staticmethod
    def of(args: argparse.Namespace) -> Request:
        """Raises OptionError or PlanError for what does not go together."""
        _check(args)
        given = None if args.plan is None else Plan.load(args.plan)
        auto = args.stages == "auto"
        n_stages = 1 if auto else args.stages or (given.n_stages if given else 1)
        dp = args.dp or (given.dp if given else 1)
        microbatches = args.microbatches or (given.microbatches if given else None)
        kept = given.options if given else {}
        options = CompileOptions(
            n_stages=n_stages,
            dp=dp,
            microbatches=microbatches,
            optimizer=OPTIMIZERS[args.optimizer],
            schedule=args.schedule or kept.get("schedule", "1f1b"),
            tied_grads=args.tied_grads or kept.get("tied_grads", "per_microbatch"),
            memory=args.memory,
            remat=args.remat,
            precision=args.precision,
            zero=_zero(args.zero, kept),
            pin=_pins(args.pin),
            plan=given,
            costs="roofline",
            solver=args.solver,
            time_limit_s=args.time_limit,
            dump_dir=args.dump,
        )
        if not auto:
            options.check_zero()
        rows = (args.devices or dp) * (microbatches or 4 * n_stages)
        if given is not None and not args.microbatches and not args.dp:
            rows *= given.microbatch_rows
        device = _device(args.device, given)
        limit: float = device.memory_bytes if args.device else math.inf
        if given is not None:
            limit = math.inf if given.budget_bytes is None else given.budget_bytes
        return Request(
            args.spec,
            ModelOptions(tuple(args.set), args.task, args.batch, args.seq, rows),
            options,
            device,
            options.memory_bytes or limit,
            args.devices,
            args.compare,
            None if args.save is None else Path(args.save),
            given,
        )


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
    subject = load(request.spec, request.model)
    options = replace(request.options, loss_fn=subject.loss_fn)
    _, whole = flatten(subject.batch)
    skeleton = skeleton_of(subject.model, HOST, options.dtypes)
    trials: tuple[Trial, ...] = ()
    if request.devices is None:
        compiled = _built(request, options, skeleton, whole)
    else:
        compiled, trials = _divided(request, options, skeleton, whole, request.devices)
    plan = compiled.plan
    if request.save is not None:
        _save(plan, request.save)
    problem = None if compiled.problem is None else calibrated(compiled.problem, plan)
    rows = compare(problem, plan.decision, request.compare) if problem and request.compare else ()
    seen = Subject(plan, compiled.timeline, request.device, problem, options.remat)
    seconds = plan.decision.search.seconds if request.given is None else None
    fp32 = _in_fp32(request, options, compiled, subject.model, whole) if options.mixed else None
    extras = Extras(seconds, trials, rows, tuple(hints(seen)), fp32)
    return Inspection(plan, compiled.timeline, extras)


def _in_fp32(
    request: Request,
    options: CompileOptions,
    compiled: Compiled,
    model: nn.Module,
    whole: BatchSpec,
) -> Plan:
    """The plan of the same stages with all of the model in fp32."""
    plan = compiled.plan
    options = replace(
        options,
        n_stages=plan.n_stages,
        dp=plan.dp,
        zero=compiled.layout.zero.level,
        precision="fp32",
        plan=None,
        dump_dir=None,
    )
    target = Target(HOST, request.device, request.limit_bytes)
    builder = Builder(skeleton_of(model, HOST, options.dtypes), options, target)
    spec, microbatches = divide(whole, options, options.dp)
    return builder.build(Mode.TRAIN, spec, microbatches, compiled.layout).plan


def _built(
    request: Request,
    options: CompileOptions,
    skeleton: Skeleton,
    whole: BatchSpec,
    finer: int = 1,
) -> Compiled:
    spec, microbatches = divide(whole, options, options.dp, finer=finer)
    target = Target(HOST, request.device, request.limit_bytes)
    return Builder(skeleton, options, target).build(Mode.TRAIN, spec, microbatches)


def _divided(
    request: Request,
    options: CompileOptions,
    skeleton: Skeleton,
    whole: BatchSpec,
    devices: int,
) -> tuple[Compiled, tuple[Trial, ...]]:
    """The best division of the devices, and all that were tried."""
    built: dict[int, Compiled] = {}

    def build(n_stages: int, dp: int, finer: int) -> Compiled:
        tried = replace(options, n_stages=n_stages, dp=dp, dump_dir=None)
        built[n_stages] = _built(request, tried, skeleton, whole, finer=finer)
        return built[n_stages]

    chosen, trials = choose_stages(devices, build)
    if options.dump_dir is not None:  # of the chosen one only
        final = replace(
            options,
            n_stages=chosen.n_stages,
            dp=chosen.dp,
            microbatches=chosen.microbatches,
        )
        return _built(request, final, skeleton, whole), trials
    return built[chosen.n_stages], trials


# -- arguments ----------------------------------------------------------------------------------


def _check(args: argparse.Namespace) -> None:
    """Raises OptionError for arguments that need each other, or have no effect together."""
    auto = args.stages == "auto"
    if args.stages is None and args.plan is None:
        raise OptionError(
            "the following arguments are required: --stages (see pipecompile inspect --help)"
        )
    if auto and args.devices is None:
        raise OptionError("--stages auto divides --devices N: say how many there are")
    if not auto and args.devices is not None:
        raise OptionError("--devices has no effect without --stages auto: use --dp for replicas")
    for flag, value, why in (
        ("--dp", args.dp, "the replicas follow from --devices and the stages"),
        ("--pin", args.pin, "the stages have no numbers yet"),
        ("--plan", args.plan, "the plan has its stages"),
    ):
        if auto and value:
            raise OptionError(f"{flag} cannot be given with --stages auto: {why}")
    check_names(args.compare)
    if args.compare and args.json:
        raise OptionError("--compare has no effect on --json, which prints the plan alone")
    if args.compare and args.plan:
        raise OptionError("--compare has no effect beside --plan: nothing is solved")
    if args.save is not None and not Path(args.save).absolute().parent.is_dir():
        raise OptionError(f"--save {args.save}: there is no folder {str(Path(args.save).parent)!r}")


def _zero(given: str | None, kept: Mapping[str, str]) -> int | str:
    level = given or kept.get("zero", "0")
    return int(level) if level.isdigit() else level


def _pins(given: Iterable[tuple[str, int]]) -> dict[str, int] | None:
    """None for none, which is what a plan goes with."""
    pins: dict[str, int] = {}
    for name, stage in given:
        if pins.setdefault(name, stage) != stage:
            raise OptionError(f"--pin {name}={stage}: it is pinned to {pins[name]} already")
    return pins or None


def _device(wanted: str | None, given: Plan | None) -> Device:
    if given is None:
        return parse_device(wanted or "cpu")
    try:
        device = parse_device(wanted or given.device)
    except OptionError as error:
        raise OptionError(f"{error} (the plan's; --device FILE describes it)") from error
    if device.name != given.device:
        raise PlanError(
            f"the plan has device={given.device}, this run device={device.name}: its seconds and "
            "stages are those of another device; make a new plan"
        )
    return device


def _save(plan: Plan, path: Path) -> None:
    try:
        plan.save(path)
    except OSError as error:
        raise OptionError(f"--save {path}: {error.strerror or error}") from error
