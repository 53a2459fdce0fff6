"""Faults of one rank at a chosen place of a training, and what the others say of it."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pipecompile
import torch
from pipecompile.compiler.driver.builder import Builder
from pipecompile.runtime import executor, stored
from pipecompile.runtime.checkpoint import checkpoint, storage
from pipecompile.runtime.exchange import lookout, peers
from pipecompile.runtime.transport import joining
from pipecompile.runtime.transport.neighbours import SWITCH
from torch import nn

from support.gang import Gang
from support.labelled import loss_of

LIMIT_S = 60
LAST_S = 15  # for the other ranks to answer when one has

PLACES = {
    "F": "in 1F1, in step() (call 2)",
    "B": "in 1B1, in step() (call 2)",
    "optimizer": "in its optimizer, in step() (call 2)",
    "save": "in save() (call 2)",
    "load": "in load() (call 3)",
    "state_dict": "in state_dict() (call 2)",
    "compile": "in its compilation, in step() (call 1)",
    "loader": "outside of the pipeline's calls, after step() (call 1)",
}
"""Where a fault happens -> how that is told; of two stages, in rank 1."""

IN_TORCH = {
    "write": "in writing its part of the checkpoint, in save() (call 2)",
    "beside": "in writing its part of the checkpoint, in wait_for_save() (call 3)",
    "read": "in reading its part of the checkpoint, in load() (call 3)",
}
"""The same, where the others wait inside of torch.distributed.checkpoint."""


def happen(how: str) -> None:
    """The fault."""
    if how == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    elif how == "stopped":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif how == "slow":
        time.sleep(LIMIT_S)
    elif how == "error":
        raise ArithmeticError("out of numbers")
    elif how == "ends":
        sys.exit(0)
    else:
        raise AssertionError(how)


@contextmanager
def planted(place: str, how: str) -> Iterator[None]:
    """In this process, inside."""
    owner, name, when = {
        "F": (executor.Executor, "_compute", lambda args: str(args[1]) == "1F1"),
        "B": (executor.Executor, "_compute", lambda args: str(args[1]) == "1B1"),
        "optimizer": (torch.optim.SGD, "step", None),
        "save": (checkpoint.snapshot, "facts_of", None),
        "load": (storage, "read_index", None),
        "write": (storage.Writer, "_written", None),
        "beside": (storage.Writer, "_written", None),
        "read": (storage.Reader, "_read_plan", None),
        "state_dict": (stored.state_dicts, "gather", None),
        "compile": (Builder, "build", None),
        "loader": (models_batch, "fault", None),
    }[place]
    original = getattr(owner, name)

    def faulty(*args: Any, **options: Any) -> Any:
        if when is None or when(args):
            happen(how)
        return original(*args, **options)

    with mock.patch.object(owner, name, faulty):
        yield


class models_batch:  # noqa: N801 -- a namespace with something to patch
    """The loader of the training."""

    @staticmethod
    def fault() -> None:
        """Where one of another rank blocks, or dies."""


def pipeline(**options: Any) -> Any:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    model.traced_once = True  # type: ignore[assignment]
    return pipecompile.compile(
        model,
        2,
        microbatches=2,
        optimizer=torch.optim.SGD,
        loss_fn=loss_of,
        **options,
    )


def train(place: str, folder: Path, how: str | None, **options: Any) -> None:
    """A step, and what the fault happens in.

    Args:
        how: the fault of this process; None where it has none.
    """
    batch = {"input": torch.ones(4, 4), "label": torch.ones(4, dtype=torch.long)}

    def second() -> None:
        models_batch.fault()
        if place in ("save", "write"):
            pipe.save(folder)
        elif place == "beside":
            pipe.save(folder, async_save=True)
            pipe.wait_for_save()
        elif place in ("load", "read"):
            pipe.save(folder)
            pipe.load(folder)
        elif place == "state_dict":
            pipe.state_dict()
        elif place == "optimizer":
            pipe.step(batch)
            pipe.step(batch)
        else:
            pipe.step(batch)

    pipe = pipeline(**options)
    if place != "compile":
        pipe.step(batch)
    if how is None:
        second()
    else:
        with planted(place, how):
            second()


def answer(
    folder: Path, place: str, how: str, shared: str = "", far: bool = False, **options: Any
) -> tuple[str, float, list[str]]:
    """What this process raises; after how many seconds of `train`'s fault; and what it said.

    Args:
        shared: "off" for gloo.
        far: ranks do not see that they are of one machine.
    """
    rank = int(os.environ["RANK"])
    times = {"first_s": joining.FIRST_S}
    times.update({name: options.pop(name) for name in list(options) if name == "first_s"})
    machine = f"machine {rank}" if far else peers.machine()
    with (
        mock.patch.dict(os.environ, {SWITCH: shared}),
        mock.patch.object(joining, "FIRST_S", times["first_s"]),
        mock.patch.object(lookout, "LISTEN_S", min(lookout.LISTEN_S, times["first_s"])),
        mock.patch.object(peers, "machine", return_value=machine),
        tempfile.TemporaryFile("w+") as said,
        mock.patch.object(sys, "stderr", said),
    ):
        started = time.monotonic()
        try:
            train(place, folder, how if rank == 1 else None, **options)
            text = "nothing"
        except Exception as error:
            text = f"{type(error).__name__}: {error}"
        seconds = time.monotonic() - started
        said.seek(0)
        return text, seconds, said.read().splitlines()


def told(
    folder: Path, place: str, how: str, size: int = 2, **options: Any
) -> list[tuple[str, float, list[str]] | None]:
    """What each rank answers; None for one that does not."""
    gang = Gang(size)
    try:
        last_s = 0.5 if how == "stopped" else LAST_S
        return gang.try_to_run(LIMIT_S, last_s, answer, folder, place, how, **options)
    finally:
        for worker in gang.workers:
            worker.kill()
            worker.join()
