"""`pipecompile inspect`: its arguments."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ..ir.errors import OptionError
from ..options.declaration import OUTPUT
from ..options.parsing import parse_names
from ..report.quiet import quiet
from ..tracing.collecting import seldom_collected, settle, uncollected
from .flags import add_command

if TYPE_CHECKING:
    from argparse import _SubParsersAction

    from .flags import Parser

_EXAMPLES = """\

examples
  pipecompile inspect train.py:build --stages 4 --dp 2 --microbatches 8
  pipecompile inspect hf:llama --stages 8 --seq 4096 --set num_key_value_heads=8 --device h100
  pipecompile inspect hf:gpt2 --stages auto --devices 8 --memory 4GiB
  pipecompile inspect hf:gpt2 --stages 4 --memory 4GiB --compare uniform,sequential
  pipecompile inspect hf:gpt2 --plan plan.json
  pipecompile inspect train.py -- --layers 2     what the script's own compile() asks for
  pipecompile inspect hf:llama --stages 8 --device h100 --set link.bytes_per_s=12.5e9
  pipecompile inspect hf:gpt2 --stages 4 --html report.html --trace planned.json
"""


def add_to(commands: _SubParsersAction[Parser]) -> None:
    _, groups = add_command(
        commands,
        "inspect",
        _run,
        ("adamw", "sgd", "none"),
        help="show how a model is divided, scheduled and what it costs",
        description="Show how a model is divided into stages, what each costs and needs, the "
        "schedule, and what would help. Needs no weights, no GPU and no other process.",
        examples=_EXAMPLES,
    )
    _add_output(groups[OUTPUT])


def _add_output(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--compare",
        type=parse_names,
        default=(),
        metavar="NAMES",
        help="beside the plan, simple strategies at the same prices: uniform, parameters, "
        "sequential, all-or-nothing, dynamic; schedules for the same batch in every schedule; "
        "separated by commas",
    )
    group.add_argument(
        "--passes", action="store_true", help="list the passes, with what each did and its time"
    )
    group.add_argument("--save", metavar="FILE", help="write the plan, for --plan and compile()")
    group.add_argument(
        "--trace",
        metavar="FILE",
        help="write the simulated step as a trace, for Perfetto, chrome://tracing and diff",
    )
    group.add_argument(
        "--html", metavar="FILE", help="write the report as one web page, for browsers and paper"
    )
    group.add_argument(
        "--json",
        action="store_true",
        help="print the plan as JSON instead, with the ways that were tried for auto",
    )


def _run(args: argparse.Namespace) -> int:
    with quiet(), seldom_collected():
        with uncollected():
            from ..subjects.script import is_script, run_script
            from .inspection import inspect
            from .request import Request

            settle()
        script = None
        if is_script(args.spec):
            script = run_script(Path(args.spec), args.script)
        elif args.script:
            raise OptionError(f"what follows -- is for a script, and {args.spec} is none")
        found = inspect(Request.of(args, script))
    if args.json:
        sys.stdout.write(found.plan.to_json([t.to_dict() for t in found.extras.trials]))
        return 0
    from ..report.report import write_report

    write_report(found.plan, found.timeline, sys.stdout, found.extras)
    return 0
