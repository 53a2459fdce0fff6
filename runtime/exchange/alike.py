"""What all ranks have to have done alike, though nothing was exchanged when they did it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from ...compiler.capture.batch import BatchSpec
from ...compiler.driver.compiled import Mode
from ...compiler.ir.errors import RankMismatchError, StateError
from ...compiler.tensors.facts import digest, sample
from ..transport.mesh import Mesh

MOST_KNOWN = 1024  # batches of which texts are kept

Pieces = tuple[BatchSpec | None, ...]
"""The microbatches of a replica; None in the places of those without anything."""


class Call(NamedTuple):
    """Of a pipeline's user; all ranks make the same ones.

    Attributes:
        number: of a pipeline.
        before: what was called since ranks compared their calls last, as nothing was exchanged.
    """

    what: str = "compile()"
    number: int = 0
    before: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.what} (call {self.number})" if self.number else self.what


def differing(first: int, one: Call, rank: int, other: Call) -> str:
    """What two ranks have called before, if that is where they part."""
    if one.what != other.what or one.before == other.before:
        return ""
    called = [" and ".join(each.before) or "nothing" for each in (one, other)]
    return f", before which rank {first} has called {called[0]}, and rank {rank} {called[1]}"


class Pace(NamedTuple):
    """How the optimizer goes on.

    Attributes:
        epoch: of the LR scheduler, the same on all ranks; None where there is none that counts.
        rates: learning rates of the groups, the same on all replicas of a stage; None where these
            may have other groups.
    """

    epoch: int | None
    rates: tuple[float, ...] | None


NO_PACE = Pace(None, None)


def check_paces(mesh: Mesh, seen: Sequence[Pace]) -> None:
    """Raises RankMismatchError where ranks go on otherwise than others.

    Args:
        seen: of every rank.
    """
    for rank, pace in enumerate(seen):
        if pace.epoch != seen[0].epoch:
            raise RankMismatchError(
                f"the LR scheduler of rank {rank} is at epoch {pace.epoch} and that of rank 0 at "
                f"{seen[0].epoch}: call its step() on every rank"
            )
        leader = mesh.rank_of(0, mesh.stages_of(rank)[0])
        if pace.rates != seen[leader].rates:
            raise RankMismatchError(
                f"ranks {leader} and {rank} step copies of the same parameters with the learning "
                f"rates {seen[leader].rates} and {pace.rates}: set them alike on every rank, and "
                "give schedulers the same metric"
            )


def check_values(
    call: str, mine: Mapping[str, torch.Tensor], gather: Callable[[Any], list[Any]], rank: int
) -> None:
    """All ranks were given the same tensors, by samples of them.

    Args:
        rank: this one.

    Raises:
        StateError: another rank has others, or under other names.
    """
    digests = {name: digest(sample(tensor)) for name, tensor in mine.items()}
    for other, theirs in enumerate(gather(digests)):
        if alone := sorted({*theirs} ^ {*digests}):
            raise StateError(
                f"{call} was given {alone[0]!r} on some ranks alone (rank {other} differs from "
                "this one): give all ranks the same state dict"
            )
        if odd := [name for name in digests if theirs[name] != digests[name]]:
            raise StateError(
                f"{call} was given other values of {odd[0]!r} on rank {other} than on rank "
                f"{rank}: give all ranks the same state dict"
            )


class Texts:
    """What batches are to ranks that compare them, worked out once for each that is not cut by a
    callable."""

    def __init__(self) -> None:
        self._known: dict[tuple[Mode, BatchSpec], tuple[str, str, int]] = {}

    def of(self, mode: Mode, spec: BatchSpec, pieces: Pieces | None) -> tuple[str, str, int]:
        """What is the same for all ranks of a run; for those of a replica; and a hash of that.

        Args:
            pieces: its microbatches, where a callable has cut it.
        """
        known = None if pieces is not None else self._known.get((mode, spec))
        if known is None:
            text = f"{mode} {_described(spec, pieces)}"
            known = f"{mode} {_alike(spec)}", text, number_of(text)
            if len(self._known) >= MOST_KNOWN:
                self._known.clear()
            if pieces is None:
                self._known[mode, spec] = known
        return known


def _described(spec: BatchSpec, pieces: Pieces | None) -> str:
    """What is not the same for all ranks of a run, but for those of a replica."""
    if pieces is None:
        return spec.with_rows(1).described()
    known = next((each.scales for each in pieces if each is not None), None)
    texts = [each.described() if each is not None else "nothing" for each in pieces]
    return f"{'; '.join(texts)}{'' if known is None else f'; {known}'}"


def _alike(spec: BatchSpec) -> str:
    """What is the same for all ranks of a run; with ``cut`` numbers may be other ones."""
    same = spec.without_sizes()
    if spec.scales is not None:
        constants = tuple(each for each in same.constants if type(each[1]) is not int)
        same = replace(same, constants=constants)
    return same.described()


def number_of(text: str) -> int:
    """A hash that fits into an int64."""
    return int(hashlib.sha256(text.encode()).hexdigest()[:15], 16)
