"""Garbage, while a model is traced."""

from __future__ import annotations

import gc

import pytest
from pipecompile.compiler.capture.exporting import tracing


@pytest.mark.parametrize("collects", [True, False])
def test_nobody_looks_for_garbage_while_tracing(collects: bool) -> None:
    before = gc.isenabled()
    (gc.enable if collects else gc.disable)()
    try:
        with tracing():
            assert not gc.isenabled()
        assert gc.isenabled() is collects
    finally:
        (gc.enable if before else gc.disable)()
