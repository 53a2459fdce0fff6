"""Several machines, for real: hosts with networks of their own (`support.hosts`), whose cables are
cut, throttled and delayed in the middle of a step."""

from __future__ import annotations

import contextlib
import json
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast
from unittest import mock

import pipecompile
import pytest
import torch
import torch.distributed as dist
from pipecompile.compiler.costs.hardware import CPU
from pipecompile.compiler.costs.topology import Topology
from pipecompile.runtime import executor
from pipecompile.runtime.exchange import link, lookout, peers
from pipecompile.runtime.transport import interfaces, joining, quick_store
from pipecompile.runtime.transport.doing import Doing
from support import faults, hosts
from support.gang import Gang
from support.hosts import Network, network
from torch import nn

ROWS = 8192  # of which messages have 64 KiB
BATCH = {"input": torch.arange(4.0 * ROWS).view(-1, 4) / ROWS, "label": torch.arange(ROWS) % 4}
TIMEOUT_S = 6.0
LIMIT_S = 60.0


@pytest.fixture(scope="module")
def hosts_needed() -> None:
    if reason := hosts.lacking():
        pytest.skip(reason)


@pytest.fixture
def two(hosts_needed: None) -> Iterator[Network]:
    with network(2) as made:
        yield made


def trained(steps: int, dp: int = 1) -> tuple[list[str], bool]:
    """The losses of some steps in full, and whether ranks of a machine share memory."""
    pipe = faults.pipeline(dp=dp)
    losses = []
    for _ in range(steps):
        rows = {name: part.chunk(pipe.data_shards)[pipe.data_shard] for name, part in BATCH.items()}
        losses.append(float(pipe.step(rows)).hex())
    return losses, bool(getattr(pipe._world.transport, "_beside", ()))


@pytest.mark.slow
@pytest.mark.usefixtures("hosts_needed", "gang")  # the worker that has what gangs are forked from
def test_two_machines_of_two_processes_train_bit_for_bit_as_one_device() -> None:
    """The names that machines have for themselves lead nowhere, as on many systems."""
    expected, _ = trained(3, dp=2)
    with network(2, own_names="127.0.1.1") as made:
        gang = Gang(4, made.hosts)
        try:
            answers = gang.run(trained, 3, dp=2)
        finally:
            gang.close()
    assert answers == [(expected, True)] * 4


def measured_here(rows: int, width: int) -> tuple[tuple[int, ...], int, float, float, str]:
    """Machines, devices of each, bytes per second between and within, and what is made of that."""
    order, *_ = placed(rows, width, "auto", costs="profile", hardware=None)
    world = faults.pipeline(dp=2)._world
    here = world._here, world.transport, world.agreement.gather
    spec = link.measured(CPU, world.mesh, *here)
    assert spec.topology is not None
    machines = spec.topology.hosts, spec.topology.devices
    return *machines, spec.topology.bytes_per_s, spec.link_bytes_per_s, order


@pytest.mark.slow
def test_links_within_and_between_machines_are_measured(two: Network) -> None:
    """Two ranks share a cable of 40 MB/s, which makes it worth that large weights stay off it."""
    two.throttle(two.hosts[1], 40_000_000)
    gang = Gang(4, two.hosts)
    try:
        first, *others = gang.run(measured_here, 8, 16384)
    finally:
        gang.close()
    assert others == [first] * 3
    hosts_of, devices, between, within, order = first
    assert (hosts_of, devices, order) == ((0, 0, 1, 1), 2, "replicas")
    assert 5e6 < between < 5e7 < within  # a bucket is full at first


def placed(
    rows: int, width: int, placement: str, **options: Any
) -> tuple[str, list[int], str, bool]:
    """How ranks are numbered, the replicas of a stage, the loss, and whether a step's neighbours
    have shared memory, of a model whose weights or whose messages are large."""
    torch.manual_seed(0)
    ends = nn.Linear(4, width, bias=False), nn.Linear(width, 4, bias=False)
    model = nn.Sequential(ends[0], ends[1], nn.Tanh(), nn.Linear(4, width), nn.Linear(width, 4))
    slow = Topology(devices=2, bytes_per_s=1e6, latency_s=1e-4)
    share = {name: part[:rows] for name, part in BATCH.items()}
    pipe = pipecompile.compile(
        model,
        2,
        dp=2,
        microbatches=2,
        optimizer=partial(torch.optim.SGD, lr=0.1),
        loss_fn=faults.loss_of,
        example_batch=share,
        placement=placement,
        **({"hardware": replace(CPU, topology=slow)} | options),
    )
    world = pipe._world
    assert pipe.plan.options["placement"] == world.mesh.order
    beside = getattr(world.transport, "_beside", frozenset())
    rank = world.mesh.rank or 0
    together = [r for r in range(4) if r == rank or r in beside]
    loss = float(pipe.step(share)).hex()
    return world.mesh.order, [world.mesh.replica_of(r) for r in together], loss, bool(beside)


