"""Losses in pieces are those of torch, and so are their gradients, whatever the pieces."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pipecompile.compiler.losses import logits, pieces
from pipecompile.compiler.memory.inside import inside
from pipecompile.compiler.memory.meter import StorageMeter
from torch import fx
from torch.nn.functional import cross_entropy, linear

IGNORED = -100
BOUND = {torch.float64: 1e-14, torch.float32: 2e-6, torch.bfloat16: 1e-2}
"""Of what differs, relative to the largest value of a tensor."""
CAPPED = "to:float32 div:3.0 tanh mul:3.0 add"

RAW = {pieces.FORWARD: pieces.chunked_loss, pieces.BACKWARD: pieces.chunked_loss_backward}


def made(tokens: int, classes: int, dtype: torch.dtype) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Hidden states, weight and bias that want gradients; labels of which some are ignored."""
    torch.manual_seed(tokens)
    shapes = (tokens, 8), (classes, 8), (classes,)
    parts = [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]
    labels = torch.randint(classes, (tokens,))
    labels[::3] = IGNORED
    return parts, labels


def largest_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    difference = (found.double() - expected.double()).abs().max()
    return float((difference / expected.double().abs().max().clamp_min(1e-30)).detach())


@settings(max_examples=40)
@given(
    dtype=st.sampled_from(list(BOUND)),
    tokens=st.integers(2, 40),
    classes=st.integers(2, 400),
    rows=st.integers(1, 50),
    smoothing=st.sampled_from([0.0, 0.1]),
    weighs=st.booleans(),
    capped=st.booleans(),
    biased=st.booleans(),
)
def test_losses_and_gradients_are_those_of_torch(
    dtype: torch.dtype,
    tokens: int,
    classes: int,
    rows: int,
    smoothing: float,
    weighs: bool,
    capped: bool,
    biased: bool,
) -> None:
    (hidden, weight, bias), labels = made(tokens, classes, dtype)
    given_bias = bias if biased else None
    capped = capped and dtype is not torch.float64
    scores = linear(hidden, weight, given_bias)
    offset = torch.randn(1, classes) if capped else None
    if offset is not None:
        scores = torch.tanh(scores.float() / 3.0) * 3.0 + offset
    wide = scores.to(logits.wide_of(scores.dtype))
    counts = torch.rand(classes, dtype=wide.dtype) + 0.1 if weighs else None
    expected = (
        cross_entropy(wide, labels, counts, label_smoothing=smoothing, reduction="none"),
        torch.logsumexp(wide, -1),
    )
    told = (counts, IGNORED, smoothing, CAPPED if capped else "", rows)
    found = pieces.chunked_loss(hidden, weight, given_bias, offset, labels, *told)
    tangents = [torch.randn(tokens, dtype=wide.dtype) for _ in range(2)]
    wanted = [hidden, weight, *([bias] if biased else [])]
    pairs = list(zip(found, expected, strict=True))
    grads = [
        torch.autograd.grad(sum(x @ t for x, t in zip(values, tangents, strict=True)), wanted)
        for values in (found, expected)
    ]
    pairs += zip(*grads, strict=True)
    for mine, theirs in pairs:
        assert (mine.dtype, mine.shape) == (theirs.dtype, theirs.shape)
        assert largest_error(mine, theirs) < BOUND[dtype]


def test_the_gradient_of_a_narrow_weight_has_the_bits_of_one_product() -> None:
    """Pieces are cut along the classes: nothing adds up over them but the hidden states'."""
    (hidden, weight, bias), labels = made(40, 300, torch.bfloat16)
    whole = cross_entropy(linear(hidden, weight, bias).float(), labels)
    made_of = pieces.chunked_loss(
        hidden, weight, bias, None, labels, None, IGNORED, 0.0, "to:float32", 3
    )
    mine = made_of[0].sum() / (labels != IGNORED).sum()
    first, second = (torch.autograd.grad(loss, [weight, bias]) for loss in (whole, mine))
    assert all(map(torch.equal, first, second))


