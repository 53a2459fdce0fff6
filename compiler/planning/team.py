"""Who compiles: the ranks of a run together, or one process alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

from ..answers.guards import Guards

T = TypeVar("T")


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

    def pool(self, seconds: list[float]) -> list[float]:
        """The medians over all ranks."""
        ...

    def stages(self, n_stages: int) -> Sequence[int]:
        """Those that this process plays."""
        ...

    def pool_stages(
        self, seconds: dict[int, tuple[float, float]]
    ) -> dict[int, tuple[float, float]]:
        """Those of every stage, from the ranks that play it."""
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

    def pool(self, seconds: list[float]) -> list[float]:
        return seconds

    def stages(self, n_stages: int) -> Sequence[int]:
        return range(n_stages)

    def pool_stages(
        self, seconds: dict[int, tuple[float, float]]
    ) -> dict[int, tuple[float, float]]:
        return seconds
