"""Replicas that own whole parameters: optimizers that need these train as on one device."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import pipecompile
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pipecompile.compiler.ir.errors import OptionError, PlanError
from pipecompile.compiler.ir.shards import item_of, owners_of, parcels_of, rows_of
from support import jobs, measured, models, optimizers, plain
from support.gang import Gang
from support.matrix import quickly
from support.zero import LEVELS, accumulate, assert_equal, compiled, save, small_parcels
from torch import nn

KINDS: dict[str, Any] = {
    "muon": optimizers.Muon,
    "factored": optimizers.Factored,
    "shampoo": optimizers.Shampoo,
    "adafactor": partial(torch.optim.Adafactor, lr=0.02),
    "groups": lambda named: both(named),
    "adamw": jobs.OPTIMIZERS["adamw"],
}


def both(named: Any) -> torch.optim.Optimizer:
    """Matrices of the layers in one group, the rest in another."""
    named = list(named)
    hidden = [p for n, p in named if p.dim() == 2 and "layers." in n]
    rest = [p for n, p in named if p.dim() != 2 or "layers." not in n]
    return optimizers.Muon([{"params": hidden}, {"params": rest, "lr": 0.01}])


STEPS = 4


@small_parcels()
def train(name: str, n_stages: int, dp: int, kind: str, zero: int, **options: Any) -> plain.Trained:
    pipe = jobs.pipeline(name, n_stages, dp, 2, optimizer=KINDS[kind], zero=zero, **options)
    return plain.train_pipeline(pipe, models.batches(name, 4 * dp, STEPS))


@cache
def oracle(name: str, dp: int, kind: str, dtype: torch.dtype | None = None) -> plain.Trained:
    model = models.build(name)
    named = list(model.named_parameters())
    batches = models.batches(name, 4 * dp, STEPS)
    return plain.train(model, batches, lambda _: KINDS[kind](named), dp, 2, dtype=dtype)


# -- numbers --------------------------------------------------------------------------------------

QUICK = [
    (("gpt2", 2, 2, "muon", 1), {}),
    (("gpt2", 2, 2, "shampoo", 3), {}),
]
FULL = [
    ((name, n_stages, dp, kind, zero), {"precision": precision})
    for name in ("gpt2", "llama")
    for n_stages, dp in ((1, 2), (1, 3), (2, 2), (3, 2))
    for kind in KINDS
    for precision in (None, "bf16")
    for zero in LEVELS
    if ((name, n_stages, dp, kind, zero), {"precision": precision}) not in QUICK
] + [
    (("gpt2", 2, 2, kind, zero), {"tied_grads": "per_step", "schedule": "zb_h1"})
    for kind in ("factored", "muon")
    for zero in LEVELS
]


@pytest.mark.parametrize(
    ("setting", "options"),
    quickly([(("gpt2", 1, 2, "muon", 1), {"precision": None})], QUICK + FULL),
    ids=str,
)
def test_processes_train_as_one(
    gang: Callable[[int], Gang], setting: Any, options: dict[str, Any]
) -> None:
    """Level 1 has the bits of plain PyTorch, its own norm and clipping too: the norms are of whole
    gradients. Above, as with rows, the replicas' mean is added up in another order."""
    name, n_stages, dp, kind, zero = setting
    options = options | {"zero_by": "matrices"}
    alone = train(*setting, **options)
    dtype = torch.bfloat16 if options.get("precision") == "bf16" else None
    expected = oracle(name, dp, kind, dtype)
    if zero == 1 and "tied_grads" not in options:
        assert_equal(alone, expected)
    else:
        assert torch.equal(alone.losses[0], expected.losses[0])
        assert torch.allclose(alone.norms[0], expected.norms[0], rtol=1e-2 if dtype else 1e-5)
    for found in gang(n_stages * dp).run(train, *setting, **options):
        assert_equal(found, alone)


class Odd(nn.Module):
    """Fewer matrices than replicas, a scalar, frozen weights, a transposed layout, and a large
    weight that rows would gather without parcels."""

    traced_once = True

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(6, 8)
        self.scale = nn.Parameter(torch.tensor(0.5))
        self.frozen = nn.Linear(8, 8)
        self.turned = nn.Parameter(torch.randn(8, 6).t())
        self.frozen.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.tanh(self.first(x)) * self.scale
        return (self.frozen(hidden) + x @ self.turned).square().mean()


@small_parcels(32)
def accumulated(dp: int, zero: int) -> tuple[dict[str, torch.Tensor], list[str]]:
    """What `accumulate` gives, and what this process's optimizer has."""
    pipe = pipecompile.compile(
        Odd(), 1, dp, microbatches=2, optimizer=optimizers.Muon, zero=zero, device="cpu"
    )
    torch.manual_seed(4)
    found = accumulate(pipe, [torch.randn(4 * dp, 6) for _ in range(4)])
    owned = [n for n, p in pipe.named_parameters() if p.requires_grad and p.numel()]
    return found, owned


