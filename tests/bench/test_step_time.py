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
    benchmark.pedantic(lambda: pair.run(rivals.step, name), rounds=5, warmup_rounds=WARM_UP)


def test_faster_than_the_rivals(
    gang: Callable[[int], Gang], capsys: pytest.CaptureFixture[str]
) -> None:
    pair = gang(2)
    seconds: dict[str, list[float]] = {name: [] for name in rivals.RIVALS}
    for round_ in range(WARM_UP + ROUNDS):
        for name, times in seconds.items():
            took = max(pair.run(rivals.step, name))
            if round_ >= WARM_UP:
                times.append(took)

    def ratio(mine: str, other: str) -> float:
        return median(b / a for a, b in zip(seconds[mine], seconds[other], strict=True))

    with capsys.disabled():
        columns = "".join(f"{name.removeprefix('pipecompile '):>16}" for name in rivals.OURS)
        print(f"\n{'':34}{'median':>10}{columns}  of the limit")
        for name, times in seconds.items():
            ratios = "".join(f"{ratio(mine, name):15.2f}×" for mine in rivals.OURS)
            share = ratio(name, rivals.LIMIT)
            print(f"{name:34}{median(times) * 1e3:7.1f} ms{ratios}{share:14.2f}")
    others = rivals.RIVALS.keys() - set(rivals.OURS) - {rivals.LIMIT, rivals.TORCH_COMPILE}
    for rival in others:
        assert ratio("pipecompile 1f1b", rival) > 1
    assert ratio("pipecompile 1f1b", rivals.FRONT_END) > 1.1
    assert ratio(rivals.BEST, rivals.LIMIT) > 0.93
    assert ratio(rivals.BEST_FUSED, rivals.TORCH_COMPILE) > 1.05


def test_the_rivals_train_the_same(gang: Callable[[int], Gang]) -> None:
    _, both = gang(2).run(rivals.losses)
    assert both[0] == pytest.approx(both[1], rel=1e-5)
