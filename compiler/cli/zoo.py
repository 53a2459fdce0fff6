"""`pipecompile zoo`: which architectures train under stages as they do plainly."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ..report.quiet import quiet
from ..zoo.families import FAMILIES, architectures
from .flags import count, positive

if TYPE_CHECKING:
    from argparse import _SubParsersAction
    from collections.abc import Iterator

    from ..zoo.trial import Outcome
    from .flags import Parser


def add_to(commands: _SubParsersAction[Parser]) -> None:
    parser = commands.add_parser(
        "zoo",
        help="train a tiny model of every architecture, and compare with plain training",
        description="Train a tiny model of every architecture of the installed transformers, and "
        "some of torch.nn alone, under stages and plainly, and compare bit for bit. Goes on where "
        "it was interrupted. The exit status is 1 if any is silently different, or failed.",
    )
    parser.set_defaults(run=_run)
    parser.add_argument(
        "--family",
        action="append",
        default=[],
        choices=FAMILIES,
        help=f"{', '.join(FAMILIES)}; repeatable (default: all)",
    )
    parser.add_argument(
        "--only",
        nargs="+",
        default=[],
        metavar="NAME",
        help="model types, such as gpt2, or causal-lm/gpt2 for one family",
    )
    parser.add_argument("--stages", type=count, default=4, metavar="N", help="default: 4")
    parser.add_argument(
        "--limit-seconds",
        type=positive,
        default=120.0,
        metavar="S",
        help="what takes longer is ended (default: 120)",
    )
    parser.add_argument(
        "--jobs", type=count, default=1, metavar="N", help="how many at once (default: 1)"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("zoo"),
        metavar="DIR",
        help="outcomes, a line of JSON each; what has one is not tried again (default: zoo)",
    )
    parser.add_argument("--again", action="store_true", help="try again what has an outcome")
    parser.add_argument("--docs", type=Path, metavar="FILE", help="write the tables as Markdown")


def _run(args: argparse.Namespace) -> int:
    with quiet():
        from ..zoo.coverage import markdown, summary
        from ..zoo.runner import read, run
        from ..zoo.trial import DIFFERENT, FAILED

        wanted = architectures(args.family, args.only)
        known = {} if args.again else read(args.out)
        left = [each for each in wanted if each not in known]
        _show(run(left, args.out, args.stages, args.limit_seconds, args.jobs), len(left))
        outcomes = read(args.out)
    found = [outcomes[each] for each in wanted if each in outcomes]
    if args.docs is not None:
        args.docs.write_text(markdown(found, args.stages))
    sys.stdout.write(summary(found))
    return int(any(each.outcome in (DIFFERENT, FAILED) for each in found))


def _show(outcomes: Iterator[Outcome], total: int) -> None:
    """A progress bar, and a line for each that is not right."""
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from ..zoo.trial import RIGHT

    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True, soft_wrap=True)
    with Progress(*columns, TextColumn("{task.fields[last]}"), console=console) as progress:
        task = progress.add_task("zoo", total=total, last="")
        for each in outcomes:
            progress.update(task, advance=1, last=str(each.architecture))
            if each.outcome != RIGHT:
                line = f"{each.architecture}: {each.outcome}: {each.reason}"
                progress.console.print(escape(line), highlight=False)
