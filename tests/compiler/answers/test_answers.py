"""What forward asks the batch in Python: trained as plainly, whatever the batch answers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

import pipecompile
import pytest
import torch
from pipecompile import errors
from pipecompile.compiler.answers.guards import Guards
from pipecompile.compiler.capture.batch import flatten
from pipecompile.compiler.driver.builder import Builder
from pipecompile.runtime import loader
from support.gang import Gang
from support.matrix import quickly
from torch import nn
from torch.nn import functional as F  # noqa: N812

PAD, EOS, WORDS, WIDTH = 0, 7, 8, 4
SGD = partial(torch.optim.SGD, lr=0.1)

Batch = dict[str, torch.Tensor]
Forward = Callable[["Model", torch.Tensor, torch.Tensor], torch.Tensor]


class Model(nn.Module):
    """Words -> the loss of a label per row; ``how`` asks something on the way."""

    def __init__(self, how: Forward) -> None:
        super().__init__()
        self.how = how
        self.words = nn.Embedding(WORDS, WIDTH)
        self.first, self.rare, self.last = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.register_buffer("longest", torch.tensor(5))

    def forward(self, ids: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": self.how(self, ids, labels)}

    def hidden(self, ids: torch.Tensor) -> torch.Tensor:
        return self.first(self.words(ids)).tanh()  # (rows, length, width)

    def loss(self, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(self.last(x), labels)


def asserting(model: Model, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """XLM: the comparison is what is asked, and not the number."""
    lengths = (ids != PAD).sum(1)
    assert lengths.max().item() + 1 <= ids.shape[1] + 1, "too long"
    assert lengths.min().item() > 0, "an empty row"
    return model.loss(model.hidden(ids).sum(1) / lengths[:, None], labels)


def branching(model: Model, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """FSMT; a parameter is read in one of the branches alone."""
    x, padding = model.hidden(ids), ids == PAD
    if padding.any():
        x = model.rare(x).masked_fill(padding[..., None], 0.0)
    return model.loss(x.mean(1), labels)


def ending(model: Model, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """BART for classification."""
    x, ends = model.hidden(ids), ids.eq(EOS)
    if torch.unique_consecutive(ends.sum(1)).numel() > 1:
        raise ValueError("All examples must have the same number of <eos> tokens.")
    return model.loss(x[ends, :].view(len(ids), -1, WIDTH)[:, -1], labels)


def labelled(model: Model, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """DeBERTa for classification: rows without a label have none in the loss."""
    index = (labels >= 0).nonzero()
    if index.size(0) == 0:
        return model.hidden(ids).sum() * 0
    x = model.hidden(ids).mean(1)
    x = torch.gather(x, 0, index.expand(index.size(0), WIDTH))
    return model.loss(x, torch.gather(labels, 0, index.view(-1)))


def scattering(model: Model, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Longformer: some positions are taken out, and put back; tensors stand for sizes."""
    x, special = model.hidden(ids), ids == EOS
    most = special.sum(1).max()
    taken = x.new_zeros(len(ids), most, WIDTH)
    places = (torch.arange(most) < special.sum(1)[:, None]).nonzero(as_tuple=True)
    taken[places] = x[special]
    x = x.clone()
    x[special] = model.rare(taken)[places]
    picked = torch.masked_select(x, special[..., None])
    return model.loss(x[:, : ids.ne(PAD).sum(1).max()].mean(1), labels) + picked.square().mean()


