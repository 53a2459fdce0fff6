"""Which backend runs a pipeline, by what there is on the machine."""

from __future__ import annotations

from dataclasses import replace

import torch

from ...compiler.ir.errors import BackendError
from ...compiler.options.options import CompileOptions
from ...compiler.options.parsing import AUTO

EAGER, INDUCTOR = "eager", "inductor"


def settled(options: CompileOptions, device: torch.device) -> tuple[CompileOptions, str]:
    """The options with a backend that is known to be there, and a note where it was chosen.

    Raises:
        BackendError: Inductor is asked for, and cannot compile here.
    """
    if options.backend == EAGER or (options.backend == AUTO and device.type != "cuda"):
        return replace(options, backend=EAGER), ""
    from .inductor import lacking

    lack = lacking(device.type)
    if not lack:
        return replace(options, backend=INDUCTOR), ""
    if options.backend == INDUCTOR:
        raise BackendError(
            f'backend="inductor" cannot compile for {device.type}: {lack}; install it, or give '
            'backend="eager"'
        )
    return replace(options, backend=EAGER), f"eager kernels, as {lack}"
