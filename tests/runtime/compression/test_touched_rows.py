"""Replicas exchange the rows of tables that a step touches, with the bits of whole tables."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pipecompile import errors
from pipecompile.runtime.compression.touched import TouchedRows
from pipecompile.runtime.executor import drive
from pipecompile.runtime.state.bucket import Bucket
from pipecompile.runtime.transport.mesh import Mesh
from pipecompile.runtime.transport.neighbours import SWITCH
from pipecompile.runtime.transport.transport import Endpoint, Loopback, ordered_mean
from support import plain, touching
from support.gang import Gang
from support.matrix import quickly

CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.bfloat16, torch.float64, torch.complex64)
ODD = torch.tensor([0.0, -0.0, 1.0, -2.5, float("nan"), float("inf")])
CASES = [
    (n_stages, dp, optimizer, options)
    for n_stages, dp in ((1, 2), (2, 2), (1, 3), (1, 4))
    for optimizer in ("sgd", "adamw")
    for options in ({}, {"precision": "bf16"}, {"schedule": "zb_h1", "microbatches": 3})
]


def over_gloo(*args: Any, **options: Any) -> Any:
    """The same where no memory is shared: what is sent is counted as on a network."""
    with mock.patch.dict(os.environ, {SWITCH: "off"}):
        return touching.train(*args, **options)


@pytest.mark.parametrize(
    ("n_stages", "dp", "optimizer", "options"), quickly([(2, 2, "adamw", {})], CASES)
)
def test_the_bits_are_those_of_whole_tables(
    n_stages: int, dp: int, optimizer: str, options: dict[str, Any]
) -> None:
    """Clipped, over microbatches, with momentum that moves rows which no step touches."""
    whole = touching.train("off", n_stages, dp, optimizer, **options)
    found = touching.train("exchange", n_stages, dp, optimizer, **options)
    for mine, theirs in zip(found[:3], whole[:3], strict=True):
        assert plain.equal(mine, theirs)
    assert 0 < found[4] < whole[1]["words.weight"].nbytes // 4


@pytest.mark.parametrize(("n_stages", "dp"), quickly([(1, 2)], [(1, 2), (2, 2), (1, 3)]))
def test_processes_over_gloo_have_them_too_and_send_what_is_counted(
    gang: Callable[[int], Gang], n_stages: int, dp: int
) -> None:
    mine = touching.train("off", n_stages, dp, "adamw")
    pipe = touching.pipeline("exchange", n_stages, dp, "adamw")
    found = gang(n_stages * dp).run(over_gloo, "exchange", n_stages, dp, "adamw")
    most = pipe.plan.stages[0].exchanged_bytes
    for losses, state, _, sent, of_rows in found:
        assert plain.equal(losses, mine[0])
        assert plain.equal(state, mine[1])
        assert 0 < of_rows < sent
    if n_stages == 1:
        assert most / 2 < max(each[3] for each in found) <= most


def test_several_calls_add_up_as_whole_tables_do() -> None:
    """What earlier calls have left is in the rows that are exchanged."""
    pipe, other = (touching.pipeline(rows) for rows in ("exchange", "off"))
    for each in (pipe, other):
        for share in touching.shares(each, 3):
            each.forward_backward(share, scale=1 / 3)
    assert plain.equal(touching.grads(pipe), touching.grads(other))


def test_where_all_rows_have_numbers_tables_travel_whole() -> None:
    """Also because somebody has added to a gradient."""
    pipe, other = (touching.pipeline(rows) for rows in ("exchange", "off"))
    for each in (pipe, other):
        each.forward_backward(touching.shares(each, 1)[0])
        dict(each.named_parameters())["words.weight"].grad.add_(1e-3)
        before = touching.rows_bytes(each)
        each.forward_backward(touching.shares(each, 1, 1)[0])
        sent = touching.rows_bytes(each) - before
        assert sent >= touching.WORDS * touching.WIDTH * 4 or each is other
    assert plain.equal(touching.grads(pipe), touching.grads(other))


def test_a_gradient_that_is_nan_is_as_with_whole_tables() -> None:
    found = []
    for rows in ("exchange", "off"):
        pipe = touching.pipeline(rows)
        with torch.no_grad():
            dict(pipe.named_parameters())["layers.1.weight"][0] = torch.nan
        pipe.forward_backward(touching.shares(pipe, 1)[0])
        found.append(touching.grads(pipe))
    assert found[1]["words.weight"].isnan().any()
    assert not found[1]["words.weight"].isnan().all()
    for name, grad in found[1].items():
        assert torch.equal(grad.isnan(), found[0][name].isnan())
        assert torch.equal(grad.nan_to_num(), found[0][name].nan_to_num())


def test_a_step_that_overflows_is_skipped_and_the_next_is_not() -> None:
    found = []
    for rows in ("exchange", "off"):
        pipe = touching.pipeline(rows, 2, precision="fp16")
        first, second = touching.shares(pipe, 2)
        usual, pipe.loss_scaler.scale = pipe.loss_scaler.scale, 2.0**60
        pipe.step(first)
        pipe.loss_scaler.scale = usual
        pipe.step(second)
        found.append((pipe.loss_scaler.skipped, pipe.state_dict()))
    assert found[0][0] == 1
    assert plain.equal(found[0], found[1])


def test_beside_compression_rows_are_exact() -> None:
    """Nothing of tables is rounded, or kept for later."""
    pipe, other = touching.pipeline("exchange", compress="int8"), touching.pipeline("off")
    for each in (pipe, other):
        each.forward_backward(touching.shares(each, 1)[0])
    found, exact = touching.grads(pipe), touching.grads(other)
    equal = {name for name, grad in found.items() if torch.equal(grad, exact[name])}
    assert equal == touching.TABLES
    kept = pipe._require().state.compressed[0].residues
    assert kept.keys() == exact.keys() - touching.TABLES


def test_a_plan_is_for_what_becomes_of_tables() -> None:
    plan = touching.pipeline("exchange").plan
    with pytest.raises(errors.PlanError, match=r"sparse_embeddings=exchange, this run .*=off"):
        touching.pipeline("off", plan=plan)
    found = touching.train("exchange", 1, 2, plan=plan)
    assert plain.equal(found[1], touching.train("off", 1, 2)[1])


def test_memory_is_what_the_plan_says() -> None:
    pipe = touching.pipeline("exchange", 2)
    for rank in (0, 1):
        held = sum(t.nbytes for t in pipe._require().state.ranks[rank].grads._owned())
        assert pipe.plan.stages[rank].memory.grads == held


# -- any rows -------------------------------------------------------------------------------------


@settings(max_examples=40)
@given(st.data())
def test_any_rows_have_the_bits_of_their_mean(data: st.DataObject) -> None:
    """Signs of zeros, infinities and NaN too; of tables of any shape and dtype."""
    dp, rows = data.draw(st.integers(2, 4)), data.draw(st.integers(0, 40))
    shape = (rows, *data.draw(st.sampled_from([(), (1,), (5,), (2, 3)])))
    dtype = data.draw(st.sampled_from(DTYPES))
    mesh, transport = Mesh(1, dp, None), Loopback()
    made, before = [], []
    for replica in range(dp):
        touched = data.draw(st.lists(st.booleans(), min_size=rows, max_size=rows))
        chance = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
        numbers = ODD[torch.randint(len(ODD), shape, generator=chance)].to(dtype)
        numbers[~torch.tensor(touched, dtype=torch.bool)] = 0
        room = Bucket({"t": numbers}, {"t": dtype}, CPU, dp)
        room.views["t"].copy_(numbers)
        before.append(numbers)
        made.append(TouchedRows({"t": room}, Endpoint(replica, mesh, CPU, transport)))
    drive([each.mean_() for each in made], transport.progress)
    mean = ordered_mean(before)
    most = 2 * made[0].buffers[0].nbytes * (dp - 1) // dp
    for each in made:
        found = each.views["t"]
        torch.testing.assert_close(found, mean, rtol=0, atol=0, equal_nan=True)
        parts = [torch.view_as_real(t) if dtype.is_complex else t for t in (found, mean)]
        signs = [part.nan_to_num(1.0).signbit() for part in parts]
        assert torch.equal(*signs)
        assert each.sent_bytes <= most + 8 * (dp - 1)
