"""Batches that a callable cuts: flattened ones, many documents in one row."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from typing import Any

import pipecompile
import pytest
import torch
from pipecompile.data import cut_documents
from pipecompile.errors import BatchError, LossError, OptionError, RankMismatchError
from support import jobs, models, plain
from support.gang import Gang
from support.matrix import quickly
from support.packed import (
    WIDTH,
    WORDS,
    Batch,
    Bordered,
    accumulated,
    bordered,
    cut_borders,
    flattened,
    kept,
    tokens,
    trained,
    trained_plainly,
)

STEPS = ([3, 3, 3, 3, 3, 3, 3], [3, 3, 3, 3, 3, 3, 3, 3, 3, 3], [5, 4, 1])
PAIRS = ([2, 3] * 12, [3, 2] * 12, [2, 3] * 12)
"""Two documents in every piece: of one alone transformers masks nothing."""


def llama(n_stages: int, dp: int, microbatches: int, **options: Any) -> Any:
    model = models.build("llama")
    model.config.use_cache = False  # or transformers does not look for packed documents
    return pipecompile.compile(
        model,
        n_stages,
        dp,
        microbatches=microbatches,
        cut=cut_documents,
        optimizer=jobs.OPTIMIZERS["adamw"],
        **options,
    )


def own(n_stages: int, dp: int, microbatches: int, loss: str = "tokens", **options: Any) -> Any:
    options = {"cut": cut_borders, "optimizer": jobs.OPTIMIZERS["adamw"]} | options
    return pipecompile.compile(Bordered(loss), n_stages, dp, microbatches=microbatches, **options)


def whole(model: Any, batch: Batch) -> tuple[torch.Tensor, Batch]:
    """Of one forward of all of it."""
    model = copy.deepcopy(model)
    loss = model(**batch)["loss"]
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters()}


def assert_close(loss: torch.Tensor, grads: Batch, expected: tuple[torch.Tensor, Batch]) -> None:
    torch.testing.assert_close(loss, expected[0], rtol=1e-6, atol=0)
    for name, grad in expected[1].items():
        assert (grads[name] - grad).norm() <= 1e-5 * grad.norm() + 1e-9, name


# -- the bits of one device -----------------------------------------------------------------------

CASES = [(s, dp, m) for s in (1, 2, 3) for dp in (1, 2, 3) for m in (1, 2, 3, 4)]


@pytest.mark.filterwarnings("error::UserWarning")
@pytest.mark.parametrize(("n_stages", "dp", "microbatches"), quickly([(2, 1, 2)], CASES))
def test_documents_train_as_on_one_device(n_stages: int, dp: int, microbatches: int) -> None:
    """Some steps have fewer documents than microbatches."""
    batches = [bordered(lengths, seed) for seed, lengths in enumerate(STEPS)]
    found = trained(own(n_stages, dp, microbatches), batches, cut_borders)
    expected = trained_plainly(Bordered(), batches, dp, microbatches, cut_borders, tokens)
    assert plain.equal(found, expected)
    assert_close(found[0][0], found[1][0], whole(Bordered(), batches[0]))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("n_stages", "dp", "microbatches"), quickly([(2, 1, 2)], [c for c in CASES if c[0] < 4])
)
def test_a_flattened_llama_trains_as_on_one_device(
    n_stages: int, dp: int, microbatches: int
) -> None:
    batches = [flattened(lengths, seed) for seed, lengths in enumerate(PAIRS)]
    pipe = llama(n_stages, dp, microbatches)
    found = trained(pipe, batches, cut_documents)
    model = models.build("llama")
    model.config.use_cache = False
    first = whole(model, batches[0])
    expected = trained_plainly(model, batches, dp, microbatches, cut_documents, kept)
    assert plain.equal(found, expected)
    assert_close(found[0][0], found[1][0], first)
    joined = pipe.forward(batches[0]).logits
    with torch.no_grad():
        torch.testing.assert_close(joined, model.eval()(**batches[0]).logits, rtol=1e-4, atol=1e-5)


def in_processes(n_stages: int, dp: int, microbatches: int, **options: Any) -> Any:
    pipe = own(n_stages, dp, microbatches, **options)
    batches = [bordered(lengths, seed) for seed, lengths in enumerate(([3, 4, 3, 4], [4]))]
    found = trained(pipe, batches, cut_borders)
    mine = [cut_borders(each, pipe.data_shards)[pipe.data_shard] for each in batches]
    return *found, pipe.evaluate(mine[0]), pipe.evaluate(iter(mine))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("n_stages", "dp", "microbatches", "options"),
    [
        (2, 1, 2, {}),
        (1, 2, 2, {}),
        (1, 2, 3, {}),
        (2, 2, 2, {}),
        (1, 3, 2, {}),
        (3, 1, 4, {"schedule": "zb_h1"}),
    ],
)
def test_in_processes_too(
    gang: Callable[[int], Gang], n_stages: int, dp: int, microbatches: int, options: dict[str, Any]
) -> None:
    """With a share of each batch, of which the last has a document for one of the replicas."""
    losses, grads, state, one, every = in_processes(n_stages, dp, microbatches)
    answers = gang(n_stages * dp).run(in_processes, n_stages, dp, microbatches, **options)
    for found in answers:
        assert plain.equal((found[0], *found[2:]), (losses, state, one, every))
        for mine, theirs in zip(found[1], grads, strict=True):
            assert all(torch.equal(grad, theirs[name]) for name, grad in mine.items())


def test_documents_do_not_see_each_other() -> None:
    """What one says changes no bit of what is computed of the others."""
    pipe, batch = own(2, 1, 2), bordered([3, 4, 5, 2])
    other = copy.deepcopy(batch)
    other["input_ids"][3:7] = (other["input_ids"][3:7] + 1) % 5
    first, second = (pipe.forward(each) for each in (batch, other))
    apart = [*range(3), *range(7, 14)]
    assert torch.equal(first["each"][apart], second["each"][apart])
    assert not torch.equal(first["each"][3:7], second["each"][3:7])

    def of_others(batch: Batch) -> dict[str, torch.Tensor]:
        pipe = own(2, 1, 2, "kept")
        batch = batch | {"targets": batch["targets"].index_fill(0, torch.arange(3, 7), -100)}
        pipe.forward_backward(batch)
        return {name: param.grad for name, param in pipe.named_parameters()}

    mine, theirs = of_others(batch), of_others(other)
    assert plain.equal(mine, theirs)


@pytest.mark.slow
def test_the_first_steps_are_compared_too() -> None:
    (pipe := own(2, 1, 2, verify=1)).step(bordered([4, 3]))
    assert "gradients     identical to the last bit" in pipe.verification
    assert "outputs were not compared: cut=" in pipe.verification


# -- losses ---------------------------------------------------------------------------------------

KNOWN = ["tokens", "elements", "divided", "kept", "sum", "documents", "by documents", "two"]


@pytest.mark.filterwarnings("error::UserWarning")
@pytest.mark.slow
@pytest.mark.parametrize("loss", [*KNOWN, "means of documents"])
def test_means_are_those_of_the_whole_batch(loss: str) -> None:
    """Over tokens or over documents, also in one data set."""
    pipe = own(1, 1, 2, loss)
    batches = [bordered(lengths, i) for i, lengths in enumerate(([3, 4, 2, 6, 1], [4, 2, 6]))]
    for batch in batches:
        found = pipe.forward_backward(batch)
        grads = {n: p.grad.clone() for n, p in pipe.named_parameters()}
        assert_close(found, grads, whole(Bordered(loss), batch))
        pipe.zero_grad()
    every = bordered([3, 4, 2, 6, 1, 4, 2, 6])
    for key in ("input_ids", "targets"):
        every[key] = torch.cat([batch[key] for batch in batches])
    expected = Bordered(loss)(**every)["loss"].detach()
    torch.testing.assert_close(pipe.evaluate(iter(batches)), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("loss", quickly(["root"], ["shorter", "by the end", "root", "product"]))
def test_what_cannot_be_told_is_said(loss: str) -> None:
    with pytest.warns(UserWarning, match=r"cannot be told from its graph.*loss_weight= says"):
        own(1, 1, 2, loss).forward_backward(bordered([3, 4, 2]))
    with pytest.raises(LossError, match="cannot be told"):
        own(1, 1, 2, loss, loss_normalization="batch").step(bordered([3, 4, 2]))


@pytest.mark.slow
@pytest.mark.filterwarnings("error::UserWarning")
def test_weights_of_the_users() -> None:
    """Of pieces with numbers of their own."""

    def counts(batch: dict[str, Any]) -> int:
        assert batch["max_seqlen"] == batch["cu_seqlens"].diff().max()
        return len(batch["targets"])

    class Told(Bordered):
        def forward(self, max_seqlen: int, **batch: torch.Tensor) -> dict[str, torch.Tensor]:  # type: ignore[override]
            return super().forward(**batch)

    batch = bordered([3, 4, 2, 6])
    pipe = pipecompile.compile(
        Told("root"), 1, microbatches=2, cut=cut_borders, loss_weight=counts, optimizer=jobs.SGD
    )
    found = pipe.forward_backward(batch | {"max_seqlen": 6})
    model = Bordered("root")
    expected = accumulated(model, batch, 1, 2, cut_borders, tokens)
    assert torch.equal(found, expected)
    pairs = zip(pipe.parameters(), model.parameters(), strict=True)
    assert all(torch.equal(p.grad, q.grad) for p, q in pairs)


@pytest.mark.slow
@pytest.mark.filterwarnings("error::UserWarning")
def test_one_document_alone_says_nothing_of_how_it_is_cut() -> None:
    """And a piece that is None counts nothing, whichever it is."""

    def backwards(batch: Batch, pieces: int) -> list[Batch | None]:
        made = cut_borders(batch, pieces)[::-1]
        return [piece if len(piece["targets"]) else None for piece in made]

    pipe = own(1, 1, 2, cut=backwards)
    for lengths in ([5], [5, 2], [3]):
        batch = bordered(lengths)
        expected = Bordered()(**batch)["loss"].detach()
        torch.testing.assert_close(pipe.evaluate(batch), expected, rtol=1e-6, atol=0)


# -- outputs --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_outputs_are_joined_where_they_differ() -> None:
    pipe, batch = own(1, 2, 1), bordered([3, 4])
    found, expected = pipe.forward(batch), Bordered()(**batch)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value.detach(), rtol=1e-5, atol=1e-6)


class Other(Bordered):
    """Returns what cannot be joined."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what = what

    def forward(self, **batch: torch.Tensor) -> Any:  # type: ignore[override]
        made = super().forward(**batch)
        other = {
            "shorter": made["each"][1:],
            "mean": made["logits"].mean(0),
            "pairs": made["logits"] @ made["logits"].T,
        }
        return made | {"other": other[self.what]}


