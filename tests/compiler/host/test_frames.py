"""How deep the caller is makes no call dear."""

from __future__ import annotations

import resource
from collections.abc import Callable, Iterator

import pytest
from pipecompile.compiler.host.frames import with_room
from pipecompile.runtime.executor import drive

DEPTHS, CALLS = 300, 100  # frames of several pieces


def leaf() -> None:
    pass


def many() -> None:
    for _ in range(CALLS):
        leaf()


def faults(act: Callable[[], object]) -> int:
    """Pages that it made anew: one for each piece of memory for frames, at least."""
    before = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt
    act()
    return resource.getrusage(resource.RUSAGE_THREAD).ru_minflt - before


def at(depth: int, act: Callable[[], object]) -> int:
    """The fewest faults of three times, that many frames deeper."""
    if depth:
        return at(depth - 1, act)
    return min(faults(act) for _ in range(3))


def driven() -> None:
    def run() -> Iterator[None]:
        many()
        yield from ()

    drive([run()], lambda: 0)


@pytest.mark.parametrize("act", [with_room(many), driven], ids=["loop", "executor"])
def test_a_loop_maps_nothing_at_any_depth(act: Callable[[], object]) -> None:
    assert max(at(depth, act) for depth in range(DEPTHS)) < CALLS / 2


def test_results_errors_and_names_are_the_functions() -> None:
    def divide(a: float, *, by: float) -> float:
        """Of two numbers."""
        return a / by

    roomy = with_room(divide)
    assert roomy(3, by=2) == 1.5
    assert (roomy.__name__, roomy.__doc__) == ("divide", "Of two numbers.")
    with pytest.raises(ZeroDivisionError):
        roomy(1, by=0)
