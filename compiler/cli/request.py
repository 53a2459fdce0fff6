"""What `pipecompile inspect` and `verify` are asked for: arguments, checked against each other."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..costs.cluster import Cluster, parse_hardware
from ..costs.hardware import CHANGED, CPU, Device
from ..driver.auto import Open, weighing
from ..ir.errors import OptionError, PlanError
from ..kept.cache import default_cache_dir
from ..options.arguments import Arguments
from ..options.declaration import declarations_of
from ..options.options import OF_SCHEDULE, OF_TRAINING, CompileOptions
from ..options.parsing import AUTO
from ..plan.plan import Plan
from ..profiling.calibration import calibrated
from ..report.compare import ORDERS, check_names
from ..subjects.script import Script
from ..subjects.spec import ModelOptions, Subject
from ..trace.writing import check_writable
from .rates import of_device, with_settings

Factory = Callable[[Iterable[Any]], torch.optim.Optimizer]

OPTIMIZERS: dict[str, Factory | None] = {
    "adamw": torch.optim.AdamW,
    "sgd": torch.optim.SGD,
    "none": None,
}


PLAN_SHAPE = ("n_stages", "virtual_stages", "dp", "microbatches")
"""What a plan has been made for, beside its options."""


@dataclass(frozen=True)
class Request:
    """The arguments, checked against each other.

    Attributes:
        open: what is to be chosen; None where all is given.
        options: without the model's loss; of what is to be chosen the simplest.
        limit_bytes: of a stage; infinity for no limit.
        default_rows: of the batch of all replicas, where ``model`` says nothing.
        given: the plan to show.
        passes: list them with their times.
        trace, page: files for the simulated step, and for the report as a web page.
        bare: the plan alone is asked for, and nothing that is said of it.
        subject: what a script has made; None for what ``spec`` names.
        real: the device with its table, whatever prices are asked for.
        whole: ``limit_bytes`` are all that the device has.
    """

    spec: str
    model: ModelOptions
    options: CompileOptions
    device: Device
    limit_bytes: float
    open: Open | None
    compare: tuple[str, ...]
    save: Path | None
    given: Plan | None
    passes: bool = False
    trace: Path | None = None
    page: Path | None = None
    bare: bool = False
    subject: Subject | None = None
    real: Device = CPU
    whole: bool = False

    @staticmethod
    def of(args: argparse.Namespace, script: Script | None = None) -> Request:
        """Raises OptionError or PlanError for what does not go together."""
        if script is not None:
            fill_in(args, script)
        _check_output(args)
        options, model, given = asked(args)
        if script is not None:
            if model.given:
                raise OptionError(
                    f"{model.given[0]} has no effect on {args.spec}: the script decides"
                )
            options = with_script(options, script, args)
        if ORDERS in args.compare and not options.training:
            raise OptionError(
                "--compare schedules has no effect with --training false: forwards run in order"
            )
        rates = tuple(filter(of_device, args.set))
        base = _base(args.hardware, given)
        real = base.each(lambda each: calibrated(each, default_cache_dir(), options.fuses))
        real = with_settings(real, rates)
        device = real if options.costs == "calibrated" else with_settings(base, rates)
        open_ = open_of(args, script, device.topology is not None)
        if device.is_cpu:  # which records nothing
            options = replace(options, cudagraphs=False)
        _check_device(device, given)
        sized = args.hardware or any(each.startswith("device.memory_bytes") for each in rates)
        limit: float = device.memory_bytes if sized else math.inf
        whole = bool(sized) and not options.memory_bytes
        if given is not None:
            limit = math.inf if given.budget_bytes is None else given.budget_bytes
            whole = given.by_device
        return Request(
            args.spec,
            model,
            options,
            device,
            options.memory_bytes or limit,
            None if open_ is None else weighing(open_, options, device.is_cpu),
            args.compare,
            None if args.save is None else Path(args.save),
            given,
            args.passes,
            None if args.trace is None else Path(args.trace),
            None if args.html is None else Path(args.html),
            args.json and args.html is None,
            None if script is None else script.subject,
            real,
            whole,
        )


def asked(args: argparse.Namespace) -> tuple[CompileOptions, ModelOptions, Plan | None]:
    """What a command on a model is given for the pipeline and for the model, and the plan.

    Raises:
        OptionError, PlanError: what does not go together.
    """
    _check_stages(args)
    rates = [each for each in args.set if of_device(each)]
    if rates and args.command != "inspect":
        raise OptionError(f"--set {rates[0]} has no effect on {args.command}, which runs here")
    given = None if args.plan is None else Plan.load(args.plan)
    options = _options_of(args, given)
    if args.n_stages != AUTO:
        options.check_shared()
        options.check_placement()
    rows = (args.devices or options.dp) * (options.microbatches or 4 * options.n_stages)
    if given is not None and not args.microbatches and not args.dp:
        rows *= given.microbatch_rows
    settings = tuple(each for each in args.set if not of_device(each))
    return options, ModelOptions(settings, args.task, args.batch, args.seq, rows), given


FROM_SCRIPT = (
    "optimizer",
    "max_grad_norm",
    "loss_normalization",
    "loss_weight",
    "dynamic",
    "cudagraphs",
)
"""Options without flags of their own values that plans depend on."""


def fill_in(args: argparse.Namespace, script: Script) -> None:
    """Give flags that are not there the values of a script's call of `compile`.

    Raises:
        OptionError: the replicas of the flags do not divide the microbatches that a session keeps.
    """
    asked, whole = script.arguments, script.open.global_microbatches
    if whole and args.n_stages not in (None, AUTO) and args.microbatches is None:
        replicas = args.dp or 1
        if whole % replicas:
            raise OptionError(
                f"--dp {replicas} does not divide global_microbatches={whole} of {args.spec}: use "
                "another number, or --microbatches"
            )
        args.microbatches = whole // replicas
    idle = OF_TRAINING if args.training is False else ()
    for name, option in declarations_of(Arguments).items():
        if option.flag is None or getattr(args, name, None) is not None or name in idle:
            continue
        value = getattr(asked, name)
        if name == "costs":
            value = value if value in ("roofline", "calibrated") else None
        if value is not None and value != option.default:
            setattr(args, name, value)


def with_script(
    options: CompileOptions, script: Script, args: argparse.Namespace
) -> CompileOptions:
    """Options of flags, with what else the script says of what they ask for."""
    trains = script.arguments.training
    given = {name for name in ("optimizer",) if args.optimizer or not trains}
    given |= set() if options.training else set(OF_TRAINING)
    found = {n: getattr(script.arguments, n) for n in FROM_SCRIPT if n not in given}
    if args.optimizer == "none":
        found["max_grad_norm"] = None
    return replace(options, **found)


def open_of(
    args: argparse.Namespace, script: Script | None = None, several: bool = False
) -> Open | None:
    """What the flags leave open; None for nothing.

    Args:
        several: whether the devices are of several machines.
        script: whose sessions hold divisions to limits, and keep microbatches.
    """
    divides, orders = args.n_stages == AUTO, args.schedule == AUTO
    places = several and args.plan is None and args.placement in (None, AUTO)
    placed = places and (divides or (args.n_stages > 1 and (args.dp or 1) > 1))
    if not divides and not orders and not placed:
        return None
    memory = args.schedule_memory or AUTO
    found = Open(divides, orders, args.devices, args.virtual_stages, memory, places=places)
    if script is None or not divides:
        return found
    kept = None if args.microbatches else script.open.global_microbatches
    return replace(found, stages=script.open.stages, global_microbatches=kept)


def _check_stages(args: argparse.Namespace) -> None:
    """Raises OptionError for arguments that need each other, or have no effect together."""
    auto = args.n_stages == AUTO
    if args.n_stages is None and args.plan is None:
        raise OptionError(
            "the following arguments are required: --stages N (see pipecompile "
            f"{args.command} --help)"
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
    for flag, value, why in (
        ("--pin", args.pin, "the stages have no numbers yet"),
        ("--plan", args.plan, "the plan has its schedule"),
    ):
        if args.schedule == AUTO and value:
            raise OptionError(f"{flag} cannot be given with --schedule auto: {why}")


def _check_output(args: argparse.Namespace) -> None:
    """The same of what is shown."""
    check_names(args.compare)
    if args.compare and args.json:
        raise OptionError("--compare has no effect on --json, which prints the plan alone")
    if args.passes and args.json:
        raise OptionError("--passes has no effect on --json, which prints the plan alone")
    if args.compare and args.plan:
        raise OptionError("--compare has no effect beside --plan: nothing is solved")
    for flag, file in (("--trace", args.trace), ("--html", args.html)):
        if file is not None:
            check_writable(Path(file), f"{flag} {file}")
    if args.save is not None and not Path(args.save).absolute().parent.is_dir():
        raise OptionError(f"--save {args.save}: there is no folder {str(Path(args.save).parent)!r}")


def _options_of(args: argparse.Namespace, given: Plan | None) -> CompileOptions:
    """Those of the flags; where a plan is given, it says what no flag does."""
    found: dict[str, Any] = {}
    for name, option in declarations_of(CompileOptions).items():
        if option.flag is None:
            continue
        value = getattr(args, name)
        if value is None and given is not None and option.plan == "keeps":
            kept = given.options.get(name)
            value = None if kept is None else option.flag.parse(kept)
        if value is not None:
            found[name] = value
    if given is not None:
        shape = {name: getattr(given, name) for name in PLAN_SHAPE}
        found = shape | found | {"plan": given}
    if args.n_stages == AUTO:
        found["n_stages"] = 1
    if args.schedule == AUTO:
        found = {name: value for name, value in found.items() if name not in OF_SCHEDULE}
    costs = found.pop("costs", None) or "roofline"
    if costs not in ("roofline", "calibrated"):
        raise OptionError(
            f"--costs {costs}: nothing is measured here, use roofline or calibrated (pipecompile "
            "calibrate measures the device at hand for the latter)"
        )
    usual = "adamw" if found.get("training", True) else "none"
    optimizer = OPTIMIZERS[args.optimizer or usual]
    return CompileOptions(**found, optimizer=optimizer, costs=costs)


def _base(wanted: str | Path | Device | Cluster | None, given: Plan | None) -> Device:
    """The device that is planned for, without what ``--set`` changes of it."""
    named = "" if given is None else given.device.partition(CHANGED)[0]
    try:
        return parse_hardware(wanted or named or "cpu")
    except OptionError as error:
        if given is None:
            raise
        raise OptionError(f"{error} (the plan's; --device FILE describes it)") from error


def _check_device(device: Device, given: Plan | None) -> None:
    if given is not None and device.name != given.device:
        raise PlanError(
            f"the plan has device={given.device}, this run device={device.name}: its seconds and "
            "stages are those of another device; make a new plan"
        )
