"""Methods of compression on gradients of any shape, between replicas of one process."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pipecompile.compiler.compression.methods import Method
from pipecompile.compiler.compression.sizes import needs
from pipecompile.runtime.compression.adacomp import SKIP, pack, unpack
from pipecompile.runtime.compression.compressed import Compressed
from pipecompile.runtime.executor import drive
from pipecompile.runtime.transport.mesh import Mesh
from pipecompile.runtime.transport.transport import Endpoint, Loopback

CPU = torch.device("cpu")
ALL = (Method("bf16"), Method("int8"), Method("powersgd", 2), Method("adacomp", 16))
SHAPES = st.lists(st.lists(st.integers(1, 40), max_size=3).map(tuple), min_size=1, max_size=4)
Grads = dict[str, torch.Tensor]


def replicas(method: Method, shapes: Sequence[tuple[int, ...]], dp: int) -> list[Compressed]:
    """Of as many replicas, each with gradients of its own."""
    mesh, transport = Mesh(1, dp, None), Loopback()
    return [
        Compressed(method, drawn(shapes, r), Endpoint(r, mesh, CPU, transport)) for r in range(dp)
    ]


def drawn(shapes: Sequence[tuple[int, ...]], seed: int) -> Grads:
    chance = torch.Generator().manual_seed(seed)
    return {str(i): torch.randn(shape, generator=chance) for i, shape in enumerate(shapes)}


def exchange(made: Sequence[Compressed]) -> None:
    drive([each.mean_() for each in made], made[0]._endpoint.transport.progress)


@given(st.sampled_from(ALL), SHAPES, st.integers(2, 4))
def test_means_and_what_is_kept_add_up(
    method: Method, shapes: list[tuple[int, ...]], dp: int
) -> None:
    made = replicas(method, shapes, dp)
    exact = [torch.stack([each._grads[n] for each in made]).mean(0) for n in made[0]._grads]
    exchange(made)
    for name, mean in zip(made[0]._grads, exact, strict=True):
        found = [each._grads[name] for each in made]
        assert all(torch.equal(found[0], other) for other in found)
        kept = [each.residues[name] for each in made if name in each.residues]
        left = torch.stack(kept).mean(0) if kept else 0
        torch.testing.assert_close(found[0] + left, mean, rtol=1e-4, atol=1e-5)


@given(st.sampled_from(ALL[:3]), SHAPES, st.integers(2, 4))
def test_as_much_is_sent_as_is_needed_on_paper(
    method: Method, shapes: list[tuple[int, ...]], dp: int
) -> None:
    made = replicas(method, shapes, dp)
    exchange(made)
    for replica, each in enumerate(made):
        assert each.sent_bytes == needs(method, shapes, dp, replica).sent_bytes
        whole = sum(tensor.nbytes for tensor in each._compressor.held)  # type: ignore[union-attr]
        assert whole == needs(method, shapes, dp, replica).residue_bytes


@pytest.mark.parametrize("method", ALL, ids=str)
def test_a_gradient_that_stays_arrives(method: Method) -> None:
    """What is sent in many steps is, on the mean, the gradient itself."""
    made = replicas(method, [(24, 32), (7,)], 2)
    latest = [{n: g.clone() for n, g in each._grads.items()} for each in made]
    exact = {n: (latest[0][n] + latest[1][n]) / 2 for n in latest[0]}
    total = {n: torch.zeros_like(g) for n, g in exact.items()}
    for _ in range(60):
        for each, grads in zip(made, latest, strict=True):
            for name, grad in grads.items():
                each._grads[name].copy_(grad)
        exchange(made)
        for name, grad in made[0]._grads.items():
            total[name] += grad
    for name, mean in exact.items():
        assert (total[name] / 60 - mean).norm() < 0.25 * mean.norm()


def test_a_matrix_of_low_rank_is_sent_whole() -> None:
    """From the second step on, as Q has found its rows' space then."""
    made = replicas(Method("powersgd", 2), [(30, 40)], 2)
    for each in made:
        grad = each._grads["0"]
        grad.copy_(grad[:, :1] @ grad[:1])  # each of rank 1: their mean of rank 2
    latest = [each._grads["0"].clone() for each in made]
    mean = (latest[0] + latest[1]) / 2
    sent = torch.zeros_like(mean)
    for _ in range(2):
        for each, grad in zip(made, latest, strict=True):
            each._grads["0"].copy_(grad)
        exchange(made)
        sent += made[0]._grads["0"]
    torch.testing.assert_close(sent, 2 * mean, rtol=1e-3, atol=1e-3)


def test_adacomp_sends_what_the_algorithm_says() -> None:
    """As algorithm 2 has it, number by number."""
    made = replicas(Method("adacomp", 8), [(4, 8)], 2)
    latest = [each._grads["0"].view(-1).tolist() for each in made]
    expected = [0.0] * 32
    for numbers in latest:
        bins = [numbers[i : i + 8] for i in range(0, 32, 8)]
        largest = [max(map(abs, each)) for each in bins]
        scale = sum(largest) / 4
        for i, number in enumerate(numbers):
            if abs(2 * number) >= largest[i // 8]:  # nothing was kept: H is twice G
                expected[i] += (scale if number > 0 else -scale) / 2
    exchange(made)
    torch.testing.assert_close(made[0]._grads["0"].view(-1), torch.tensor(expected))


@given(st.sets(st.integers(0, 4 * SKIP), max_size=40), st.data())
def test_places_and_signs_come_back(chosen: set[int], data: st.DataObject) -> None:
    places = torch.tensor(sorted(chosen), dtype=torch.int64)
    signs = data.draw(st.lists(st.booleans(), min_size=len(chosen), max_size=len(chosen)))
    negative = torch.tensor(signs, dtype=torch.bool)
    words = pack(places, negative)
    assert words.dtype is torch.int16
    found = unpack(words)
    assert torch.equal(found[0], places)
    assert torch.equal(found[1], negative)


@pytest.mark.parametrize("method", ALL, ids=str)
def test_nothing_stays_nothing(method: Method) -> None:
    made = replicas(method, [(24, 32), (7,)], 2)
    for each in made:
        for grad in each._grads.values():
            grad.zero_()
    for _ in range(2):
        exchange(made)
    assert not any(grad.any() for each in made for grad in each._grads.values())
    assert all(basis.any() for each in made for basis in each.bases.values())
