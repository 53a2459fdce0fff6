"""The command line: `pipecompile inspect`, `diff`, `verify`, `solve`, `export`, `import`,
`zoo` and `calibrate`.

Each command's file adds its arguments and names what runs it. torch and transformers are
imported when a model is asked for, and not for ``--help``, ``solve`` or
``diff``.
"""

from __future__ import annotations

import atexit
import gc
import logging
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import NoReturn

from ... import __version__
from ..host.frames import with_room
from ..ir.errors import OptionError, PipecompileError
from . import calibrate, convert, diff, inspect, solve, verify, zoo
from .flags import Parser


@with_room
def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; 0, or 2 and one line on stderr for a mistake of the user's."""
    given = list(sys.argv[1:] if argv is None else argv)
    own = given.index("--") if "--" in given else len(given)
    try:
        args = make_parser().parse_args(given[:own])
        args.script = tuple(given[own + 1 :])
        if args.script and args.command != "inspect":
            raise OptionError(f"what follows -- is for scripts that inspect runs: {args.script[0]}")
        code: int = args.run(args)
        return code
    except PipecompileError as error:
        print(f"pipecompile: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def run() -> NoReturn:
    """The process: it ends with the command, and nothing that it has made is taken apart first,
    which takes a second after torch was imported. What others want done at the end is done."""
    codes: list[int] = []
    atexit.register(_leave, codes)  # the first one is called last
    codes.append(main())
    gc.freeze()
    sys.exit(codes[0])


def _leave(codes: Sequence[int]) -> None:
    """End at once, where there is a code to end with and all that was written has arrived."""
    with suppress(OSError, ValueError, AttributeError):  # Python says what is wrong with a stream
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        if codes:
            logging.shutdown()
            os._exit(codes[0])


def make_parser() -> Parser:
    parser = Parser(
        prog="pipecompile",
        description="Compiles an unmodified PyTorch transformer into a pipeline-parallel program.",
    )
    parser.add_argument("--version", action="version", version=f"pipecompile {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for command in (inspect, diff, verify, solve, convert, zoo, calibrate):
        command.add_to(commands)
    return parser
