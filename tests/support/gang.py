"""Real processes over real gloo, started once and used by many tests."""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import multiprocessing
import os
import pickle
import random
import socket
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from itertools import accumulate
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar
from unittest import mock

from support.hosts import Host, enter

T = TypeVar("T")

TIMEOUT_S = 240
_TESTS = Path(__file__).parents[1]
IMPORTED = (
    "highspy",
    "hypothesis",
    "networkx",
    "pulp",
    "pytest",
    "pipecompile.compiler.api",
    "transformers.models.gpt2.modeling_gpt2",
    "transformers.models.llama.modeling_llama",
    "support.remembered",
    "support.settled",  # the last
)


def free_port() -> int:
    """A port for processes that meet at ``MASTER_PORT``, which nothing listens on.

    From below those that a system hands out by itself (32768 on Linux): no connection of another
    process gets it between this look and rank 0's start.
    """
    while True:
        port = 20000 + random.SystemRandom().randrange(12000)
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
            return port


class Gang:
    """``size`` processes that have met; each runs the functions that it is told to.

    They are forked from two processes that have imported everything: rank 0 from one, the others
    from the other, which hashes text in its own way. What depends on the order of a set differs
    between ranks.

    Args:
        hosts: machines that share the processes evenly, in order; this one, where it is left out.
    """

    def __init__(self, size: int, hosts: Sequence[Host] = ()):
        port = free_port()
        context = multiprocessing.get_context("forkserver")
        self.pipes: list[Connection] = []
        self.workers = []
        for rank in range(size):
            mine, theirs = context.Pipe()
            told = (theirs, rank, size, port, hosts)
            worker = context.Process(target=_serve, args=told, daemon=True)
            forks = _server(first=rank == 0).connect_to_new_process
            path = filter(None, (str(_TESTS), os.environ.get("PYTHONPATH")))
            with (
                mock.patch.object(forkserver, "connect_to_new_process", forks),
                mock.patch.dict(os.environ, PYTHONPATH=os.pathsep.join(path)),  # of what it imports
            ):
                worker.start()
            self.pipes.append(mine)
            self.workers.append(worker)

    def run(self, function: Callable[..., T], *args: Any, **options: Any) -> list[T]:
        """Call a function of a test file, or of this package, with the same arguments on every
        process; the results in rank order.

        Raises:
            AssertionError: with the tracebacks of the processes that failed.
        """
        self._send(function, args, options)
        answers = []
        for rank, pipe in enumerate(self.pipes):
            assert pipe.poll(TIMEOUT_S), f"rank {rank} did not answer in {TIMEOUT_S} s"
            answers.append(pipe.recv())
        failures = [f"rank {r}:\n{text}" for r, (ok, text) in enumerate(answers) if not ok]
        assert not failures, "\n".join(failures)
        return [result for _, result in answers]

    def try_to_run(
        self, limit_s: float, last_s: float, function: Callable[..., T], *args: Any, **options: Any
    ) -> list[T | None]:
        """The same; None for a process that has ended, or does not answer within ``last_s`` after
        the first one has."""
        self._send(function, args, options)
        wait(self.pipes, limit_s)
        deadline = time.monotonic() + last_s
        answers: list[T | None] = []
        for pipe in self.pipes:
            answers.append(None)
            with contextlib.suppress(EOFError, ConnectionError):
                if pipe.poll(max(0.0, deadline - time.monotonic())):
                    ok, answers[-1] = pipe.recv()
                    assert ok, answers[-1]
        return answers

    def _send(self, function: Callable[..., Any], args: Any, options: Any) -> None:
        module, name = function.__module__, function.__qualname__
        given = pickle.dumps((args, options))  # which may name things of that module
        for pipe in self.pipes:
            pipe.send((module, sys.modules[module].__file__, name, given))

    def close(self) -> None:
        for pipe in self.pipes:
            pipe.send(None)
        for worker in self.workers:
            worker.join(10)
            worker.kill()


@functools.cache
def _server(first: bool) -> forkserver.ForkServer:
    """What is forked from; started for the first process that is."""
    server = forkserver.ForkServer()
    server.set_forkserver_preload(list(IMPORTED))
    return server


def _serve(pipe: Connection, rank: int, size: int, port: int, hosts: Sequence[Host]) -> None:
    beside = size // max(1, len(hosts))
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(size),
        LOCAL_RANK=str(rank % beside),
        MASTER_ADDR=hosts[0].name if hosts else "127.0.0.1",
        MASTER_PORT=str(port),
    )
    sys.path.insert(0, str(_TESTS))
    if hosts:
        os.environ["LOCAL_WORLD_SIZE"] = str(beside)
        enter(hosts[rank // beside].init)
    from support.process import settle
    from support.remembered import remembering

    settle()
    with remembering():
        while (job := pipe.recv()) is not None:
            module, file, name, given = job
            try:
                function = getattr(_imported(module, file), name)
                args, options = pickle.loads(given)
                result = (True, function(*args, **options))
            except BaseException:
                result = (False, traceback.format_exc())
            pipe.send(result)


def _imported(name: str, file: str) -> ModuleType:
    """A module by the name that it has where the tests run: pytest names test files itself."""
    if name not in sys.modules and not name.startswith("support."):
        spec = importlib.util.spec_from_file_location(name, file)
        assert spec is not None
        assert spec.loader is not None
        for above in accumulate(name.split(".")[:-1], "{}.{}".format):  # pickle imports these
            sys.modules.setdefault(above, ModuleType(above))
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return importlib.import_module(name)