@pytest.mark.parametrize("what", quickly(["mean"], ["shorter", "mean", "pairs"]))
def test_outputs_that_cannot_be_joined(what: str) -> None:
    pipe = pipecompile.compile(Other(what), 1, microbatches=2, cut=cut_borders)
    with pytest.raises(
        BatchError, match=r"'other' from each of 2 micro.*: compile with microbatch"
    ):
        pipe.forward(bordered([3, 4, 2]))


# -- data sets ------------------------------------------------------------------------------------


def collated(samples: list[Batch]) -> Batch:
    lengths = [len(each["input_ids"]) for each in samples]
    batch = bordered(lengths)
    for key in ("input_ids", "targets"):
        batch[key] = torch.cat([each[key] for each in samples])
    return batch


def loaded(n_stages: int, dp: int, whole_batches: bool) -> Any:
    """Losses of the batches of a data set, and that of all; the last batch has one document."""
    dataset = [bordered([2 + i % 2], i) for i in range(7)]
    dataset = [{key: each[key] for key in ("input_ids", "targets")} for each in dataset]
    pipe = own(n_stages, dp, 2)
    loader = pipe.loader(dataset, 3, collate_fn=collated, whole_batches=whole_batches)
    losses = torch.stack([pipe.step(batch) for batch in loader])
    return losses, pipe.evaluate(loader, progress=False)


