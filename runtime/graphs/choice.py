"""Whether programs are recorded, by the device and by the batches that are met."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch

from ...compiler.capture.batch import BatchSpec
from ...compiler.ir.errors import BatchError, OptionError
from ...compiler.options.options import CompileOptions
from .recorder import RECORDERS, Recorder


def settled(options: CompileOptions, device: torch.device) -> CompileOptions:
    """The options, with ``cudagraphs`` that are known to be possible on the device.

    Raises:
        OptionError: they are asked for, and the device has none.
    """
    if not options.cudagraphs or device.type in RECORDERS:
        return options
    if options.cudagraphs is True:
        raise OptionError(
            f"cudagraphs=True records work of a CUDA device, and this pipeline runs on {device}: "
            'give device="cuda", or leave it out'
        )
    return replace(options, cudagraphs=False)


def recorder_for(
    wanted: bool | str, spec: BatchSpec, others: Iterable[BatchSpec], device: torch.device
) -> Recorder | None:
    """What records the programs for microbatches of a shape; None where they run as they are.

    Args:
        others: of microbatches whose programs are there already.

    Raises:
        BatchError: ``cudagraphs=True``, and there is another shape.
    """
    first = next(iter(others), None)
    if not wanted or (first is not None and wanted is not True):
        return None
    if first is not None:
        raise BatchError(
            f"cudagraphs=True, and microbatches of ({spec}) come after such of ({first}): what was "
            "recorded holds for one shape. Give batches of one shape, with rows that microbatches= "
            '× dp= divides (pad them, drop_last=True), or cudagraphs="auto", which runs others '
            "operator by operator"
        )
    return RECORDERS[device.type](device)
