"""`pipecompile.compile`: the one call."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .capture.refusals import check_model
from .ir.errors import OptionError
from .options.arguments import Arguments
from .options.declaration import declarations_of
from .options.options import CompileOptions
from .options.parsing import AUTO
from .options.signature import takes

if TYPE_CHECKING:
    from ..runtime.pipeline import Pipeline


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
    options = CompileOptions.of(arguments)
    check_model(arguments.model, arguments.loss_fn)
    from ..runtime.start import start, start_best

    if arguments.n_stages != AUTO:
        if arguments.devices is not None:
            raise OptionError('devices= has no effect without n_stages="auto"')
        return start(arguments.model, options)
    _check_auto(arguments)
    return start_best(arguments.model, options, arguments.devices)


def _check_auto(arguments: Arguments) -> None:
    """Raises OptionError for what automatic stages lack, or do not go with."""
    declarations_of(Arguments)["devices"].check_value(arguments.devices)
    if arguments.dp is not None:
        raise OptionError(
            f'dp={arguments.dp} beside n_stages="auto": dp follows from the devices, leave it out'
        )
    if arguments.example_batch is None:
        raise OptionError(
            'n_stages="auto" needs example_batch=, the batch of all replicas, to plan for'
        )
    if arguments.cut is not None:
        raise OptionError(
            'cut= beside n_stages="auto", which plans for rows: give n_stages= and dp= numbers'
        )
    for name in ("plan", "pin"):
        if getattr(arguments, name) is not None:
            raise OptionError(f'{name}= names stages: give n_stages a number, not "auto"')
