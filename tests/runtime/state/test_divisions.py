"""What replicas hold under ZeRO: rows, bytes, actions and checkpoints of every division."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pipecompile
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pipecompile.compiler.ir import zero as zeros
from pipecompile.compiler.ir.actions import Action, Kind, from_text, to_text
from pipecompile.compiler.ir.errors import OptionError, PlanError, VerificationError
from pipecompile.compiler.ir.shards import Item, parcels_of, row_range, rows_of
from pipecompile.compiler.ir.zero import layer_of
from pipecompile.passes.schedule.exchange import verify_exchange
from pipecompile.runtime.transport.doing import HERE
from support import jobs, measured, models, plain
from support.gang import Gang
from support.matrix import quickly
from support.zero import LEVELS, compiled, save, small_parcels
from torch import nn

# -- checkpoints ----------------------------------------------------------------------------------


def pipeline(n_stages: int, dp: int, zero: int, precision: str | None) -> Any:
    return compiled(n_stages, dp, zero=zero, precision=precision)


def saved(folder: str, *division: Any) -> dict[str, Any]:
    return save(pipeline(*division), folder)


def resumed(folder: str, *division: Any) -> tuple[Any, Any, Any]:
    """Parameters as loaded, this rank's states, and the loss of one more step."""
    pipe = pipeline(*division)
    assert pipe.load(folder) == 2
    loaded = pipe.state_dict()
    states = {
        name: (
            pipe._world.mesh.replica_of(rank),
            {key: value.clone() for key, value in pipe.optimizer.state[param].items()},
        )
        for name, (rank, param) in pipe._session.state.primary.items()
    }
    batch = models.batches("gpt2", 12, 3)[2]
    loss = pipe.step(plain.cut(batch, pipe.data_shards)[pipe.data_shard])
    return loaded, states, loss


DIVISIONS: list[tuple[int, int, int, str | None]] = [
    (1, 2, 1, None),
    (1, 3, 3, "bf16"),
    (2, 2, 2, "bf16"),
    (1, 4, 3, None),
]


SLOWLY = [
    pytest.param(first, [each for each in DIVISIONS if each != first], marks=pytest.mark.slow)
    for first in ((2, 1, 0, None), *DIVISIONS[:2])
]


@pytest.mark.parametrize(("first", "others"), SLOWLY, ids=str)
def test_checkpoints_open_under_any_division(
    gang: Callable[[int], Gang], tmp_path: Path, first: Any, others: Any
) -> None:
    folder = str(tmp_path)
    kept = gang(first[0] * first[1]).run(saved, folder, *first)[0]
    whole = resumed(folder, 1, 1, 0, None)
    assert all(torch.equal(whole[0][name], kept[name]) for name in kept)
    for division in others:
        for loaded, states, loss in gang(division[0] * division[1]).run(resumed, folder, *division):
            assert all(torch.equal(loaded[name], kept[name]) for name in kept)
            assert torch.allclose(loss, whole[2], rtol=1e-2)
            for name, (replica, state) in states.items():
                expected = whole[1][name][1]
                for key, value in state.items():
                    mine = rows_of(expected[key], division[1], replica) if value.dim() else value
                    assert torch.equal(value, mine), (name, key)


# -- memory ---------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("zero", "precision"),
    quickly([(3, "bf16")], [(0, None), (1, "bf16"), (2, None), (3, "bf16")]),
)
def test_what_ranks_hold_is_what_the_plan_says(
    gang: Callable[[int], Gang], zero: int, precision: str | None
) -> None:
    options = {"zero": zero, "precision": precision, "microbatches": 2, "length": 16}
    for found in gang(2).run(measured.shares, "llama", 1, 2, **options):
        for kind in ("weights", "copies", "grads", "states", "peak"):
            assert found[f"predicted {kind}"] == pytest.approx(found[kind], rel=0.03), kind


def wide() -> nn.Module:
    """Its embeddings are the largest tensors."""
    torch.manual_seed(0)
    return models.llama(num_hidden_layers=4, vocab_size=512)


