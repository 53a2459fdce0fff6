"""Step time against torch.distributed.pipelining and one plain process: `make bench`.

Two processes, one thread each, paired: all take turns within one run, and a ratio is the
median of the pairs' ratios.
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from typing import Any

import pytest
from support import rivals
from support.gang import Gang

WARM_UP, ROUNDS = 2, 15

pytestmark = pytest.mark.bench


@pytest.mark.parametrize("name", rivals.RIVALS)
def test_step_time(benchmark: Any, gang: Callable[[int], Gang], name: str) -> None:
    benchmark.group = "one training step, 2 processes"
    pair = gang(2)
    benchmark.pedantic(
        lambda: pair.run("support.rivals:step", name), rounds=5, warmup_rounds=WARM_UP
    )


def test_faster_than_the_rivals(
    gang: Callable[[int], Gang], capsys: pytest.CaptureFixture[str]
) -> None:
    pair = gang(2)
    seconds: dict[str, list[float]] = {name: [] for name in rivals.RIVALS}
    for round_ in range(WARM_UP + ROUNDS):
        for name, times in seconds.items():
            took = max(pair.run("support.rivals:step", name))
            if round_ >= WARM_UP:
                times.append(took)
    mine = seconds["pipecompile"]
    with capsys.disabled():
        print()
        for name, times in seconds.items():
            ratio = median(other / own for other, own in zip(times, mine, strict=True))
            print(f"{name:28}  median {median(times) * 1e3:7.1f} ms   pipecompile is {ratio:.2f}×")
    ratios = [b / a for a, b in zip(mine, seconds["torch 1F1B, equal layers"], strict=True)]
    assert median(ratios) > 1.1, "the naive prototype was 1.1× as fast as torch's 1F1B"


def test_the_rivals_train_the_same(gang: Callable[[int], Gang]) -> None:
    _, both = gang(2).run("support.rivals:losses")
    assert both[0] == pytest.approx(both[1], rel=1e-5)
