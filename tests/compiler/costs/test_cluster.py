"""Devices of several kinds: who has which, over which link two of them talk."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import pipecompile
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pipecompile.compiler.cli.rates import with_settings
from pipecompile.compiler.costs.cluster import Cluster, parse_hardware
from pipecompile.compiler.costs.hardware import A100, CPU, H100, L4
from pipecompile.compiler.costs.topology import ORDERS, Numbering, Topology
from pipecompile.compiler.ir.errors import OptionError
from support.devices import MINE

MIXED = "a100:2,l4:2"
TWO_MACHINES = Topology(devices=2, bytes_per_s=1e9, latency_s=1e-3)


def test_one_name_says_how_many_of_what() -> None:
    whole = parse_hardware(MIXED)
    assert whole == Cluster((("a100", 2), (L4, 2))).whole == parse_hardware(whole)
    assert (whole.name, whole.memory_bytes, whole.order) == (MIXED, L4.memory_bytes, ())
    assert parse_hardware(whole.name) == whole
    assert pipecompile.Cluster is Cluster
    assert parse_hardware("a100") is A100
    assert whole.mean_peak("bfloat16") == (A100.peak("bfloat16") + L4.peak("bfloat16")) / 2
    assert H100.mean_peak("bfloat16") == H100.peak("bfloat16")


def test_every_replica_has_as_many_of_each_kind() -> None:
    seated = parse_hardware("a100:4,l4:4").with_ranks(Numbering(4, 2))
    assert seated.order == ("a100", "a100", "l4", "l4")
    assert [seated.at(rank).bytes_per_s for rank in (0, 3)] == [A100.bytes_per_s, L4.bytes_per_s]
    other = seated.along(("l4", "a100", "a100", "l4"))
    assert other.order == ("l4", "a100", "a100", "l4")
    assert other.along(()) is other
    assert H100.at(3) is H100
    assert H100.along(("h100",)) is H100
    assert parse_hardware("l4:8").with_ranks(Numbering(4, 2)).order == ("l4",) * 4


@given(st.lists(st.integers(1, 3), min_size=1, max_size=3), st.integers(1, 2), st.data())
def test_orders_are_all_there_are_the_evenest_first(
    counts: list[int], dp: int, data: st.DataObject
) -> None:
    names = ["a100", "l4", "h100"][: len(counts)]
    cluster = Cluster(tuple((name, n * dp) for name, n in zip(names, counts, strict=True)))
    numbering = Numbering(sum(counts), dp, data.draw(st.sampled_from(ORDERS)))
    orders = list(cluster.orders(numbering))
    wanted = Counter(dict(zip(names, counts, strict=True)))
    assert all(Counter(order) == wanted for order in orders)
    assert len(set(orders)) == len(orders)
    ways, left = 1, sum(counts)
    for n in counts:  # multinomial
        for i in range(n):
            ways = ways * (left - i) // (i + 1)
        left -= n
    assert len(orders) == ways
    runs = [len(list(groupby(order))) for order in orders]
    assert runs == sorted(runs)


def test_many_devices_are_not_all_ordered_to_know_the_first() -> None:
    cluster = Cluster((("a100", 64), ("l4", 64), ("h100", 64)))
    first = list(islice(cluster.orders(Numbering(192, 1)), 50))
    assert len(set(first)) == 50


def test_a_link_within_a_machine_is_that_of_the_slower_device() -> None:
    seated = parse_hardware(MIXED).with_ranks(Numbering(4, 1))
    ends = [seated.link(a, a + 1) for a in range(3)]
    fast, slow = ((each.link_bytes_per_s, each.link_latency_s) for each in (A100, L4))
    assert ends == [fast, slow, slow]
    assert seated.link(2, 1) == slow


@pytest.mark.parametrize(
    ("numbering", "order", "hosts"),
    [
        (Numbering(4, 1), ("a100", "a100", "l4", "l4"), (0, 0, 1, 1)),
        (Numbering(4, 1), ("l4", "a100", "l4", "a100"), (1, 0, 1, 0)),
        (Numbering(2, 2), ("l4", "a100"), (1, 0, 1, 0)),
        (Numbering(2, 2, "replicas"), ("a100", "l4"), (0, 0, 1, 1)),
    ],
)
def test_ranks_are_in_the_machines_that_have_their_devices(
    numbering: Numbering, order: tuple[str, ...], hosts: tuple[int, ...]
) -> None:
    whole = Cluster((("a100", 2), ("l4", 2)), TWO_MACHINES).whole
    seated = whole.with_ranks(numbering).along(order)
    assert seated.topology is not None
    assert seated.topology.hosts == hosts
    for a in range(numbering.pp - 1):
        far = hosts[numbering.rank_of(0, a)] != hosts[numbering.rank_of(0, a + 1)]
        assert (seated.link(a, a + 1) == (1e9, 1e-3)) == far
    assert seated.at(0).placed == seated.placed


def test_processes_have_the_devices_that_they_are_on() -> None:
    def seated(devices: str, *numbering: Any) -> tuple[str, ...]:
        cluster = parse_hardware(devices).cluster
        assert cluster is not None
        return cluster.as_they_are().with_ranks(Numbering(*numbering)).order

    assert seated("l4:1,a100:2,l4:1", 4, 1) == ("l4", "a100", "a100", "l4")
    assert seated("l4:1,a100:1,l4:1,a100:1", 2, 2) == ("l4", "a100")
    assert seated(MIXED, 2, 2, "replicas") == ("a100", "l4")
    with pytest.raises(OptionError, match=r"order a100, a100 in one replica and l4, l4 in another"):
        seated(MIXED, 2, 2)
    made = Cluster((("a100", 1), ("l4", 1))).as_they_are().with_ranks(Numbering(2, 1))
    with pytest.raises(OptionError, match=r"the plan has l4, a100 .* a100, l4: make a new plan"):
        made.along(("l4", "a100"))


def test_a_file_may_describe_a_cluster(tmp_path: Path) -> None:
    path = tmp_path / "cluster.json"
    topology = {"devices": 2, "bytes_per_s": 1e9, "latency_s": 1e-3}

    def parsed(*devices: tuple[Any, Any], **more: Any) -> Cluster:
        rows = [{"device": device, "count": count} for device, count in devices]
        path.write_text(json.dumps({"devices": rows, "topology": topology} | more))
        found = parse_hardware(path).cluster
        assert isinstance(found, Cluster)
        assert parse_hardware(str(path)).cluster == found
        return found

    assert parsed(("a100", 2), ("l4", 2)) == Cluster((("a100", 2), ("l4", 2)), TWO_MACHINES)
    assert parsed((MINE, 4)).name == "mine:4"
    assert parsed(("a100", 1), topology=None).topology is None
    for wrong, more, said in (
        ((("a10", 2),), {}, "unknown device 'a10': did you mean 'a100'"),
        ((("a100", 0),), {}, "a100: 0 devices: give an int of 1 or more"),
        ((("a100", 2.5),), {}, "a100: 2.5 devices"),
        (((MINE | {"launch": 1}, 1),), {}, r"cluster\.json, device 0: unknown field 'launch'"),
        (((3, 1),), {}, "device 0: give a name, the path of a JSON file, or an object"),
        ((), {}, "needs at least one kind of device"),
        ((("a100", 1),), {"machines": 3}, "unknown field 'machines': known are devices, topology"),
        ((("a100", 1),), {"devices": 3}, "devices must be a list of"),
        ((("a100", 1),), {"topology": {"devices": 0}}, "'bytes_per_s' of the topology is missing"),
    ):
        with pytest.raises(OptionError, match=said):
            parsed(*wrong, **more)


@pytest.mark.parametrize(
    ("devices", "numbering", "said"),
    [
        ("a100:4,l4:4", (4, 1), r"has 8 devices, and n_stages=4 × dp=1 are 4 ranks"),
        ("a100:3,l4:1", (2, 2), r"dp=2 does not divide 3 × a100: use another number of replicas"),
    ],
)
def test_what_contradicts_the_number_of_ranks_is_refused(
    devices: str, numbering: tuple[int, int], said: str
) -> None:
    with pytest.raises(OptionError, match=said):
        parse_hardware(devices).with_ranks(Numbering(*numbering))


def test_what_no_pipeline_has_is_refused() -> None:
    with pytest.raises(OptionError, match="traced for CPUs or for GPUs"):
        parse_hardware("cpu:1,a100:1")
    with pytest.raises(OptionError, match="two kinds of devices are called 'l4'"):
        Cluster(((L4, 1), (replace(L4, launch_s=1.0), 1)))
    with pytest.raises(OptionError, match="is a cluster, and no device of one"):
        Cluster(((parse_hardware(MIXED), 1),))
    assert parse_hardware("cpu:2").is_cpu
    assert CPU.is_cpu
    assert not parse_hardware(MIXED).is_cpu


def test_flags_change_the_machines_and_not_one_of_several_devices() -> None:
    flags = ["machine.devices=2", "machine.bytes_per_s=1e9", "machine.latency_s=1e-3"]
    whole = with_settings(parse_hardware(MIXED), flags)
    assert whole.topology == TWO_MACHINES
    assert whole.name == f"{MIXED} with {' '.join(flags)}"
    seated = whole.with_ranks(Numbering(4, 1))
    assert seated.name == whole.name
    assert seated.link(1, 2) == (1e9, 1e-3)
    with pytest.raises(OptionError, match=r"--set link\.bytes_per_s=1e9: which of a100:2,l4:2\?"):
        with_settings(parse_hardware(MIXED), ["link.bytes_per_s=1e9"])
