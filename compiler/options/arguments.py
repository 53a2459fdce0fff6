"""Every option of `pipecompile.compile`, declared.

Signature, docstring, the command line's flags, the check of plans and what ranks compare follow
from here. Nothing here imports torch: ``--help`` reads it.
"""
# ruff: noqa: RUF009 -- `option` returns a field

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from ...passes.schedule.registry import DEFAULT, SCHEDULES
from ..compression.methods import OFF, parse_compression
from ..costs.cluster import Cluster
from ..costs.hardware import DEVICES, Device
from ..costs.topology import ORDERS
from ..plan.plan import Plan
from . import checks
from .declaration import (
    OUTPUT,
    PIPELINE,
    PLANNER,
    Flag,
    as_it_is,
    decision_of_plan,
    declare,
    option,
)
from .parsing import (
    AUTO,
    check_memory,
    parse_chunks,
    parse_count,
    parse_dtype,
    parse_level,
    parse_names,
    parse_pin,
    parse_seconds,
    parse_stages,
    precision_in_plan,
)
from .schedule import check_schedule, order_of_schedule
from .training import TrainingOptions

if TYPE_CHECKING:
    from torch import nn

    from ..ir.precision import Precision

_DEVICES = ", ".join(f'"{name}"' for name in DEVICES)


