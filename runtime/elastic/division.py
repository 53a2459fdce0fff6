"""Which of the processes that are there work, and what those do that are too many."""

from __future__ import annotations

import os
import sys
import time
from contextlib import suppress
from datetime import timedelta
from typing import NoReturn

import torch.distributed as dist
from torch.distributed.distributed_c10d import Store

from ...compiler.driver.auto import Open
from ...compiler.ir.errors import OptionError
from ...compiler.options.parsing import AUTO

Stages = int | tuple[int, int] | str

_OVER = "pipecompile/elastic/over"
_SEEN = "pipecompile/elastic/seen"
MISSING_S = 120.0  # that a run which has begun waits for processes that are missing
_POLL_S = 0.5
_LINGER_S = 10.0  # for those that wait to hear that the run is over
_ALONE_S = 60.0  # for the agent to end a process whose run is gone


def limits_of(n_stages: Stages) -> tuple[int, int] | None:
    """The fewest and the most ranks of a replica; None for any number.

    Raises:
        OptionError: it is neither.
    """
    if n_stages == AUTO:
        return None
    pair = (n_stages, n_stages) if isinstance(n_stages, int) else n_stages
    whole = isinstance(pair, tuple) and len(pair) == 2 and all(type(n) is int for n in pair)
    if not whole or not 1 <= pair[0] <= pair[1]:  # type: ignore[operator]
        raise OptionError(
            f"n_stages={n_stages!r}: give a number, the fewest and the most as in (1, 4), or "
            '"auto" for any'
        )
    return pair  # type: ignore[return-value]


def check_microbatches(count: object) -> None:
    """Raises OptionError where ``global_microbatches=`` is no number of them."""
    if count is not None and (type(count) is not int or count < 1):
        raise OptionError(
            f"global_microbatches={count!r}: give the microbatches of all replicas together, 1 or "
            "more"
        )


def used_of(processes: int, open_: Open) -> int:
    """How many processes work: as many as can be divided.

    Raises:
        OptionError: none can.
    """
    for count in range(processes, 0, -1):
        if open_.divisions(count):
            return count
    least = open_.stages[0] if open_.stages else 1
    raise OptionError(
        f"there are {processes} processes, and n_stages= needs {least} for a replica: let it begin "
        f"at {processes} or less, or start at least {least} (torchrun --nnodes={least}:...)"
    )


def wait_for_more(error: OptionError) -> NoReturn:
    """There are too few processes in a run that has trained before: others may be on their way.

    An agent that sees them come starts its processes anew, and that does not count as a restart;
    an error at once would.

    Raises:
        OptionError: the error, if nobody comes in time.
    """
    print(f"pipecompile: waits {MISSING_S:.0f} s for others: {error}", file=sys.stderr, flush=True)
    time.sleep(MISSING_S)
    raise error


def leave_out(processes: int, used: int, what: str) -> None:
    """Those that are too many wait here, and end with the run; the others are told their number.

    Args:
        what: the options that leave some over, for people.

    Raises:
        OptionError: the script has joined all of them already.
    """
    if used == processes:
        return
    if dist.is_initialized():
        raise OptionError(
            f"{processes} processes have joined, and {what} divides {used}: leave "
            "init_process_group out of the script"
        )
    rank = int(os.environ["RANK"])
    os.environ["WORLD_SIZE"] = str(used)
    if rank == 0:
        ranks = f"rank {used}" if used + 1 == processes else f"ranks {used} to {processes - 1}"
        print(
            f"pipecompile: {processes} processes are there, and {what} divides {used}: {ranks} "
            f"{'waits' if used + 1 == processes else 'wait'}, and nothing is lost if others end",
            file=sys.stderr,
            flush=True,
        )
    if rank >= used:
        _wait_for_the_end()


def tell_the_end(waiting: int) -> None:
    """The run is over, for processes that were left out; from rank 0."""
    with suppress(Exception):
        store = _store()
        store.set(_OVER, "")
        deadline = time.monotonic() + _LINGER_S
        while store.add(_SEEN, 0) < waiting and time.monotonic() < deadline:
            time.sleep(0.05)  # the store may end with this process


def _wait_for_the_end() -> NoReturn:
    try:
        store = _store()
        while not store.check([_OVER]):
            time.sleep(_POLL_S)
        with suppress(Exception):
            store.add(_SEEN, 1)
    except dist.DistError:  # the run is gone, and the agent ends this process with all others
        time.sleep(_ALONE_S)
        raise SystemExit(1) from None
    raise SystemExit(0)


def _store() -> Store:
    """Of this attempt; it may be kept by rank 0."""
    made: Store = dist.TCPStore(  # type: ignore[attr-defined]  # public, and not told to checkers
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=False,
        wait_for_workers=False,
        timeout=timedelta(seconds=300),
    )
    return made
