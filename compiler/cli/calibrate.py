"""`pipecompile calibrate`: its arguments, and what it does."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from ..ir.errors import OptionError

if TYPE_CHECKING:
    from argparse import _SubParsersAction

    from .flags import Parser


def add_to(commands: _SubParsersAction[Parser]) -> None:
    parser = commands.add_parser(
        "calibrate",
        help="measure what the device at hand reaches, for costs=calibrated",
        description="Measure, in seconds, what matrix products, attention, element-wise operators "
        "and launches reach on the device at hand. It is remembered for this torch, and "
        "inspect --costs calibrated and compile(costs='calibrated') use it from then on.",
    )
    parser.set_defaults(run=_run)
    parser.add_argument(
        "--on", metavar="DEVICE", help='"cpu" or "cuda" (default: CUDA if there is one)'
    )


def _run(args: argparse.Namespace) -> int:
    import torch

    from ..costs.at_hand import device_spec
    from ..kept.cache import default_cache_dir
    from ..profiling.calibrating import calibrate
    from ..report.calibration_report import calibration_lines

    chosen = args.on or ("cuda" if torch.cuda.is_available() else "cpu")
    if chosen not in ("cpu", "cuda"):
        raise OptionError(f"--on {chosen}: use cpu or cuda")
    if chosen == "cuda" and not torch.cuda.is_available():
        raise OptionError("--on cuda: this torch sees no CUDA device, use cpu")
    device = torch.device(chosen)
    measured, samples = calibrate(device)
    path = measured.keep(default_cache_dir())
    for line in calibration_lines(measured, samples, device_spec(device), path):
        print(line)
    return 0
