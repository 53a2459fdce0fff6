"""A rank that dies, or does not get on, is named by the others, with the place where it was."""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch.distributed as dist
from pipecompile import errors
from pipecompile.runtime.exchange import lookout, peers
from pipecompile.runtime.exchange.lookout import Lookout, Loss
from pipecompile.runtime.transport import joining
from pipecompile.runtime.transport.doing import ENDED, Doing, place_of, told
from pipecompile.runtime.transport.mesh import Mesh
from support import faults
from support.gang import free_port

LIMIT_S = 20
SOON_S = 12  # a rank that has died is named after; most of it is for machines that are busy
ODD = "rank 1 (stage 1, replica 0)"

# -- in one process -------------------------------------------------------------------------------


@pytest.fixture
def watching(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Lookout]]:
    """The lookouts of three ranks, in one process and with short times."""
    for module, name, seconds in (
        (lookout, "POLL_S", 0.01),
        (lookout, "BEAT_S", 0.02),
        (lookout, "LISTEN_S", 0.05),
        (lookout, "GRACE_S", 0.1),
        (joining, "FIRST_S", 0.2),
    ):
        monkeypatch.setattr(module, name, seconds)
    store, made = dist.HashStore(), [None] * 3

    def make(rank: int) -> None:
        made[rank] = Lookout(rank, 3, store, 1800.0, Doing())
        made[rank].mesh = Mesh(3, 1, rank)

    threads = [threading.Thread(target=make, args=(rank,)) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    yield made
    for each in made:
        each.stop()


class Sleeper:
    """Waits for others."""

    def __init__(self) -> None:
        self.woken = threading.Event()

    def wake(self) -> None:
        self.woken.set()


def said(capsys: pytest.CaptureFixture[str], seconds: float) -> list[str]:
    time.sleep(seconds)
    return capsys.readouterr().err.splitlines()


def test_who_is_waited_for_in_the_end_is_named(
    watching: list[Lookout], capsys: pytest.CaptureFixture[str]
) -> None:
    """Rank 0 waits for 1, and that for 2, which does not wait for anybody."""
    here, middle, last = (each._doing for each in watching)
    with here.call("step() (call 3)"), middle.call("step() (call 3)"), last.call("save() (call 3)"):
        here.act(told("0B3"))
        with here.waiting((1,)), middle.waiting((2,)):
            lines = [line for line in said(capsys, 1.3) if "rank 0 (" in line.partition("has")[0]]
    assert 1 < len(lines) < 5, "at 0.2, 0.4, 0.8 s: ever less often"
    assert lines[0].startswith("pipecompile: rank 0 (stage 0, replica 0) has waited 0 s in 0B3, in")
    assert "step() (call 3) for rank 1 (stage 1, replica 0), and that for rank 2 (stage" in lines[0]
    assert "which is alive, in save() (call 3) for" in lines[0]


def test_ranks_that_wait_for_all_of_a_group_name_the_others(
    watching: list[Lookout], capsys: pytest.CaptureFixture[str]
) -> None:
    """Each says that it waits for all, as a rank may be slow inside of what all of them do."""
    here, middle = (each._doing for each in watching[:2])
    inside, waits = "state_dict() (call 2)", (0, 1)
    with here.call(inside), middle.call(inside), here.waiting(waits), middle.waiting(waits):
        lines = said(capsys, 1.3)
    for rank, other in ((0, 1), (1, 0)):
        of_it = [line for line in lines if f" rank {rank} (" in line.partition("has waited")[0]]
        assert of_it
        assert f"for rank {other} (stage {other}, replica 0), which is alive, in" in of_it[-1]


def test_who_waits_longer_than_the_limit_ends_the_run(watching: list[Lookout]) -> None:
    here, other, third = watching
    sleeper, far = Sleeper(), Sleeper()
    here._doing.wakes(sleeper)
    third._doing.wakes(far)
    here.timeout_s = 0.3
    with here._doing.call("step()"), third._doing.call("step()"), third._doing.waiting((0,)):
        with here._doing.waiting((1,)):
            assert sleeper.woken.wait(LIMIT_S)
        assert far.woken.wait(LIMIT_S), "all ranks are told"
        assert here.failure() == third.failure() == other.failure()
        text = here.failure() or ""
    assert "for rank 1 (stage 1, replica 0), which is alive, outside of the pipeline's" in text
    assert "longer than timeout_s=0.3" in text


def test_a_rank_that_gave_itself_up_ends(
    watching: list[Lookout], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is blocked outside of any call: in a loader, say."""
    ended: list[int] = []
    monkeypatch.setattr("os._exit", lambda status: ended.append(status))
    watching[0]._publish(Loss([1], "rank 1 does not get on", stalled=True))
    deadline = time.monotonic() + LIMIT_S
    while not ended and time.monotonic() < deadline:
        time.sleep(0.01)
    assert set(ended) == {1}
    assert watching[1]._doing.place.fate == b"f"
    assert watching[2]._doing.place.fate == b"w"


def test_a_death_concerns_calls_that_need_the_rank(watching: list[Lookout]) -> None:
    """Not those that it had finished."""
    here = watching[0]
    here._take(Loss([1], "rank 1 died", order=2, inside=False))
    for expected in (None, None, "rank 1 died"):
        with here._doing.call("step()"):
            assert here.failure() == expected
    here._take(Loss([1], "rank 1 died", order=4, inside=True))
    with here._doing.call("step()"):
        assert here.failure() == "rank 1 died"


def test_who_has_ended_its_script_is_told(watching: list[Lookout]) -> None:
    with watching[1]._doing.call("step() (call 1)"):
        pass
    watching[1]._doing.end(ENDED)
    with watching[0]._doing.call("step() (call 2)"):
        assert watching[0].explain() == (
            "rank 1 (stage 1, replica 0) has ended its script after step() (call 1), and rank 0 is "
            "in step() (call 2): every rank must make the same calls of a pipeline"
        )


@pytest.fixture
def apart(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> list[Lookout]:
    """`watching`, of ranks that do not see that they are of one machine."""
    for module in (peers, lookout):
        monkeypatch.setattr(module, "SILENT_S", 0.4)
    monkeypatch.setattr(peers, "machine", lambda: "")
    found: list[Lookout] = request.getfixturevalue("watching")
    return found


def test_a_silent_rank_of_another_machine_is_named_by_who_listens_late(
    apart: list[Lookout], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The thread that listens looks several times before the one that asks does so again."""
    monkeypatch.setattr(lookout, "LISTEN_S", 60)  # what it waits for has only just begun
    apart[1].stop()  # as if killed: it has not said that it ends
    real = time.sleep
    monkeypatch.setattr(time, "sleep", lambda seconds: real(4 * seconds))
    with apart[0]._doing.call("step() (call 1)"):
        text = apart[0].explain() or ""
    assert re.match(r"rank 1 \(stage 1, replica 0\) has not been heard of for \d s \(it, its", text)


def test_nobody_is_blamed_while_all_are_heard_of(apart: list[Lookout]) -> None:
    with apart[0]._doing.call("step() (call 1)"):
        assert apart[0].explain() is None


def test_a_page_says_where_a_process_is() -> None:
    doing = Doing()
    before = doing.place
    assert str(before) == "outside of the pipeline's calls, before the first one"
    doing.share()
    with doing.call("compile()"):
        with doing.phase("its compilation"):
            assert str(doing.place) == "in its compilation, in compile()"
            with doing.call("compile_for()"):
                assert str(doing.place) == "in compile_for()"
            assert str(doing.place) == "in its compilation, in compile()"
        assert str(doing.place) == "in compile()"
    assert str(doing.place) == "outside of the pipeline's calls, after compile()"
    doing.act(told("x" * 500))
    assert len(place_of(doing._page).action) == 64


def test_a_process_that_has_another_ones_number_is_not_taken_for_it() -> None:
    assert peers.Peer.of(1, peers.identity(Doing())).pid == os.getpid()
    machine = peers.machine()
    stale = f'["{machine}", {os.getpid()}, "12345", -1, "host"]'
    assert peers.Peer.of(1, stale).ended


def test_an_attempt_gets_a_name_of_its_own_beside_what_an_earlier_one_left() -> None:
    """Whose rank 1 had come, and rank 2 had not."""
    store, names = dist.HashStore(), []
    store.set("pipecompile/hello/1", "stale")
    store.set("pipecompile/welcome/1", '["stale", "of the dead"]')
    store.set("pipecompile/here/of the dead/1", "")

    def come(rank: int) -> None:
        names.append(joining.scope_of(store, rank, 3, LIMIT_S))

    for _ in range(2):
        greeted = store.get("pipecompile/hello/1")
        threads = [threading.Thread(target=come, args=(rank,)) for rank in (1, 2, 0)]
        for thread in threads[:2]:
            thread.start()
        while store.get("pipecompile/hello/1") == greeted:
            time.sleep(0.001)
        time.sleep(0.05)  # rank 1 looks at what the dead have left before rank 0 comes
        threads[2].start()
        for thread in threads:
            thread.join(LIMIT_S)
    assert len(names) == 6
    assert len(set(names[:3])) == len(set(names[3:])) == 1
    assert len({*names, "of the dead"}) == 3


def test_a_rank_that_does_not_come_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(joining, "FIRST_S", 0.1)
    with pytest.raises(Exception, match="ranks 1, 2 did not join the run within timeout_s="):
        joining.scope_of(dist.HashStore(), 0, 3, 0.4)
    assert "rank 0 waits for others to join the run: ranks 1, 2, for 0 s now" in said(capsys, 0)[0]


def test_a_store_that_nobody_keeps_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Within the limit; and rank 0, who keeps it, waits for those that are missing by name."""
    port = free_port()
    for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": 2}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    monkeypatch.setenv("RANK", "1")
    nobody = rf"rank 1 cannot reach rank 0 at 127.0.0.1:{port} within timeout_s=0.2 \(.*is it"
    with pytest.raises(errors.PeerFailedError, match=nobody):
        joining._met(0.2)
    monkeypatch.setenv("RANK", "0")
    store, rank, size = joining._met(0.2)
    assert (rank, size) == (0, 2)
    with pytest.raises(errors.PeerFailedError, match="rank 1 did not join the run"):
        joining.scope_of(store, rank, size, 0.2)


# -- between processes ----------------------------------------------------------------------------


def check_named(folder: Path, place: str, how: str, shared: str) -> None:
    before = left_behind()
    (text, seconds, _), odd = faults.told(folder, place, how, shared=shared)
    assert odd is None
    assert text.startswith(f"PeerFailedError: {ODD} died {faults.PLACES[place]}: its process was")
    assert seconds < SOON_S
    assert left_behind() <= before


def left_behind() -> set[str]:
    """What processes may leave of themselves."""
    return {path.name for path in Path("/dev/shm").iterdir() if "pipecompile" in path.name}


@pytest.mark.parametrize(
    ("place", "shared"),
    [
        ("B", ""),
        *(
            pytest.param(place, shared, marks=pytest.mark.slow)
            for place in faults.PLACES
            for shared in ("", "off")
        ),
    ],
)
@pytest.mark.usefixtures("gang")  # for the worker that has what gangs are forked from
def test_a_killed_rank_is_named(tmp_path: Path, place: str, shared: str) -> None:
    check_named(tmp_path, place, "killed", shared)


@pytest.mark.slow
@pytest.mark.parametrize("shared", ["", "off"])
def test_a_killed_rank_of_another_machine_is_named(tmp_path: Path, shared: str) -> None:
    (text, seconds, _), odd = faults.told(tmp_path, "B", "killed", shared=shared, far=True)
    assert odd is None
    assert text.startswith(f"PeerFailedError: {ODD} has not been heard of for")
    assert seconds < SOON_S + lookout.PATIENCE_S  # on a machine that is very busy


@pytest.mark.parametrize(
    ("place", "how", "shared"),
    [
        ("F", "stopped", "off"),
        *(
            pytest.param(place, how, shared, marks=pytest.mark.slow)
            for place in faults.PLACES
            for how in ("stopped", "slow")
            for shared in ("", "off")
        ),
    ],
)
@pytest.mark.usefixtures("gang")
def test_a_stalled_rank_is_named_and_ends_the_run(
    tmp_path: Path, place: str, how: str, shared: str
) -> None:
    limits = {"first_s": 0.5, "timeout_s": 2.5}
    answers = faults.told(tmp_path, place, how, shared=shared, **limits)
    assert answers[0] is not None
    text, _, lines = answers[0]
    state = "is stopped (as by SIGSTOP)" if how == "stopped" else "is alive,"
    expected = f"for {ODD}, which {state} {faults.PLACES[place]}"
    assert any(expected in line for line in lines), lines
    assert text.startswith("PeerFailedError: rank 0 (stage 0, replica 0) has waited ")
    assert expected in text
    assert "longer than timeout_s=2.5" in text


@pytest.mark.slow
@pytest.mark.parametrize(
    ("place", "how"),
    [("write", "slow"), ("write", "stopped"), ("read", "slow"), ("beside", "slow")],
)
@pytest.mark.usefixtures("gang")
def test_who_is_waited_for_inside_of_torch_is_named(tmp_path: Path, place: str, how: str) -> None:
    """While all ranks write or read a checkpoint, also beside the training."""
    limits = {"first_s": 0.5, "timeout_s": 2.5}
    answers = faults.told(tmp_path, place, how, **limits)
    assert answers[0] is not None
    text, _, _ = answers[0]
    state = "is stopped (as by SIGSTOP)" if how == "stopped" else "is alive,"
    waits = "what all ranks read, in load()" if place == "read" else "the parts of all ranks, in "
    assert re.match(rf"PeerFailedError: rank 0 \(.*\) has waited \d s in {re.escape(waits)}", text)
    assert f"for {ODD}, which {state} {faults.IN_TORCH[place]}" in text
    assert "longer than timeout_s=2.5" in text


@pytest.mark.slow
@pytest.mark.parametrize("place", [place for place in faults.PLACES if place != "loader"])
@pytest.mark.parametrize("shared", ["", "off"])
def test_an_error_is_told_with_its_place(tmp_path: Path, place: str, shared: str) -> None:
    """But for one in the loader, which is told when it ends its process."""
    (text, _, _), odd = faults.told(tmp_path, place, "error", shared=shared)
    assert odd is not None
    assert "ArithmeticError: out of numbers" in odd[0]
    if place in ("save", "load"):  # where ranks tell each other their errors
        assert text == odd[0] == "CheckpointError: ArithmeticError: out of numbers"
    else:
        assert f"PeerFailedError: {ODD} failed first {faults.PLACES[place]}: Arithmetic" in text
