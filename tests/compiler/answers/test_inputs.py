"""What forward may do with a number of the batch that is an input of its graph."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any
from unittest import mock

import pipecompile
import pytest
import torch
from pipecompile.errors import BatchError, CaptureError
from support import plain
from support.annealed import (
    ANNEALED,
    ROWS,
    WIDTH,
    Batch,
    Model,
    Way,
    batches,
    piped,
    plainly,
    trained,
)
from torch import nn

VALUES = 2  # of a number that is no input, before it is said: `told` asks for that


VALUES_OF = [0.3, -1.7, 2.5, -0.0, 0.0, math.nan, math.inf, -math.inf, 5e-324, 1e100, 1 / 3]


DTYPES = [torch.float32, torch.bfloat16, torch.int64, torch.float16, torch.float64, torch.bool]


def arithmetic(x: torch.Tensor, n: Any, dtypes: list[torch.dtype]) -> dict[str, torch.Tensor]:
    """All that is done in the graph, on dtypes and dimensions in which numbers are promoted."""
    found = {}
    for dtype in dtypes:
        for name, y in {"": (x * 3).to(dtype), "mean ": (x * 3).mean().to(dtype)}.items():
            made = {
                "x+n": y + n, "n+x": n + y, "x*n": y * n, "n*x": n * y, "x/n": y / n,
                "n/x": n / y, "add": torch.add(y, n), "div": torch.true_divide(y, n),
                "2n": y * (2 * n), "1-n": y * (1 - n), "n/3": y / (n / 3), "-n": y + -n,
                "abs": y * abs(n), "n+n": y * (n + n * n - 0.5 * n), "n**2": y * n**2,
                "n%": y * (n % 0.7), "n//": y + n // 0.3,
            }  # fmt: skip
            if dtype is not torch.bool:
                made |= {"n-x": n - y, "x-n": y - n}
            if dtype.is_floating_point:
                z = y.clone()
                z += n
                z *= n
                z -= 2 * n
                z /= n
                made["in place"] = z.sub_(n)
            found |= {f"{name}{dtype} {key}": value for key, value in made.items()}
    return found


class Arithmetic(nn.Module):
    def __init__(self, dtypes: list[torch.dtype]) -> None:
        super().__init__()
        self.linear, self.dtypes = nn.Linear(4, 4), dtypes

    def forward(self, x: torch.Tensor, n: Any) -> dict[str, torch.Tensor]:
        return arithmetic(self.linear(x), n, self.dtypes)


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """With signs of zeros, and NaN where the other is."""
    if one.dtype is not other.dtype or not torch.equal(one.isnan(), other.isnan()):
        return False
    kept = ~one.isnan()
    signs = torch.equal(one.signbit()[kept], other.signbit()[kept])
    return signs and torch.equal(one[kept], other[kept])


@pytest.mark.parametrize(
    "dtypes", [DTYPES[:3], pytest.param(DTYPES[3:], marks=pytest.mark.slow)], ids=str
)
def test_arithmetic_has_the_bits_of_python(traces: list[bool], dtypes: list[torch.dtype]) -> None:
    torch.manual_seed(0)
    model, x = Arithmetic(dtypes).eval(), torch.randn(ROWS, 4)
    pipe = pipecompile.compile(model, 1, dynamic="auto")
    counts = []
    for n in VALUES_OF:
        with torch.no_grad():
            expected = model(x, n)
        found = pipe.forward({"x": x, "n": n})
        counts.append(len(traces))
        wrong = [key for key in expected if not same(found[key], expected[key])]
        assert not wrong, f"{n}: {wrong}"
    assert counts[1:] == counts[1:2] * (len(VALUES_OF) - 1)


def test_a_comparison_has_a_program_for_each_side(traces: list[bool]) -> None:
    def way(x: torch.Tensor, beta: Any) -> torch.Tensor:
        return x * beta if 2 * beta > 0.5 and beta else x.tanh() + max(beta, 0.1)

    given = batches([0.3, 0.2, 0.4, 0.05, 0.5, 0.01, 0.6, 0.15])
    found, before = [], []
    pipe = piped(Model(way))
    for batch in given:
        found.append(pipe.step(batch))
        before.append(len(traces))
    assert all(map(torch.equal, found, plainly(Model(way), given).losses))
    assert before[3] == before[-1]


def test_python_fails_as_it_does(traces: list[bool]) -> None:
    """Before anything runs; the program goes on with other values."""

    def way(x: torch.Tensor, beta: Any) -> torch.Tensor:
        return x * (1 / (beta - 0.5))

    pipe = piped(Model(way), 2, microbatches=2)
    given = batches([0.1, 0.2, 0.3, 0.5, 0.4])
    for batch in given[:3]:
        pipe.evaluate(batch)
    before = len(traces)
    with pytest.raises(CaptureError, match="ZeroDivisionError: float division by zero"):
        pipe.evaluate(given[3])
    failed = len(traces) - before
    pipe.evaluate(given[4])
    assert len(traces) == before + failed


def exponent(x: torch.Tensor, beta: Any) -> torch.Tensor:
    return x * math.exp(beta)


def filled(x: torch.Tensor, beta: Any) -> torch.Tensor:
    return x + torch.full((WIDTH,), beta)


def scaled(x: torch.Tensor, beta: Any) -> torch.Tensor:
    return torch.add(x, x.tanh(), alpha=beta)


def powered(x: torch.Tensor, beta: Any) -> torch.Tensor:
    return x.abs() ** (1 + beta)


def dropped(x: torch.Tensor, beta: Any) -> torch.Tensor:
    return nn.functional.dropout(x, beta * 0) * x.clamp(max=beta)


def written(x: torch.Tensor, beta: Any) -> torch.Tensor:
    return x * float(f"{beta:.2f}")


def typed(x: torch.Tensor, beta: Any) -> torch.Tensor:
    return x * beta if type(beta) is float else x.tanh()


def counted(x: torch.Tensor, beta: Any) -> torch.Tensor:
    return x + torch.tensor([beta, 1.0]).sum()


@pytest.mark.parametrize(
    ("way", "why"),
    [
        (exponent, r"takes the number itself in module .*math\.exp\(beta\)"),
        pytest.param(filled, r"takes the number itself .*torch\.full", marks=pytest.mark.slow),
        pytest.param(scaled, r"takes the number itself .*alpha=beta", marks=pytest.mark.slow),
        pytest.param(
            powered, r"takes the number itself .*\*\* \(1 \+ beta\)", marks=pytest.mark.slow
        ),
        pytest.param(dropped, r"takes the number itself .*dropout", marks=pytest.mark.slow),
        pytest.param(written, r"takes the number itself .*float\(f", marks=pytest.mark.slow),
        (typed, r"forward does other things with numbers that it can look at"),
        pytest.param(
            counted, r"takes the number itself .*torch\.tensor\(\[beta", marks=pytest.mark.slow
        ),
    ],
)
def test_what_takes_the_number_itself_is_traced(
    traces: list[bool], told: Callable[[], list[str]], way: Way, why: str
) -> None:
    """For each value, which is said once, with the place. Another number stays an input."""
    given = batches([0.1 + 0.1 * i for i in range(VALUES + 2)])
    losses = [(pipe := piped(Model(way))).step(given[0])]
    for batch in given[1:VALUES]:
        losses.append(pipe.step(batch))
    assert not told()
    losses += [pipe.step(batch) for batch in given[VALUES:]]
    assert all(map(torch.equal, losses, plainly(Model(way), given).losses))
    said = told()
    assert len(said) == 1 + (way is typed)
    assert re.search(rf"'beta' is a number that changes, .*{why}.* without dimensions", said[0])


@pytest.mark.slow
def test_a_number_that_is_counted_by_is_a_literal(told: Callable[[], list[str]]) -> None:
    """What keeps a denominator from zero is a part of how microbatches are weighed."""

    def kept(output: torch.Tensor, batch: Batch) -> torch.Tensor:
        mask = batch["y"] != -100
        return (output.square().mean(-1) * mask).sum() / (mask.sum() + batch["beta"])

    given = batches([0.1 * i for i in range(VALUES + 2)], ignored=True)
    pipes = [
        piped(Model(), 2, microbatches=2, loss_fn=kept, dynamic=how) for how in ("auto", "off")
    ]
    plain.assert_equal(*(trained(pipe, given) for pipe in pipes))
    assert "microbatches are weighed by it" in told()[0]


@pytest.mark.slow
@mock.patch("pipecompile.runtime.loader.MOST_OUTCOMES", 3)
def test_more_sides_than_programs(told: Callable[[], list[str]]) -> None:
    def way(x: torch.Tensor, beta: Any) -> torch.Tensor:
        return x * sum(beta > limit / 10 for limit in range(8))

    given = batches([i / 10 + 0.05 for i in range(7)])
    losses = [pipe.step(batch) for pipe in [piped(Model(way))] for batch in given]
    assert all(map(torch.equal, losses, plainly(Model(way), given).losses))
    assert "more than 3 ways" in told()[0]


def overflowing(x: torch.Tensor, beta: Any) -> torch.Tensor:
    return x * beta**2


@pytest.mark.slow
def test_a_number_that_is_too_large() -> None:
    pipe, given = piped(Model(overflowing), 2), batches([0.1, 0.2, 1e200, 0.3])
    losses = [pipe.step(given[0]), pipe.step(given[1])]
    with pytest.raises(BatchError, match=r"computes with numbers of the batch.*OverflowError"):
        pipe.step(given[2])
    losses.append(pipe.step(given[3]))
    expected = plainly(Model(overflowing), [*given[:2], given[3]], ROWS).losses
    assert all(map(torch.equal, losses, expected))


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        return 2 * grads[0]


def with_function(x: torch.Tensor, beta: Any) -> torch.Tensor:
    doubled: torch.Tensor = Doubled.apply(x)
    return doubled * beta


class Deciding(nn.Module):
    """Runs eagerly, as it decides by what depends on parameters."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.tanh() if x.sum() > 0 else x.sin()


