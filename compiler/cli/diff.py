"""`pipecompile diff`: its arguments, and what it does."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from argparse import _SubParsersAction

    from .flags import Parser

_EXAMPLE = """\

example
  with pipe.trace("run.json", plan="plan.json"):   # in train.py
      for batch in batches:
          pipe.step(batch)
  pipecompile diff plan.json run.json
"""


def add_to(commands: _SubParsersAction[Parser]) -> None:
    parser = commands.add_parser(
        "diff",
        help="compare the trace of a plan with that of its run",
        description="Compare what was predicted with what was measured: seconds per stage and kind "
        "of action, of a step, its bubble, and which rank waits for which.",
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=_run)
    parser.add_argument(
        "planned", metavar="PLANNED", help="a trace of inspect --trace or pipe.trace(plan=)"
    )
    parser.add_argument("measured", metavar="MEASURED", help="a trace of pipe.trace()")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")


def _run(args: argparse.Namespace) -> int:
    from ..report.diff_report import write_difference
    from ..trace.difference import difference
    from ..trace.reading import read_trace

    found = difference(read_trace(Path(args.planned)), read_trace(Path(args.measured)))
    write_difference(found, sys.stdout, as_json=args.json)
    return 0