@pytest.mark.parametrize(
    ("dp", "zero"), quickly([(2, 3)], [(d, z) for d in (2, 4) for z in LEVELS])
)
def test_odd_parameters_and_accumulation(gang: Callable[[int], Gang], dp: int, zero: int) -> None:
    alone, names = accumulated(dp, zero)
    found = gang(dp).run(accumulated, dp, zero)
    for values, _ in found:
        for name in alone:
            assert torch.equal(values[name], alone[name]), name
    owned = [owned for _, owned in found]
    assert sorted(n for each in owned for n in each if n != "scale") == sorted(
        set(names) - {"scale"}
    )
    assert all("scale" in each for each in owned)


# -- checkpoints ----------------------------------------------------------------------------------

Division = tuple[int, int, int, str]  # stages, replicas, level, how


def pipeline(kind: str, division: Division, precision: str | None) -> Any:
    n_stages, dp, zero, by = division
    options = {"optimizer": KINDS[kind], "zero": zero, "zero_by": by, "precision": precision}
    return compiled(n_stages, dp, **options)


def saved(folder: str, *setting: Any) -> dict[str, Any]:
    return save(pipeline(*setting), folder)


def resumed(folder: str, *setting: Any) -> tuple[Any, Any]:
    """Parameters as loaded, and this rank's states with the part of each that they are of."""
    pipe = pipeline(*setting)
    assert pipe.load(folder) == 2
    loaded, state = pipe.state_dict(), pipe._session.state
    states = {
        name: (
            state.mesh.replica_of(rank),
            state.owners.get(name),
            {
                k: v.clone()
                for k, v in pipe.optimizer.state[param].items()
                if isinstance(v, torch.Tensor)
            },
        )
        for name, (rank, param) in state.primary.items()
    }
    batch = models.batches("gpt2", 12, 3)[2]
    pipe.step(plain.cut(batch, pipe.data_shards)[pipe.data_shard])
    return loaded, states


ONE = (1, 1, 0, "auto")
MOVES: list[tuple[str, Division, str | None, list[Division]]] = [
    ("adamw", (1, 3, 3, "matrices"), "bf16", [(1, 2, 1, "rows")]),
    ("adamw", (1, 2, 2, "rows"), None, [(2, 2, 3, "matrices"), (1, 3, 1, "matrices")]),
    ("factored", (2, 2, 2, "auto"), None, [(1, 3, 3, "auto"), (2, 1, 0, "auto")]),
]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "first", "precision", "others"), MOVES, ids=str)
def test_checkpoints_open_under_any_division(
    gang: Callable[[int], Gang],
    tmp_path: Path,
    kind: str,
    first: Division,
    precision: str | None,
    others: list[Division],
) -> None:
    folder = str(tmp_path)
    kept = gang(first[0] * first[1]).run(saved, folder, kind, first, precision)[0]
    loaded, whole = resumed(folder, kind, ONE, precision)
    assert all(torch.equal(loaded[name], kept[name]) for name in kept)
    for division in others:
        size = division[0] * division[1]
        met: set[str] = set()
        for loaded, states in gang(size).run(resumed, folder, kind, division, precision):
            assert all(torch.equal(loaded[name], kept[name]) for name in kept)
            for name, (replica, owner, state) in states.items():
                met.add(name)
                for key, value in state.items():
                    expected = whole[name][2][key]
                    if division[2] and value.dim():
                        expected = rows_of(expected, division[1], replica, owner)
                    assert torch.equal(value, expected), (name, key)
        assert met == set(whole)


@small_parcels()
def interrupted(folder: str, *setting: Any) -> tuple[Any, Any]:
    """Four steps at once, and two, a checkpoint, and two."""
    ends = []
    for stops in (False, True):
        pipe = pipeline(*setting)
        for number, batch in enumerate(models.batches("gpt2", 12, 4)):
            if stops and number == 2:
                pipe.save(folder)
                pipe = pipeline(*setting)
                pipe.load(folder)
            pipe.step(plain.cut(batch, pipe.data_shards)[pipe.data_shard])
        ends.append(pipe.state_dict())
    return ends[0], ends[1]


@pytest.mark.slow
def test_a_resumed_run_has_the_bits_of_one_that_was_not(
    gang: Callable[[int], Gang], tmp_path: Path
) -> None:
    for through, again in gang(2).run(interrupted, str(tmp_path), "muon", (1, 2, 3, "auto"), None):
        assert plain.equal(through, again)


