"""How the processes of a run meet, and the groups that they form.

All of it stands under a name that this attempt alone has: a store may outlive an attempt, as
torchrun's does with ``--max-restarts``, and has addresses and errors of processes that are no more.

The store is reached through `_get_default_store`: torch.distributed has no public name for it.
"""

from __future__ import annotations

import atexit
import json
import os
import secrets
import sys
import threading
import time
import weakref
from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store, _get_default_store
from torch.distributed.rendezvous import rendezvous

from ...compiler.ir.errors import PeerFailedError
from . import interfaces
from .doing import HERE

TIMEOUT_S = 1800.0  # for those that have to meet before there are options
FIRST_S = 30.0  # after which a wait is told first; then after twice as long, and so on
_LONGEST_S = 0.1  # between two looks at the store
_MARGIN = 1.5  # what torch may wait longer than we do: its errors name nobody
_MOST_S = 10 * 365 * 24 * 3600.0
_PROBE = 0x7FFFFF  # a tag of no message

_groups: weakref.WeakSet[dist.ProcessGroup] = weakref.WeakSet()
_stores: dict[str, Any] = {}  # torch does not type all that stores can do
_timeout = timedelta(seconds=TIMEOUT_S * _MARGIN)


def limit_of(timeout_s: float) -> timedelta:
    """How long torch may wait, where we end a run after some seconds."""
    return timedelta(seconds=min(timeout_s * _MARGIN + 60, _MOST_S))


def join(backend: str, timeout_s: float = TIMEOUT_S) -> None:
    """Start the default process group, unless the script has done so.

    Raises:
        PeerFailedError: a rank has not come in time; it is named.
    """
    global _timeout
    _timeout = limit_of(timeout_s)
    scope = None
    if not dist.is_initialized():
        store, rank, size = _met(timeout_s)
        scope = scope_of(store, rank, size, timeout_s)
        store = PrefixStore(f"pipecompile/{scope}", store)
        interfaces.choose(store, rank, size)
        try:
            dist.init_process_group(
                backend, store=store, rank=rank, world_size=size, timeout=_timeout
            )
        except RuntimeError as error:
            raise _unconnected(rank, error) from error
        atexit.register(_disconnect)
    world = dist.group.WORLD
    if world is not None and world not in _groups:
        store = _get_default_store()
        if scope is None:
            scope = scope_of(store, dist.get_rank(), dist.get_world_size(), timeout_s)
        _stores[""] = PrefixStore(f"pipecompile/{scope}", store)
        _groups.add(world)
        HERE.wakes(_GLOO)


def _met(timeout_s: float) -> tuple[Store, int, int]:
    """The store at ``MASTER_ADDR``, this rank, and how many there are.

    torch's rank 0 waits in here for all others and cannot say for whom; ours does so later.

    Raises:
        PeerFailedError: nobody keeps a store there.
    """
    if os.environ["RANK"] == "0" and not has_agent_store():
        size = int(os.environ["WORLD_SIZE"])
        address = os.environ.get("MASTER_ADDR", ""), int(os.environ.get("MASTER_PORT", "0"))
        if all(address):  # else torch says which is missing
            kept: Store = dist.TCPStore(  # type: ignore[attr-defined]  # public, and not told
                *address, size, True, _timeout, wait_for_workers=False, multi_tenant=True
            )
            return kept, 0, size
    unreached = f"rank {os.environ['RANK']} cannot reach {_keeper()}"
    try:
        with _Told(unreached):
            limit = timedelta(seconds=min(timeout_s, _MOST_S))
            store, rank, size = next(rendezvous("env://", timeout=limit))
    except dist.DistError as error:
        raise PeerFailedError(
            f"{unreached} within timeout_s={timeout_s:g} ({str(error).splitlines()[0]}): is it "
            "started, with the same MASTER_ADDR and MASTER_PORT, and does no firewall lie between?"
        ) from error
    store.set_timeout(_timeout)
    return store, rank, size


def _unconnected(rank: int, error: RuntimeError) -> Exception:
    """What is said where ranks have met and cannot reach each other."""
    if "connectFullMesh" not in str(error):
        return error
    through = os.environ.get(interfaces.CHOICE)
    return PeerFailedError(
        f"rank {rank} has met the others at {_keeper()}, and cannot connect to them"
        f"{f' through {through}' if through else ''}: set {interfaces.CHOICE} to the network "
        "interface by which machines reach each other, and let no firewall keep them apart"
    )


def run_store() -> Store:
    """Of this attempt alone, for one thread: who waits in a store keeps others from it."""
    made: Store = _stores[""].clone()
    return made


