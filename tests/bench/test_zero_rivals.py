"""What `make zero-bench` times against each other trains the same."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from bench import zero_rivals
from support import sharded
from support.gang import Gang

pytestmark = pytest.mark.bench


@pytest.mark.parametrize("optimizer", sharded.OPTIMIZERS)
def test_the_contenders_train_the_same(gang: Callable[[int], Gang], optimizer: str) -> None:
    four = gang(sharded.STAGES * sharded.REPLICAS)
    losses = zero_rivals.first_losses(four, list(sharded.contenders()), optimizer)
    assert zero_rivals.apart(losses) < zero_rivals.TOLERANCE
