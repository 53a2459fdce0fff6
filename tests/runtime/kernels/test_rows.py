"""Gradients of tables are added by the rows that a microbatch reads, with all the bits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pipecompile
import pytest
import torch
from pipecompile.compiler.ir import ops
from pipecompile.compiler.ir.ops import Slot
from pipecompile.runtime.kernels import rounding
from pipecompile.runtime.state.bucket import GradSlot
from support import plain
from support.fused import interpreted
from support.gang import Gang
from torch import nn
from transformers.modeling_outputs import CausalLMOutput

ROWS, WIDTH, LENGTH = 96, 8, 5
OPTIMIZER: Any = torch.optim.AdamW


class Words(nn.Module):
    """Two tables, one with a padding, and positions, of which every row is read.

    Args:
        tied: the head is the first table.
        frozen: the second is not trained.
    """

    def __init__(self, tied: bool = False, frozen: bool = False, by_count: bool = False):
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(ROWS, WIDTH, padding_idx=3, scale_grad_by_freq=by_count)
        self.kinds = nn.Embedding(ROWS, WIDTH).requires_grad_(not frozen)
        self.places = nn.Embedding(LENGTH, WIDTH)
        self.layers = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(2)))
        self.head = nn.Linear(WIDTH, ROWS, bias=False)
        if tied:
            self.head.weight = self.words.weight

    def forward(self, ids: torch.Tensor, labels: torch.Tensor) -> CausalLMOutput:
        x = self.words(ids) + self.kinds(ids % 7) + self.places(torch.arange(LENGTH))
        logits = self.head(self.layers(x).tanh())
        return CausalLMOutput(
            loss=nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        )


def batches(steps: int, rows: int) -> list[dict[str, torch.Tensor]]:
    """Ids that are repeated often, and paddings among them."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 8, (steps, rows, LENGTH), generator=generator)
    return [{"ids": each, "labels": each.roll(1, 0)} for each in ids]


def pipeline(n_stages: int, dp: int = 1, **options: Any) -> Any:
    given = {k: options.pop(k) for k in ("tied", "frozen", "by_count") if k in options}
    return pipecompile.compile(
        Words(**given), n_stages, dp, microbatches=2, optimizer=OPTIMIZER, **options
    )


def by_rows(pipe: Any) -> int:
    """How many tables' gradients are added by rows in the programs that run."""
    executors = next(iter(pipe._session.loaded.values())).executors.values()
    return sum(
        len(bound.program.module.graph.find_nodes(op="call_function", target=ops.accumulate_rows))
        for executor in executors
        for stage in executor.stages.values()
        for bound in stage.parts.values()
    )


@pytest.mark.parametrize("ids", [torch.int64, torch.int32])
@pytest.mark.parametrize(("padding", "by_count"), [(-1, False), (2, False), (50, True)])
@pytest.mark.parametrize(
    ("made", "sums"),
    [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.bfloat16),
    ],
)
def test_a_slot_adds_rows_as_it_adds_gradients(
    ids: torch.dtype, padding: int, by_count: bool, made: torch.dtype, sums: torch.dtype
) -> None:
    """The first is written over what is there; occurrences add up before the sum gets them."""
    rows, whole = (GradSlot(torch.full((ROWS, WIDTH), 7.0, dtype=sums)) for _ in range(2))
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        grad = torch.randn(6, LENGTH, WIDTH, generator=generator).to(made)
        read = torch.randint(0, 9, (6, LENGTH), generator=generator).to(ids)
        rows.add_rows(grad, read, ROWS, padding, by_count)
        Slot.add_rows(whole, grad, read, ROWS, padding, by_count)
        assert torch.equal(rows.tensor, whole.tensor)
        assert torch.equal(rows.tensor.signbit(), whole.tensor.signbit())


def test_occurrences_one_by_one_would_round_otherwise() -> None:
    """What the test above has to see: 2²⁴ + 1 + 1 is 2²⁴ in fp32, 2²⁴ + 2 is not."""
    slot = GradSlot(torch.full((ROWS, 1), 2.0**24))
    slot.fresh = False
    slot.add_rows(torch.ones(2, 1), torch.tensor([5, 5]), ROWS, -1, False)
    assert slot.tensor[5] == 2.0**24 + 2
    one_by_one = torch.full((ROWS, 1), 2.0**24)
    one_by_one.index_put_((torch.tensor([5, 5]),), torch.ones(2, 1), accumulate=True)
    assert one_by_one[5] == 2.0**24


CASES: list[tuple[int, dict[str, Any], int]] = [
    (2, {}, 2),
    (1, {"tied": True}, 1),  # the sum of both gradients is no table's
    (2, {"frozen": True, "by_count": True}, 1),
    (2, {"schedule": "zb_h1"}, 2),
]


@pytest.mark.parametrize(("n_stages", "options", "tables"), CASES, ids=str)
def test_a_pipeline_has_the_bits_of_one_device(
    n_stages: int, options: dict[str, Any], tables: int
) -> None:
    """Positions, of which all are read, are added whole."""
    given = batches(3, 4)
    pipe = pipeline(n_stages, **options)
    found = plain.train_pipeline(pipe, given)
    assert by_rows(pipe) == tables
    model = Words(**{k: v for k, v in options.items() if k != "schedule"})
    plain.assert_equal(found, plain.train(model, given, OPTIMIZER, 1, 2))


def test_the_part_of_a_tied_table_that_is_summed_once_is_added_by_rows() -> None:
    pipe = pipeline(2, tied=True, tied_grads="per_step")
    pipe.compile_for(batches(1, 4)[0])
    assert by_rows(pipe) == 2


def test_fused_programs_add_rows_too() -> None:
    given = batches(3, 4)
    with interpreted():
        pipe = pipeline(2, backend="inductor")
        found = plain.train_pipeline(pipe, given)
    assert by_rows(pipe) == 2
    plain.assert_equal(found, plain.train(Words(), given, OPTIMIZER, 1, 2))


def test_a_table_of_which_many_rows_are_read_is_added_whole() -> None:
    pipe = pipeline(1)
    pipe.compile_for(batches(1, 2 * (ROWS // LENGTH // rounding.FEW + 1))[0])
    assert by_rows(pipe) == 0


def train(zero: int, **options: Any) -> tuple[plain.Trained, int]:
    pipe = pipeline(1, 2, zero=zero, **options)
    return plain.train_pipeline(pipe, batches(3, 8)), by_rows(pipe)


@pytest.mark.parametrize("zero", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_replicas_have_the_bits_of_gradients_that_are_made_first(
    monkeypatch: pytest.MonkeyPatch, gang: Callable[[int], Gang], zero: int
) -> None:
    """At level 1 whole gradients leave with the last microbatch, at level 2 with every one."""
    made = gang(2).run(train, zero, **({"zero_keep": "nothing"} if zero == 2 else {}))
    monkeypatch.setattr(rounding, "FEW", ROWS)
    expected, _ = train(zero, **({"zero_keep": "nothing"} if zero == 2 else {}))
    for found, tables in made:
        assert tables == (2 if zero == 1 else 0)
        plain.assert_equal(replace(found, grads=[]), replace(expected, grads=[]))
