"""Which snapshot a run goes on from: the newest of which every piece is on some machine."""

from __future__ import annotations

from itertools import product

from hypothesis import given
from hypothesis import strategies as st
from pipecompile.runtime.elastic.holdings import (
    Held,
    Snapshot,
    complete,
    neighbours,
    next_attempt,
    server,
)

ATTEMPTS = ("00000001-a", "00000001-b", "00000002-a", "00000010-a")
PIECES = [
    Held(attempt, sequence, sequence + 5, size, rank)
    for attempt, sequence, size in product(ATTEMPTS, range(3), (1, 2, 3))
    for rank in range(size)
]
machines = st.lists(st.sets(st.sampled_from(PIECES)), min_size=1, max_size=4)


@given(machines)
def test_the_newest_is_the_last_of_the_last_attempt_that_is_whole(held: list[set[Held]]) -> None:
    """Against all candidates, one by one."""
    everywhere = set().union(*held)
    whole = [
        (attempt, sequence, size)
        for attempt, sequence, size in product(ATTEMPTS, range(3), (1, 2, 3))
        if all(Held(attempt, sequence, sequence + 5, size, r) in everywhere for r in range(size))
    ]
    found = complete(held)
    assert sorted((s.attempt, s.sequence, s.size) for s in found) == sorted(whole)
    ages = [(s.attempt, s.sequence) for s in found]
    assert ages == sorted(ages, reverse=True)


@given(machines, st.data())
def test_every_holder_has_what_it_is_said_to_have(
    held: list[set[Held]], data: st.DataObject
) -> None:
    for snapshot in complete(held):
        for rank, holders in enumerate(snapshot.holders):
            assert set(holders) == {m for m, h in enumerate(held) if snapshot.piece(rank) in h}
    lost = data.draw(st.integers(0, len(held) - 1))
    fewer = [set() if m == lost else h for m, h in enumerate(held)]
    known = {(s.attempt, s.sequence, s.size) for s in complete(held)}
    assert {(s.attempt, s.sequence, s.size) for s in complete(fewer)} <= known


def test_steps_may_go_back() -> None:
    """Where a user has loaded an older checkpoint, what came later counts."""
    later = [Held("00000001-a", 8, 3, 1, 0), Held("00000001-a", 7, 90, 1, 0)]
    assert complete([later])[0].steps == 3


def test_pieces_of_two_attempts_are_no_snapshot() -> None:
    one, other = Held("00000001-a", 4, 4, 2, 0), Held("00000001-b", 4, 4, 2, 1)
    assert complete([[one], [other]]) == []
    assert complete([[one], [Held("00000001-a", 4, 5, 2, 1)]]) == []


@given(st.lists(st.integers(1, 4), min_size=1, max_size=5), st.randoms())
def test_one_machine_less_loses_nothing(sizes: list[int], random: object) -> None:
    """Each piece is where it was made, and with a neighbour of another machine."""
    places = [f"m{number}" for number, size in enumerate(sizes) for _ in range(size)]
    random.shuffle(places)  # type: ignore[attr-defined]
    order = list(dict.fromkeys(places))
    held: dict[str, set[Held]] = {name: set() for name in order}
    for rank, (place, neighbour) in enumerate(zip(places, neighbours(places), strict=True)):
        piece = Held("00000001-a", 0, 1, len(places), rank)
        held[place].add(piece)
        assert (neighbour is None) == (len(order) == 1)
        if neighbour is not None:
            assert places[neighbour] != place
            held[places[neighbour]].add(piece)
    for lost in order if len(order) > 1 else ():
        assert complete([held[name] for name in order if name != lost])


@given(st.integers(1, 6), st.integers(1, 4))
def test_copies_are_spread_over_a_machine(machine_count: int, size: int) -> None:
    places = [f"m{rank // size}" for rank in range(machine_count * size)]
    taken = [n for n in neighbours(places) if n is not None]
    assert len(set(taken)) == len(taken)


@given(st.lists(st.sampled_from(ATTEMPTS)))
def test_a_next_attempt_is_greater_than_all(known: list[str]) -> None:
    assert all(next_attempt(known, "0") > each for each in known)


def test_a_piece_is_given_by_a_rank_that_has_it() -> None:
    snapshot = Snapshot("00000001-a", 0, 1, ((0,), (0, 2), ()))
    assert server(snapshot, 0, [0, 0, 1, 2]) in (0, 1)
    assert server(snapshot, 1, [1, 1, 2]) == 2
    assert server(snapshot, 2, [0, 1, 2]) is None
