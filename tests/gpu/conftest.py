"""The device of these tests, and the time that all of them have.

``PIPECOMPILE_TEST_DEVICE=cuda`` runs them on the first CUDA device, which then plays all ranks of a
process; without it they run on the CPU. After ``PIPECOMPILE_TEST_SECONDS`` what is left is skipped.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

import pytest

DEVICE = os.environ.get("PIPECOMPILE_TEST_DEVICE", "cpu")
_SECONDS = float(os.environ.get("PIPECOMPILE_TEST_SECONDS", "inf"))
_started = time.monotonic()

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA is first used


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.path.parent.name == "gpu" and time.monotonic() - _started > _SECONDS:
        pytest.skip(f"the {_SECONDS:g} s are up")


@pytest.fixture
def device() -> Iterator[str]:
    """What ranks compute on, with kernels that give the same bits every time: attention and others
    add up in any order otherwise, and nothing could be compared bit for bit."""
    import torch

    if DEVICE == "cpu":
        yield DEVICE
        return
    if not torch.cuda.is_available():
        pytest.fail("PIPECOMPILE_TEST_DEVICE=cuda, and this torch sees no CUDA device")
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield DEVICE
    torch.use_deterministic_algorithms(before)
