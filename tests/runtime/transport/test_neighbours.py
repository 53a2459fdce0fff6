"""Packets between processes of one machine."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from pipecompile.runtime.transport import neighbours
from pipecompile.runtime.transport.mesh import connect, make_mesh
from pipecompile.runtime.transport.neighbours import MOST_BYTES, SWITCH, Neighbours
from support.connected import of, open_files
from support.gang import Gang
from torch import device


def contents(ends: Neighbours, tickets: Any) -> list[bytes]:
    return [ends.take(ticket).content for ticket in tickets]


@given(st.data())
def test_who_asks_first_gets_what_was_posted_first(data: st.DataObject) -> None:
    here, there = of(2)
    channels = data.draw(st.lists(st.integers(-3, 3), min_size=1, max_size=20))
    for number, channel in enumerate(channels):
        here.post(1, channel, bytes([number]))
    tickets = [there.ask(0, channel) for channel in channels]
    order = data.draw(st.permutations(range(len(channels))))
    assert contents(there, (tickets[i] for i in order)) == [bytes([i]) for i in order]


def test_two_that_post_more_than_sockets_hold_wait_for_nobody() -> None:
    count, ends, heard = 3000, of(2), [b"", b""]

    def run(me: int) -> None:
        for number in range(count):
            ends[me].post(1 - me, 0, number.to_bytes(4, "little"))
        tickets = [ends[me].ask(1 - me, 0) for _ in range(count)]
        heard[me] = b"".join(contents(ends[me], tickets))

    threads = [threading.Thread(target=run, args=(me,), daemon=True) for me in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    every = b"".join(number.to_bytes(4, "little") for number in range(count))
    assert heard == [every, every]


def test_who_waits_for_one_reads_what_others_post() -> None:
    """Rank 2 cannot post all that it has until rank 0 reads it, which waits for rank 1; rank 1
    posts once rank 2 is done."""
    first, second, third = of(3)
    done = threading.Event()

    def flood() -> None:
        for _ in range(3000):
            third.post(0, 0, b"x")
        done.set()

    def answer() -> None:
        done.wait()
        second.post(0, 0, b"y")

    for act in (flood, answer):
        threading.Thread(target=act, daemon=True).start()
    assert first.take(first.ask(1, 0)).content == b"y"


def test_the_end_of_a_rank_is_named_once_all_it_posted_is_read() -> None:
    here, there = of(2)
    there.post(0, 5, b"last")
    here.post(1, 5, b"unread, so that its socket is reset")
    there._sockets[0].close()
    assert here.take(here.ask(1, 5)).content == b"last"
    with pytest.raises(ConnectionError, match="rank 1 has ended"):
        here.take(here.ask(1, 5))
    with pytest.raises(ConnectionError, match="rank 1 has ended"):
        here.post(1, 5, b"too late")


def test_the_end_of_another_rank_disturbs_nobody() -> None:
    first, second, third = of(3)
    third._sockets[0].close()
    threading.Timer(0.05, second.post, (0, 0, b"still here")).start()
    assert first.take(first.ask(1, 0)).content == b"still here"


def gathered(ends: list[Neighbours], value: Callable[[int], Any]) -> list[list[Any]]:
    """What each rank hears."""
    heard: list[list[Any]] = [[] for _ in ends]

    def run(me: int) -> None:
        heard[me] = ends[me].gather(value(me))

    threads = [threading.Thread(target=run, args=(me,)) for me in range(len(ends))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return heard


@pytest.mark.parametrize("size", [0, MOST_BYTES - 20, MOST_BYTES + 1, 40 * MOST_BYTES])
def test_every_rank_hears_all_whatever_their_size(size: int) -> None:
    every = [(me, bytes(size)) for me in range(3)]
    assert gathered(of(3), lambda me: every[me]) == [every] * 3


def test_no_file_stays_open() -> None:
    ends, before = of(2), open_files()
    gathered(ends, lambda me: bytes(3 * MOST_BYTES))
    assert open_files() == before


def test_what_is_told_can_be_waited_for_after_what_follows() -> None:
    here, there = of(2)
    first = [ends.tell("first" if ends is here else None, [0]) for ends in (here, there)]
    assert gathered([here, there], lambda me: me) == [[0, 1], [0, 1]]
    assert [hear() for hear in first] == [["first"], ["first"]]


# -- meeting -------------------------------------------------------------------------------------


def met(switch: str = SWITCH) -> tuple[list[int], list[Any]]:
    """The ranks of this machine, and what they gather."""
    mesh = make_mesh(3, 1)
    connect(mesh, device("cpu"))
    assert mesh.rank is not None

    def gather(value: Any) -> list[Any]:
        values: list[Any] = [None] * mesh.size
        dist.all_gather_object(values, value)
        return values

    os.environ["APART"] = "off" if mesh.rank == 1 else ""
    found = neighbours.meet(mesh.rank, gather, switch)
    return ([], []) if found is None else (sorted(found.ranks), found.gather(mesh.rank))


def test_processes_of_a_machine_meet_but_for_one_that_keeps_apart(
    gang: Callable[[int], Gang],
) -> None:
    assert gang(3).run(met) == [
        ([1, 2], [0, 1, 2]),
        ([0, 2], [0, 1, 2]),
        ([0, 1], [0, 1, 2]),
    ]
    assert gang(3).run(met, "APART") == [([2], [0, 2]), ([], []), ([0], [0, 2])]


def test_who_does_not_know_the_secret_is_turned_away() -> None:
    listening = neighbours._listening(SWITCH)
    assert listening is not None
    secret = bytes(range(16))
    stranger = neighbours._connected(listening.getsockname(), bytes(16), 1)
    known = neighbours._connected(listening.getsockname(), secret, 1)
    assert stranger is not None
    assert known is not None
    found = neighbours._accepted(listening, secret, [1])
    known.send(b"hello")
    assert found[1].recv(5) == b"hello"
    assert stranger.recv(1) == b""  # closed
    assert neighbours._connected(b"\0nobody listens here", secret, 1) is None
