"""Flags: those that options declare, and the types of arguments that commands share."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import MISSING
from typing import Any, NoReturn, TypeVar

from ..ir.errors import OptionError
from ..options.arguments import Arguments
from ..options.declaration import PLANNER, Declaration, declarations_of
from ..options.parsing import parse_count, parse_seconds

T = TypeVar("T")

_SPEC_HELP = """\
SPEC is one of
  path/to/file.py:function   the function takes nothing and returns (model, example batch) or
                             (model, example batch, loss_fn); tensors that it makes have no
                             data, so the model may be of any size
  path/to/train.py           inspect only: a script, run with the arguments after -- until it would
                             train; its compile() says the options, and flags change them
  hf:MODEL_TYPE              a transformers model, for example hf:gpt2, hf:llama, hf:t5, hf:vit
  hf:path/to/config.json     the model of a transformers configuration
"""


class Parser(argparse.ArgumentParser):
    """Reports mistakes as every other error is reported; flags are written in full."""

    def __init__(self, **options: Any):
        super().__init__(**options, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise OptionError(f"{message} (see {self.prog} --help)")


def add_command(
    commands: argparse._SubParsersAction[Parser],
    name: str,
    run: Callable[[argparse.Namespace], int],
    optimizers: tuple[str, ...],
    *,
    help: str,
    description: str,
    examples: str,
) -> tuple[Parser, dict[str, argparse._ArgumentGroup]]:
    """Add a command on a model: SPEC, the flags of options, and those of the model.

    Args:
        optimizers: the first is the default.

    Returns:
        Its parser, and the groups of the options' flags by title.
    """
    parser = commands.add_parser(
        name,
        help=help,
        description=description,
        epilog=_SPEC_HELP + examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    parser.add_argument("spec", metavar="SPEC", help="the model: see below")
    groups = add_flags(parser, Arguments)
    groups[PLANNER].add_argument(
        "--optimizer",
        choices=optimizers,
        help="its states are part of the memory; sgd is without momentum "
        f"(default: {optimizers[0]})",
    )
    _add_model(parser.add_argument_group("the model, for hf: only, and figures of the device"))
    return parser, groups


def _add_model(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="change the configuration; repeatable; text_config.KEY=VALUE for one inside it; of "
        "any model, device.memory_bytes, device.bytes_per_s, device.flops_per_s.bfloat16, "
        "device.launch_s, link.bytes_per_s and link.latency_s change the device, and "
        "machine.devices, .bytes_per_s, .latency_s and .oversubscription the machines it is in",
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


def add_flags(
    parser: argparse.ArgumentParser, arguments: type
) -> dict[str, argparse._ArgumentGroup]:
    """Add the flag of every option that declares one; their groups by title.

    Each sets the attribute of its option's name to what the option takes, and to None where it is
    not given.

    Args:
        arguments: a dataclass of options.
    """
    options = declarations_of(arguments)
    flags = {name: option.flag_name for name, option in options.items() if option.flag is not None}
    groups: dict[str, argparse._ArgumentGroup] = {}
    for name, option in options.items():
        if (flag := option.flag) is None:
            continue
        if flag.group not in groups:
            groups[flag.group] = parser.add_argument_group(flag.group)
        groups[flag.group].add_argument(
            flags[name],
            dest=name,
            type=typed(flag.parse),
            action=Stages if flag.repeats else "store",
            metavar=flag.metavar,
            help=help_of(option, flags),
        )
    return groups


def help_of(option: Declaration, flags: Mapping[str, str]) -> str:
    """What ``--help`` says of an option: its help, what only flags add, and its default.

    Values are typed without quotes, so they stand without.

    Args:
        flags: name of an option -> its flag, for the options that it names.
    """
    flag = option.flag
    assert flag is not None
    text = f"{option.help}; {flag.more}" if flag.more else option.help
    default = flag.default or _text(option.default)
    text += f" (default: {default})" if default else ""
    text = re.sub("`+([^`]+)`+", lambda name: flags.get(name[1], name[1]), text)
    return text.replace('"', "").replace("%", "%%")


def _text(default: object) -> str:
    if default is None or default is MISSING:
        return ""
    return f"{default:g}" if isinstance(default, float) else str(default)


class Stages(argparse.Action):
    """Collects NAME=STAGE, given several times, into a dict."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        name, stage = values
        stages = getattr(namespace, self.dest) or {}
        if stages.setdefault(name, stage) != stage:
            raise OptionError(
                f"{option_string} {name}={stage}: it is pinned to {stages[name]} already"
            )
        setattr(namespace, self.dest, stages)


def typed(parse: Callable[[str], T]) -> Callable[[str], T]:
    """The type of an argument: argparse names the argument in what ``parse`` raises."""

    def convert(text: str) -> T:
        try:
            return parse(text)
        except OptionError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return convert


def _parse_positive(text: str) -> float:
    number = parse_seconds(text)
    if not 0 < number < math.inf:
        raise OptionError(f"{text!r} is not a number above 0")
    return number


count = typed(parse_count)
positive = typed(_parse_positive)
