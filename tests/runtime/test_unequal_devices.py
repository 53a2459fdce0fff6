"""Devices of several kinds at hand: each is measured, and its stages have its seconds."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest import mock

import pipecompile
import pytest
import torch
from pipecompile.compiler.costs.cluster import BOTH, cluster_of, kinds_at
from pipecompile.compiler.costs.hardware import CPU, H100, L4
from pipecompile.compiler.costs.topology import Numbering
from pipecompile.compiler.driver import closing
from pipecompile.compiler.ir.program import Program
from pipecompile.compiler.planning.team import Alone, medians, worst
from pipecompile.compiler.profiling.profile import Profiler
from pipecompile.runtime.exchange import devices
from support.gang import Gang
from torch import nn

PRODUCT_S, STEP_S, SLOWER = 1e-2, 2e-2, 3
FAST, SLOW = "cpu with fast CPU", "cpu with slow CPU"
LAYERS = 12


class Deep(nn.Module):
    """Layers that are alike."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(LAYERS))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x).tanh()
        return x.square().mean()


@dataclass(frozen=True)
class Seen:
    """What a rank knows after two steps.

    Attributes:
        kinds: of the ranks of a replica; empty where all devices are alike.
        products: of each stage.
        forward_s: of each stage, per product.
        closing_s: of each stage's rank.
        plan: a digest of it.
    """

    kinds: tuple[str, ...]
    products: tuple[int, ...]
    forward_s: tuple[float, ...]
    closing_s: tuple[float, ...]
    plan: str
    losses: tuple[str, ...]
    notes: dict[str, str]


def trained(n_stages: int, dp: int, slow: Sequence[int] = ()) -> Seen:
    """By this process, whose clock is three times as slow on some ranks."""
    rank = int(os.environ.get("RANK", 0))
    factor = SLOWER if rank in slow else 1

    def timed(_: Profiler, program: Program, arguments: list[Any]) -> tuple[float, Any]:
        names = [str(node.target) for node in program.module.graph.nodes]
        count = sum("mm" in name for name in names)
        return factor * PRODUCT_S * count, program.module.forward(arguments)

    name = "slow CPU" if rank in slow else "fast CPU"
    with (
        mock.patch.object(devices, "device_name", return_value=name),
        mock.patch.object(Profiler, "_time", timed),
        mock.patch.object(closing, "optimizer_seconds", return_value=factor * STEP_S),
    ):
        pipe = pipecompile.compile(
            Deep(),
            n_stages,
            dp,
            microbatches=8,
            costs="profile",
            optimizer=partial(torch.optim.SGD, lr=0.1),
        )
        x = torch.randn(32, 16, generator=torch.Generator().manual_seed(1))
        shares = x.chunk(pipe.data_shards)
        losses = [float(pipe.step(shares[pipe.data_shard])) for _ in range(2)]
    plan = pipe.plan
    counts = Counter[int]()
    for s, (forward, _, _) in plan.decision.stages_and_seconds:
        counts[s] += forward > 0
    return Seen(
        plan.decision.devices,
        tuple(counts[s] for s in range(n_stages)),
        tuple(each.forward_s / counts[s] for s, each in enumerate(plan.stages)),
        tuple(each.closing_s for each in plan.stages),
        hashlib.sha256(plan.to_json().encode()).hexdigest(),
        tuple(each.hex() for each in losses),
        dict(plan.notes),
    )


@pytest.fixture(scope="module")
def alone() -> Seen:
    return trained(1, 1)


def test_each_stage_has_the_seconds_of_its_device(gang: Callable[[int], Gang], alone: Seen) -> None:
    """The slow rank gets a quarter of the layers, and the bits stay those of one device."""
    alike, *others = gang(2).run(trained, 2, 1)
    assert others == [alike]
    assert (alike.kinds, alike.products) == ((), (6, 6))
    assert alike.forward_s == pytest.approx((PRODUCT_S, PRODUCT_S))
    seen, *others = gang(2).run(trained, 2, 1, (1,))
    assert others == [seen]
    assert (seen.kinds, seen.products) == ((FAST, SLOW), (9, 3))
    assert seen.forward_s == pytest.approx((PRODUCT_S, SLOWER * PRODUCT_S))
    told_s, told_too_s = seen.closing_s[0] - STEP_S, seen.closing_s[1] - SLOWER * STEP_S
    assert 0 < told_s < STEP_S  # what ranks tell each other counts too, and is really measured
    assert told_too_s == pytest.approx(told_s)
    assert seen.notes["devices"] == f"ranks on 1 × {FAST}, 1 × {SLOW}"
    assert seen.losses == alike.losses == alone.losses


@pytest.mark.slow
@pytest.mark.parametrize(
    ("slow", "kinds", "products"),
    [
        ((2, 3), (f"{FAST}{BOTH}{SLOW}",) * 2, (6, 6)),  # a replica
        ((1, 3), (FAST, SLOW), (9, 3)),  # a stage
        ((3,), (FAST, f"{FAST}{BOTH}{SLOW}"), (9, 3)),  # waits for its slow replica
    ],
)
def test_replicas_of_several_kinds_are_as_slow_as_the_slowest(
    gang: Callable[[int], Gang],
    slow: tuple[int, ...],
    kinds: tuple[str, ...],
    products: tuple[int, ...],
) -> None:
    seen, *others = gang(4).run(trained, 2, 2, slow)
    assert [each.plan for each in others] == [seen.plan] * 3
    assert (seen.kinds, seen.products) == (kinds, products)
    factors = [SLOWER if SLOW in kind else 1 for kind in kinds]
    assert seen.forward_s == pytest.approx([factor * PRODUCT_S for factor in factors])


# -- in one process -------------------------------------------------------------------------------


def test_devices_of_one_kind_are_no_cluster() -> None:
    smaller = H100.memory_bytes // 2
    found = cluster_of([H100, H100, type(H100)(**vars(H100) | {"memory_bytes": smaller})])
    assert found.cluster is None
    assert found.memory_bytes == smaller


def test_ranks_whose_replicas_differ_have_the_slower_figures() -> None:
    whole = cluster_of([H100, L4, H100, H100])
    spec = whole.with_ranks(Numbering(2, 2))
    assert spec.order == ("h100", f"h100{BOTH}l4")
    assert [kinds_at(spec, rank) for rank in range(2)] == [("h100",), ("h100", "l4")]
    both = spec.at(1)
    assert both.memory_bytes == L4.memory_bytes
    assert both.bytes_per_s == L4.bytes_per_s
    assert both.peak("bfloat16") == L4.peak("bfloat16")
    assert both.peak("float64") == L4.peak("float64")
    assert spec.along(spec.order).order == spec.order
    assert whole.with_ranks(Numbering(4, 1)).order == ("h100", "l4", "h100", "h100")
    assert kinds_at(CPU, 0) == ("",)


def test_one_process_measures_every_kind_that_it_has() -> None:
    """Of several seconds of a stage the most counts, of ranks of a kind the median."""
    told = {"a": {0: (1.0, 2.0, 1.0)}, "b": {0: (3.0, 1.0, 0.0), 1: (4.0, 4.0, 2.0)}}
    assert Alone().pool_stages(told) == {0: (3.0, 2.0, 1.0), 1: (4.0, 4.0, 2.0)}
    several = [{"a": {0: (n, 10.0 * n, n)}} for n in (1.0, 2.0, 9.0)]
    assert medians(several) == {0: (2.0, 20.0, 2.0)}
    assert worst({"a": [1.0, 5.0], "b": [2.0, 3.0]}, ("a", "b")) == [2.0, 5.0]
