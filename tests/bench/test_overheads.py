"""What the executor takes by itself: `make bench`."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from support import overhead
from support.gang import Gang

MOST_S = 30e-6

pytestmark = pytest.mark.bench


def test_python_per_action(gang: Callable[[int], Gang], capsys: pytest.CaptureFixture[str]) -> None:
    found = gang(2).run(overhead.seconds_per_action)
    with capsys.disabled():
        print(f"\nbeside programs: {', '.join(f'{s * 1e6:.1f}' for s in found)} µs per action")
    assert max(found) < MOST_S
