"""Who compiles: the ranks of a run together, or one process alone."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Protocol, TypeVar

from ..answers.guards import Guards

T = TypeVar("T")
Measured = Mapping[str, list[float]]
"""Kind of device -> seconds on it."""
StageSeconds = tuple[float, float, float]
"""Of a stage: its forward, its backward, and of that the weight gradients that are split off."""
StagesMeasured = Mapping[str, Mapping[int, StageSeconds]]
"""Kind of device -> stage -> its seconds on it."""


class Team(Protocol):
    """The ranks that compile together."""

    def agree(self, fingerprint: str) -> None:
        """Raise on every rank where graphs, options or weights differ."""
        ...

    def together(self, act: Callable[[], T]) -> T:
        """What ``act`` returns here, once it has succeeded on every rank; else its error on all."""
        ...

    def alike(self, guards: Guards) -> None:
        """Raise on every rank where ranks have heard different answers of their batches."""
        ...

    def share(self, decide: Callable[[], T]) -> T:
        """What rank 0 decides, on every rank; its error too."""
        ...

    def pool(self, seconds: Measured) -> Measured:
        """The medians over the ranks that have a kind of device."""
        ...

    def stages(self, n_stages: int) -> Sequence[int]:
        """Those that this process plays."""
        ...

    def pool_stages(self, seconds: StagesMeasured) -> dict[int, StageSeconds]:
        """Those of every stage, from the ranks that play it; on the slowest kind of device."""
        ...


class Alone:
    """One process: its own decision, its own seconds."""

    def agree(self, fingerprint: str) -> None:
        pass

    def together(self, act: Callable[[], T]) -> T:
        return act()

    def alike(self, guards: Guards) -> None:
        pass

    def share(self, decide: Callable[[], T]) -> T:
        return decide()

    def pool(self, seconds: Measured) -> Measured:
        return seconds

    def stages(self, n_stages: int) -> Sequence[int]:
        return range(n_stages)

    def pool_stages(self, seconds: StagesMeasured) -> dict[int, StageSeconds]:
        return medians([seconds])


def worst(seconds: Measured, kinds: Sequence[str]) -> list[float]:
    """Of those of several kinds of devices the most."""
    return [max(each) for each in zip(*(seconds[kind] for kind in kinds), strict=True)]


def medians(ranks: Sequence[StagesMeasured]) -> dict[int, StageSeconds]:
    """Per stage the medians over the ranks that have a kind of device; of kinds the most."""
    kinds = sorted({kind for each in ranks for kind in each})
    found: dict[int, list[StageSeconds]] = defaultdict(list)
    for kind in kinds:
        mine: dict[int, list[StageSeconds]] = defaultdict(list)
        for each in ranks:
            for stage, seconds in each.get(kind, {}).items():
                mine[stage].append(seconds)
        for stage, rows in mine.items():
            found[stage].append(_each(median, rows))
    return {stage: _each(max, rows) for stage, rows in found.items()}


def _each(of: Callable[[tuple[float, ...]], float], rows: Sequence[StageSeconds]) -> StageSeconds:
    forward, backward, weight = map(of, zip(*rows, strict=True))
    return forward, backward, weight