class Eager(Model):
    def __init__(self) -> None:
        super().__init__()
        self.layers[1] = Deciding()


class Keeping(Model):
    """Evaluation would read the last number that training had."""

    last: Any = None

    def forward(self, x: torch.Tensor, beta: Any = 0.5) -> torch.Tensor:
        self.last = beta, 1
        return super().forward(x, beta)


@pytest.mark.parametrize(
    ("build", "why"),
    [
        pytest.param(Keeping, r"forward keeps the number itself in Python", marks=pytest.mark.slow),
        (lambda: Model(with_function), r"a torch\.autograd\.Function may do anything"),
        pytest.param(Eager, r"parts of the model run eagerly", marks=pytest.mark.slow),
    ],
)
@pytest.mark.filterwarnings("ignore:what cannot be traced")
def test_models_whose_numbers_are_literals(
    told: Callable[[], list[str]], build: Callable[[], Model], why: str
) -> None:
    given = batches([0.1 + 0.1 * i for i in range(VALUES + 2)])
    losses = [pipe.step(batch) for pipe in [piped(build())] for batch in given]
    assert all(map(torch.equal, losses, plainly(build(), given).losses))
    assert re.search(why, told()[0])


class Failing(Model):
    def forward(self, x: torch.Tensor, beta: Any = 0.5) -> torch.Tensor:
        return super().forward(x, beta) if x.shape[1] < 9 else self.head(x.float())


@pytest.mark.slow
def test_a_batch_that_fails_says_nothing_of_numbers(told: Callable[[], list[str]]) -> None:
    pipe, given = piped(Failing()), batches([0.1 * i for i in range(VALUES + 2)])
    for batch in given[:2]:
        wrong = batch | {"x": torch.zeros(ROWS, 9).long(), "y": torch.zeros(ROWS, 9).long()}
        with pytest.raises(CaptureError):
            pipe.step(wrong)
    losses = [pipe.step(batch) for batch in given]
    assert all(map(torch.equal, losses, plainly(Model(), given).losses))
    assert not told()


def test_a_tensor_without_dimensions_is_an_input(traces: list[bool]) -> None:
    """From the first value on, as it always was."""
    pipe, given = piped(Model()), batches(ANNEALED[:3])
    for batch in given:
        batch["weights"]["penalty"] = 0.5
    tensors = [batch | {"beta": torch.tensor(batch["beta"])} for batch in given]
    plain.assert_equal(trained(pipe, tensors), plainly(Model(), given))
    assert len(traces) == 1