def new_group(ranks: Sequence[int] | None = None, backend: str | None = None) -> Any:
    """As torch has it, with this run's limit of time; who waits in it can be woken."""
    group = dist.new_group(ranks, timeout=_timeout, backend=backend)
    if isinstance(group, dist.ProcessGroup):
        _groups.add(group)
    return group


def scope_of(store: Store, rank: int, size: int, timeout_s: float) -> str:
    """A name that only the processes that are here now know; a collective of all.

    The number of a restart would not do: torchrun's agents count their own. So each rank says hello
    with a number that it has just drawn, and takes the name that rank 0 gives with that number.

    Raises:
        PeerFailedError: a rank does not come within some seconds.
    """
    deadline = time.monotonic() + timeout_s
    mine = secrets.token_hex(8)
    if rank == 0:
        return _welcome(store, mine, set(range(1, size)), deadline)
    store.set(f"pipecompile/hello/{rank}", mine)
    key = f"pipecompile/welcome/{rank}"
    with _Told(f"rank {rank} waits for rank 0 to join the run"):
        for _ in _looks(deadline, "rank 0"):
            if store.check([key]):
                number, scope = json.loads(store.get(key))
                if number == mine:
                    store.set(f"pipecompile/here/{scope}/{rank}", "")
                    return str(scope)
    raise AssertionError("looks end with an error")


def _welcome(store: Store, scope: str, missing: set[int], deadline: float) -> str:
    answered: dict[int, str] = {}
    with _Told("rank 0 waits for others to join the run", missing):
        for _ in _looks(deadline, missing):
            for rank in sorted(missing):
                if store.check([f"pipecompile/here/{scope}/{rank}"]):
                    missing.discard(rank)
                elif store.check([f"pipecompile/hello/{rank}"]):
                    number = store.get(f"pipecompile/hello/{rank}").decode()
                    if answered.get(rank) != number:  # else it is that of an earlier attempt
                        answered[rank] = number
                        store.set(f"pipecompile/welcome/{rank}", json.dumps([number, scope]))
            if not missing:
                return scope
    raise AssertionError("looks end with an error")


def _looks(deadline: float, whom: object) -> Any:
    """Again and again, ever less often."""
    pause = 0.001
    while True:
        yield
        if time.monotonic() > deadline:
            raise PeerFailedError(
                f"{_named(whom)} did not join the run within timeout_s=: is it started, with the "
                "same MASTER_ADDR, MASTER_PORT and WORLD_SIZE?"
            )
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST_S)


def _named(whom: object) -> str:
    if isinstance(whom, set):
        several = sorted(whom)
        more = f" and {len(several) - 8} more" if len(several) > 8 else ""
        return f"rank{'s'[: len(several) > 1]} {', '.join(map(str, several[:8]))}{more}"
    return str(whom)


def _keeper() -> str:
    where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    return f"{'the agent of torchrun' if has_agent_store() else 'rank 0'} at {where}"


def has_agent_store() -> bool:
    """Whether torchrun's agent keeps the store, and not rank 0."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


class _Told:
    """Says what this process waits for, ever less often, while it lasts.

    Args:
        missing: ranks that it waits for.
    """

    def __init__(self, what: str, missing: set[int] | None = None):
        self._what, self._missing, self._over = what, missing, threading.Event()

    def __enter__(self) -> None:
        threading.Thread(target=self._tell, daemon=True, name="pipecompile-joining").start()

    def __exit__(self, *_: object) -> None:
        self._over.set()

    def _tell(self) -> None:
        waited, pause = 0.0, FIRST_S
        while not self._over.wait(pause):
            waited, pause = waited + pause, waited + pause
            whom = f": {_named(set(self._missing))}" if self._missing else ""
            print(f"pipecompile: {self._what}{whom}, for {waited:.0f} s now", file=sys.stderr)


class _Gloo:
    """What waits in gloo.

    A wait cannot be called back, but if one times out gloo closes all connections of its group, and
    all that wait there fail.
    """

    def wake(self) -> None:
        for group in list(_groups):
            with suppress(Exception):
                if "gloo" in dist.get_backend(group) and group.size() > 1:
                    close(group)


_GLOO = _Gloo()


def close(group: dist.ProcessGroup) -> None:
    """Make all that waits in a group of gloo fail, now and later."""
    room = torch.empty(1)
    for other in range(group.size()):
        if other != group.rank():
            try:
                group.recv([room], other, _PROBE).wait(timedelta(milliseconds=1))
            except RuntimeError as error:
                if "Timed out" in str(error):
                    return  # and one that has ended times out for nobody: ask the next


def _disconnect() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
