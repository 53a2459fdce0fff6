"""Many trials, each in a process of its own with a time limit; outcomes go to a file at once."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path

from .families import Architecture
from .trial import FAILED, TIMEOUT, Outcome, try_out

FILE = "outcomes.jsonl"


@dataclass(frozen=True)
class _Running:
    architecture: Architecture
    process: BaseProcess
    receiver: Connection
    begun: float


def read(directory: Path) -> dict[Architecture, Outcome]:
    """What earlier runs have found; of several outcomes the last."""
    path = directory / FILE
    if not path.exists():
        return {}
    lines = path.read_text().splitlines()
    found = [Outcome(**json.loads(line)) for line in lines if line.endswith("}")]
    return {each.architecture: each for each in found}


def run(
    wanted: Sequence[Architecture],
    directory: Path,
    stages: int,
    limit_s: float,
    jobs: int,
    trial: Callable[[Architecture, int], Outcome] = try_out,
) -> Iterator[Outcome]:
    """Try each; what is found is written before it is yielded.

    Args:
        limit_s: of each; what takes longer is ended.
        jobs: how many at once.
    """
    directory.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("forkserver")  # which imports the libraries once
    context.set_forkserver_preload([__name__, "transformers", "pipecompile.runtime.start"])
    waiting = list(reversed(wanted))
    running: list[_Running] = []
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                running.append(_start(context, waiting.pop(), stages, trial))
            wait([each.receiver for each in running], timeout=0.2)
            for each in list(running):
                outcome = _ended(each, limit_s)
                if outcome is not None:
                    running.remove(each)
                    with (directory / FILE).open("a") as file:
                        file.write(json.dumps(asdict(outcome)) + "\n")
                    yield outcome
    finally:
        for each in running:
            each.process.kill()


def _start(
    context: multiprocessing.context.ForkServerContext,
    architecture: Architecture,
    stages: int,
    trial: Callable[[Architecture, int], Outcome],
) -> _Running:
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(sender, architecture, stages, trial))
    process.start()
    sender.close()
    return _Running(architecture, process, receiver, time.monotonic())


def _work(
    sender: Connection,
    architecture: Architecture,
    stages: int,
    trial: Callable[[Architecture, int], Outcome],
) -> None:
    """What a process does: quietly, for libraries warn of tiny models."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    sender.send(trial(architecture, stages))


def _ended(running: _Running, limit_s: float) -> Outcome | None:
    """The outcome of one that has ended, or has run for too long."""
    seconds = time.monotonic() - running.begun
    family, name = running.architecture.family, running.architecture.name
    if running.receiver.poll():
        try:
            outcome: Outcome = running.receiver.recv()
        except EOFError:
            running.process.join()
            reason = f"its process ended with {running.process.exitcode}"
            return Outcome(family, name, FAILED, reason, seconds=round(seconds, 2))
        running.process.join()
        return outcome
    if seconds < limit_s:
        return None
    running.process.kill()
    running.process.join()
    return Outcome(family, name, TIMEOUT, f"more than {limit_s:g} s", seconds=round(seconds, 2))