def counting(model: Model, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Numbers that become sizes, and sets of values."""
    lengths = (ids != PAD).sum(1)
    parts = model.hidden(ids).flatten(0, 1).split([*lengths.tolist(), (ids == PAD).sum().item()])
    x = torch.stack([part.sum(0) for part in parts[: len(ids)]])
    kinds, where, counts = ids.unique(return_inverse=True, return_counts=True)
    weights = (1.0 / counts)[where].sum(1) + torch.bincount(ids.flatten()).max()
    again = model.words(kinds).repeat_interleave(counts, 0).mean()
    return model.loss(x * weights[:, None] + again, labels)


def constant(model: Model, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """What is made in forward, or a buffer that nobody changes; `nn.Transformer` looks at masks."""
    mask = torch.full((3, 3), float("-inf")).triu(1)
    mask[0, 1] = 0.0
    x = model.hidden(ids)
    if torch.equal(mask, torch.full((3, 3), float("-inf")).triu(1)):
        x = x + 1
    for _ in range(int(model.longest) - 3):
        x = x * 2
    return model.loss(x.mean(1), labels)


def batch(rows: int = 4, ends: int = 1, pads: int = 0, seed: int = 0) -> Batch:
    torch.manual_seed(seed)
    ids = torch.randint(1, EOS, (rows, 6))
    ids[:, 1 : 1 + ends] = EOS
    if pads:
        ids[:, -pads:] = PAD
    return {"ids": ids, "labels": torch.randint(0, WIDTH, (rows,))}


def alike(*words: int) -> Batch:
    """Rows that answer alike."""
    return batch() | {"ids": torch.tensor([words] * 4)}


def unlabelled(rows: int) -> Batch:
    made = batch()
    made["labels"][rows::2] = -1
    return made


def built(how: Forward) -> Model:
    torch.manual_seed(0)
    return Model(how)


def trained(model: nn.Module, batches: list[Batch]) -> list[torch.Tensor]:
    """Plainly, in two microbatches: losses, gradients, parameters and an evaluation."""
    optimizer, found = SGD(model.parameters()), []
    for each in batches:
        pieces = [dict(zip(each, part, strict=True)) for part in cut(each)]
        losses = [model(**piece)["loss"] for piece in pieces]
        for loss in losses:
            (loss / 2).backward()
        found += [torch.stack(losses).mean().detach()]
        found += [p.grad.clone() for p in model.parameters() if p.grad is not None]
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        losses = [model.eval()(**dict(zip(batches[-1], p, strict=True)))["loss"] for p in cut(each)]
    return [*found, *model.state_dict().values(), torch.stack(losses).mean()]


def cut(batch: Batch) -> Any:
    return zip(*(value.chunk(2) for value in batch.values()), strict=True)


def under_stages(pipe: Any, batches: list[Batch]) -> list[torch.Tensor]:
    found = []
    for each in batches:
        found += [pipe.forward_backward(each)]
        found += [p.grad.clone() for _, p in pipe.named_parameters() if p.grad is not None]
        pipe.optimizer.step()
        pipe.zero_grad()
    return [*found, *pipe.state_dict().values(), pipe.evaluate(batches[-1])]


def compiled(model: nn.Module, n_stages: int = 2, **options: Any) -> Any:
    return pipecompile.compile(model, n_stages, **{"optimizer": SGD, "microbatches": 2, **options})


CASES: dict[str, tuple[Forward, list[Batch]]] = {
    "assert": (asserting, [batch(), batch(pads=2)]),
    "branch": (branching, [batch(), batch(pads=2), batch(seed=1)]),
    "branch the other way": (branching, [batch(pads=1), batch()]),
    "ends": (ending, [batch(), batch(ends=2)]),
    "nonzero": (labelled, [batch(), unlabelled(1), unlabelled(0)]),
    "masks": (scattering, [batch(ends=2), batch(ends=1, pads=1)]),
    "numbers": (counting, [alike(1, 2, 2, 3, 5, 7), alike(1, 1, 4, 3, 0, 0)]),
    "constants": (constant, [batch(), batch(seed=1)]),
}


@pytest.mark.parametrize("n_stages", quickly([2], [1, 2]))
@pytest.mark.parametrize("name", quickly(["assert", "branch", "ends", "masks", "constants"], CASES))
def test_it_trains_as_plainly_whatever_the_batch_answers(name: str, n_stages: int) -> None:
    how, batches = CASES[name]
    model = built(how)
    expected = trained(copy.deepcopy(model), batches)
    found = under_stages(compiled(model, n_stages), batches)
    assert len(found) == len(expected)
    assert all(map(torch.equal, found, expected))


# -- batches that cannot be run -------------------------------------------------------------------


def mixed(one: Batch, other: Batch) -> Batch:
    """The first microbatch of one, the second of the other."""
    return {key: torch.cat([one[key][:2], other[key][2:]]) for key in one}


def with_an_empty_row() -> Batch:
    made = batch()
    made["ids"][3] = PAD
    return made


def with_two_ends() -> Batch:
    """In one row."""
    made = batch()
    made["ids"][0, 3] = EOS
    return made


def test_microbatches_that_do_not_agree_are_refused_by_line() -> None:
    pipe = compiled(built(branching))
    for odd in (mixed(batch(), batch(pads=1)), mixed(batch(pads=1), batch())):
        with pytest.raises(errors.BatchError) as caught:
            pipe.step(odd)
        assert "in module '(the model itself)', at " in str(caught.value)
        assert "(if padding.any():)" in str(caught.value)
    pipe.step(batch())
    with pytest.raises(errors.BatchError, match="one microbatch gives False and another gives"):
        pipe.step(mixed(batch(), batch(pads=1)))
    pipe.step(batch(pads=1))


@pytest.mark.parametrize(
    ("how", "odd", "message"),
    [
        pytest.param(
            asserting,
            with_an_empty_row(),
            "assert lengths.*AssertionError: an empty row",
            marks=pytest.mark.slow,
        ),
        (ending, with_two_ends(), "ValueError: All examples must have the same number of <eos>"),
    ],
)
def test_what_forward_raises_is_raised(how: Forward, odd: Batch, message: str) -> None:
    with pytest.raises(errors.BatchError, match=message):
        compiled(built(how)).step(odd)
    pipe = compiled(built(how))
    pipe.step(batch())
    for _ in range(2):
        with pytest.raises(errors.BatchError, match=message):
            pipe.step(odd)
    pipe.step(batch())


def grouped(model: Model, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Experts of transformers: traced, they take another kernel than untraced, which torch cannot
    trace in fp32."""
    x, padding = model.hidden(ids), ids == PAD
    if padding.any():
        x = x.masked_fill(padding[..., None], 0.0)
    x = x.sum(1)
    if torch.compiler.is_compiling():
        return model.loss(x @ model.rare.weight, labels)
    ends = torch.tensor([len(x)], dtype=torch.int32)
    return model.loss(F.grouped_mm(x, model.rare.weight[None], offs=ends), labels)


def test_what_a_kernel_refuses_while_it_is_traced_is_no_error_of_forward() -> None:
    model, batched = built(grouped), batch(pads=1)
    loss = compiled(model).step(batched)
    expected = [model(**{k: v[i : i + 2] for k, v in batched.items()})["loss"] for i in (0, 2)]
    torch.testing.assert_close(loss, torch.stack(expected).mean().detach())


def test_more_programs_than_a_few_are_refused() -> None:
    pipe = compiled(built(lambda model, ids, labels: labels[0].item() * model.hidden(ids).sum()))
    with (
        mock.patch.object(loader, "MOST_OUTCOMES", 3),
        mock.patch.object(Builder, "build", autospec=True, side_effect=Builder.build) as build,
    ):
        for label in (0, 1, 2, 1):
            pipe.step(batch() | {"labels": torch.full((4,), label)})
        assert build.call_count == 3
        with pytest.raises(
            errors.BatchError, match=r"labels\[0\].item.*program of its own, after 3"
        ):
            pipe.step(batch() | {"labels": torch.full((4,), 99)})


def test_a_comparison_asks_for_no_more_than_its_outcome() -> None:
    pipe = compiled(built(asserting))
    with mock.patch.object(Builder, "build", autospec=True, side_effect=Builder.build) as build:
        for pads in range(5):
            pipe.step(mixed(batch(pads=pads), batch(pads=1)))
        assert build.call_count == 1


def test_shapes_alone_answer_nothing() -> None:
    pipe = compiled(built(branching))
    with pytest.raises(errors.CaptureError, match="keep it a tensor"):
        pipe.compile_for(flatten(batch())[1])
    pipe.compile_for(batch(pads=1))
    with mock.patch.object(Builder, "build") as build:
        pipe.step(batch(pads=2))
    assert not build.called


def test_a_buffer_that_forward_updates_answers_nothing() -> None:
    def updating(model: Model, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        model.longest.add_(1)
        return model.hidden(ids).sum() * (2 if model.longest > 7 else 1)

    with pytest.raises(errors.CaptureError, match=r"buffer 'longest': forward updates it"):
        compiled(built(updating)).step(batch())


def test_a_buffer_that_is_loaded_with_another_answer_is_refused() -> None:
    pipe = compiled(built(constant))
    pipe.step(batch())
    state = pipe.state_dict()
    pipe.load_state_dict(state)
    pipe.step(batch())
    pipe.load_state_dict(state | {"longest": torch.tensor(6)})
    with pytest.raises(errors.CaptureError, match="by the values of buffer 'longest', which are"):
        pipe.step(batch())


def positions(model: Model, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """What transformers asks of positions that it has numbered itself: are rows packed?"""
    places = torch.arange(ids.shape[1]).expand(len(ids), -1)
    packed = (places.diff(dim=1) != 1).any()
    return model.loss(model.hidden(ids).mean(1), labels) * (2 if packed else 1)


@pytest.mark.parametrize(("how", "asked"), [(positions, 0), (constant, 0), (branching, 2)])
def test_what_no_batch_can_answer_otherwise_is_asked_once(how: Forward, asked: int) -> None:
    pipe = compiled(built(how))
    pipe.step(batch())
    with mock.patch.object(Guards, "difference", autospec=True, return_value=None) as difference:
        pipe.step(batch())
    assert difference.call_count == asked  # per microbatch


def test_results_of_a_forward_that_asks() -> None:
    model = built(branching).eval()
    pipe = compiled(copy.deepcopy(model))
    for each in (batch(), batch(pads=2)):
        pieces = [model(*part)["loss"].detach() for part in cut(each)]
        assert torch.equal(pipe.forward(each)["loss"], torch.stack(pieces).mean())


# -- between processes ----------------------------------------------------------------------------


def in_replicas(pads: tuple[int, int], first: bool) -> list[str]:
    """What a step says whose replicas have other batches; and one afterwards."""
    pipe = compiled(built(branching), n_stages=1, dp=2, microbatches=1)
    if first:
        pipe.step(batch())
    found = []
    for each in (pads, (1, 1)):
        try:
            pipe.step(batch(pads=each[pipe.data_shard]))
            found.append("right")
        except errors.PipecompileError as error:
            found.append(f"{type(error).__name__}: {error}")
    return found


@pytest.mark.parametrize("first", quickly([], [True, False]))
def test_replicas_that_do_not_agree_are_refused_on_every_rank(
    gang: Callable[[int], Gang], first: bool
) -> None:
    for before, after in gang(2).run(in_replicas, (1, 0), first):
        assert before.startswith("BatchError: forward decides by the values of the batch")
        assert "(if padding.any():), where one microbatch gives " in before
        assert after == "right"


def raising_in_one(pads: tuple[int, int]) -> str:
    pipe = compiled(built(asserting), n_stages=1, dp=2, microbatches=1)
    pipe.step(batch())
    with pytest.raises(errors.BatchError) as caught:
        pipe.step(batch(pads=pads[pipe.data_shard]))
    return str(caught.value)


@pytest.mark.slow
def test_what_forward_raises_in_one_replica_is_raised_on_every_rank(
    gang: Callable[[int], Gang],
) -> None:
    for text in gang(2).run(raising_in_one, (0, 6)):
        assert "AssertionError: an empty row" in text


def losses_of_stages() -> list[torch.Tensor]:
    how, batches = CASES["branch"]
    pipe = compiled(built(how))
    return [*map(pipe.step, batches), pipe.evaluate(batches[0])]


@pytest.mark.slow
def test_stages_in_processes_take_the_same_branch(gang: Callable[[int], Gang]) -> None:
    how, batches = CASES["branch"]
    pipe = compiled(built(how), 1)
    expected = [*map(pipe.step, batches), pipe.evaluate(batches[0])]
    for found in gang(2).run(losses_of_stages):
        assert all(map(torch.equal, found, expected))


def rounding(model: Model, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Whether a product of matrices is one of bf16 decides."""
    x = ids.float() / 3
    inexact = ((x @ x.mT).float() - (x[:, None] * x).sum(-1)).abs().max() > 1e-3
    return model.loss(model.hidden(ids).mean(1), labels) * (2 if inexact else 1)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_it_is_asked_in_the_precision_of_forward(precision: str) -> None:
    model = built(rounding)
    pipe = compiled(copy.deepcopy(model), precision=precision)
    found = [pipe.forward_backward(batch()) for _ in range(2)]
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16"):
        expected = torch.stack([model(*part)["loss"].detach() for part in cut(batch())]).mean()
    assert torch.equal(found[0], expected)
    assert torch.equal(found[1], expected)
