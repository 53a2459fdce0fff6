"""Every schedule trains as one process does, whatever ranks, stages on them, microbatches."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pipecompile
import pytest
import torch
from pipecompile import errors
from pipecompile.passes.schedule.registry import SCHEDULES
from support import jobs, models, plain
from support.gang import Gang
from support.matrix import quickly

STEPS = 2
Case = tuple[str, int, int, int, int]


def cases() -> list[Case]:
    """(schedule, ranks, stages on each, microbatches, replicas)"""
    found = []
    for name, ranks, virtual, dp in product(SCHEDULES, (2, 3, 4), (1, 2, 3), (1, 2)):
        allowed = SCHEDULES[name].virtual
        if allowed is None or virtual in allowed:
            found += [(name, ranks, virtual, m, dp) for m in (ranks - 1, ranks, 2 * ranks + 1)]
    return found


QUICK: list[Case] = [
    ("gpipe", 2, 2, 5, 1),
    ("interleaved", 2, 2, 5, 1),
    ("zb_h1", 3, 1, 2, 1),
    ("zb", 2, 1, 5, 1),
    ("zb_v", 2, 2, 5, 1),
]


def model_for(stages: int) -> str:
    """GPT-2 ties a weight of the first stage and of the last; others have more units."""
    return "gpt2" if stages <= 6 else "llama" if stages <= 9 else "llama-deep"


@pytest.mark.parametrize(
    ("name", "ranks", "virtual", "microbatches", "dp"), quickly(QUICK, cases())
)
def test_training_is_exact(
    gang: Callable[[int], Gang], name: str, ranks: int, virtual: int, microbatches: int, dp: int
) -> None:
    """In processes; gradients, parameters and losses are one device's, bit for bit."""
    model = model_for(ranks * virtual)
    work = model, ranks, dp, microbatches, "adamw", STEPS, name
    expected = jobs.train_plainly(model, dp, microbatches, "adamw", STEPS)
    for found in gang(ranks * dp).run(jobs.train, *work, virtual_stages=virtual):
        plain.assert_equal(found, expected, whole=False)


# -- chosen, planned again, brought along ---------------------------------------------------------


@pytest.mark.slow
def test_auto_takes_the_shortest_step_of_all() -> None:
    batches, adamw = models.batches("gpt2", 4, STEPS), jobs.OPTIMIZERS["adamw"]
    model = models.gpt2(n_layer=2)
    options: dict[str, Any] = {"schedule": "auto", "optimizer": adamw, "example_batch": batches[0]}
    pipe = pipecompile.compile(model, 2, microbatches=2, **options)
    note = dict(pipe.plan.notes)["stages"]
    steps = {
        order: float(step)
        for order, step in re.findall(r"2 × dp 1, ([\w ,]+?): ([\d.e-]+) s", note.split(" of ")[1])
    }
    assert set(SCHEDULES) == {order.partition(",")[0] for order in steps}
    (taken,) = re.findall(r"^2 × dp 1, ([\w ,]+?): ", note)
    assert steps[taken] == min(steps.values()) == pytest.approx(pipe.plan.step_s, rel=1e-3)
    found = plain.train_pipeline(pipe, batches)
    assert pipe.plan.microbatches == 2
    plain.assert_equal(found, plain.train(model, batches, adamw, 1, 2))


