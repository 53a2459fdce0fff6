"""A training whose steps are timed with copies of the state in memory and without."""

from __future__ import annotations

import os
import time
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

from pipecompile import elastic
from pipecompile.runtime.elastic.memory import WHERE

from support import rivals

STEPS = 4  # of a turn: what is done beside a step falls into the next


@cache
def begun(folder: str, far: bool) -> tuple[elastic.Session, Any]:
    """A session of 2 stages, and its pipeline.

    Args:
        folder: for the memory of machines.
        far: ranks take each other for those of another machine, and swap copies.
    """
    place = Path(folder) / (os.environ["RANK"] if far else "here")
    place.mkdir(exist_ok=True)
    session = elastic.Session()
    with mock.patch.dict(os.environ, {WHERE: str(place)}):
        pipe = session.compile(
            rivals.model(),
            (2, 2),
            global_microbatches=rivals.MICROBATCHES,
            optimizer=rivals.ADAMW,
            max_grad_norm=1.0,
            hardware="cpu",
            example_batch=rivals.batch(),
        )
        session.resume()
    return session, pipe


def training(way: str, folder: str) -> float:
    """Seconds of a step."""
    session, pipe = begun(folder, way == "two machines")
    batch = rivals.batch()
    pipe.step(batch)
    assert session._keeper is not None
    session._keeper.wait()
    begun_s = time.perf_counter()
    for _ in range(STEPS):
        pipe.step(batch)
        if way != "no copies":
            session._passed()
    return (time.perf_counter() - begun_s) / STEPS


def state_bytes(folder: str) -> int:
    """Of this rank's piece."""
    session, _ = begun(folder, False)
    assert session._keeper is not None
    return max(room.content.numel() for room in session._keeper._rooms.values())
