"""Numbers of a batch: what is asked of it by what Python does with them."""

from __future__ import annotations

import copy
import math
import operator
from collections.abc import Callable
from typing import Any

import pytest
from pipecompile.compiler.answers.number import Number, plain


def number(value: float) -> tuple[Any, list[Any]]:
    """And the answers that were given."""
    answers: list[Any] = []

    def ask(how: Callable[[Any], Any]) -> Any:
        answers.append(how(value))
        return answers[-1]

    return Number(ask, value), answers


@pytest.mark.parametrize(
    ("use", "result", "asked"),
    [
        (lambda n: n <= 7, True, [True]),
        (lambda n: n < 4, False, [False]),
        (lambda n: n + 1 == 6, True, [True]),
        (lambda n: 2 * n - 3 < 7, False, [False]),
        (lambda n: bool(n - 5), False, [False]),
        (lambda n: n in (4, 5), True, [False, True]),
        (lambda n: max(n, 3) > 4, True, [False, True]),
        (lambda n: isinstance(n, int), True, []),
        (lambda n: isinstance(n, str), False, []),
        (lambda n: list(range(n)), [0, 1, 2, 3, 4], [5]),
        (lambda n: [0] * n, [0] * 5, [5]),
        (lambda n: "abcdef"[n], "f", [5]),
        (lambda n: f"{n:03d} {n} {n!r}", "005 5 5", [5, 5, 5]),
        (lambda n: operator.mod("%d", n), "5", [5]),
        (lambda n: {5: "five"}[n], "five", [5, True]),
        (lambda n: n.bit_length(), 3, [5]),
        (lambda n: (n & 4, 4 & n, n << 1, -n, ~n), (4, 4, 10, -5, -6), [5] * 5),
        (lambda n: divmod(n, 2), (2, 1), [5]),
        (lambda n: math.sqrt(n - 1), 2.0, [4]),
        (lambda n: plain([n, {"a": n}]), [5, {"a": 5}], [5, 5]),
        (lambda n: copy.deepcopy(n), 5, [5]),
        (lambda n: n == "five", False, []),
    ],
)
def test_what_is_asked(use: Callable[[Any], Any], result: Any, asked: list[Any]) -> None:
    five, answers = number(5)
    assert use(five) == result
    assert answers == asked