@pytest.mark.slow
def test_ranks_that_send_each_other_most_share_a_machine(two: Network) -> None:
    gang = Gang(4, two.hosts)
    try:
        few = gang.run(placed, 8, 512, "auto")
        many = gang.run(placed, 8192, 4, "auto")
        said = gang.run(placed, 8192, 4, "replicas")
    finally:
        gang.close()
    assert [(order, replicas) for order, replicas, *_ in few] == [("replicas", [0, 1])] * 4
    assert [order for order, *_ in many] == ["pipeline"] * 4
    assert [replicas for _, replicas, *_ in many] == [[0, 0]] * 2 + [[1, 1]] * 2
    assert [order for order, *_ in said] == ["replicas"] * 4
    assert {loss for *_, loss, _ in said} == {loss for *_, loss, _ in many}


def held_up(folder: Path, **options: Any) -> tuple[list[str], float]:
    """The losses of three steps in full, and seconds from what happens to the network, for which
    rank 1 waits in the middle of the second step, to the end."""
    rank, original = int(os.environ["RANK"]), executor.Executor._compute

    def waits(*args: Any, **more: Any) -> Any:
        if rank == 1 and str(args[1]) == "1B1" and len(losses) == 1:
            time.sleep(2 * lookout.BEAT_S)  # it says where it is
            (folder / "here").touch()
            while not (folder / "go").exists():
                time.sleep(0.01)
        return original(*args, **more)

    losses: list[str] = []
    pipe = faults.pipeline(**options)
    losses.append(float(pipe.step(BATCH)).hex())
    with mock.patch.object(executor.Executor, "_compute", waits):
        for _ in range(2):
            losses.append(float(pipe.step(BATCH)).hex())
    happened_s = (folder / "go").stat().st_mtime
    return losses, time.time() - happened_s


def refused(folder: Path) -> str:
    """What `held_up` raises."""
    with (
        mock.patch.object(joining, "FIRST_S", 2.0),
        mock.patch.object(lookout, "LISTEN_S", 1.0),
        mock.patch.object(quick_store, "ANSWER_S", 2.0),
        mock.patch.object(peers, "SILENT_S", 2.0),
        mock.patch.object(lookout, "SILENT_S", 2.0),
    ):
        try:
            held_up(folder, timeout_s=TIMEOUT_S)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
    return "nothing"


def during(gang: Gang, folder: Path, function: Any, happens: Any) -> list[Any]:
    """What processes answer to whom something happens in the middle of the second step."""
    gang._send(function, (folder,), {})
    deadline = time.monotonic() + LIMIT_S
    while not (folder / "here").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    happens()
    (folder / "go").touch()
    found = []
    for pipe in gang.pipes:
        assert pipe.poll(LIMIT_S)
        ok, answer = pipe.recv()
        assert ok, answer
        found.append(answer)
    return found


@pytest.mark.slow
def test_a_cut_cable_is_named_on_both_ends_within_the_limit(two: Network, tmp_path: Path) -> None:
    gang = Gang(2, two.hosts)
    try:
        first, second = during(gang, tmp_path, refused, lambda: two.cut(two.hosts[1]))
    finally:
        gang.close()
    zero, one = "rank 0 (stage 0, replica 0, on host0)", "rank 1 (stage 1, replica 0, on host1)"
    silent = "which has not been heard of for"
    assert re.match(rf"PeerFailedError: {re.escape(zero)} has waited [67] s in 0B[01], in", first)
    assert f"for {one}, {silent}" in first
    assert "the network between is stopped or gone), and was in 1B1, in step() (call 2)" in first
    assert re.match(rf"PeerFailedError: {re.escape(one)} has waited [67] s in ", second)
    assert f"for {zero}, {silent}" in second
    for said in (first, second):
        assert f"longer than timeout_s={TIMEOUT_S:g}" in said


