"""`pipecompile solve`: its arguments, and what it does."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from .flags import count, positive

if TYPE_CHECKING:
    from argparse import _SubParsersAction

    from .flags import Parser

_FILE_HELP = """\
FILE is a graph in the JSON format of one of
  msr-fiddle/dnn-partitioning   operator or layer graphs; the load of a device is its time and
                                its transfers (Tarnawski et al., NeurIPS 2020)
  msr-fiddle/piper              layers with and without recomputation (Tarnawski et al.,
                                NeurIPS 2021)
A folder stands for its *.json files. The objective is the largest load of a device.

example
  pipecompile solve graphs/bert24_training.json --stages 6
"""


def add_to(commands: _SubParsersAction[Parser]) -> None:
    parser = commands.add_parser(
        "solve",
        help="divide public graphs into stages: how good is the solver?",
        description="Divide planning problems of two public collections into stages, and say how "
        "good the divisions are. Needs no torch.",
        epilog=_FILE_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("files", nargs="+", metavar="FILE_OR_FOLDER", help="see below")
    parser.add_argument(
        "--stages", type=count, metavar="K", help="devices (default: the file's, or 8)"
    )
    parser.add_argument(
        "--memory", type=positive, metavar="GIB", help="per device (default: the file's, or 8)"
    )
    parser.add_argument(
        "--time-limit",
        type=positive,
        default=30.0,
        metavar="S",
        help="seconds for each graph (default: 30)",
    )
    parser.add_argument(
        "--solver",
        default="auto",
        metavar="NAME",
        help="auto (default), highs or cbc: the integer program; dynamic: contiguous divisions",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    from ...passes.partition.public_problems import files_of, read
    from ..report.solve_report import outcome_of, write_outcomes

    outcomes = []
    for path in files_of(args.files):
        problem = read(path, n_stages=args.stages, memory_gib=args.memory)
        outcomes.append(outcome_of(path, problem, args.time_limit, args.solver))
    write_outcomes(outcomes, sys.stdout, as_json=args.json)
    return 0
