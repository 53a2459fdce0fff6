"""What `pipecompile inspect` and `verify` are asked for: arguments, checked against each other."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..costs.hardware import Device, parse_device
from ..driver.auto import Open
from ..ir.errors import OptionError, PlanError
from ..kept.cache import default_cache_dir
from ..options.declaration import declarations_of
from ..options.options import OF_SCHEDULE, CompileOptions
from ..options.parsing import AUTO
from ..plan.plan import Plan
from ..profiling.calibration import calibrated
from ..report.compare import ORDERS, check_names
from ..trace.writing import check_writable
from .spec import ModelOptions

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

    @staticmethod
    def of(args: argparse.Namespace) -> Request:
        """Raises OptionError or PlanError for what does not go together."""
        _check_output(args)
        options, model, given = asked(args)
        if ORDERS in args.compare and not options.training:
            raise OptionError(
                "--compare schedules has no effect with --training false: forwards run in order"
            )
        device = _device(args.hardware, given)
        if options.costs == "calibrated":
            device = calibrated(device, default_cache_dir(), options.backend == "inductor")
        limit: float = device.memory_bytes if args.hardware else math.inf
        if given is not None:
            limit = math.inf if given.budget_bytes is None else given.budget_bytes
        return Request(
            args.spec,
            model,
            options,
            device,
            options.memory_bytes or limit,
            open_of(args),
            args.compare,
            None if args.save is None else Path(args.save),
            given,
            args.passes,
            None if args.trace is None else Path(args.trace),
            None if args.html is None else Path(args.html),
        )


def asked(args: argparse.Namespace) -> tuple[CompileOptions, ModelOptions, Plan | None]:
    """What a command on a model is given for the pipeline and for the model, and the plan.

    Raises:
        OptionError, PlanError: what does not go together.
    """
    _check_stages(args)
    given = None if args.plan is None else Plan.load(args.plan)
    options = _options_of(args, given)
    if args.n_stages != AUTO:
        options.check_zero()
    rows = (args.devices or options.dp) * (options.microbatches or 4 * options.n_stages)
    if given is not None and not args.microbatches and not args.dp:
        rows *= given.microbatch_rows
    return options, ModelOptions(tuple(args.set), args.task, args.batch, args.seq, rows), given


def open_of(args: argparse.Namespace) -> Open | None:
    """What the flags leave open; None for nothing."""
    divides, orders = args.n_stages == AUTO, args.schedule == AUTO
    if not divides and not orders:
        return None
    return Open(divides, orders, args.devices, args.virtual_stages, args.schedule_memory or AUTO)


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