# -- memory ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("zero", "precision"),
    quickly([], [(z, p) for z in LEVELS for p in (None, "bf16")]),
)
def test_what_ranks_hold_is_what_the_plan_says(
    gang: Callable[[int], Gang], zero: int, precision: str | None
) -> None:
    """The plan is of the replica that holds most; and that is hardly more than its share."""
    options = {"zero": zero, "precision": precision, "zero_by": "matrices"}
    found = gang(2).run(measured.shares, "llama", 1, 2, microbatches=2, length=16, **options)
    for kind in ("weights", "copies", "grads", "states", "peak"):
        most = max(each[kind] for each in found)
        assert found[0][f"predicted {kind}"] == pytest.approx(most, rel=0.05), kind
    states = [each["states"] for each in found]
    assert max(states) < 0.52 * sum(states)


# -- owners ---------------------------------------------------------------------------------------

SIZES = st.lists(
    st.tuples(st.integers(1, 60), st.integers(0, 2), st.booleans()), min_size=1, max_size=9
)


@given(SIZES, st.integers(2, 5))
def test_owners_have_as_many_bytes(sizes: Any, dp: int) -> None:
    """None has more than an even share and the largest parameter; every stage on its own."""
    params = {f"h.{i}.w": torch.empty(n, requires_grad=True) for i, (n, _, _) in enumerate(sizes)}
    homes = {f"h.{i}.w": (s, 3) if tied else (s,) for i, (_, s, tied) in enumerate(sizes)}
    owners = owners_of(params, homes, dp)
    assert list(owners) == list(params)
    for stage in range(3):
        mine = [n for n in params if homes[n] == (stage,)]
        if all(len(homes[n]) == 1 for n in params) and mine:
            held = [sum(params[n].nbytes for n in mine if owners[n] == r) for r in range(dp)]
            assert max(held) <= sum(held) / dp + max(params[n].nbytes for n in mine)
    layer = {
        f"h.{i}.{k}": torch.empty(4, 4, requires_grad=True) for i in range(dp) for k in range(dp)
    }
    spread = owners_of(layer, dict.fromkeys(layer, (0,)), dp)
    assert all({spread[f"h.{i}.{k}"] for k in range(dp)} == set(range(dp)) for i in range(dp))


def test_what_is_frozen_or_a_number_has_no_owner() -> None:
    params = {"a": torch.empty(3, requires_grad=True), "b": torch.empty((), requires_grad=True)}
    assert owners_of(params | {"c": torch.empty(9)}, dict.fromkeys("abc", (0,)), 2) == {"a": 0}


SHAPES = st.lists(st.lists(st.integers(1, 9), max_size=3).map(tuple), min_size=1, max_size=8)


@given(SHAPES, st.integers(1, 5), st.integers(1, 400), st.integers(0, 99))
def test_parcels_have_every_row_once(shapes: Any, dp: int, limit: int, seed: int) -> None:
    owners = {str(i): (seed + i * i) % dp for i, shape in enumerate(shapes) if shape and i % 3 < 2}
    whole = {str(i): torch.zeros(shape) for i, shape in enumerate(shapes)}
    items = [item_of(name, tensor, owners) for name, tensor in whole.items()]
    with small_parcels(limit):
        parcels = parcels_of(items, dp)
    for parcel in parcels:
        for replica in range(dp):
            for item, at in zip(parcel.items, parcel.offsets[replica], strict=True):
                rows = item.rows(whole[item.name], dp, replica)
                rows += 1
                assert at + rows.numel() <= parcel.sizes[replica]
                mine = rows_of(whole[item.name], dp, replica, owners.get(item.name))
                assert item.own_rows(mine, dp, replica).shape == rows.shape
    for item in items:
        assert (whole[item.name] == (1 if item.shape else dp)).all()


# -- options --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_how_is_chosen_by_what_the_optimizer_needs() -> None:
    batch = models.batches("gpt2", 8, 1)[0]

    def plan(kind: str, **options: Any) -> Any:
        options = {"zero": 1, "optimizer": KINDS[kind], "example_batch": batch} | options
        return jobs.pipeline("gpt2", 1, 2, 2, **options).plan

    assert plan("adamw").options["zero_by"] == "rows"
    assert plan("adamw", zero=0).options["zero_by"] == "auto"
    assert plan("adamw", zero_by="matrices").options["zero_by"] == "matrices"
    assert plan("muon", optimizer=None).options["zero_by"] == "rows"  # it is not known yet
    whole = plan("muon")
    assert whole.options["zero_by"] == "matrices"
    assert "each replica owns whole parameters, as Muon needs them" in dict(whole.notes)["zero"]
    assert plan("muon", plan=whole).decision == whole.decision
    with pytest.raises(PlanError, match="zero_by=matrices, this run zero_by=rows"):
        plan("adamw", plan=whole)
    with pytest.raises(
        OptionError, match=r'zero_by="rows" .* Muon needs whole .*zero_by="matrices"'
    ):
        plan("muon", zero_by="rows")
    with pytest.raises(OptionError, match='zero_by="matrices" has no effect with zero=0'):
        plan("adamw", zero=0, zero_by="matrices")
    with pytest.raises(OptionError, match="use 'auto' or 'rows' or 'matrices'"):
        plan("adamw", zero_by="columns")
