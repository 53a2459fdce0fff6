"""The command line: `pipecompile inspect`, `solve`, `export` and `import`.

One function per command adds its arguments and names what runs it. torch and transformers are
imported when a model is asked for, and not for ``--help`` or ``solve``.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import math
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from ... import __version__
from ..costs.hardware import DEVICES
from ..ir.errors import OptionError, PipecompileError, SpecError

if TYPE_CHECKING:
    from argparse import _SubParsersAction

    Commands = _SubParsersAction["_Parser"]

_SPEC_HELP = """\
SPEC is one of
  path/to/file.py:function   the function takes nothing and returns (model, example batch) or
                             (model, example batch, loss_fn); tensors that it makes have no
                             data, so the model may be of any size
  hf:MODEL_TYPE              a transformers model, for example hf:gpt2, hf:llama, hf:t5, hf:vit
  hf:path/to/config.json     the model of a transformers configuration

examples
  pipecompile inspect train.py:build --stages 4 --dp 2 --microbatches 8
  pipecompile inspect hf:llama --stages 8 --seq 4096 --set num_key_value_heads=8 --device h100
  pipecompile inspect hf:gpt2 --stages auto --devices 8 --memory 4GiB
  pipecompile inspect hf:gpt2 --stages 4 --memory 4GiB --compare uniform,sequential
  pipecompile inspect hf:gpt2 --plan plan.json
"""

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


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; 0, or 2 and one line on stderr for a mistake of the user's."""
    try:
        args = _parser().parse_args(argv)
        code: int = args.run(args)
        return code
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
    _add_inspect(commands)
    _add_solve(commands)
    _add_export(commands)
    _add_import(commands)
    return parser


# -- inspect ------------------------------------------------------------------------------------


