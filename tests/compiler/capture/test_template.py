"""Graphs that follow from one trace with symbols are those that tracing each size gives."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pipecompile
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pipecompile.compiler.capture.batch import BatchSpec, flatten
from pipecompile.compiler.capture.capture import (
    Captured,
    capture_evaluation,
    capture_forward,
    capture_training,
)
from pipecompile.compiler.capture.skeleton import Skeleton, skeleton_of
from pipecompile.compiler.general import shapes
from pipecompile.compiler.general.template import Template, capture_template
from pipecompile.compiler.ir.graph import tensors
from pipecompile.errors import CaptureError
from support import jobs, models
from support.matrix import quickly
from torch import nn
from torch.utils.checkpoint import checkpoint

CPU = torch.device("cpu")
WIDTH, WORDS = 8, 16


def sized(spec: BatchSpec, rows: int, length: int | None = None) -> BatchSpec:
    """With so many rows, and sequences of a length."""
    shapes = [
        (rows, *((length, *x.shape[2:]) if length and len(x.shape) > 1 else x.shape[1:]))
        for x in spec.leaves
    ]
    pairs = zip(spec.leaves, shapes, strict=True)
    return replace(spec, leaves=tuple(replace(leaf, shape=shape) for leaf, shape in pairs))


def generalised(skeleton: Skeleton, spec: BatchSpec, sequences: bool, wants: str) -> Template:
    varying = [{0, 1} if sequences and len(x.shape) > 1 else {0} for x in spec.leaves]
    kind = "results" if wants == "results" else "loss"
    trains = wants == "training"
    return capture_template(skeleton, spec, varying, None, CPU, kind, trains, (), None, weighs=True)


def traced(skeleton: Skeleton, spec: BatchSpec, wants: str) -> Captured:
    if wants == "results":
        return capture_forward(skeleton, spec, CPU, weighs=True)
    capture = capture_training if wants == "training" else capture_evaluation
    return capture(skeleton, spec, None, CPU, weighs=True)


def told(captured: Captured) -> Any:
    """All that the rest of the compiler reads."""
    loss, nodes = captured.loss, captured.graph.graph.nodes
    made = [each for node in nodes for each in tensors(node.meta.get("val"))]
    layouts = [(each.shape, each.stride(), each.dtype) for each in made]
    return (
        captured.graph.fingerprint(),
        layouts,
        captured.outputs,
        loss and replace(loss, counting=None),
        None if loss is None or loss.counting is None else loss.counting.inputs,
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "wants"),
    [
        ("gpt2 of one layer", "training"),
        *(
            pytest.param(name, wants, marks=pytest.mark.slow)
            for name in ("gpt2", "llama", "bert-mlm", "bert-classifier", "bart", "t5", "vit")
            for wants in ("training", "evaluation", "results")
        ),
    ],
)
def test_graphs_are_those_that_are_traced(name: str, wants: str) -> None:
    """Node by node, with the strides, for more and fewer rows and tokens."""
    small = name == "gpt2 of one layer"
    skeleton = skeleton_of(models.gpt2(n_layer=1) if small else models.build(name), CPU)
    spec = flatten(dict(models.tokens(4) if small else models.batches(name, 4, 1)[0]))[1]
    sequences = name != "vit"
    made = generalised(skeleton, spec, sequences, wants)
    for rows, length in ((6, 15),) if small else ((4, None), (6, 15), (3, 7)):
        other = sized(spec, rows, length if sequences else None)
        assert told(made.at(other)) == told(traced(skeleton, other, wants))


class Model(nn.Module):
    """Of a few operators, so that tracing takes little."""

    def __init__(self, between: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(WORDS, WIDTH), nn.Linear(WIDTH, WORDS)
        self.inner, self.between = nn.Linear(WIDTH, WIDTH), between

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        states = self.between(self.inner(self.embed(x)))
        logits = self.head(states).flatten(0, 1)
        return nn.functional.cross_entropy(logits, y.flatten())


def batch(rows: int, length: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(100 * rows + length)
    tokens = torch.randint(WORDS, (rows, length))
    return {"x": tokens, "y": torch.where(torch.rand(rows, length) < 0.3, -100, tokens)}


def masked(states: torch.Tensor) -> torch.Tensor:
    """As transformers does: a flag is set, if a mask that is made of sizes masks nothing."""
    place = torch.arange(states.shape[1])
    mask = (place[None] - place[:, None]).abs() < states.shape[1]
    if mask.all():
        return states.cumsum(1) / (place + 1)[:, None]
    return states


def averaged(states: torch.Tensor) -> torch.Tensor:
    pooled = nn.functional.avg_pool1d(states.mT, 2, ceil_mode=True).mT
    return states + pooled.repeat_interleave(2, 1)[:, : states.shape[1]] * states.shape[0] ** 0.5


def attended(states: torch.Tensor) -> torch.Tensor:
    heads = states.unflatten(-1, (2, -1)).transpose(1, 2)
    made = nn.functional.scaled_dot_product_attention(heads, heads, heads, is_causal=True)
    return made.transpose(1, 2).flatten(2) / states.shape[1]


WAYS = (masked, averaged, attended)


@cache
def template_of(way: Any) -> tuple[Skeleton, Template]:
    skeleton = skeleton_of(Model(way), CPU)
    spec = flatten(batch(4, 6))[1]
    return skeleton, generalised(skeleton, spec, True, "training")


@settings(max_examples=4, deadline=None)
@given(st.integers(2, 9), st.integers(2, 20))
def test_for_any_size(rows: int, length: int) -> None:
    check_at(attended, rows, length)


@pytest.mark.slow
@settings(max_examples=30, deadline=None)
@given(st.sampled_from(WAYS), st.integers(2, 9), st.integers(2, 20))
def test_for_many_sizes(way: Any, rows: int, length: int) -> None:
    check_at(way, rows, length)


def check_at(way: Any, rows: int, length: int) -> None:
    skeleton, made = template_of(way)
    spec = flatten(batch(rows, length))[1]
    try:
        found = made.at(spec)
    except CaptureError:
        assert way is averaged  # another operator for an odd length
        return
    assert told(found) == told(traced(skeleton, spec, "training"))


# -- in a pipeline -------------------------------------------------------------------------------


def piped(between: Callable[[torch.Tensor], torch.Tensor], **options: Any) -> Any:
    options = {"n_stages": 2, "microbatches": 1, "optimizer": jobs.OPTIMIZERS["adamw"]} | options
    return pipecompile.compile(Model(between), **options)


def plainly(between: Callable[[torch.Tensor], torch.Tensor], sizes: Any) -> list[torch.Tensor]:
    model, losses = Model(between), []
    optimizer = jobs.OPTIMIZERS["adamw"](model.parameters())
    for rows, length in sizes:
        losses.append(model(**batch(rows, length)))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    return [loss.detach() for loss in losses]


LENGTHS = [(4, 6), (4, 9), (4, 3), (3, 12), (4, 6), (2, 2), (5, 17)]


def test_one_row_of_any_length(traces: list[bool]) -> None:
    """The number of rows is no symbol then."""
    sizes = [(1, length) for length in (6, 9, 3, 12, 2)]
    pipe = piped(masked)
    losses = [pipe.step(batch(*size)) for size in sizes]
    assert all(map(torch.equal, losses, plainly(masked, sizes)))
    assert (traces.count(False), traces.count(True)) == (1, 1)


@pytest.mark.slow
@pytest.mark.parametrize("microbatches", quickly([4], [3, 4]))
def test_how_one_row_is_weighed(traces: list[bool], microbatches: int) -> None:
    """Told by more rows, also where the length is a symbol; 5 rows are cut into unequal ones."""
    pipe = piped(attended, microbatches=microbatches)
    model, alone = Model(attended).eval(), []
    for length in (6, 9, 12, 15, 7):
        given = batch(5, length)
        expected = model(**given).detach()
        torch.testing.assert_close(pipe.evaluate(given), expected, rtol=1e-5, atol=0)
        alone.append(traces.count(False))
    assert traces.count(True) == 2  # of one row, and of two
    assert len(set(alone[1:])) == 1


@pytest.mark.parametrize("dynamic", quickly(["auto"], ["auto", "off"]))
def test_training_on_all_lengths(traces: list[bool], dynamic: str) -> None:
    """One trace of the first length, and one with symbols."""
    pipe = piped(masked, dynamic=dynamic)
    losses = [pipe.step(batch(*size)) for size in LENGTHS]
    assert all(map(torch.equal, losses, plainly(masked, LENGTHS)))
    expected = (1, 1) if dynamic == "auto" else (len(set(LENGTHS)), 0)
    assert (traces.count(False), traces.count(True)) == expected


def test_numbers_of_rows_become_a_symbol_after_a_few(traces: list[bool]) -> None:
    sizes = [(rows, 6) for rows in (8, 7, 6, 5, 4, 3)]
    pipe = piped(attended)
    losses = [pipe.step(batch(*size)) for size in sizes]
    assert all(map(torch.equal, losses, plainly(attended, sizes)))
    assert (traces.count(False), traces.count(True)) == (shapes.ROWS, 1)


def branching(states: torch.Tensor) -> torch.Tensor:
    return states * 2 if states.shape[1] > 8 else states


def counting(states: torch.Tensor) -> torch.Tensor:
    """Decides by a value that follows from sizes."""
    place = torch.arange(states.shape[1])
    return states + 1 if (place < 8).all() else states


def once_more(states: torch.Tensor) -> torch.Tensor:
    """Needs the number itself."""
    return states * (1.0 if len(range(states.shape[1])) % 2 else 0.5)


def kept(states: torch.Tensor) -> torch.Tensor:
    made: torch.Tensor = checkpoint(torch.tanh, states, use_reentrant=False)
    return made


def cubed(states: torch.Tensor) -> torch.Tensor:
    made: torch.Tensor = Cubed.apply(states)
    return made


class Cubed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        (x,) = ctx.saved_tensors
        return 3 * x**2 * grads[0]


@pytest.mark.parametrize(
    ("way", "message"),
    [
        pytest.param(branching, "", marks=pytest.mark.slow),  # one graph for each side
        (counting, ""),
        (once_more, "is made for"),
        (kept, None),  # in some versions of torch a Function of its own
        pytest.param(cubed, "autograd.Function", marks=pytest.mark.slow),
    ],
)
def test_what_depends_on_a_size_is_traced_for_it(way: Any, message: str | None) -> None:
    """With a warning, once; None where that may be or not."""
    pipe = piped(way)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        losses = [pipe.step(batch(*size)) for size in LENGTHS]
    assert all(map(torch.equal, losses, plainly(way, LENGTHS)))
    said = [str(each.message) for each in told if "traced one by one" in str(each.message)]
    assert message is None or len(said) == bool(message)
    assert not message or re.search(message, said[0])


@pytest.mark.parametrize("way", quickly([branching], [branching, counting]))
def test_one_graph_for_the_sizes_on_each_side_of_a_branch(traces: list[bool], way: Any) -> None:
    """The first shape is on the other side, so that the next one is traced too, to compare."""
    sizes = [(4, 6), (4, 9), (4, 12), (3, 17), (4, 4), (4, 30), (4, 5), (3, 3)]
    pipe = piped(way)
    losses = [pipe.step(batch(*size)) for size in sizes]
    assert all(map(torch.equal, losses, plainly(way, sizes)))
    assert (traces.count(False), traces.count(True)) == (2, 2)