@pytest.mark.parametrize(
    "wants", [(1, 0, 0), (0, 1, 1), (0, 0, 1), (1, 0, 1)], ids=["hidden", "weights", "bias", "both"]
)
def test_only_gradients_that_are_wanted_are_made(wants: tuple[int, ...]) -> None:
    parts, labels = made(9, 70, torch.float32)
    expected = torch.autograd.grad(cross_entropy(linear(*parts), labels, reduction="sum"), parts)
    for part, wanted in zip(parts, wants, strict=True):
        part.requires_grad_(bool(wanted))
    losses, _ = pieces.chunked_loss(*parts, None, labels, None, IGNORED, 0.0, "", 2)
    losses.sum().backward()
    for part, wanted, grad in zip(parts, wants, expected, strict=True):
        assert (part.grad is not None) == bool(wanted)
        assert part.grad is None or largest_error(part.grad, grad) < BOUND[torch.float32]


def test_classes_that_are_masked_out_make_no_piece_of_nothing() -> None:
    (hidden, weight, _), _ = made(6, 200, torch.float32)
    offset = torch.full((1, 200), -torch.inf)
    offset[:, 150:190] = 0
    labels = torch.full((6,), 160)
    for rows in (1, 2, 6):
        args = (hidden, weight, None, offset, labels, None, IGNORED, 0.0, "add", rows)
        losses, _ = pieces.chunked_loss(*args)
        expected = cross_entropy(linear(hidden, weight) + offset, labels, reduction="none")
        assert largest_error(losses, expected) < BOUND[torch.float32]
        assert all(g.isfinite().all() for g in torch.autograd.grad(losses.sum(), [hidden, weight]))


def test_a_tangent_that_is_infinite_does_not_reach_ignored_labels() -> None:
    """A microbatch that keeps nothing divides by zero; its gradients are zero as torch's are."""
    (hidden, weight, _), labels = made(5, 20, torch.float32)
    labels[:] = IGNORED
    losses, _ = pieces.chunked_loss(hidden, weight, None, None, labels, None, IGNORED, 0.0, "", 2)
    grads = torch.autograd.grad(losses.sum() / (labels != IGNORED).sum(), [hidden, weight])
    assert all(not grad.any() for grad in grads)


@pytest.mark.parametrize("label", [-1, 20])
def test_a_label_that_is_no_class_is_an_error(label: int) -> None:
    parts, labels = made(5, 20, torch.float32)
    labels[1] = label
    with pytest.raises(IndexError, match=f"Target {label} is out of bounds"):
        pieces.chunked_loss(*parts, None, labels, None, IGNORED, 0.0, "", 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("steps", ["to:float32", "to:float32 div:3.0 tanh mul:3.0"])
def test_the_memory_that_is_counted_is_what_it_takes(dtype: torch.dtype, steps: str) -> None:
    """And a small part of what all logits take."""
    (hidden, weight, bias), labels = made(256, 4096, dtype)
    parts, told = [x.detach() for x in (hidden, weight, bias)], (None, IGNORED, 0.0, steps, 16)
    forward = [*parts, None, labels, *told]
    losses, lse = pieces.chunked_loss(*forward)
    backward = [losses, None, *forward[:6], lse, *told[1:], [True, True, True]]
    for target, args in ((pieces.FORWARD, forward), (pieces.BACKWARD, backward)):
        counted, results = _counted(target, args)
        measured = _measured(target, args)
        assert measured <= 1.02 * (counted + results)
        assert counted + results < 1.25 * measured
        assert counted < 256 * 4096 * 4 / 4


def _counted(target: Any, args: list[Any]) -> tuple[int, int]:
    """Scratch bytes of a node, and those of its results."""
    graph = fx.Graph()
    nodes = []
    for i, arg in enumerate(args):
        nodes.append(graph.placeholder(f"a{i}") if isinstance(arg, torch.Tensor) else arg)
        if isinstance(arg, torch.Tensor):
            nodes[-1].meta["val"] = arg
    node = graph.call_function(target, tuple(nodes))
    node.meta["val"] = target(*args)
    work = inside(node)
    assert work is not None
    return work.scratch_bytes, sum(t.nbytes for t in node.meta["val"])


def _measured(target: Any, args: list[Any]) -> int:
    meter = StorageMeter()
    meter.hold(arg for arg in args if isinstance(arg, torch.Tensor))
    before = meter.current_bytes
    with meter:
        RAW[target]._init_fn(*args)
    return meter.peak_bytes - before