def loaded(source: str, dp: int, folder: Path, **options: Any) -> tuple[int, int, Any]:
    """While a pipeline is loaded the peak in bytes, what is left of it, and the values."""
    with torch.device("cpu" if source == "model" else "meta"):
        model = wide()
    weights = folder if source == "files" else None
    pipe = pipecompile.compile(
        model, 1, dp, microbatches=2, seed=3, weights=weights, device="cpu", **options
    )
    return *measured.loading(pipe, models.tokens(4)), pipe.state_dict()


@pytest.mark.parametrize(
    ("source", "options"),
    quickly(
        [],
        [
            ("initialisers", {"zero": 3}),
            ("initialisers", {"zero": 1, "precision": "bf16"}),
            ("files", {"zero": 3}),
            ("model", {"zero": 3}),
        ],
    ),
    ids=str,
)
def test_loading_needs_own_rows_and_one_tensor(
    gang: Callable[[int], Gang], tmp_path: Path, source: str, options: dict[str, Any]
) -> None:
    """With bf16 at level 1 embedding and norms are whole, as they are read in fp32."""
    wide().save_pretrained(tmp_path)
    _, total, expected = loaded(source, 1, tmp_path)
    largest = max(tensor.nbytes for tensor in expected.values())
    for peak, held, values in gang(2).run(loaded, source, 2, tmp_path, **options):
        assert held <= total // 2 + (largest // 2 if options["zero"] == 1 else 0) + 2048
        assert peak <= held + largest + (20 << 10) < total
        assert all(torch.equal(values[name], expected[name]) for name in expected)


# -- layout ---------------------------------------------------------------------------------------


@given(st.integers(0, 40), st.integers(1, 9))
def test_rows_are_those_of_torch_chunk(rows: int, dp: int) -> None:
    tensor = torch.arange(rows * 2).view(rows, 2)
    expected = list(tensor.chunk(dp)) if rows else []
    expected += [tensor[:0]] * (dp - len(expected))
    assert all(torch.equal(rows_of(tensor, dp, r), expected[r]) for r in range(dp))
    assert row_range((), dp, 0) == (0, 1)


SHAPES = st.lists(st.lists(st.integers(1, 9), max_size=3).map(tuple), min_size=1, max_size=8)


@given(SHAPES, st.integers(1, 5), st.integers(1, 400))
def test_parcels_have_every_row_once(shapes: Any, dp: int, limit: int) -> None:
    items = [Item(str(i), shape, torch.float32) for i, shape in enumerate(shapes)]
    with small_parcels(limit):
        parcels = parcels_of(items, dp)
    whole = {item.name: torch.zeros(item.shape) for item in items}
    for parcel in parcels:
        for replica in range(dp):
            for item, at in zip(parcel.items, parcel.offsets[replica], strict=True):
                rows = item.rows(whole[item.name], dp, replica)
                rows += 1
                assert at + rows.numel() <= parcel.sizes[replica]
                mine = rows_of(whole[item.name], dp, replica)
                assert item.own_rows(mine, dp, replica).shape == rows.shape
    for item in items:
        assert (whole[item.name] == (1 if item.shape else dp)).all()


def test_layers_are_groups() -> None:
    assert layer_of("h.3.attn.c_attn.weight") == "h.3"
    assert layer_of("transformer.wte.weight") == "transformer.wte"
    assert layer_of("weight") == ""


# -- schedules ------------------------------------------------------------------------------------


def test_actions_print_parse_and_stand_where_they_must() -> None:
    batch = models.batches("gpt2", 8, 1)[0]
    for zero in LEVELS:
        pipe = jobs.pipeline("gpt2", 2, 2, 2, zero=zero, example_batch=batch)
        schedule, program = pipe.compiled.schedule, pipe.compiled.program
        assert from_text(to_text(schedule)) == schedule
        kinds = [action.kind for action in schedule[0]]
        assert (kinds[0] is Kind.UNSHARD) == (zero < 3)
        assert kinds.count(Kind.REDUCE_B) == (2 if zero > 1 else 0)
        last = (Kind.SYNC_TIED, Kind.REDUCE_GRAD)
        assert tuple(kinds[-2:]) == (last if zero == 1 else last[::-1])
        swapped = ((*schedule[0][:-2], schedule[0][-1], schedule[0][-2]), *schedule[1:])
        with pytest.raises(VerificationError, match="wrong side"):
            verify_exchange(swapped, program, 2, zeros.LEVELS[zero])
        early = (Action(0, Kind.REDUCE_GRAD), *schedule[0][:-1])
        if zero == 2:
            with pytest.raises(VerificationError):
                verify_exchange((early, *schedule[1:]), program, 2, zeros.LEVELS[zero])


