"""Garbage, while a model is traced."""

from __future__ import annotations

import contextlib
import gc

import pytest
from pipecompile.compiler.capture.exporting import tracing
from pipecompile.compiler.tracing.collecting import SELDOM, seldom_collected, settle


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


def test_a_command_looks_for_garbage_seldom_and_afterwards_as_before() -> None:
    before = gc.get_threshold()
    with contextlib.suppress(ValueError), seldom_collected():
        assert gc.isenabled()
        assert gc.get_threshold() == SELDOM
        raise ValueError
    assert gc.get_threshold() == before


def test_what_is_there_to_stay_is_not_looked_at_in_a_command_alone() -> None:
    settle()
    assert gc.get_freeze_count() == 0  # of a process that others work in, too
    with seldom_collected():
        settle()
        assert gc.get_freeze_count() > 0
    assert gc.get_freeze_count() == 0