@dataclass(frozen=True, kw_only=True)
class Options(TrainingOptions):
    """Those that mean the same before and after the number of stages is known."""

    schedule: str = option(
        DEFAULT,
        help="; ".join(f'"{kind.name}": {kind.help}' for kind in SCHEDULES.values())
        + '; "auto": the one with the shortest predicted step for ``example_batch``; or a file '
        "with actions per rank, as text or CSV",
        more="All give the same bits.",
        check=check_schedule,
        plan="keeps",
        compared=order_of_schedule,
        flag=Flag(group=PIPELINE, metavar="NAME"),
    )
    virtual_stages: int | None = option(
        None,
        help="stages that each rank holds, where the ``schedule`` deals several to it",
        more="The model is then divided into ``n_stages`` × ``virtual_stages`` stages, and "
        "``n_stages`` is the number of ranks of a replica. None takes what is usual for the "
        "schedule.",
        check=checks.check_count,
        compared=lambda _, options: options.virtual,
        flag=Flag(
            group=PIPELINE, metavar="V", parse=parse_count, default="what the schedule needs"
        ),
    )
    schedule_memory: str = option(
        "auto",
        help='what microbatches in flight may take where the ``schedule`` is "zb": "1f1b" as much '
        'as with 1f1b, "2x1f1b" twice that, "budget" all that ``memory`` leaves; "auto" takes '
        '"budget" where there is one, else "1f1b"',
        more="More memory makes a smaller bubble.",
        choices=("auto", "1f1b", "2x1f1b", "budget"),
        plan="decides",
        compared=as_it_is,
        flag=Flag(group=PIPELINE, metavar="MUCH"),
    )
    tied_grads: str = option(
        "per_microbatch",
        help='how weights that several stages read get their gradients: "per_microbatch" sends '
        'parts with every microbatch, bit-exact; "per_step" adds them up and sends once',
        more='"per_microbatch" adds the parts in autograd\'s order, which makes the gradient that '
        'of one device bit for bit; "per_step" sends less and may differ in the last bits.',
        choices=("per_microbatch", "per_step"),
        plan="keeps",
        compared=as_it_is,
        flag=Flag(group=PIPELINE, metavar="WHEN"),
    )
    memory: int | str | None = option(
        None,
        help='what a rank may use at its peak, bytes or a text such as "20GiB"',
        more="None takes the device's own, shared among the ranks on it.",
        check=check_memory,
        plan="decides",
        compared=lambda _, options: options.memory_bytes,
        flag=Flag(
            group=PLANNER,
            metavar="BYTES",
            default="all that ``hardware`` has; without ``hardware`` no limit",
        ),
    )
    remat: str = option(
        "auto",
        help='what the backward computes again: "auto": what it takes to fit into ``memory``; '
        '"none": nothing; "full": all but each unit\'s inputs',
        more='"auto" is chosen together with the stages.',
        choices=("auto", "none", "full"),
        plan="decides",
        compared=as_it_is,
        flag=Flag(group=PLANNER, metavar="WHAT"),
    )
    chunked_loss: int | str = option(
        "off",
        help='logits of a loss over many classes: "off": all exist; a number: at once only as many '
        'as so many tokens have; "auto": all, unless a step without is shorter, or alone fits',
        more="They are made again in the backward, and all is equal up to rounding.",
        check=checks.check_chunks,
        plan="keeps",
        compared=as_it_is,
        flag=Flag(group=PLANNER, metavar="ROWS", parse=parse_chunks),
    )
    precision: str | Precision | None = option(
        None,
        help='"bf16" or "fp16": matrix products, convolutions and attention in that dtype, as '
        '`torch.autocast` has it on the device; "bf16_params" or "fp16_params": everything, as '
        'FSDP and DeepSpeed have it, which takes less memory; "fp32": everything in fp32',
        more="Weights, sums of gradients and optimizer states stay in fp32, also those of a model "
        "that comes in a reduced dtype. fp16 comes with dynamic loss scaling. None leaves the "
        "model's dtypes as they are. A `pipecompile.Precision` says more.",
        check=checks.check_precision,
        plan="keeps",
        in_plan=precision_in_plan,
        compared=lambda _, options: options.dtypes,
        flag=Flag(group=PIPELINE, metavar="DTYPE", parse=parse_dtype, default="as the model comes"),
    )
    backend: str = option(
        "auto",
        help='what runs the operators of stages: "eager": the kernels of PyTorch one by one, with '
        'the bits of one device; "inductor": those that torch\'s Inductor fuses, layer by layer, '
        'equal up to rounding; "auto": "inductor" on CUDA where Triton is installed, else "eager"',
        more="Layers that are alike are compiled once. Where costs are measured, stages are "
        'chosen by what compiled operators take. With `costs="calibrated"` a search '
        '(`n_stages="auto"`, `schedule="auto"`) weighs both on CUDA.',
        choices=("auto", "eager", "inductor"),
        compared=as_it_is,
        flag=Flag(group=PIPELINE, metavar="NAME"),
    )
    cudagraphs: bool | str = option(
        False,
        help="record programs of stages as CUDA graphs, whose replay takes no time per operator: "
        'True, or "auto" for where that can be; a note in the plan says where not',
        more="For batches of one shape. What programs read and leave stays in its place, for every "
        "microbatch in flight; plans count that. The bits are the same.",
        check=checks.check_graphs,
        compared=as_it_is,
    )
    zero: int | str = option(
        0,
        help="what the replicas of a stage divide among themselves: 0 nothing, 1 optimizer states, "
        '2 gradients too, 3 parameters too; "auto": the least that fits, with auto stages the best',
        more="1 also divides fp32 weights of which only a copy in another dtype is computed with; "
        "at 3 parameters are fetched layer by layer while the layer before computes. From 1 on "
        "the optimizer holds this rank's share, as ``zero_by`` says.",
        check=checks.check_level,
        plan="keeps",
        compared=as_it_is,
        flag=Flag(group=PIPELINE, metavar="LEVEL", parse=parse_level),
    )
    zero_by: str = option(
        AUTO,
        help='how ``zero`` divides what is trained: "rows" of each parameter; "matrices": whole '
        'parameters, each replica as many bytes; "auto": rows where the optimizer allows it',
        more="Rows are for optimizers that treat every element alone, as SGD and Adam do, and "
        "matrices also for those that need whole parameters, as Muon, Shampoo and Adafactor do. "
        '"auto" tries the optimizer on small parameters.',
        choices=(AUTO, "rows", "matrices"),
        plan="keeps",
        compared=as_it_is,
        flag=Flag(group=PIPELINE, metavar="HOW"),
    )
    zero_keep: str = option(
        AUTO,
        help="what ``zero`` 2 and 3 keep whole over a step, so that it is exchanged once and not "
        'with every microbatch: "nothing"; "gradients", at 3; "auto": of parameters and gradients '
        "what fits into ``memory`` and shortens the predicted step; without ``memory`` nothing",
        more="Layer by layer, after stages and recomputation are chosen. What is kept is as exact "
        "as at a lower level; the plan's notes say how much it is.",
        choices=(AUTO, "nothing", "gradients"),
        plan="keeps",
        compared=as_it_is,
        flag=Flag(group=PIPELINE, metavar="WHAT"),
    )
    placement: str = option(
        AUTO,
        help='which ranks are neighbours in number, and so share a machine: "pipeline" those of a '
        'replica, "replicas" those of a stage; "auto": where machines are several, what makes the '
        "shorter predicted step",
        more='"auto" needs ``example_batch`` to plan for, and is "pipeline" without. All give the '
        "same bits.",
        choices=(AUTO, *ORDERS),
        compared=as_it_is,
        flag=Flag(group=PIPELINE, metavar="HOW"),
    )
    compress: str | Mapping[str, str] = option(
        OFF,
        help='what travels in fewer bits: a method for gradients between replicas, "bf16", "int8", '
        '"powersgd:4" (of rank 4) or "adacomp:512" (of bins of 512), or a dict with one for '
        '"gradients" and one for "values" between stages, "bf16" or "int8"; "off": nothing',
        more="For slow links. What a method leaves out of gradients is kept and sent in later "
        "steps; all replicas get the same bits.",
        check=lambda name, given: parse_compression(given, name),
        plan="keeps",
        in_plan=lambda given: str(parse_compression(given)),
        compared=lambda _, options: str(options.compression),
        flag=Flag(group=PIPELINE, metavar="HOW"),
    )
    sparse_embeddings: str = option(
        OFF,
        help="of parameters in which rows are looked up and that nothing else reads: "
        '"exchange": replicas exchange touched rows alone, with the same bits; "step": and '
        '``optimizer`` is given these rows alone, as a sparse gradient; "off": all rows',
        more="A table that a head reads too has gradients in all rows, and is none of them. Plans "
        'tell the most bytes that rows can take. "step" is for optimizers that take sparse '
        "gradients: SGD without momentum, SparseAdam, Adagrad; other parameters' are whole.",
        choices=(OFF, "exchange", "step"),
        plan="keeps",
        compared=as_it_is,
        flag=Flag(group=PIPELINE, metavar="HOW"),
    )
    pin: Mapping[str, int] | None = option(
        None,
        help="the stages of modules or parameters, by their dotted names",
        more="Dotted name -> the stage that its operators go to.",
        check=checks.check_stages,
        plan="decides",
        compared=lambda _, options: None if options.pin is None else dict(options.pin),
        flag=Flag(
            group=PLANNER,
            metavar="FQN=STAGE",
            parse=parse_pin,
            more="repeatable",
            repeats=True,
        ),
    )
    eager_modules: Collection[str] = option(
        (),
        help="submodules to run eagerly, each call as one node of the graph, by their dotted "
        "names; ``*`` stands for the number of any layer",
        more="For what Python decides anew in every call. What cannot be traced runs so anyway, if "
        "it can; a node is on one stage, and recomputed as a whole or not.",
        check=checks.check_names,
        compared=lambda _, options: sorted(options.eager_modules),
        flag=Flag(group=PIPELINE, metavar="NAMES", parse=parse_names, default="none"),
    )
    costs: str = option(
        "auto",
        help='where seconds come from: "profile" measures each distinct unit on the device here; '
        '"calibrated" takes what a device reaches by shape, from a table, its own after '
        '`pipecompile calibrate`; "roofline" takes peak rates, a bound; "auto" measures',
        more='What "profile" measured is remembered on disk.',
        choices=("auto", "roofline", "calibrated", "profile"),
        compared=lambda _, options: options.priced,
        flag=Flag(group=PLANNER, metavar="HOW", default="roofline; nothing is measured here"),
    )
    hardware: str | Path | Device | Cluster | None = option(
        None,
        help=f"plan for this device, by its peak rates: {_DEVICES}; for so many of several kinds, "
        "a100:4,l4:4; or for what a JSON file describes",
        more="Or a `Device`, or a `Cluster`.",
        check=checks.one_of(
            (str, Path, Device, Cluster),
            "give a name, the path of a JSON file, a Device, or a Cluster",
        ),
        flag=Flag(group=PLANNER, metavar="NAME", name="--device", default='"cpu", a generic core'),
    )
    solver: str = option(
        "auto",
        help='of the partitioning problem: "auto", "highs", "cbc" or "dynamic"',
        choices=("auto", "highs", "cbc", "dynamic"),
        plan="decides",
        flag=Flag(group=PLANNER, metavar="NAME"),
    )  # rank 0 decides, with its own: so with the limit of its time
    time_limit_s: float = option(
        30.0,
        help="seconds of an idle core after which the solver's best so far is taken; they are "
        "counted as work, so that a busy machine plans the same",
        check=checks.check_above_zero,
        plan="decides",
        flag=Flag(group=PLANNER, metavar="S", name="--time-limit", parse=parse_seconds),
    )
    timeout_s: float = option(
        1800.0,
        help="seconds that a rank may wait for another one; then the run ends, on every rank, with "
        "a message that names it",
        check=checks.check_above_zero,
        compared=as_it_is,
    )
    plan: str | Path | Plan | None = option(
        None,
        help="a saved plan, whose stages and recomputation are used as they are",
        more="A `Plan`, or the path of one that ``pipe.plan.save`` or ``inspect --json`` wrote.",
        check=checks.one_of((str, Path, Plan), "give a Plan, or the path of a saved one"),
        compared=decision_of_plan,
        flag=Flag(
            group=PLANNER,
            metavar="FILE",
            more="its stages, replicas, microbatches, rows and device need not be given again",
        ),
    )
    dump_dir: str | Path | None = option(
        None,
        help="write what every pass made, as text, below this folder",
        check=checks.one_of((str, Path), "give the path of a folder"),
        flag=Flag(group=OUTPUT, metavar="DIR", name="--dump"),
    )
    skip: Collection[str] = option(
        (),
        help="for debugging: passes to leave out, which nothing later needs",
        more="``inspect --passes`` lists them all.",
        check=checks.check_names,
        compared=lambda _, options: sorted(options.skip),
        flag=Flag(group=OUTPUT, metavar="PASSES", parse=parse_names, default="none"),
    )