def chosen(dp: int, virtual: int | None = None) -> tuple[plain.Trained, str]:
    batches = models.batches("gpt2", 8 * dp, STEPS)
    shard = {name: value[8 * (rank() // 2) :][:8] for name, value in batches[0].items()}
    options: dict[str, Any] = {"virtual_stages": virtual} if virtual else {}
    pipe = jobs.pipeline("gpt2", 2, dp, 4, schedule="auto", example_batch=shard, **options)
    return plain.train_pipeline(pipe, batches), pipe.plan.options["schedule"]


def rank() -> int:
    return int(os.environ["RANK"])


@pytest.mark.slow
@pytest.mark.parametrize("dp", [1, 2])
def test_ranks_take_the_same_schedule(gang: Callable[[int], Gang], dp: int) -> None:
    expected = jobs.train_plainly("gpt2", dp, 4, "adamw", STEPS)
    answers = gang(2 * dp).run(chosen, dp, 2)
    assert len({name for _, name in answers}) == 1
    for found, _ in answers:
        plain.assert_equal(found, expected, whole=False)


@pytest.mark.parametrize(
    ("name", "virtual"),
    quickly([], [("zb", 1), ("zb_v", 2), ("interleaved", 2)]),
)
def test_a_plan_keeps_its_order(name: str, virtual: int, tmp_path: Path) -> None:
    """Also where another search, for other seconds, would find another one."""
    batches = models.batches("llama", 10, STEPS)
    shape = {"schedule": name, "virtual_stages": virtual, "example_batch": batches[0]}
    first = jobs.pipeline("llama", 2, 1, 5, **shape)
    first.plan.save(tmp_path / "plan.json")
    again = jobs.pipeline("llama", 2, 1, 5, **shape, plan=tmp_path / "plan.json")
    assert again.plan.schedule == first.plan.schedule
    assert again.plan.virtual_stages == virtual
    plain.assert_equal(
        plain.train_pipeline(again, batches), jobs.train_plainly("llama", 1, 5, "adamw", STEPS)
    )
    with pytest.raises(errors.PlanError, match=r"the plan has (virtual_stages|schedule)="):
        jobs.pipeline("llama", 2, 1, 5, example_batch=batches[0], plan=tmp_path / "plan.json")


def from_file(path: str) -> plain.Trained:
    return jobs.train("llama", 2, 1, 4, "adamw", STEPS, path)


def test_an_order_of_ones_own(gang: Callable[[int], Gang], tmp_path: Path) -> None:
    """Both ranks hold two stages that follow each other, and W is where it is wanted."""
    path = tmp_path / "mine.txt"
    path.write_text(
        "0F0 0F1 1F0 1F1 0F2 1F2 1B0 0B0 0F3 1F3 1B1 1W0 0B1 1B2 0B2 1W1 1B3 0B3 1W2 1W3\n"
        "2F0 3F0 3B0 2B0 2F1 3F1 3B1 2B1 2F2 3F2 3B2 2B2 2F3 3F3 3B3 2B3 2W0 2W1 2W2 2W3 3W0 3W1 "
        "3W2 3W3\n"
    )
    expected = jobs.train_plainly("llama", 1, 4, "adamw", STEPS)
    for found in gang(2).run(from_file, str(path)):
        plain.assert_equal(found, expected, whole=False)
    batch = models.batches("llama", 12, 1)[0]
    for shape, said in (
        ((3, 1, 4), "is for 2 ranks, this run has 3: n_stages=2"),
        ((2, 1, 6), "is for 4 microbatches, this run has 6: microbatches=4"),
    ):
        with pytest.raises(errors.OptionError, match=said):
            jobs.pipeline("llama", *shape, schedule=str(path), example_batch=batch)


# -- all that goes with several stages per rank ---------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("gpt2", {"schedule": "interleaved", "remat": "full"}),
        pytest.param(
            "llama",
            {"schedule": "zb_v", "pin": {"model.embed_tokens": 0, "lm_head": 3}},
            marks=pytest.mark.slow,
        ),
        pytest.param("llama", {"schedule": "v_min", "remat": "full"}, marks=pytest.mark.slow),
        pytest.param("t5", {"schedule": "zb", "virtual_stages": 2}, marks=pytest.mark.slow),
        pytest.param("bart", {"schedule": "interleaved"}, marks=pytest.mark.slow),
    ],
)
def test_options_go_with_several_stages_per_rank(name: str, options: dict[str, Any]) -> None:
    order = options["schedule"]
    more = {key: value for key, value in options.items() if key != "schedule"}
    found = jobs.train(name, 2, 1, 4, "adamw", STEPS, order, **more)
    plain.assert_equal(found, jobs.train_plainly(name, 1, 4, "adamw", STEPS))


@pytest.mark.slow
def test_memory_is_kept_by_ranks_with_several_stages() -> None:
    """A budget below what keeping everything takes: recomputed, within it, and the same bits."""
    batch = models.batches("llama", 8, 1)[0]
    roomy = jobs.pipeline("llama", 2, 1, 4, schedule="interleaved", example_batch=batch)
    peaks = [stages[0].memory.peak for stages in roomy.plan.ranks]
    budget = int(0.9 * max(peaks))
    tight = jobs.pipeline(
        "llama", 2, 1, 4, schedule="interleaved", example_batch=batch, memory=budget
    )
    assert max(stages[0].memory.peak for stages in tight.plan.ranks) <= budget
    assert tight.plan.decision.recomputed or peaks != [
        stages[0].memory.peak for stages in tight.plan.ranks
    ]
    batches = models.batches("llama", 8, STEPS)
    plain.assert_equal(
        plain.train_pipeline(tight, batches), jobs.train_plainly("llama", 1, 4, "adamw", STEPS)
    )


@pytest.mark.slow
def test_evaluation_and_outputs_with_several_stages_per_rank() -> None:
    batch = models.batches("llama", 8, 1)[0]
    ours = jobs.pipeline("llama", 2, 1, 4, schedule="zb_v")
    theirs = jobs.pipeline("llama", 4, 1, 4)
    assert torch.equal(ours.evaluate(batch), theirs.evaluate(batch))
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    assert torch.equal(ours.forward(inputs).logits, theirs.forward(inputs).logits)


@pytest.mark.slow
def test_uneven_rows_mix_programs_in_one_order() -> None:
    """Seven rows over four microbatches: two shapes, one schedule that was searched."""
    batch = models.batches("llama", 7, 1)[0]
    ours = jobs.pipeline("llama", 2, 1, 4, schedule="zb")
    theirs = jobs.pipeline("llama", 2, 1, 4)
    assert torch.equal(ours.step(batch), theirs.step(batch))
    there = theirs.state_dict()
    assert all(torch.equal(value, there[name]) for name, value in ours.state_dict().items())
