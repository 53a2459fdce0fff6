"""Plain numbers of the batch that change from step to step: one program for all of their values."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pipecompile
import pytest
import torch
from pipecompile.errors import RankMismatchError
from support import plain
from support.annealed import (
    ANNEALED,
    LENGTH,
    ROWS,
    WORDS,
    Batch,
    Model,
    batches,
    penalised,
    piped,
    plainly,
    trained,
)
from support.gang import Gang
from support.matrix import quickly

# -- training -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n_stages", "dp", "microbatches", "precision"),
    quickly(
        [(2, 2, 2, None)],
        [(1, 1, 1, None), (2, 1, 2, None), (2, 2, 2, None), (3, 1, 1, "bf16"), (2, 2, 1, "bf16")],
    ),
)
def test_an_annealed_number_has_two_programs(
    traces: list[bool],
    told: Callable[[], list[str]],
    n_stages: int,
    dp: int,
    microbatches: int,
    precision: str | None,
) -> None:
    """The first value has a graph of its own, and all others share one."""
    given, counted = batches(ANNEALED), []
    pipe = piped(Model(), n_stages, dp=dp, microbatches=microbatches, precision=precision)
    found = trained(pipe, given[:2])
    counted.append(len(traces))
    rest = trained(pipe, given[2:])
    counted.append(len(traces))
    for mine, more in zip(vars(found).values(), vars(rest).values(), strict=True):
        mine.update(more) if isinstance(mine, dict) else mine.extend(more)
    dtype = torch.bfloat16 if precision else None
    plain.assert_equal(found, plainly(Model(), given, microbatches, dp, dtype))
    assert counted[0] == counted[1]
    assert not told()


def test_a_number_that_stays_is_a_literal(traces: list[bool]) -> None:
    pipe = piped(Model())
    given = [batch | {"weights": {"penalty": 0.5}} for batch in batches([0.5] * 3)]
    plain.assert_equal(trained(pipe, given[:1]), plainly(Model(), given[:1]))
    before = len(traces)
    pipe.step(given[1])
    assert len(traces) == before


@pytest.mark.slow
def test_off_is_off(traces: list[bool], told: Callable[[], list[str]]) -> None:
    """Each value is traced, and that is what was asked for."""
    given = batches(ANNEALED[:4])
    plain.assert_equal(trained(piped(Model(), dynamic="off"), given), plainly(Model(), given))
    assert len(traces) == len(given)
    assert not told()


@pytest.mark.slow
def test_labels_are_counted_as_without(traces: list[bool]) -> None:
    """Means over what is kept, with a term that is weighed by a number beside them."""
    given = batches(ANNEALED[:4], ignored=True)
    options: Any = {"n_stages": 2, "dp": 2, "microbatches": 2}
    pipes = [piped(Model(), **options, dynamic=how) for how in ("auto", "off")]
    found, expected = (trained(pipe, given) for pipe in pipes)
    plain.assert_equal(found, expected)
    notes = {note for pipe in pipes for note in _notes(pipe)}
    assert notes == {"a mean over what is kept of 'y'; a mean over rows; a part that is no row's"}


def _notes(pipe: Any) -> list[str]:
    """What is said of the loss, of each graph."""
    compiled = [loaded.compiled for loaded in pipe._session.loaded.values()]
    return [r.note for each in compiled for r in each.records if r.name == "loss"]


@pytest.mark.slow
def test_lengths_vary_too(traces: list[bool]) -> None:
    lengths = [6, 6, 9, 4, 12, 5]
    given = batches(ANNEALED)
    for batch, length in zip(given, lengths, strict=True):
        batch["x"] = batch["y"] = torch.randint(WORDS, (ROWS, length))
    found = trained(piped(Model(), 2, microbatches=1), given)
    plain.assert_equal(found, plainly(Model(), given))
    assert (traces.count(False), traces.count(True)) == (3, 1)


@pytest.mark.slow
def test_verified_beside_one_process() -> None:
    pipe = piped(Model(), 2, dp=2, microbatches=1, verify=3)
    for batch in batches(ANNEALED[:4]):
        pipe.step(batch)
    assert "step 3  parameters    identical to the last bit" in pipe.verification


# -- where it stands ----------------------------------------------------------------------------


@dataclasses.dataclass
class Options:
    beta: float
    mask: torch.Tensor


@dataclasses.dataclass
class Record:
    x: torch.Tensor
    options: Options


class Nested(Model):
    def forward(self, x: torch.Tensor, options: Any) -> torch.Tensor:  # type: ignore[override]
        return (super().forward(x, options.beta) * options.mask[..., None]).square().mean()


@pytest.mark.slow
def test_a_number_in_a_dataclass(traces: list[bool]) -> None:
    model, pipe = Nested(), pipecompile.compile(Nested(), 2, microbatches=2)
    x, mask = torch.randint(WORDS, (ROWS, LENGTH)), torch.ones(ROWS, LENGTH)
    for beta in ANNEALED:
        loss = pipe.evaluate(Record(x, Options(beta, mask)))
        pieces = zip(x.chunk(2), mask.chunk(2), strict=True)
        expected = [model(mine, Options(beta, kept)) for mine, kept in pieces]
        assert torch.equal(loss, torch.stack(expected).mean())
    assert len(traces) == 8  # training, and three here, each with one of twice the rows


def test_a_number_in_a_tuple(traces: list[bool]) -> None:
    def loss_fn(output: torch.Tensor, batch: Any) -> torch.Tensor:
        loss: torch.Tensor = output.square().mean() * batch[2] + batch[3].float().mean()
        return loss

    pipe, model = piped(Model(), loss_fn=loss_fn), Model()
    x = torch.randint(WORDS, (ROWS, LENGTH))
    for beta in ANNEALED:
        given = (x, beta, 2 * beta, x)
        assert torch.equal(pipe.evaluate(given), loss_fn(model(x, beta), given))
    assert len(traces) == 4  # training has decided the stages


@pytest.mark.parametrize("kind", quickly([int], [int, bool, np.float64, np.float32]))
def test_other_numbers_are_literals(traces: list[bool], kind: Any) -> None:
    pipe, model = piped(Model()), Model()
    before = []
    for i, batch in enumerate(batches([1.0] * 3)):
        given = batch | {"beta": kind(i % 2), "weights": {"penalty": 0.5}}
        expected = penalised(model(batch["x"], kind(i % 2)), given)
        assert torch.equal(pipe.evaluate(given), expected)
        before.append(len(traces))
    assert before == [2, 3, 3]


def test_modes_are_apart_and_the_users_weight_gets_a_float(traces: list[bool]) -> None:
    """A number may change in training and stay in evaluation."""
    seen: list[Any] = []

    def weight(batch: Batch) -> float:
        seen.append(batch["beta"])
        return 1.0

    pipe, given = piped(Model(), 2, microbatches=2, loss_weight=weight), batches(ANNEALED)
    for batch in given:
        pipe.step(batch)
        pipe.evaluate(batch | {"beta": 0.5, "weights": {"penalty": 1.0}})
    assert {type(each) for each in seen} == {float}
    assert set(ANNEALED) < set(seen)
    specs = {request.mode: str(request.spec) for request in pipe._session.loaded}
    assert "beta: a number" in specs["train"]
    assert "beta" not in specs["evaluate"]


# -- processes ----------------------------------------------------------------------------------


def annealed_in_processes(n_stages: int) -> tuple[list[bool], torch.Tensor]:
    """The first stage has the tokens, the last the labels."""
    pipe = piped(Model(), n_stages, microbatches=2)
    needs, losses = [], []
    for batch in batches(ANNEALED):
        needs.append(pipe.needs_data)
        losses.append(pipe.step(batch if pipe.needs_data else None))
    return needs, torch.stack(losses)


def deciding_in_processes(n_stages: int) -> torch.Tensor:
    pipe = piped(Model(deciding), n_stages, microbatches=2)
    return torch.stack([pipe.step(each if pipe.needs_data else None) for each in batches(ANNEALED)])


def deciding(x: torch.Tensor, beta: Any) -> torch.Tensor:
    return x * beta if beta > 0.3 else x.tanh()


def unlike_in_processes(dp: int) -> str:
    """The last rank has another number."""
    pipe = piped(Model(), 1, dp=dp)
    first, second = batches(ANNEALED[:2])
    for step in (first, second, first):
        pipe.step(step)
    rank = int(os.environ["RANK"])
    try:
        pipe.step(first | {"beta": 0.3 + rank // (dp - 1)})
    except RankMismatchError as error:
        return str(error)
    return ""


@pytest.mark.slow
@pytest.mark.parametrize("n_stages", [2, 3])
def test_stages_in_processes(gang: Callable[[int], Gang], n_stages: int) -> None:
    """Those in the middle need no batch for a number."""
    expected = torch.stack(plainly(Model(), batches(ANNEALED), 2).losses)
    for rank, (needs, losses) in enumerate(gang(n_stages).run(annealed_in_processes, n_stages)):
        assert needs[1:] == [rank in (0, n_stages - 1)] * (len(ANNEALED) - 1)
        assert torch.equal(losses, expected)
    expected = torch.stack(plainly(Model(deciding), batches(ANNEALED), 2).losses)
    for losses in gang(n_stages).run(deciding_in_processes, n_stages):
        assert torch.equal(losses, expected)


@pytest.mark.slow
@pytest.mark.parametrize("dp", quickly([2], [2, 3]))
def test_replicas_have_the_same_numbers(gang: Callable[[int], Gang], dp: int) -> None:
    for text in gang(dp).run(unlike_in_processes, dp):
        assert re.search(
            rf"rank 0 was called with .*'beta': 0\.3.* rank {dp - 1} with .*'beta': 1\.3", text
        )
