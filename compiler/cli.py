"""The command line: `pipecompile inspect`.

torch and transformers are imported when a model is asked for, and not for ``--help``.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import sys
import warnings
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NoReturn

from .. import __version__
from .errors import OptionError, PipecompileError

if TYPE_CHECKING:
    from .build import Compiled

_SPEC_HELP = """\
SPEC is one of
  path/to/file.py:function   the function takes nothing and returns (model, example batch) or
                             (model, example batch, loss_fn); tensors that it makes have no
                             data, so the model may be of any size
  hf:MODEL_TYPE              a transformers model, for example hf:gpt2, hf:llama, hf:t5, hf:vit
  hf:path/to/config.json     the model of a transformers configuration

examples
  pipecompile inspect train.py:build --stages 4 --dp 2 --microbatches 8
  pipecompile inspect hf:llama --stages 8 --seq 4096 --set num_key_value_heads=8
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; 0, or 2 and one line on stderr for a mistake of the user's."""
    try:
        args = _parser().parse_args(argv)
        return _inspect(args)
    except PipecompileError as error:
        print(f"pipecompile: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


class _Parser(argparse.ArgumentParser):
    """Reports mistakes as every other error is reported."""

    def error(self, message: str) -> NoReturn:
        raise OptionError(f"{message} (see {self.prog} --help)")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="pipecompile",
        description="Compiles an unmodified PyTorch transformer into a pipeline-parallel program.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"pipecompile {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    inspect = commands.add_parser(
        "inspect",
        help="show how a model is divided, scheduled and what it costs",
        description="Show how a model is divided into stages, what each costs, and the schedule. "
        "Needs no weights, no GPU and no other process.",
        epilog=_SPEC_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    inspect.add_argument("spec", metavar="SPEC", help="the model: see below")
    _add_pipeline_options(inspect)
    _add_model_options(inspect)
    return parser


def _add_pipeline_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("the pipeline")
    group.add_argument("--stages", type=_count, required=True, metavar="S", help="pipeline stages")
    group.add_argument(
        "--dp", type=_count, default=1, metavar="N", help="replicas of the pipeline (default 1)"
    )
    group.add_argument(
        "--microbatches",
        type=_count,
        metavar="M",
        help="into how many a replica's batch is cut (default: the divisor of its rows nearest "
        "to 4 per stage)",
    )
    group.add_argument(
        "--schedule",
        default="1f1b",
        metavar="NAME",
        help="1f1b (default), or zb_h1: weight gradients later, for a smaller bubble",
    )
    group.add_argument(
        "--tied-grads",
        default="per_microbatch",
        metavar="WHEN",
        help="per_microbatch: gradients of tied weights travel with every microbatch, bit-exact "
        "(default); per_step: summed once per step",
    )
    group.add_argument("--dump", metavar="DIR", help="write what every pass made below DIR")
    group.add_argument("--json", action="store_true", help="print the plan as JSON instead")


def _add_model_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("the model, for hf: only")
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
        type=_count,
        metavar="ROWS",
        help="rows of the batch of all replicas (default: one per microbatch)",
    )
    group.add_argument(
        "--seq",
        type=_count,
        metavar="TOKENS",
        help="tokens per row (default 512, or the model's longest if that is shorter)",
    )


def _count(text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return number


def _inspect(args: argparse.Namespace) -> int:
    with _quiet():
        compiled = _compile(args)
    if args.json:
        sys.stdout.write(compiled.plan.to_json())
        return 0
    from .report import write_report

    write_report(compiled.plan, compiled.timeline, sys.stdout)
    return 0


def _compile(args: argparse.Namespace) -> Compiled:
    import torch

    from .batch import flatten
    from .build import Builder, Mode, divide
    from .options import CompileOptions
    from .skeleton import skeleton_of
    from .spec import ModelOptions, load

    rows = args.dp * (args.microbatches or 4 * args.stages)
    shape = ModelOptions(tuple(args.set), args.task, args.batch, args.seq, rows)
    subject = load(args.spec, shape)
    options = CompileOptions(
        n_stages=args.stages,
        dp=args.dp,
        microbatches=args.microbatches,
        loss_fn=subject.loss_fn,
        schedule=args.schedule,
        tied_grads=args.tied_grads,
        dump_dir=args.dump,
    )
    _, whole = flatten(subject.batch)
    spec, microbatches = divide(whole, options, options.dp)
    device = torch.device("cpu")
    builder = Builder(skeleton_of(subject.model, device), options, device)
    return builder.build(Mode.TRAIN, spec, microbatches)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Only the report goes to stdout; what libraries warn of concerns running, not inspecting."""
    disabled = logging.root.manager.disable
    with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(disabled)
