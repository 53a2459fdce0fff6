"""Compressed gradients: replicas have the same bits, nothing is lost, and plans know the bytes."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any
from unittest import mock

import pipecompile
import pytest
import torch
from pipecompile import errors
from pipecompile.runtime.transport.neighbours import SWITCH
from support import compressing, jobs, models, plain
from support.compressing import METHODS
from support.gang import Gang
from support.matrix import quickly

DIVISIONS = [(1, 2), (2, 2), (1, 3), (1, 4)]
CASES = [(method, *division) for method in METHODS for division in DIVISIONS]


def over_gloo(*args: Any, **options: Any) -> Any:
    """The same where no memory is shared: what is sent is counted as on a network."""
    with mock.patch.dict(os.environ, {SWITCH: "off"}):
        return compressing.train(*args, **options)


@pytest.mark.parametrize(("method", "n_stages", "dp"), quickly([("int8", 2, 2)], CASES))
def test_processes_have_the_bits_of_one_that_plays_them(
    gang: Callable[[int], Gang], method: str, n_stages: int, dp: int
) -> None:
    mine = compressing.train(method, n_stages, dp)
    found = gang(n_stages * dp).run(compressing.train, method, n_stages, dp)
    for losses, state, held, kept, _ in found:
        assert plain.equal(losses, mine[0])
        assert plain.equal(state, mine[1])
        assert all(torch.equal(p, mine[2][key]) for key, p in held.items())
        assert kept
        assert all(torch.equal(r, mine[3][key]) for key, r in kept.items())


@pytest.mark.parametrize("method", quickly(["powersgd:2"], METHODS))
def test_all_ranks_that_hold_a_parameter_have_the_same_bits(method: str) -> None:
    """Tied embeddings too, which two stages hold beside other parameters each."""
    held = compressing.train(method, 2, 3)[2]
    names = {name for _, name in held}
    for name in names:
        first, *others = [p for (_, n), p in held.items() if n == name]
        assert all(torch.equal(first, other) for other in others), name
    assert sum(n == "transformer.wte.weight" for _, n in held) == 6


@pytest.mark.parametrize("method", quickly(["adacomp:64"], METHODS))
def test_stages_change_no_bit(method: str) -> None:
    one, two = (compressing.train(method, n, 2, steps=2) for n in (1, 2))
    assert plain.equal(one[0], two[0])
    assert plain.equal(one[1], two[1])


@pytest.mark.parametrize("method", quickly(["bf16", "adacomp:64"], METHODS))
def test_what_is_sent_and_what_is_kept_are_all(method: str) -> None:
    """The sum of all means is that of the gradients, but for the mean of what replicas keep."""
    pipe = compressing.pipeline(method)
    exact = compressing.pipeline("off")
    share = compressing.shares(pipe, 1)[0]
    sent: dict[str, torch.Tensor] = {}
    for _ in range(4):  # the parameters stay, so that gradients do
        pipe.forward_backward(share)
        for name, param in pipe.named_parameters():
            sent[name] = sent.get(name, 0) + param.grad
        pipe.zero_grad()
    exact.forward_backward(share)
    kept = compressing.residues(pipe)
    for name, param in exact.named_parameters():
        mine = [r for (_, n), r in kept.items() if n == name]
        left = torch.stack(mine).mean(0) if mine else 0
        torch.testing.assert_close(sent[name] + left, 4 * param.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("method", quickly(["bf16"], METHODS))
def test_it_is_not_what_it_would_be_without(method: str) -> None:
    found, exact = (compressing.train(m, 1, 2)[1] for m in (method, "off"))
    assert not plain.equal(found, exact)


@pytest.mark.parametrize("method", quickly(["int8"], METHODS))
def test_gradients_of_earlier_calls_are_not_compressed_again(method: str) -> None:
    """Two calls add up what two steps' gradients are alone."""
    pipe, other = (compressing.pipeline(method) for _ in range(2))
    first, second = compressing.shares(pipe, 2)
    pipe.forward_backward(first)
    pipe.forward_backward(second)
    other.forward_backward(first)
    before = {name: param.grad.clone() for name, param in other.named_parameters()}
    other.zero_grad()
    other.forward_backward(second)
    for name, param in pipe.named_parameters():
        assert torch.equal(param.grad, before[name] + dict(other.named_parameters())[name].grad)


# -- bytes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "dp"), quickly([("int8", 2)], [(m, dp) for m in METHODS[:3] for dp in (2, 3)])
)
def test_as_many_bytes_are_sent_as_the_plan_says(
    gang: Callable[[int], Gang], method: str, dp: int
) -> None:
    plan = compressing.pipeline(method, 1, dp).plan
    found = gang(dp).run(over_gloo, method, 1, dp)
    assert max(sent for *_, sent in found) == plan.stages[0].exchanged_bytes


