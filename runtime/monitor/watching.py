"""Scripts that are run until they would train: what they have asked for by then."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from ...compiler.capture.batch import BatchSpec
from ...compiler.driver.auto import Open
from ...compiler.options.arguments import Arguments


class Reached(BaseException):
    """Ends a script; no `except Exception` of its own is in the way.

    Attributes:
        asked: by its call of `compile`.
        batch: of all replicas.
    """

    def __init__(self, asked: Asked, batch: Any):
        super().__init__("the script would train now")
        self.asked, self.batch = asked, batch


@dataclass(frozen=True)
class Asked:
    """A call of `compile`.

    Attributes:
        open: what it leaves open.
    """

    arguments: Arguments
    open: Open


@dataclass
class Watch:
    """Of one script; filled in by its first call of `compile`."""

    asked: Asked | None = None


_watches: list[Watch] = []


@contextmanager
def watching() -> Iterator[Watch]:
    """Inside, `Reached` is raised by the first `compile` that is given an ``example_batch``, or by
    the first batch that its pipeline is to train on, or, where it does not train, to run on."""
    watch = Watch()
    _watches.append(watch)
    try:
        yield watch
    finally:
        _watches.remove(watch)


def compiles(arguments: Arguments, open_: Open) -> None:
    """A call of `compile`. Raises Reached, where a script is watched and its batch is known."""
    if not _watches or _watches[-1].asked is not None:
        return
    asked = _watches[-1].asked = Asked(arguments, open_)
    if arguments.example_batch is not None:
        raise Reached(asked, arguments.example_batch)


def reaches(spec: BatchSpec | None, values: Sequence[torch.Tensor]) -> None:
    """A batch that a pipeline is for. Raises Reached, where a script is watched."""
    if not _watches or (asked := _watches[-1].asked) is None or spec is None:
        return
    raise Reached(asked, spec.build(list(values)) if values else spec)
