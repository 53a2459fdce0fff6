"""`pipecompile.compile`: the one call."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from .capture.refusals import check_model
from .host.frames import with_room
from .ir.errors import OptionError
from .options.arguments import Arguments
from .options.declaration import declarations_of
from .options.options import OF_TRAINING, CompileOptions
from .options.parsing import AUTO
from .options.signature import takes

if TYPE_CHECKING:
    from ..runtime.pipeline import Pipeline
    from .driver.auto import Open


@takes(Arguments)
def compile(arguments: Arguments) -> Pipeline:
    """Compile an unmodified model into a pipeline-parallel training program.

    Started by torchrun with n_stages × dp processes, each plays one rank; started by plain
    python, the one process plays them all, with the same numbers bit for bit. The model's
    weights are copied; the model itself stays as it is and may be deleted.

    Args:
        ...

    Raises:
        OptionError: an unknown, impossible or ineffective option.
        WorldSizeError: torchrun started another number of processes than n_stages × dp.
        MemoryBudgetError: no division fits into ``memory``.
        PlanError: ``plan`` is damaged, or was made for something else.
        StateError: ``weights`` does not fit the model, or there is no initialiser.
        RankMismatchError: options, models or weights differ between ranks.
        SharedStorageError, CaptureError, LossError, BatchError, PartitionError: from compiling,
            at the first batch or with ``example_batch``.
    """
    from .driver.auto import Open

    divides, orders = arguments.n_stages == AUTO, arguments.schedule == AUTO
    if not divides and arguments.devices is not None:
        raise OptionError('devices= has no effect without n_stages="auto"')
    if orders and not arguments.training:
        raise OptionError(f"schedule= has no effect with training=False: {OF_TRAINING['schedule']}")
    open_ = Open(
        divides,
        orders,
        arguments.devices,
        arguments.virtual_stages,
        arguments.schedule_memory,
    )
    return compile_among(arguments, open_)


@with_room
def compile_among(arguments: Arguments, open_: Open) -> Pipeline:
    """`compile` the best of what is left open; the arguments say what is not."""
    options = CompileOptions.of(arguments)
    from ..runtime.monitor.watching import compiles

    compiles(arguments, open_)
    check_model(arguments.model, arguments.loss_fn)
    from ..runtime.start import chooses_places, start, start_best

    if not open_.divides and not open_.orders:
        if chooses_places(options):
            return start_best(arguments.model, options, replace(open_, places=True))
        return start(arguments.model, options, stays=open_.stages is None)
    _check_auto(arguments, 'n_stages="auto"' if open_.divides else 'schedule="auto"')
    return start_best(arguments.model, options, open_)


def _check_auto(arguments: Arguments, auto: str) -> None:
    """Raises OptionError for what automatic stages or schedules lack, or do not go with."""
    declarations_of(Arguments)["devices"].check_value(arguments.devices)
    if arguments.n_stages == AUTO and arguments.dp is not None:
        raise OptionError(
            f'dp={arguments.dp} beside n_stages="auto": dp follows from the devices, leave it out'
        )
    if arguments.example_batch is None:
        whole = ", the batch of all replicas" if arguments.n_stages == AUTO else ""
        raise OptionError(f"{auto} needs example_batch={whole}, to plan for")
    if arguments.cut is not None:
        raise OptionError(f"cut= beside {auto}, which plans for rows: name what is to be taken")
    if arguments.pin is not None:
        raise OptionError(f"pin= names stages, which {auto} does not number: leave one of them out")
    if arguments.plan is not None:
        raise OptionError(f"plan= has decided what {auto} would choose: leave one of them out")