@pytest.mark.parametrize("width", quickly([64], [64, 256, 512]))
def test_what_adacomp_sends_is_about_what_the_plan_says(width: int) -> None:
    """Which is an estimate, as it depends on the gradients."""
    pipe = compressing.pipeline(f"adacomp:{width}")
    for share in compressing.shares(pipe, 4):
        pipe.step(share)
    sent = pipe._require().state.compressed[0].sent_bytes / 4
    assert 0.5 < pipe.plan.stages[0].exchanged_bytes / sent < 2.0


@pytest.mark.slow
def test_without_compression_too(gang: Callable[[int], Gang]) -> None:
    plan = compressing.pipeline("off", 1, 2).plan
    found = gang(2).run(over_gloo, "off", 1, 2)
    assert {sent for *_, sent in found} == {plan.stages[0].exchanged_bytes}


# -- what is not finite ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "n_stages"), quickly([("int8", 2)], [(m, n) for m in METHODS for n in (1, 2)])
)
def test_an_overflow_leaves_what_is_kept_as_it_was(method: str, n_stages: int) -> None:
    """On all ranks: also on those whose own gradients are finite."""
    pipe = compressing.pipeline(method, n_stages, precision="fp16")
    first, second = compressing.shares(pipe, 2)
    pipe.step(first)
    before, weights = compressing.residues(pipe), pipe.state_dict()
    usual, pipe.loss_scaler.scale = pipe.loss_scaler.scale, 2.0**40
    pipe.step(second)
    assert pipe.loss_scaler.skipped == 1
    after = compressing.residues(pipe)
    assert all(torch.equal(after[key], kept) for key, kept in before.items())
    assert plain.equal(pipe.state_dict(), weights)
    pipe.loss_scaler.scale = usual
    pipe.step(second)
    assert all(r.isfinite().all() for r in compressing.residues(pipe).values())


@pytest.mark.parametrize("method", quickly(["powersgd:2"], METHODS))
def test_a_gradient_that_is_nan_is_seen_and_not_kept(method: str) -> None:
    pipe = compressing.pipeline(method)
    pipe.step(compressing.shares(pipe, 1)[0])
    before = compressing.residues(pipe)
    with torch.no_grad():
        spoiled = dict(pipe.named_parameters())["transformer.ln_f.bias"]
        was = spoiled.clone()
        spoiled[0] = torch.nan
    pipe.forward_backward(compressing.shares(pipe, 1)[0])
    assert all(p.grad.isnan().any() for _, p in pipe.named_parameters())
    with torch.no_grad():
        spoiled.copy_(was)
    assert all(torch.equal(r, before[key]) for key, r in compressing.residues(pipe).items())


def test_what_is_kept_is_of_gradients_that_are_not_scaled() -> None:
    found = []
    for scale in (2.0**8, 2.0**10):
        pipe = compressing.pipeline("int8", precision="fp16")
        pipe.loss_scaler.scale = scale
        pipe.step(compressing.shares(pipe, 1)[0])
        found.append(compressing.residues(pipe))
    for key, kept in found[0].items():
        assert 0.5 < (kept.norm() / found[1][key].norm()).item() < 2.0, key


# -- what does not go together --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"compress": "int8", "dp": 1}, "no effect with dp=1"),
        ({"compress": {"values": "bf16"}, "dp": 2}, "no effect with n_stages=1"),
        ({"compress": "int8", "dp": 2, "zero": 2}, "zero=2 has each microbatch's leave at once"),
        ({"compress": "int8", "dp": 2, "zero": "auto"}, "give zero=0 or 1"),
        ({"compress": "int8", "dp": 2, "training": False}, "training=False"),
        ({"compress": "int8", "dp": 2, "verify": 1}, "verify=1"),
    ],
)
def test_what_does_not_go_together_is_told_at_once(options: dict[str, Any], said: str) -> None:
    with pytest.raises(errors.OptionError, match=said):
        pipecompile.compile(models.build("gpt2"), 1, **options)


def test_gradients_in_another_dtype_are_told() -> None:
    model = models.build("gpt2").double()
    pipe = pipecompile.compile(model, 1, 2, optimizer=jobs.SGD, compress="int8")
    with pytest.raises(errors.StateError, match=r"no effect on gradients in torch\.float64"):
        pipe.step(models.batches("gpt2", 4, 1)[0])
