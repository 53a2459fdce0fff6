"""What is kept whole over a step fits, and shortens the step."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pipecompile.compiler.costs.hardware import CPU, Device
from pipecompile.compiler.ir.zero import NOTHING, Kept
from pipecompile.compiler.planning import keeping
from pipecompile.compiler.planning.keeping import Keepable, Trial, fill
from support import jobs, models
from support.matrix import quickly

# -- with numbers that are made up ----------------------------------------------------------------


@dataclass(frozen=True)
class Rank:
    """One stage, and a layer per entry.

    Attributes:
        compute_s: of a program, beside which it exchanges what is not kept.
        layers: bytes of each; of parameters and of gradients.
    """

    compute_s: float
    layers: tuple[int, ...]
    room: int

    def offered(self, rank: int, m: int) -> list[Keepable]:
        found = [
            Keepable((f"{rank}.{i}",), grads, m * (1 if grads else 2), size)
            for i, size in enumerate(self.layers)
            for grads in (False, True)
        ]
        return sorted((x for x in found if x.times > 1), key=lambda x: (-x.times, x.nbytes))

    def sizes(self, kept: Kept) -> tuple[int, int]:
        """Of what is kept, parameters and gradients."""
        return tuple(
            sum(self.layers[int(name.split(".")[1])] for name in names)
            for names in (kept.params, kept.grads)
        )

    def seconds(self, kept: Kept, m: int) -> float:
        """A forward gathers, a backward gathers and scatters; a second per byte."""
        params, grads = self.sizes(kept)
        whole = sum(self.layers)
        forward = max(self.compute_s, whole - params)
        backward = max(self.compute_s, 2 * whole - params - grads)
        last = max(self.compute_s, 2 * whole - params)
        return m * forward + (m - 1) * backward + last + params


@st.composite
def ranks(draw: st.DrawFn) -> tuple[list[Rank], int]:
    sizes = st.lists(st.integers(1, 8), min_size=1, max_size=6).map(tuple)
    one = st.builds(Rank, st.floats(0.0, 60.0), sizes, st.integers(0, 100))
    return draw(st.lists(one, min_size=1, max_size=3)), draw(st.integers(1, 3))


def chosen(case: Sequence[Rank], m: int) -> tuple[tuple[Kept, ...], list[Any]]:
    """What is kept, and all that was asked for."""
    asked: list[Any] = []

    def of(kept: Sequence[Kept]) -> list[Kept]:
        asked.append(tuple(kept))
        return list(kept) or [NOTHING] * len(case)

    def stages_s(kept: Sequence[Kept]) -> list[float]:
        return [rank.seconds(each, m) for rank, each in zip(case, of(kept), strict=True)]

    def peaks(kept: Sequence[Kept]) -> list[float]:
        return [sum(rank.sizes(each)) for rank, each in zip(case, of(kept), strict=True)]

    trial = Trial(peaks, stages_s, lambda kept: max(stages_s(kept)))
    mates = [(rank,) for rank in range(len(case))]
    program: Any = case

    def offered(_: Any, stages: Sequence[int], *__: Any) -> list[Keepable]:
        return case[stages[0]].offered(stages[0], m)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(keeping, "keepable", offered)
        of_all: Any = None
        kept = fill(program, of_all, mates, len, trial, [rank.room for rank in case])
    return kept, asked


@settings(max_examples=300)
@given(ranks())
def test_what_is_kept_fits_and_shortens_the_step(case: tuple[list[Rank], int]) -> None:
    """It is as short as the best that keeps the first so many of each rank."""
    all_, m = case
    kept, asked = chosen(all_, m)
    assert len(asked) <= 60
    plain = max(rank.seconds(NOTHING, m) for rank in all_)
    if not kept:
        kept = (NOTHING,) * len(all_)
    step = max(rank.seconds(each, m) for rank, each in zip(all_, kept, strict=True))
    assert step < plain or all(each == NOTHING for each in kept)
    best = 0.0
    for number, (rank, each) in enumerate(zip(all_, kept, strict=True)):
        assert sum(rank.sizes(each)) <= rank.room
        prefixes = [[]] + [
            list(part) for part in itertools.accumulate([x] for x in rank.offered(number, m))
        ]
        found = [
            Kept(
                tuple(n for x in part if not x.gradients for n in x.names),
                tuple(n for x in part if x.gradients for n in x.names),
            )
            for part in prefixes
        ]
        fits = [each for each in found if sum(rank.sizes(each)) <= rank.room]
        best = max(best, min(rank.seconds(each, m) for each in fits))
    assert step <= best * (1 + 2 * keeping.LEAST_GAIN)


def test_nothing_is_kept_that_computing_hides() -> None:
    kept, asked = chosen([Rank(100.0, (1, 2, 3), 1000)], 4)
    assert kept == ()
    assert len(asked) <= 8


def test_a_rank_for_which_nobody_waits_keeps_nothing() -> None:
    slow, fast = Rank(0.0, (8, 8), 1000), Rank(0.0, (1,), 1000)
    kept, _ = chosen([slow, fast], 4)
    assert kept[0].params == ("0.0", "0.1")
    assert kept[1] == NOTHING


@pytest.mark.parametrize("room", [0, 3, 1000])
def test_a_rank_keeps_the_most_that_fits(monkeypatch: pytest.MonkeyPatch, room: int) -> None:
    """Where all of it helps: each rank its own, in the order given, and few peaks are asked for."""
    offered = [Keepable((f"h.{i}.w",), i % 2 == 1, 9 - i, 1) for i in range(6)]
    monkeypatch.setattr(keeping, "keepable", lambda *_: offered)
    asked = []

    def counts(kept: Sequence[Kept]) -> list[int]:
        return [len(each.params) + len(each.grads) for each in kept or [NOTHING, NOTHING]]

    def peaks(kept: Sequence[Kept]) -> list[float]:
        asked.append(kept)
        first, second = counts(kept)
        return [10 + first, 10 + 2 * second]

    def stages_s(kept: Sequence[Kept]) -> list[float]:
        return [100.0 - count for count in counts(kept)]

    of: Any = None
    trial = Trial(peaks, stages_s, lambda kept: sum(stages_s(kept)))
    kept = fill(of, of, [(0,), (1,)], len, trial, [10 + room] * 2)
    assert counts(kept) == [min(room, 6), min(room // 2, 6)]
    assert len(asked) <= 4
    if room == 3:
        assert kept[0] == Kept(("h.0.w", "h.2.w"), ("h.1.w",))


# -- with real plans ------------------------------------------------------------------------------

BATCH = 16
HIDDEN = CPU
SENDING = replace(CPU, send_share=1.0)
SLOW = CPU.with_link(1e8, 1e-4)


def planned(zero: int, device: Device, keep: str, memory: str, **options: Any) -> Any:
    batch = models.batches("gpt2", BATCH, 1)[0]
    given = {"zero": zero, "zero_keep": keep, "memory": memory, "remat": "none"}
    of = given | {"hardware": device, "example_batch": batch} | options
    n_stages = of.pop("n_stages", 2)
    return jobs.pipeline("gpt2", n_stages, 2, 4, **of).plan


@functools.cache
def least(zero: int, n_stages: int) -> int:
    plan = planned(zero, CPU, "nothing", "1GiB", n_stages=n_stages)
    return int(max(stage.memory.peak for stage in plan.stages))


DEVICES = {"hidden": HIDDEN, "sending": SENDING, "slow": SLOW}


@pytest.mark.parametrize(
    ("device", "n_stages", "zero"),
    quickly(
        [("hidden", 1, 3), ("sending", 2, 2), ("slow", 1, 3)],
        itertools.product(DEVICES, [1, 2], [2, 3]),
    ),
)
def test_no_plan_is_longer_for_what_it_keeps(device: str, zero: int, n_stages: int) -> None:
    """With room for nothing, for some and for everything; more room is no loss."""
    one = least(zero, n_stages)
    last = None
    for room in (1.0, 1.1, 1.3, 4.0):
        memory = f"{int(room * one)}B"
        kept, none = (
            planned(zero, DEVICES[device], keep, memory, n_stages=n_stages)
            for keep in ("auto", "nothing")
        )
        assert kept.step_s <= none.step_s
        assert all(stage.memory.peak <= int(room * one) for stage in kept.stages)
        assert last is None or kept.step_s <= last * 1.001
        last = kept.step_s
        if kept.decision.kept:
            assert kept.step_s < none.step_s
    assert bool(kept.decision.kept) == (device != "hidden")
