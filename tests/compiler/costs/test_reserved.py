"""What a device takes for itself: of a CPU nothing, of a GPU by the communicators that it opens."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pipecompile.compiler.capture.batch import flatten
from pipecompile.compiler.capture.skeleton import skeleton_of
from pipecompile.compiler.costs.hardware import CPU, DEVICES, H100, L4, Device, parse_device
from pipecompile.compiler.costs.reserved import NOTHING, Reserved
from pipecompile.compiler.costs.topology import Numbering, Placed, Topology
from pipecompile.compiler.driver.builder import Builder
from pipecompile.compiler.driver.compiled import Compiled, main_mode
from pipecompile.compiler.driver.work import Settings
from pipecompile.compiler.ir.errors import MemoryBudgetError, OptionError
from pipecompile.compiler.options.microbatches import divide
from pipecompile.compiler.options.options import CompileOptions
from pipecompile.compiler.planning.target import Target
from pipecompile.runtime.transport import processes
from support import models

HOST, GIB = torch.device("cpu"), 2**30
ROUND = Reserved(context=1000, workspaces=100, link=10, group=5, peer=1)


def built(
    device: Device, n_stages: int = 3, dp: int = 1, whole: bool = True, **more: object
) -> Compiled:
    given: dict[str, object] = {"n_stages": n_stages, "dp": dp, "microbatches": 3} | more
    options = CompileOptions(**given)  # type: ignore[arg-type]
    _, spec = flatten(models.batches("gpt2", 3 * dp, 1)[0])
    piece, microbatches = divide(spec, options, dp)
    budget = device.memory_bytes if whole else options.memory_bytes or float("inf")
    target = Target(HOST, device, budget, whole=whole)
    builder = Builder(skeleton_of(models.build("gpt2"), HOST), options, target)
    return builder.build(main_mode(options), piece, microbatches)


def taken(made: Compiled) -> list[int]:
    return [stage.memory.device for stage in made.plan.stages]


def test_a_rank_pays_for_each_communicator_that_it_is_an_end_of() -> None:
    """Two for each neighbour; one more where the tied embedding's gradient goes from the last stage
    to the first, and its weight back."""
    device = replace(H100, reserved=ROUND)
    made = built(device)
    routes = made.program.routes
    assert {(0, 1), (1, 2), (2, 1), (1, 0)} < routes
    ends = Counter(end for ends in routes for end in ends)
    assert taken(made) == [1100 + 10 * ends[s] for s in range(3)]
    several = built(device, dp=2)
    assert taken(several) == [size + 5 + 1 for size in taken(made)]
    note = dict(several.plan.notes)["device memory"]
    assert "1,000 bytes CUDA context" in note
    assert "6 bytes 1 for 2 replicas" in note


def test_the_transport_opens_what_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """On CUDA, whose groups are only counted here."""
    made = built(replace(H100, reserved=ROUND))
    opened: list[list[int]] = []

    def counted(ranks: list[int]) -> None:
        opened.append(ranks)

    class Mesh:
        dp, rank = 1, 7  # no end of any

        @staticmethod
        def rank_of(replica: int, stage: int) -> int:
            return stage

    monkeypatch.setattr(processes, "new_group", counted)
    transport = object.__new__(processes.Processes)
    transport.device, transport.mesh = torch.device("cuda"), Mesh()  # type: ignore[assignment]
    transport.links, transport.abandoned = {}, False
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *size, device: zeros(*size))
    transport.open(made.program.routes)
    ends = Counter(end for ranks in opened for end in ranks)
    assert taken(made) == [1100 + 10 * ends[s] for s in range(3)]


def test_replicas_of_a_machine_are_counted_where_machines_are_known() -> None:
    seen = Topology(devices=4, bytes_per_s=1e9, latency_s=0.0)
    assert Placed(seen, Numbering(1, 8)).beside(0) == 3
    assert Placed(seen, Numbering(2, 4)).beside(1) == 1
    assert Placed(seen, Numbering(2, 4, "replicas")).beside(1) == 3
    placed = replace(H100, reserved=ROUND, topology=seen)
    assert taken(built(placed, 1, dp=8)) == [1100 + 5 + 3]
    assert taken(built(replace(H100, reserved=ROUND), 1, dp=16)) == [1100 + 5 + 7]


def test_it_counts_against_what_the_device_has_and_nothing_else() -> None:
    peak = max(stage.memory.peak for stage in built(H100, whole=False).plan.stages)
    large = Reserved(context=peak // 4)
    fits = replace(H100, reserved=large, memory_bytes=peak + peak // 4)
    assert max(stage.memory.needed for stage in built(fits).plan.stages) == fits.memory_bytes
    least = replace(fits, memory_bytes=peak // 2)
    with pytest.raises(MemoryBudgetError, match="what its device takes for itself"):
        built(least)
    given = built(fits, whole=False, memory=f"{peak}B").plan
    assert taken_of(given.stages) == [0, 0, 0]
    assert not given.by_device


def taken_of(stages: object) -> list[int]:
    return [stage.memory.device for stage in stages]  # type: ignore[attr-defined]


def test_cpus_take_nothing_and_gpus_some() -> None:
    assert CPU.reserved == NOTHING
    assert taken(built(CPU)) == [0, 0, 0]
    assert "device memory" not in dict(built(CPU).plan.notes)
    for name, device in DEVICES.items():
        if name != "cpu":
            least = sum(dict(device.reserved.parts(links=4, replicas=8, beside=7)).values())
            alone = sum(dict(device.reserved.parts(0, 1, 0)).values())
            assert 0.4 * GIB < alone < 1 * GIB < 6 * GIB
            assert least < 0.2 * device.memory_bytes
    assert L4.memory_bytes < 24e9 * 1.0
    assert H100.memory_bytes > 80e9


def test_settings_without_a_budget_of_the_device_take_nothing() -> None:
    options = CompileOptions(n_stages=1)
    settings = object.__new__(Settings)
    object.__setattr__(settings, "options", options)
    object.__setattr__(settings, "rates", H100)
    object.__setattr__(settings, "whole", False)
    assert settings.taken(None, 0) == []  # type: ignore[arg-type]


def test_a_file_may_say_what_is_taken(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    known = dataclasses.asdict(L4)
    path.write_text(json.dumps(known))
    assert parse_device(path).reserved == L4.reserved
    del known["reserved"]
    path.write_text(json.dumps(known))
    assert parse_device(path).reserved == NOTHING
    path.write_text(json.dumps(known | {"reserved": {"context": 5}}))
    assert parse_device(path).reserved == Reserved(context=5)
    for wrong, said in (
        ({"contexts": 1}, "reserved must be an object with context, workspaces, link, group, peer"),
        ({"context": -1}, r"reserved\.context=-1 must be a number of 0 or more"),
        (3, "reserved must be an object"),
    ):
        path.write_text(json.dumps(known | {"reserved": wrong}))
        with pytest.raises(OptionError, match=said):
            parse_device(path)