@small_parcels()
def departures(zero: int) -> list[str]:
    """During which actions this process's parcels of gradients leave."""
    pipe = jobs.pipeline("llama", 1, 2, 2, zero=zero)
    (share, *_) = plain.cut(models.batches("llama", 8, 1)[0], 2)
    pipe.compile_for(share)
    (loaded,) = pipe._session.loaded.values()
    assert len(loaded.executors) == 1
    replicas = pipe._world.transport.replicas
    scatter, seen = replicas.scatter, []

    def watched(*args: Any) -> Any:
        seen.append(HERE.place.action)
        return scatter(*args)

    replicas.scatter = watched
    pipe.forward_backward(share)
    return seen


def test_gradients_leave_while_the_backward_runs(gang: Callable[[int], Gang]) -> None:
    """Level 1 during the last microbatch's, level 2 during each, and not when it is over."""
    for zero, backwards in ((1, {"0B1"}), (2, {"0B0", "0B1"})):
        for seen in gang(2).run(departures, zero):
            assert len(seen) > 2 * len(backwards)
            assert set(seen) == backwards


# -- options --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dp", "zero", "said"),
    [(2, 4, "use 0, 1, 2, 3"), (2, True, "use 0"), (2, "most", "use 0"), (1, 2, "dp=2 or more")],
)
def test_bad_levels_are_refused(dp: int, zero: Any, said: str) -> None:
    with pytest.raises(OptionError, match=said):
        pipecompile.compile(nn.Linear(2, 2), 1, dp, zero=zero)


class Rows(torch.optim.Optimizer):
    """Divides by the norm of the whole gradient, as LAMB and LARS do."""

    def __init__(self, params: Any):
        super().__init__(params, {"lr": 1e-9})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    param.data -= group["lr"] * param.grad / (1e-6 + param.grad.norm())


@pytest.mark.parametrize("optimizer", [torch.optim.Adafactor, Rows])
def test_optimizers_that_need_whole_parameters_are_refused(optimizer: Any) -> None:
    with pytest.raises(OptionError, match=r"steps each replica's rows alone"):
        jobs.pipeline("gpt2", 1, 2, 2, zero=1, zero_by="rows", optimizer=optimizer)


@pytest.mark.slow
def test_auto_takes_the_smallest_level_that_fits() -> None:
    batch = models.batches("llama", 8, 1)[0]

    def plan(zero: Any, dp: int = 4, **options: Any) -> Any:
        return pipecompile.compile(
            models.llama(num_hidden_layers=1),
            1,
            dp,
            microbatches=2,
            optimizer=jobs.OPTIMIZERS["adamw"],
            zero=zero,
            example_batch=batch,
            **options,
        ).plan

    peaks = [plan(zero, remat="none").stages[0].memory.peak for zero in (0, 1)]
    assert peaks[1] < peaks[0]
    roomy = plan("auto", memory=peaks[0], remat="none")
    tight = plan("auto", memory=peaks[0] - 1, remat="none")
    assert (roomy.options["zero"], tight.options["zero"]) == ("0", "1")
    assert dict(roomy.notes)["zero"] == "zero=0: everything fits undivided"
    assert "too much" in dict(tight.notes)["zero"]
    assert plan(1, plan=tight).decision == tight.decision
    with pytest.raises(PlanError, match="zero"):
        plan(2, plan=tight)
    assert plan("auto", dp=1).options["zero"] == "0"
