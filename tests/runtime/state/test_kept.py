"""What replicas divide is kept whole over a step where there is room for it (zero_keep=)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pipecompile
import pytest
import torch
from pipecompile.compiler.costs.hardware import DEVICES
from pipecompile.compiler.ir.actions import Kind
from pipecompile.compiler.ir.errors import OptionError
from pipecompile.compiler.ir.zero import layer_of
from pipecompile.compiler.plan.plan import Plan
from pipecompile.compiler.planning.keeping import Division, keepable
from support import jobs, measured, models, plain
from support.gang import Gang
from support.matrix import quickly
from support.zero import LEVELS, Odd, accumulate, small_parcels
from torch import nn

MICROBATCHES = 4
EVERYTHING = "1GiB"
SENDING = replace(DEVICES["cpu"], send_share=1.0)
"""Where sending takes the processor, so that all that is exchanged less often shortens the step."""


def pipeline(name: str, n_stages: int, zero: int, memory: Any, **options: Any) -> Any:
    given = {"zero": zero, "memory": memory, "remat": "none", "hardware": SENDING} | options
    return jobs.pipeline(name, n_stages, 2, MICROBATCHES, **given)


@functools.cache
@small_parcels()
def peak(name: str, n_stages: int, zero: int, **options: Any) -> int:
    """Of the rank that needs most, where nothing is kept."""
    batch = models.batches(name, 2 * 2 * MICROBATCHES, 1)[0]
    pipe = pipeline(name, n_stages, zero, None, example_batch=batch, **options)
    return max(stage.memory.peak for stage in pipe.plan.stages)


def between(name: str, n_stages: int, zero: int, **options: Any) -> int:
    """A budget that lets a level keep some of what it divides, and not all."""
    ends = peak(name, n_stages, 1, **options), peak(name, n_stages, zero, **options)
    return sum(ends) // 2


@small_parcels()
def train(name: str, n_stages: int, zero: int, memory: Any, **options: Any) -> plain.Trained:
    """Five steps, clipped."""
    pipe = pipeline(name, n_stages, zero, memory, **options)
    return plain.train_pipeline(pipe, models.batches(name, 2 * 2 * MICROBATCHES, 5))


# -- what is decided ------------------------------------------------------------------------------


@pytest.mark.parametrize("zero", [2, 3])
@small_parcels()
def test_what_fits_is_kept(zero: int) -> None:
    """All with much memory, some with less, nothing without a budget; the plan says so, its
    schedule exchanges less, and its step is shorter where sending takes the processor."""
    batch = models.batches("gpt2", 16, 1)[0]
    some = between("gpt2", 2, zero)
    plans = [
        pipeline("gpt2", 2, zero, memory, example_batch=batch).plan
        for memory in (None, some, EVERYTHING)
    ]
    held = [sum(len(k.params) + len(k.grads) for k in plan.decision.kept) for plan in plans]
    assert held[0] == 0 < held[1] < held[2]
    assert all(stage.memory.peak <= some for stage in plans[1].stages)
    reduced = ["REDUCE_B" in " ".join(plan.schedule) for plan in plans]
    assert reduced == [True, True, False]
    assert all(("UNSHARD" in row) == (zero == 2) for row in plans[0].schedule)
    assert all("UNSHARD" in row for row in plans[2].schedule)
    assert plans[2].step_s < plans[1].step_s < plans[0].step_s
    assert "keep" not in dict(plans[0].notes).get("zero", "")
    assert "MiB whole over a step" in dict(plans[2].notes)["zero"]
    whole = pipeline("gpt2", 2, 1, None, example_batch=batch).plan
    for ours, theirs in zip(plans[2].stages, whole.stages, strict=True):
        assert ours.memory.peak <= theirs.memory.peak + 4096  # padding of buckets
    without = pipeline("gpt2", 2, zero, EVERYTHING, zero_keep="nothing", example_batch=batch).plan
    assert without.decision.kept == ()
    assert Plan.from_json(plans[1].to_json()) == plans[1]
    again = jobs.pipeline("gpt2", 2, 2, MICROBATCHES, zero=zero, plan=plans[1], example_batch=batch)
    assert again.plan.decision.kept == plans[1].decision.kept
    assert again.plan.schedule == plans[1].schedule


def test_what_is_exchanged_most_often_is_kept_first() -> None:
    """At level 3 a parameter that two programs read, before gradients, before one of one program;
    what a step exchanges once is not kept."""
    batch = models.batches("gpt2", 16, 1)[0]
    program = pipeline("gpt2", 1, 2, None, example_batch=batch).compiled.program
    zero = pipeline("gpt2", 1, 3, None, example_batch=batch).compiled.layout.zero
    order = keepable(program, (0,), Division(zero, 2, 4), len)
    assert [each.times for each in order] == sorted((each.times for each in order), reverse=True)
    assert {(each.gradients, each.times) for each in order} == {(False, 8), (False, 4), (True, 4)}
    for each in order:
        assert len({layer_of(name) for name in each.names}) == 1
    once = keepable(program, (0,), Division(zero, 2, 1), len)
    assert {(each.gradients, each.times) for each in once} == {(False, 2)}
    assert [each.nbytes for each in once] == sorted(each.nbytes for each in once)


# -- numbers --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "n_stages", "zero", "options"),
    [
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                ("gpt2", 2, 3, {}),
                ("gpt2", 2, 2, {}),
                ("llama", 1, 2, {"precision": "bf16"}),
                ("llama", 1, 3, {"precision": "bf16"}),
                ("gpt2", 2, 3, {"schedule": "zb_h1"}),
                ("gpt2", 1, 3, {"zero_by": "matrices"}),
                ("gpt2", 2, 3, {"schedule": "interleaved"}),
            )
        ),
    ],
    ids=str,
)
def test_everything_kept_is_level_one(
    gang: Callable[[int], Gang], name: str, n_stages: int, zero: int, options: dict[str, Any]
) -> None:
    """With its bits, norms and clipping too, in one process and between several. Some kept trains
    alike in one process and between several, and within rounding of nothing kept."""
    first = train(name, n_stages, 1, None, **options)
    alone = train(name, n_stages, zero, EVERYTHING, **options)
    assert_alike(alone, first)
    budget = between(name, n_stages, zero, **options)
    partly = train(name, n_stages, zero, budget, **options)
    args = name, n_stages, zero
    for found in gang(2 * n_stages).run(train, *args, EVERYTHING, **options):
        assert_alike(found, first)
    for found in gang(2 * n_stages).run(train, *args, budget, **options):
        assert_alike(found, partly)
    assert torch.equal(partly.losses[0], first.losses[0])
    if "schedule" not in options:  # with others all may fit, as more is under way
        assert not all(torch.equal(partly.params[n], p) for n, p in first.params.items())
    for a, b in zip(partly.losses, first.losses, strict=True):
        assert torch.allclose(a, b, rtol=2e-4 if options.get("precision") else 3e-7)


def assert_alike(found: plain.Trained, expected: plain.Trained) -> None:
    assert all(torch.equal(a, b) for a, b in zip(found.losses, expected.losses, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(found.norms, expected.norms, strict=True))
    assert not [n for n, p in expected.params.items() if not torch.equal(found.params[n], p)]


@pytest.mark.slow
def test_tied_parts_are_summed_behind_the_mean(gang: Callable[[int], Gang]) -> None:
    """Each of two ranks adds to a tied gradient, which is kept on both."""
    options = {"tied_grads": "per_step"}
    alone = train("gpt2", 2, 3, EVERYTHING, **options)
    for found in gang(4).run(train, "gpt2", 2, 3, EVERYTHING, **options):
        assert_alike(found, alone)
    first = train("gpt2", 2, 1, None, **options)
    for a, b in zip(alone.losses, first.losses, strict=True):
        assert torch.allclose(a, b, rtol=3e-7)


@small_parcels(32)
def accumulated(zero: int, memory: Any) -> dict[str, torch.Tensor]:
    pipe = pipecompile.compile(
        Odd(),
        1,
        2,
        microbatches=2,
        optimizer=jobs.OPTIMIZERS["adamw"],
        zero=zero,
        memory=memory,
        hardware=SENDING,
        device="cpu",
    )
    torch.manual_seed(4)
    return accumulate(pipe, [torch.randn(8, 5) for _ in range(4)])


@pytest.mark.parametrize("zero", quickly([3], LEVELS[1:]))
def test_gradients_of_earlier_calls_stay(gang: Callable[[int], Gang], zero: int) -> None:
    """And a state that is loaded is the one that the next step starts from."""
    first, alone = accumulated(1, None), accumulated(zero, EVERYTHING)
    for found in gang(2).run(accumulated, zero, EVERYTHING):
        for name in first:
            assert torch.equal(found[name], alone[name]), name
            assert torch.equal(found[name], first[name]), name


# -- memory ---------------------------------------------------------------------------------------


@small_parcels()
def shares(zero: int, memory: Any = None, **options: Any) -> dict[str, int]:
    return measured.shares("llama", 1, 2, 2, 16, zero=zero, memory=memory, remat="none", **options)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("zero", "precision"), [(2, None), (2, "bf16"), (3, None), (3, "bf16")], ids=str
)
def test_what_ranks_hold_is_what_the_plan_says(
    gang: Callable[[int], Gang], zero: int, precision: str | None
) -> None:
    levels = (gang(2).run(shares, level, precision=precision) for level in (zero, 1))
    (least, _), (most, _) = levels
    some = (least["predicted peak"] + most["predicted peak"]) // 2
    for memory in (some, EVERYTHING):
        for found in gang(2).run(shares, zero, memory, precision=precision):
            for kind in ("weights", "copies", "grads", "states", "peak"):
                assert found[f"predicted {kind}"] == pytest.approx(found[kind], rel=0.03), kind
            held = [sum(x[k] for k in ("weights", "copies", "grads")) for x in (least, found)]
            assert held[0] < held[1]
            assert found["predicted peak"] <= (some if memory == some else most["predicted peak"])


# -- options --------------------------------------------------------------------------------------


def test_whole_gradients_at_level_three() -> None:
    """Asked for: parameters are gathered as ever, gradients leave once per step."""
    batch = models.batches("gpt2", 16, 1)[0]
    options: dict[str, Any] = {"zero_keep": "gradients"}
    pipe = pipeline("gpt2", 2, 3, None, example_batch=batch, **options)
    kinds = {action.kind for row in pipe.compiled.schedule for action in row}
    assert kinds.isdisjoint({Kind.UNSHARD, Kind.REDUCE_B})
    assert any(stage.groups for stage in pipe.compiled.program.stages)
    assert peak("gpt2", 2, 3) < peak("gpt2", 2, 3, **options)


@pytest.mark.slow
def test_whole_gradients_between_processes(gang: Callable[[int], Gang]) -> None:
    """With the bits of level 1."""
    first = train("gpt2", 2, 1, None)
    for found in gang(4).run(train, "gpt2", 2, 3, None, zero_keep="gradients"):
        assert_alike(found, first)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"zero": 1, "zero_keep": "nothing"}, "no effect with zero=1"),
        ({"zero_keep": "gradients"}, "no effect with zero=0"),
        ({"zero": 2, "zero_keep": "gradients"}, "at level 2 that is zero=1"),
        ({"zero": "auto", "zero_keep": "gradients"}, "it is for one level"),
        ({"zero": 3, "zero_keep": "parameters"}, "use 'auto' or 'nothing' or 'gradients'"),
        ({"training": False, "zero": 0, "zero_keep": "nothing"}, "nothing to divide"),
    ],
    ids=str,
)
def test_bad_values_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(OptionError, match=said):
        pipecompile.compile(nn.Linear(2, 2), 1, 2, **options)