STAGES = declare(
    help='ranks of the pipeline, each with a stage, or "auto": the division of ``devices`` with '
    "the shortest predicted step",
    more='Divisions, numbers of ``microbatches`` and what else is "auto" (``schedule``, ``zero``) '
    "are then searched for ``example_batch``, which is the batch of all replicas.",
    check=checks.check_count,
    compared=as_it_is,
    flag=Flag(group=PIPELINE, metavar="S", name="--stages", parse=parse_stages),
)
REPLICAS = declare(
    help="data-parallel replicas of the pipeline",
    more='None for 1, or with n_stages="auto" for what is best.',
    check=checks.check_count,
    compared=as_it_is,
    flag=Flag(group=PIPELINE, metavar="N", parse=parse_count, default="1"),
)


@dataclass(frozen=True)
class Arguments(Options):
    """What `pipecompile.compile` takes, not checked yet."""

    model: nn.Module = field(
        metadata=declare(
            help="any module that `torch.export` can trace; it trains in the mode that it is in",
            more='Built under ``torch.device("meta")`` it has no weights: each rank then makes '
            "those of its own stages, by the model's initialisers (``reset_parameters``, "
            "``_init_weights``) or from ``weights``.",
        )
    )
    n_stages: int | str = field(metadata=STAGES)
    dp: int | None = field(default=None, metadata=REPLICAS)
    _: KW_ONLY
    devices: int | None = option(
        None,
        help='how many to divide between stages and replicas, where ``n_stages`` is "auto"',
        more="None takes the number of processes, or of GPUs.",
        check=checks.check_count,
        flag=Flag(group=PIPELINE, metavar="N", parse=parse_count),
    )
