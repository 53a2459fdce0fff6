"""`pipecompile inspect`: its arguments."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from ..options.arguments import OUTPUT, PLANNER, Arguments
from ..options.parsing import parse_names
from .flags import add_flags, count
from .quiet import quiet

if TYPE_CHECKING:
    from argparse import _SubParsersAction

    from .flags import Parser

SPEC_HELP = """\
SPEC is one of
  path/to/file.py:function   the function takes nothing and returns (model, example batch) or
                             (model, example batch, loss_fn); tensors that it makes have no
                             data, so the model may be of any size
  hf:MODEL_TYPE              a transformers model, for example hf:gpt2, hf:llama, hf:t5, hf:vit
  hf:path/to/config.json     the model of a transformers configuration
"""
_EXAMPLES = """\

examples
  pipecompile inspect train.py:build --stages 4 --dp 2 --microbatches 8
  pipecompile inspect hf:llama --stages 8 --seq 4096 --set num_key_value_heads=8 --device h100
  pipecompile inspect hf:gpt2 --stages auto --devices 8 --memory 4GiB
  pipecompile inspect hf:gpt2 --stages 4 --memory 4GiB --compare uniform,sequential
  pipecompile inspect hf:gpt2 --plan plan.json
"""


def add_to(commands: _SubParsersAction[Parser]) -> None:
    parser = commands.add_parser(
        "inspect",
        help="show how a model is divided, scheduled and what it costs",
        description="Show how a model is divided into stages, what each costs and needs, the "
        "schedule, and what would help. Needs no weights, no GPU and no other process.",
        epilog=SPEC_HELP + _EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=_run)
    parser.add_argument("spec", metavar="SPEC", help="the model: see below")
    groups = add_flags(parser, Arguments)
    groups[PLANNER].add_argument(
        "--optimizer",
        default="adamw",
        choices=("adamw", "sgd", "none"),
        help="its states are part of the memory; sgd is without momentum (default: adamw)",
    )
    _add_output(groups[OUTPUT])
    add_model(parser.add_argument_group("the model, for hf: only"))


def _add_output(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--compare",
        type=parse_names,
        default=(),
        metavar="NAMES",
        help="beside the plan, simple strategies at the same prices: uniform, parameters, "
        "sequential, all-or-nothing, dynamic; separated by commas",
    )
    group.add_argument(
        "--passes", action="store_true", help="list the passes, with what each did and its time"
    )
    group.add_argument("--save", metavar="FILE", help="write the plan, for --plan and compile()")
    group.add_argument("--json", action="store_true", help="print the plan as JSON instead")


def add_model(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="change the configuration; repeatable; text_config.KEY=VALUE for one inside it",
    )
    group.add_argument(
        "--task",
        metavar="TASK",
        help="causal-lm, masked-lm, seq2seq-lm, sequence-classification or image-classification "
        "(default: that of the configuration)",
    )
    group.add_argument(
        "--batch",
        type=count,
        metavar="ROWS",
        help="rows of the batch of all replicas (default: one per microbatch)",
    )
    group.add_argument(
        "--seq",
        type=count,
        metavar="TOKENS",
        help="tokens per row (default: 512, or the model's longest if that is shorter)",
    )


def _run(args: argparse.Namespace) -> int:
    with quiet():
        from .inspection import inspect
        from .request import Request

        found = inspect(Request.of(args))
    if args.json:
        sys.stdout.write(found.plan.to_json())
        return 0
    from ..report.report import write_report

    write_report(found.plan, found.timeline, sys.stdout, found.extras)
    return 0