def interrupted(made: Network) -> None:
    made.cut(made.hosts[1])
    threading.Timer(SLOWER_S, made.mend, [made.hosts[1]]).start()


HAPPENS: dict[str, Callable[[Network], None]] = {
    "cut for some seconds": interrupted,
    "throttled": lambda made: made.throttle(made.hosts[1], 100_000),
    "delayed": lambda made: made.delay(made.hosts[1], 0.2),
}
SLOWER_S = 2.0


@pytest.mark.slow
@pytest.mark.parametrize("what", HAPPENS)
def test_a_bad_cable_only_slows_the_step(two: Network, tmp_path: Path, what: str) -> None:
    expected, _ = trained(3)
    gang = Gang(2, two.hosts)
    try:
        answers = during(gang, tmp_path, held_up, lambda: HAPPENS[what](two))
    finally:
        gang.close()
    assert [losses for losses, _ in answers] == [expected] * 2
    slower_s = {"cut for some seconds": SLOWER_S, "throttled": 0.5, "delayed": 0.8}[what]
    assert max(seconds for _, seconds in answers) > slower_s


def test_who_has_never_been_heard_of_was_nowhere() -> None:
    peer = peers.Peer(1, "host1", heard=0.0)
    assert peer.state().endswith("(it, its machine or the network between is stopped or gone)")
    peer.beat = json.loads(peers.beat_of(1, Doing(), 0.0))
    assert peer.state().endswith("before the first one when it was")


# -- which interface ------------------------------------------------------------------------------


def test_the_interface_is_the_one_by_which_all_meet() -> None:
    """The machine of MASTER_ADDR reaches itself by its loopback: what others call it counts."""
    keeper, same, far = (
        ("127.0.0.1", "127.0.0.1"),
        ("10.0.0.1", "10.0.0.1"),
        ("10.0.0.2", "10.0.0.1"),
    )
    assert interfaces.address_here(keeper, [keeper, keeper]) == "127.0.0.1"
    assert interfaces.address_here(keeper, [keeper, far]) == "10.0.0.1"
    assert interfaces.address_here(same, [same, far]) == "10.0.0.1"
    assert interfaces.address_here(far, [keeper, far]) == "10.0.0.2"
    assert interfaces.address_here(("", ""), [("", ""), ("", "")]) == ""


def test_an_interface_is_found_by_its_address() -> None:
    assert interfaces.interface_of(interfaces.way_to("localhost")[0]) == "lo"
    assert interfaces.interface_of("203.0.113.1") == ""
    assert interfaces.interface_of("") == interfaces.interface_of("::2") == ""
    assert interfaces.way_to("no-such-name.invalid") == ("", "")


def test_what_a_user_has_chosen_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setattr(interfaces, "_chosen", [])
    monkeypatch.setenv(interfaces.CHOICE, "eth7")
    interfaces.choose(dist.HashStore(), 0, 1)
    assert os.environ[interfaces.CHOICE] == "eth7"
    monkeypatch.delenv(interfaces.CHOICE)
    interfaces.choose(dist.HashStore(), 0, 1)
    assert os.environ[interfaces.CHOICE] == "lo"


# -- a store that does not answer -----------------------------------------------------------------


def test_a_store_that_does_not_answer_says_so_and_is_heard_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(quick_store, "ANSWER_S", 0.1)
    answers = threading.Event()

    class Slow:
        def check(self, keys: list[str]) -> bool:
            answers.wait()
            return keys == ["key"]

        def add(self, key: str, amount: int) -> int:
            raise KeyError(key)

    store = quick_store.QuickStore(cast(Any, Slow()))
    for _ in range(2):
        with pytest.raises(quick_store.StoreSilentError):
            store.check(["key"])
    answers.set()
    deadline = time.monotonic() + LIMIT_S
    while time.monotonic() < deadline:
        with contextlib.suppress(quick_store.StoreSilentError):
            assert store.check(["key"])
            break
    else:
        pytest.fail("it is not heard again")
    with pytest.raises(KeyError):
        store.add("key", 1)
