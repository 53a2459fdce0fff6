"""What a step takes beside its programs: `make bench`."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from support import overhead
from support.gang import Gang

MOST_S = 30e-6
WAYS = {"shared memory": "", "gloo": "off"}

pytestmark = pytest.mark.bench


def test_python_per_action(gang: Callable[[int], Gang], capsys: pytest.CaptureFixture[str]) -> None:
    found = gang(2).run(overhead.seconds_per_action)
    with capsys.disabled():
        print(f"\nbeside programs: {', '.join(f'{s * 1e6:.1f}' for s in found)} µs per action")
    assert max(found) < MOST_S


def test_agreements(gang: Callable[[int], Gang], capsys: pytest.CaptureFixture[str]) -> None:
    for way, switch in WAYS.items():
        gather_s, check_s = gang(2).run(overhead.seconds_per_agreement, switch)[0]
        with capsys.disabled():
            told = f"{gather_s * 1e6:.0f} µs, all before a step {check_s * 1e6:.0f} µs"
            print(f"\n{way}: a value of all ranks {told}")
        assert gather_s < check_s < 5e-3


def test_steps_that_count_later_or_send_less_often(
    gang: Callable[[int], Gang], capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        *((f"counted later, {way}", overhead.counted_later, s) for way, s in WAYS.items()),
        *((f"one message per action, {n}", overhead.bundled, n) for n in ("bart", "t5")),
    ]
    for what, function, argument in rows:
        before_s, after_s = gang(2).run(function, argument)[0]
        with capsys.disabled():
            times = f"{before_s * 1e3:.2f} → {after_s * 1e3:.2f} ms"
            print(f"\n{what}: {times}, {after_s / before_s:.3f} ×")
        assert after_s < 1.03 * before_s


def test_share_of_the_optimizer(
    gang: Callable[[int], Gang], capsys: pytest.CaptureFixture[str]
) -> None:
    found = gang(2).run(overhead.share_of_optimizer)
    with capsys.disabled():
        print(f"\noptimizer: {', '.join(f'{share:.1%}' for share in found)} of a step per rank")
    assert max(found) < 0.1