def _add_inspect(commands: Commands) -> None:
    parser = commands.add_parser(
        "inspect",
        help="show how a model is divided, scheduled and what it costs",
        description="Show how a model is divided into stages, what each costs and needs, the "
        "schedule, and what would help. Needs no weights, no GPU and no other process.",
        epilog=_SPEC_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(run=_inspect)
    parser.add_argument("spec", metavar="SPEC", help="the model: see below")
    _add_pipeline_options(parser)
    _add_planner_options(parser)
    _add_output_options(parser)
    _add_model_options(parser)


def _add_pipeline_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("the pipeline")
    group.add_argument(
        "--stages",
        type=_count_or_auto,
        metavar="S",
        help="pipeline stages; auto: the division of --devices with the shortest predicted step",
    )
    group.add_argument(
        "--devices", type=_count, metavar="N", help="stages × replicas, for --stages auto"
    )
    group.add_argument(
        "--dp", type=_count, metavar="N", help="replicas of the pipeline (default 1)"
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
        metavar="NAME",
        help="1f1b (default), or zb_h1: weight gradients later, for a smaller bubble",
    )
    group.add_argument(
        "--tied-grads",
        metavar="WHEN",
        help="per_microbatch: gradients of tied weights travel with every microbatch, bit-exact "
        "(default); per_step: summed once per step",
    )
    group.add_argument(
        "--precision",
        metavar="DTYPE",
        help="bf16 or fp16: matrix products and attention in that dtype, as torch.autocast has it "
        "on the device; fp32 (default: as the model comes)",
    )

    group.add_argument(
        "--zero",
        metavar="LEVEL",
        help="what replicas divide among themselves: 1 optimizer states, 2 gradients too, 3 "
        "parameters too; auto: the smallest that fits into the memory (default 0: nothing)",
    )


def _add_planner_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("the planner")
    group.add_argument(
        "--memory",
        metavar="BYTES",
        help="what a stage may use at its peak, for example 20GiB (default: all that --device "
        "has; without --device no limit)",
    )
    group.add_argument(
        "--remat",
        default="auto",
        metavar="WHAT",
        help="auto: recompute what it takes to fit into the memory (default); none; full: keep "
        "each unit's inputs only",
    )
    group.add_argument(
        "--pin",
        action="append",
        default=[],
        type=_pin,
        metavar="FQN=STAGE",
        help="the stage of a module or parameter, by its dotted name; repeatable",
    )
    group.add_argument(
        "--device",
        metavar="NAME",
        help=f"whose peak rates count: {', '.join(DEVICES)}, or a JSON file that describes one "
        "(default cpu: a generic core)",
    )
    group.add_argument(
        "--optimizer",
        default="adamw",
        choices=("adamw", "sgd", "none"),
        help="its states are part of the memory (default adamw; sgd is without momentum)",
    )
    group.add_argument(
        "--solver", default="auto", metavar="NAME", help="auto (default), highs, cbc or dynamic"
    )
    group.add_argument(
        "--time-limit",
        type=_seconds,
        default=30.0,
        metavar="S",
        help="seconds after which the solver's best so far is taken (default 30)",
    )
    group.add_argument(
        "--plan",
        metavar="FILE",
        help="show a saved plan on this model, instead of making one; its stages, replicas, "
        "microbatches, rows and device need not be given again",
    )


def _add_output_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("the output")
    group.add_argument(
        "--compare",
        type=_names,
        default=(),
        metavar="NAMES",
        help="beside the plan, simple strategies at the same prices: uniform, parameters, "
        "sequential, all-or-nothing, dynamic; separated by commas",
    )
    group.add_argument("--save", metavar="FILE", help="write the plan, for --plan and compile()")
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


def _inspect(args: argparse.Namespace) -> int:
    with _quiet():
        from .inspection import Request, inspect

        found = inspect(Request.of(args))
    if args.json:
        sys.stdout.write(found.plan.to_json())
        return 0
    from ..report.report import write_report

    write_report(found.plan, found.timeline, sys.stdout, found.extras)
    return 0


# -- solve --------------------------------------------------------------------------------------


def _add_solve(commands: Commands) -> None:
    parser = commands.add_parser(
        "solve",
        help="divide public graphs into stages: how good is the solver?",
        description="Divide planning problems of two public collections into stages, and say how "
        "good the divisions are. Needs no torch.",
        epilog=_FILE_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("files", nargs="+", metavar="FILE_OR_FOLDER", help="see below")
    parser.add_argument(
        "--stages", type=_count, metavar="K", help="devices (default: the file's, or 8)"
    )
    parser.add_argument(
        "--memory", type=_positive, metavar="GIB", help="per device (default: the file's, or 8)"
    )
    parser.add_argument(
        "--time-limit",
        type=_positive,
        default=30.0,
        metavar="S",
        help="seconds for each graph (default 30)",
    )
    parser.add_argument(
        "--solver",
        default="auto",
        metavar="NAME",
        help="auto (default), highs or cbc: the integer program; dynamic: contiguous divisions",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.set_defaults(run=_solve)


def _solve(args: argparse.Namespace) -> int:
    from ..report.solve_report import outcome_of, write_outcomes
    from .public_problems import files_of, read

    outcomes = []
    for path in files_of(args.files):
        problem = read(path, n_stages=args.stages, memory_gib=args.memory)
        outcomes.append(outcome_of(path, problem, args.time_limit, args.solver))
    write_outcomes(outcomes, sys.stdout, as_json=args.json)
    return 0


# -- export and import --------------------------------------------------------------------------


def _add_export(commands: Commands) -> None:
    parser = commands.add_parser(
        "export",
        help="write a checkpoint's weights for from_pretrained",
        description="Write the weights of a checkpoint as Hugging Face safetensors files, and the "
        "model's config.json, for from_pretrained. One tensor at a time is in memory.",
        allow_abbrev=False,
    )
    parser.set_defaults(run=_export)
    parser.add_argument("directory", metavar="DIR", help="what pipe.save() wrote to")
    parser.add_argument("out", metavar="OUT", help="a new folder")
    parser.add_argument(
        "--config",
        metavar="FILE_OR_SPEC",
        help="a config.json, or a model as `inspect` takes it, for OUT/config.json (default: the "
        "configuration of the model that was saved)",
    )
    parser.add_argument(
        "--shard-size",
        default="5GB",
        metavar="BYTES",
        help="the most that one file holds, if no tensor is larger (default 5GB)",
    )


def _export(args: argparse.Namespace) -> int:
    from ...runtime.checkpoint.huggingface import export
    from ..options.parsing import parse_bytes

    shard_bytes = parse_bytes(args.shard_size, "--shard-size")
    config = None if args.config is None else _config(args.config)
    for path in export(Path(args.directory), Path(args.out), config, shard_bytes):
        print(path)
    return 0


def _config(source: str) -> dict[str, Any]:
    """The configuration in a JSON file, or of the model that a SPEC names."""
    from ...runtime.checkpoint.huggingface import read_object
    from ...runtime.checkpoint.snapshot import config_of
    from .spec import ModelOptions, load

    if source.endswith(".json") and not source.startswith("hf:"):
        return read_object(Path(source))
    with _quiet():
        config = config_of(load(source, ModelOptions()).model)
    if config is None:
        raise SpecError(f"the model of {source} has no configuration: give a config.json")
    return config


def _add_import(commands: Commands) -> None:
    parser = commands.add_parser(
        "import",
        help="make a checkpoint of a model's safetensors files",
        description="Make a checkpoint of Hugging Face safetensors files: weights alone, with "
        "which pipe.load() begins a training. One tensor at a time is in memory.",
        allow_abbrev=False,
    )
    parser.set_defaults(run=_import)
    parser.add_argument("source", metavar="SRC", help="a folder of save_pretrained, or a file")
    parser.add_argument("directory", metavar="DIR", help="a folder without checkpoints")


def _import(args: argparse.Namespace) -> int:
    from ...runtime.checkpoint.huggingface import import_

    print(import_(Path(args.source), Path(args.directory)))
    return 0


# -- arguments ----------------------------------------------------------------------------------


def _count(text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return number


def _count_or_auto(text: str) -> int | str:
    return text if text == "auto" else _count(text)


def _seconds(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds") from None


def _positive(text: str) -> float:
    number = _seconds(text)
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return number


def _pin(text: str) -> tuple[str, int]:
    name, _, stage = text.rpartition("=")
    if not name or not stage.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r}: write it as FQN=STAGE, like lm_head=3")
    return name, int(stage)


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(","))


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
