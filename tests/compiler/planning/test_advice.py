"""What is said of a model that does not fit: figures that are those of its plan."""

from __future__ import annotations

import re
import warnings
from functools import partial
from typing import Any

import pipecompile
import pytest
import torch
from pipecompile.compiler.ir.errors import MemoryBudgetError, OptionError
from pipecompile.compiler.memory.rank_memory import RankMemory, Static
from pipecompile.compiler.options.options import CompileOptions
from pipecompile.compiler.planning.advice import gib, parts_of
from support import models
from support.matrix import quickly

SIZES = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
AMOUNT = r"([\d.,]+) (bytes|KiB|MiB|GiB)"


def amounts(text: str) -> list[float]:
    found = re.findall(AMOUNT, text)
    return [float(number.replace(",", "")) * SIZES[unit] for number, unit in found]


def compiled(name: str, n_stages: int, **more: Any) -> Any:
    more.setdefault("optimizer", partial(torch.optim.AdamW, lr=1e-3))
    batch = models.batches(name, 8, 1)[0]
    return pipecompile.compile(
        models.build(name), n_stages, microbatches=4, example_batch=batch, **more
    )


CASES = [
    (name, zero, precision)
    for name in ("gpt2", "llama", "bert-mlm")
    for zero, precision in ((0, None), (0, "bf16"), (1, None))
]


@pytest.mark.parametrize(("name", "zero", "precision"), quickly([("gpt2", 0, None)], CASES))
def test_the_message_has_the_figures_of_the_plan(name: str, zero: int, precision: Any) -> None:
    """Of one stage, whose division is the only one. Reserves, by which prices are corrected, are no
    weights."""
    more: Any = {"zero": zero, "dp": 2 if zero else 1, "precision": precision, "remat": "none"}
    memory = compiled(name, 1, **more).plan.stages[0].memory
    with pytest.raises(MemoryBudgetError) as caught:
        compiled(name, 1, **more, memory="100KiB")
    message = str(caught.value)
    needs, budget, over, *_ = amounts(message)
    assert (needs, budget) == (pytest.approx(memory.peak, rel=0.05), 100 * 2**10)
    assert over == pytest.approx(needs - budget, rel=0.05)
    (parts,) = re.findall(r"\(of what it needs, (.*)\)", message)
    held = memory.weights + memory.copies + memory.grads + memory.states
    rest = memory.buffers + memory.constants + memory.batch
    found = amounts(parts)
    assert found[0] == pytest.approx(held, rel=0.05)
    assert found[1] == pytest.approx(rest, rel=0.05)
    assert sum(found) == pytest.approx(needs, rel=0.05)
    assert re.match(rf"{AMOUNT} are weights, gradients and optimizer states, ", parts)


STATIC = Static(weights=8, copies=0, grads=8, states=16, buffers=3, constants=0, batch=1)


@pytest.mark.parametrize(
    ("at", "stash", "expected"),
    [
        ("0B3", 40.0, (32, 4, 40, 24)),
        ("1F12", 90.0, (32, 4, 64)),  # prices may be above what there is
        ("OPTIM", 40.0, (32, 4, 64)),  # when no microbatch is under way
        ("0W1", 0.0, (32, 4, 64)),
    ],
)
def test_parts_are_told_apart(at: str, stash: float, expected: tuple[int, ...]) -> None:
    text = parts_of(RankMemory(STATIC, 100, at, ()), stash)
    assert tuple(amounts(text)) == expected
    assert ("the stash" in text) is (at in ("0B3", "1F12"))
    assert (f"what {at} takes besides" in text) is (at != "1F12")


@pytest.mark.parametrize("number", [1, 20, 999, 1024, 5000, 2**20 - 1, 2**20, 2**31])
def test_no_figure_is_rounded_to_nothing(number: int) -> None:
    assert amounts(gib(number))[0] == pytest.approx(number, rel=0.06)


@pytest.mark.parametrize("given", [20, 1, 80, 141, 4095, "20", " 16 ", "1_0", 3.5])
def test_a_number_without_its_unit_is_refused(given: Any) -> None:
    text = str(given).strip()
    with pytest.raises(OptionError, match=rf'give it a unit, such as memory="{text}GiB"'):
        CompileOptions(n_stages=2, memory=given)


@pytest.mark.parametrize("given", [4096, 80_000, "100000"])
def test_a_small_number_is_warned_of(given: Any) -> None:
    with pytest.warns(UserWarning, match=r'is [\d.,]+ KiB: if that is meant, write "\d+ B"'):
        CompileOptions(n_stages=2, memory=given)


@pytest.mark.parametrize("given", ["20 B", "20b", "300KiB", "0.5MB", 2**20, 10**9, "1048576"])
def test_what_is_meant_is_taken(given: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert CompileOptions(n_stages=2, memory=given).memory_bytes
