"""The watchdogs of two ranks over one store, in one process and with short times."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator

import pytest
import torch.distributed as dist
from pipecompile.compiler.ir.errors import BatchError, PeerFailedError
from pipecompile.runtime.exchange import endings, watchdog
from pipecompile.runtime.exchange.watchdog import Watchdog
from pipecompile.runtime.transport.doing import Doing, told

LIMIT_S = 20  # for what takes a tenth of a second where the machine is free


class Rank:
    """With a watchdog."""

    def __init__(self, number: int, store: dist.Store) -> None:
        self.doing, self.store = Doing(), store
        self.watchdog = Watchdog(number, "test", store, doing=self.doing)

    def fail(self, error: Exception) -> Exception:
        """Fail in a guarded call; what is raised."""
        with pytest.raises(Exception) as caught, self.watchdog.guard("step()"):  # noqa: PT011, PT012
            self.doing.act(told("1F0"))
            raise error
        return caught.value


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch) -> tuple[Rank, Rank]:
    store = dist.HashStore()
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setattr(endings, "_tellers", [])
    for name, seconds in (("POLL_S", 0.01), ("GRACE_S", 0.1), ("ECHO_S", 0.1)):
        monkeypatch.setattr(watchdog, name, seconds)
    return Rank(0, store), Rank(1, store)


@pytest.fixture
def ended(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """With what exit status a watchdog would have ended the process, and waits instead."""
    statuses: list[int] = []
    over = threading.Event()

    def end(status: int) -> None:
        statuses.append(status)
        over.wait(LIMIT_S)

    monkeypatch.setattr("os._exit", end)
    yield statuses
    over.set()


def until(condition: Callable[[], object]) -> bool:
    deadline = time.monotonic() + LIMIT_S
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return bool(condition())


def test_the_first_cause_is_on_top(ranks: tuple[Rank, Rank]) -> None:
    """An echo of it raises it; what the user did wrong stays what it is."""
    first, second = ranks
    cause = second.fail(ArithmeticError("out of numbers"))
    assert isinstance(cause, ArithmeticError)
    echo = first.fail(RuntimeError("connection closed"))
    assert isinstance(echo, PeerFailedError)
    assert str(echo).startswith(
        "rank 1 failed first in 1F0, in step(): ArithmeticError: out of numbers\n\nIts traceback:\n"
    )
    assert str(echo).endswith("\n(seen here as RuntimeError: connection closed)")
    assert echo.__suppress_context__, "what was seen here would be printed above it"
    assert echo.__cause__ is None
    assert isinstance(first.fail(BatchError("rows")), BatchError)
    echo = second.fail(RuntimeError("connection closed"))
    assert "rank 0 failed first in 1F0, in step(): BatchError: rows" in str(echo)


def test_an_error_belongs_to_its_call(ranks: tuple[Rank, Rank]) -> None:
    first, second = ranks
    second.fail(ArithmeticError("out of numbers"))
    with first.watchdog.guard("step()"):
        pass
    assert isinstance(first.fail(RuntimeError("of its own")), RuntimeError)
    with second.watchdog.guard("step()"):
        pass
    first.fail(RuntimeError("the next"))
    assert "the next" in str(second.fail(RuntimeError("connection closed")))


def test_an_error_outside_of_any_call_reaches_all(
    ranks: tuple[Rank, Rank], capsys: pytest.CaptureFixture[str]
) -> None:
    """It ends the process: whatever the others do, they hear of it."""
    error = ArithmeticError("the data loader is empty")
    ranks[0].watchdog.report(error, watchdog._FATAL)
    assert "the data loader is empty" in str(ranks[1].fail(RuntimeError("connection closed")))
    sys.excepthook(ArithmeticError, error, None)
    assert "the data loader is empty" in capsys.readouterr().err


def test_a_blocked_rank_is_ended(
    ranks: tuple[Rank, Rank], ended: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = ranks
    second.fail(ArithmeticError("out of numbers"))
    with first.watchdog.guard("step()"):
        assert until(lambda: ended)
    assert ended == [1]
    assert "rank 0 stops: rank 1 failed first in 1F0, in step(): Arith" in capsys.readouterr().err


def test_a_rank_has_time_to_notice_by_itself(
    ranks: tuple[Rank, Rank], ended: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And is left alone when it is not at work, or where nobody failed."""
    first, second = ranks
    with first.watchdog.guard("step()"):
        time.sleep(0.3)
    with second.watchdog.guard("step()"):
        pass
    monkeypatch.setattr(watchdog, "GRACE_S", 600.0)
    second.fail(ArithmeticError("out of numbers"))
    with first.watchdog.guard("step()"):
        time.sleep(0.3)
    monkeypatch.setattr(watchdog, "GRACE_S", 0.0)
    time.sleep(0.3)
    assert ended == []


def test_time_to_notice_begins_with_the_call(ranks: tuple[Rank, Rank], ended: list[int]) -> None:
    """However long ago another rank has failed for good."""
    first, second = ranks
    second.watchdog.report(ArithmeticError("the data loader is empty"), watchdog._FATAL)
    time.sleep(5 * watchdog.GRACE_S)
    with first.watchdog.guard("step()"):
        begun = time.monotonic()
        assert until(lambda: ended)
    assert time.monotonic() - begun > 2 * watchdog.GRACE_S


def test_a_rank_that_has_just_left_is_not_ended(
    ranks: tuple[Rank, Rank], ended: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its call ends while the watchdog looks for a failure, and finds one."""
    dog, looks = ranks[0].watchdog, []

    def found() -> str:
        looks.append(dog.call)
        dog.working = len(looks) < 2
        return "rank 1 failed first"

    monkeypatch.setattr(watchdog, "GRACE_S", 0.0)
    monkeypatch.setattr(dog, "first_failure", found)
    with dog.guard("step()"):
        assert until(lambda: len(looks) == 2)
        time.sleep(0.1)
    assert ended == []


def test_a_watchdog_ends_with_its_owner(ranks: tuple[Rank, Rank]) -> None:
    before = set(threading.enumerate())
    rank = Rank(2, ranks[0].store)
    (thread,) = set(threading.enumerate()) - before
    assert thread.name == "pipecompile-watchdog"
    del rank
    assert until(lambda: not thread.is_alive())
