"""Which link two ranks have, what a step takes on it, and which ranks share a machine."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pipecompile.compiler.cli.rates import with_settings
from pipecompile.compiler.costs.hardware import H100, parse_device
from pipecompile.compiler.costs.topology import ORDERS, Numbering, Topology
from pipecompile.compiler.ir.errors import OptionError
from support.devices import MINE

SLOW = Topology(devices=2, bytes_per_s=1e9, latency_s=1e-3)
CLUSTER = replace(H100, topology=SLOW)


@given(st.integers(1, 6), st.integers(1, 6), st.sampled_from(ORDERS))
def test_every_rank_has_one_place(pp: int, dp: int, order: str) -> None:
    ranks = Numbering(pp, dp, order)
    for rank in range(pp * dp):
        assert ranks.rank_of(ranks.replica_of(rank), ranks.position_of(rank)) == rank
        assert rank in ranks.peers_of(ranks.position_of(rank))
    neighbours = range(pp) if order == "pipeline" else range(dp)
    of = ranks.replica_of if order == "pipeline" else ranks.position_of
    assert {of(rank) for rank in neighbours} == {0}


def test_what_shares_a_machine_has_its_link() -> None:
    within = (H100.link_bytes_per_s, H100.link_latency_s)
    pipeline = CLUSTER.with_ranks(Numbering(2, 2, "pipeline"))
    replicas = CLUSTER.with_ranks(Numbering(2, 2, "replicas"))
    assert pipeline.link(0, 1) == within
    assert replicas.link(0, 1) == (1e9, 1e-3)
    assert replicas.message_s(0, 1, 1e9) == pytest.approx(1 + 1e-3)
    assert pipeline.collective_s(4e9, 2, 3) == pytest.approx(2 + 3e-3)
    assert replicas.collective_s(4e9, 2) == H100.collective_s(4e9, 2)
    assert H100.with_ranks(Numbering(2, 2)) is H100


def test_a_pipeline_over_machines_pays_where_it_leaves_one() -> None:
    spread = CLUSTER.with_ranks(Numbering(4, 1))
    assert [spread.link(a, a + 1)[0] for a in range(3)] == [
        H100.link_bytes_per_s,
        1e9,
        H100.link_bytes_per_s,
    ]


def test_who_sends_at_once_shares_what_is_oversubscribed() -> None:
    four = replace(SLOW, devices=4, oversubscription=4.0)
    assert [four.shared(n) for n in (1, 2, 4)] == [1e9, 5e8, 2.5e8]
    device = replace(H100, topology=four)
    # four replicas of two stages: a machine of stage 0's, and one of stage 1's
    assert device.with_ranks(Numbering(2, 4, "replicas")).link(0, 1)[0] == 2.5e8
    # two replicas of four stages: a machine each, where nothing but the replicas leaves it
    alike = device.with_ranks(Numbering(4, 2, "pipeline"))
    assert alike.link(0, 1)[0] == H100.link_bytes_per_s
    assert alike.collective_s(1e9, 2) == pytest.approx(1e-3 + 0.5e9 / 2.5e8)


def test_machines_are_as_they_are_seen() -> None:
    seen = replace(SLOW, hosts=(0, 0, 0, 1))
    device = replace(H100, topology=seen).with_ranks(Numbering(4, 1))
    assert [device.link(a, a + 1)[0] == 1e9 for a in range(3)] == [False, False, True]


def test_a_file_may_describe_the_machines(tmp_path: Path) -> None:
    path = tmp_path / "device.json"

    def parsed(**topology: Any) -> Any:
        path.write_text(json.dumps(MINE | {"topology": topology}))
        return parse_device(path)

    full = {"devices": 8, "bytes_per_s": 2.5e10, "latency_s": 2e-5}
    assert parsed(**full).topology == Topology(8, 2.5e10, 2e-5)
    assert parsed(**full, oversubscription=2).topology.oversubscription == 2
    for wrong, said in (
        (full | {"devices": 0}, "topology.devices=0 must be an int of 1 or more"),
        (full | {"latency_s": -1}, "topology.latency_s=-1 must be a number of 0 or more"),
        (full | {"oversubscription": 0.5}, "oversubscription=0.5 must be a number of 1 or more"),
        (full | {"bytes_per_s": "fast"}, "bytes_per_s='fast' must be a number above 0"),
        (full | {"hosts": [0]}, "topology must be an object with devices, bytes_per_s, latency_s"),
        ({"devices": 8}, "field 'bytes_per_s' of the topology is missing"),
    ):
        with pytest.raises(OptionError, match=said):
            parsed(**wrong)


def test_flags_may_describe_the_machines() -> None:
    flags = ["machine.devices=8", "machine.bytes_per_s=25GB/s", "machine.oversubscription=2"]
    made = with_settings(H100, flags)
    assert made.topology == Topology(8, 25e9, H100.link_latency_s, 2.0)
    with pytest.raises(OptionError, match="say how many devices a machine has"):
        with_settings(H100, ["machine.bytes_per_s=1e9"])
    with pytest.raises(OptionError, match=r"devices=1\.5 must be an int"):
        with_settings(H100, ["machine.devices=1.5"])
