"""How a process of a run ends: the others hear of it, and its user reads one message.

An exception that nobody catches is told to the other ranks. What another rank has caused is printed
without the way through this library, and an interrupt in one line: several ranks print it at once.
"""

from __future__ import annotations

import atexit
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from ...compiler.ir.errors import PeerFailedError
from ..transport.doing import ENDED, FAILED, HERE
from . import lookout

_LIBRARY = str(Path(__file__).parents[2])
_tellers: list[Callable[[Exception], None]] = []


def watch_endings(rank: int, tell: Callable[[Exception], None]) -> None:
    """From now on; once per process.

    Args:
        tell: called with an exception that ends this process.
    """
    if not _tellers:
        _hook(rank)
        atexit.register(_ended)
    _tellers[:] = [tell]


def _hook(rank: int) -> None:
    previous = sys.excepthook

    def report(
        kind: type[BaseException], error: BaseException, trace: TracebackType | None
    ) -> None:
        if isinstance(error, Exception):
            for tell in _tellers:
                tell(error)
            HERE.end(FAILED)
        if isinstance(error, KeyboardInterrupt):
            print(f"pipecompile: rank {rank} was interrupted {_where(trace)}", file=sys.stderr)
        elif isinstance(error, PeerFailedError):
            text = traceback.format_exception(kind, error, _outside(trace), chain=False)
            print("".join(text).rstrip(), file=sys.stderr)
        else:
            previous(kind, error, trace)

    sys.excepthook = report


def _outside(trace: TracebackType | None) -> TracebackType | None:
    """The part of a traceback before it enters this library."""
    kept = []
    while trace is not None and not trace.tb_frame.f_code.co_filename.startswith(_LIBRARY):
        kept.append(trace)
        trace = trace.tb_next
    made = None
    for each in reversed(kept):
        made = TracebackType(made, each.tb_frame, each.tb_lasti, each.tb_lineno)
    return made


def _where(trace: TracebackType | None) -> str:
    """The last line outside of this library."""
    frames = traceback.extract_tb(_outside(trace))
    return f"at {frames[-1].filename}:{frames[-1].lineno}" if frames else ""


def _ended() -> None:
    """Python exits."""
    HERE.end(ENDED)
    lookout.stop()
