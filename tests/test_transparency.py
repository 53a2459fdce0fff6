"""The promise: a pipeline trains to the same bits as one plain process.

Losses, gradients, global norm and parameters after several steps with clipping active are
compared with `torch.equal`. There is no exception: weights tied over stages are summed in
autograd's own order (``tied_grads="per_microbatch"``, the default).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
from support import jobs, models, plain
from support.gang import Gang
from support.matrix import quickly

# (model, n_stages, dp, microbatches, optimizer): every model, and every value of every other
# dimension, with fewer microbatches than stages, and pairs that have gone wrong elsewhere
COVERING = [
    ("gpt2", 1, 1, 1, "sgd"),
    ("gpt2", 2, 2, 2, "adamw"),
    ("gpt2", 3, 1, 5, "sgd"),
    ("gpt2", 4, 1, 8, "adamw"),
    ("gpt2", 4, 2, 2, "adamw"),
    ("llama", 2, 1, 8, "adamw"),
    ("llama", 4, 2, 1, "sgd"),
    ("bert-classifier", 3, 2, 2, "adamw"),
    ("bert-classifier", 2, 1, 1, "sgd"),
    ("bert-mlm", 4, 1, 5, "sgd"),
    ("bert-mlm", 2, 2, 2, "adamw"),
    ("bart", 3, 2, 5, "sgd"),
    ("bart", 4, 1, 2, "adamw"),
    pytest.param("t5", 2, 2, 8, "adamw", marks=pytest.mark.slow),
    ("t5", 4, 1, 5, "sgd"),
    ("mixtral", 3, 1, 2, "sgd"),
    ("mixtral", 1, 2, 5, "adamw"),
    ("vit", 4, 2, 5, "adamw"),
    ("vit", 1, 1, 8, "sgd"),
]
SLOWER = ("bart", "bert-classifier", "vit", "mixtral")
QUICK = [case for case in COVERING[1::2] if case[0] not in SLOWER]
MATRIX = [
    (name, n_stages, dp, microbatches, optimizer)
    for name in models.MODELS
    for n_stages in (1, 2, 3, 4)
    for dp in (1, 2)
    for microbatches in (1, 2, 5, 8)
    for optimizer in ("sgd", "adamw")
]
PROCESSES = [
    ("gpt2", 2, 1, 5, "adamw"),
    pytest.param("t5", 2, 2, 2, "sgd", marks=pytest.mark.slow),
    pytest.param("bart", 4, 1, 2, "adamw", marks=pytest.mark.slow),
    pytest.param("llama", 1, 4, 2, "adamw", marks=pytest.mark.slow),
    pytest.param("mixtral", 4, 1, 5, "sgd", marks=pytest.mark.slow),
]
ZERO_BUBBLE = [
    ("gpt2", 3, 1, 5),
    ("t5", 4, 2, 2),
    ("bart", 2, 1, 8),
    ("bert-mlm", 4, 1, 8),
    ("mixtral", 3, 2, 2),
]
STEPS = 5

expected = cache(jobs.train_plainly)


def _check(name: str, n_stages: int, dp: int, microbatches: int, optimizer: str) -> None:
    found = jobs.train(name, n_stages, dp, microbatches, optimizer, STEPS)
    plain.assert_equal(found, expected(name, dp, microbatches, optimizer, STEPS))


@pytest.mark.parametrize(
    ("name", "n_stages", "dp", "microbatches", "optimizer"), quickly(QUICK, COVERING)
)
def test_one_process_equals_plain_training(
    name: str, n_stages: int, dp: int, microbatches: int, optimizer: str
) -> None:
    _check(name, n_stages, dp, microbatches, optimizer)


@pytest.mark.parametrize(
    ("name", "n_stages", "dp", "microbatches"),
    quickly([("gpt2", 3, 1, 5), ("bert-mlm", 4, 1, 8)], ZERO_BUBBLE),
)
def test_zero_bubble_equals_plain_training(
    name: str, n_stages: int, dp: int, microbatches: int
) -> None:
    found = jobs.train(name, n_stages, dp, microbatches, "adamw", STEPS, "zb_h1")
    plain.assert_equal(found, expected(name, dp, microbatches, "adamw", STEPS))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "t5"])
def test_zero_bubble_in_processes(gang: Callable[[int], Gang], name: str) -> None:
    for found in gang(4).run(jobs.train, name, 4, 1, 5, "adamw", STEPS, "zb_h1"):
        plain.assert_equal(found, expected(name, 1, 5, "adamw", STEPS), whole=False)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "n_stages", "dp", "microbatches", "optimizer"), MATRIX)
def test_the_whole_matrix(
    name: str, n_stages: int, dp: int, microbatches: int, optimizer: str
) -> None:
    _check(name, n_stages, dp, microbatches, optimizer)


@pytest.mark.parametrize(("name", "n_stages", "dp", "microbatches", "optimizer"), PROCESSES)
def test_processes_equal_plain_training(
    gang: Callable[[int], Gang],
    name: str,
    n_stages: int,
    dp: int,
    microbatches: int,
    optimizer: str,
) -> None:
    workers = gang(n_stages * dp)
    case = (name, n_stages, dp, microbatches, optimizer, STEPS)
    for rank, found in enumerate(workers.run(jobs.train, *case)):
        plain.assert_equal(found, expected(name, dp, microbatches, optimizer, STEPS), whole=False)
        assert found.grads[0] or rank, "a rank without gradients"


@pytest.mark.slow
@pytest.mark.parametrize("name", models.MODELS)
@pytest.mark.parametrize(("n_stages", "dp"), [(2, 1), (3, 1), (2, 2), (4, 1), (3, 2), (4, 2)])
@pytest.mark.parametrize("microbatches", [1, 2, 5, 8])
def test_the_matrix_in_processes(
    gang: Callable[[int], Gang], name: str, n_stages: int, dp: int, microbatches: int
) -> None:
    case = (name, n_stages, dp, microbatches, "adamw", STEPS)
    for found in gang(n_stages * dp).run(jobs.train, *case):
        plain.assert_equal(found, expected(name, dp, microbatches, "adamw", STEPS), whole=False)