@pytest.mark.slow
@pytest.mark.parametrize("whole_batches", [True, False])
def test_data_sets(gang: Callable[[int], Gang], whole_batches: bool) -> None:
    """With whole batches that are cut in every process, the bits of one process."""
    expected = loaded(1, 2, whole_batches)
    for found in gang(2).run(loaded, 1, 2, whole_batches):
        if whole_batches:
            assert plain.equal(found, expected)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=0)


class Layers(torch.nn.Module):
    """Of which a stage in the middle reads nothing of the batch."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = torch.nn.Embedding(WORDS, WIDTH), torch.nn.Linear(WIDTH, WORDS)
        self.layers = torch.nn.ModuleList(torch.nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, input_ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        states = self.embed(input_ids)
        for layer in self.layers:
            states = states + layer(states).tanh()
        each = torch.nn.functional.cross_entropy(self.head(states), targets, reduction="none")
        return each.mean()


def without_data(gives: bool) -> Any:
    batches = [bordered(lengths) for lengths in ([3, 4, 2], [5], [2, 2, 6])]

    def cut(batch: Batch, pieces: int) -> list[Batch]:
        """Tokens that are documents of two."""
        borders = torch.arange(0, len(batch["targets"]) + 1, 2)
        borders[-1:] = len(batch["targets"])
        made = cut_borders(batch | {"cu_seqlens": borders}, pieces)
        return [{key: piece[key] for key in batch} for piece in made]

    batches = [{key: each[key] for key in ("input_ids", "targets")} for each in batches]
    pipe = pipecompile.compile(
        Layers(), 3, microbatches=2, cut=cut, optimizer=jobs.SGD, example_batch=batches[0]
    )
    given = [each if gives or pipe.needs_data else None for each in batches]
    losses = torch.stack([pipe.step(each) for each in given])
    return losses, pipe.state_dict(), pipe.needs_data


@pytest.mark.slow
def test_stages_that_read_nothing_are_given_nothing(gang: Callable[[int], Gang]) -> None:
    *expected, _ = without_data(gives=True)
    answers = gang(3).run(without_data, gives=False)
    assert [needs for *_, needs in answers] == [True, False, True]
    assert all(plain.equal(found, expected) for *found, _ in answers)


# -- what cannot be ------------------------------------------------------------------------------


def lost(batch: Batch, pieces: int) -> list[Batch]:
    return [*cut_borders(batch, pieces)[:-1], None]


CUTS: dict[str, tuple[Callable[..., Any], str]] = {
    "raises": (lambda batch, pieces: batch["words"], "cut= raised KeyError: 'words'"),
    "tensor": (lambda batch, pieces: batch["input_ids"], "asked for 2 pieces and returned no list"),
    "three": (lambda batch, pieces: [batch] * 3, "asked for 2 pieces and returned 3 of them"),
    "nothing": (lambda batch, pieces: [None] * pieces, "cut= left nothing of the batch"),
    "copies": (lambda batch, pieces: [batch] * pieces, r"returned the whole batch \(.*\) 2 times"),
    "key": (
        lambda batch, pieces: [{"input_ids": batch["input_ids"]}] * pieces,
        "piece 0 of cut= lacks the tensor 'cu_seqlens'",
    ),
    "more": (
        lambda batch, pieces: [
            piece | {"x": torch.ones(2)} for piece in cut_borders(batch, pieces)
        ],
        "piece 0 of cut= has a tensor 'x', which the batch does not have",
    ),
    "dtype": (
        lambda batch, pieces: [
            piece | {"targets": piece["targets"].float()} for piece in cut_borders(batch, pieces)
        ],
        r"piece 0 of cut= has targets: float32\[\d+\], and the batch targets: int64\[9\]",
    ),
    "structure": (
        lambda batch, pieces: [piece | {"n": 1} for piece in cut_borders(batch, pieces)],
        "piece 0 of cut= has another structure than the batch",
    ),
    "text": (lambda batch, pieces: ["text"] * pieces, "piece 0 of cut=: .* holds no tensor"),
    "lost": (lost, r"cut= loses a part of 'input_ids': its pieces have 3 of 9 in dimension 0"),
}


@pytest.mark.parametrize(("cut", "message"), CUTS.values(), ids=CUTS)
def test_cuts_that_are_none(cut: Callable[..., Any], message: str) -> None:
    with pytest.raises(BatchError, match=message):
        own(1, 1, 2, cut=cut).step(bordered([3, 4, 2]))


def test_calls_that_do_not_fit() -> None:
    with pytest.raises(OptionError, match="cut=2 is not callable"):
        own(1, 1, 2, cut=2)
    with pytest.raises(OptionError, match='cut= beside n_stages="auto"'):
        pipecompile.compile(
            Bordered(), "auto", cut=cut_borders, devices=2, example_batch=bordered([2, 3])
        )
    spec = pipecompile.compiler.capture.batch.flatten(bordered([2, 3]), by_rows=False)[1]
    with pytest.raises(BatchError, match="cut= cuts a batch by its values"):
        own(1, 1, 2).compile_for(spec)
    with pytest.raises(BatchError, match="the batch has nothing in it"):
        own(1, 1, 2).step(bordered([]))
    with pytest.raises(BatchError, match=r"disagree on dim 0.*; cut= cuts in another way"):
        own(1, 1, 2, cut=None).step(bordered([2, 3]))


@pytest.mark.slow
def test_it_is_compiled_before_a_step() -> None:
    batch = bordered([3, 4, 3, 4])
    pipe = own(2, 1, None, example_batch=batch)
    assert pipe.plan.microbatches == 8
    before = set(pipe._session.loaded)
    assert {request.spec.leaves[0].shape for request in before} == {(4,), (3,)}
    pipe.step(batch)
    assert set(pipe._session.loaded) == before


def misled(kind: str) -> str:
    """One of two ranks cuts otherwise, or cannot."""
    rank = int(os.environ["RANK"])

    def cut(batch: Batch, pieces: int) -> list[Batch]:
        if kind == "fails" and rank:
            raise KeyError("words")
        made = cut_borders(batch, pieces)
        return made[::-1] if kind == "differs" and rank else made

    pipe = own(2, 1, 2, cut=cut)
    with pytest.raises((BatchError, RankMismatchError)) as raised:
        pipe.step(bordered([3, 4, 2]))
    return str(raised.value)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("fails", "cut= raised KeyError: 'words'"),
        ("differs", "ranks 0 and 1 are stages of one replica, and cut= made"),
    ],
)
def test_all_ranks_hear_of_it(gang: Callable[[int], Gang], kind: str, message: str) -> None:
    for said in gang(2).run(misled, kind):
        assert message in said
