"""Loaders of several processes, in step: here with what other processes say made up."""

from __future__ import annotations

from typing import Any

import torch
from pipecompile.compiler.capture.batch import flatten
from pipecompile.runtime.data.in_step import in_step


def test_none_of_a_process_that_needs_no_batches_may_meet_an_end_elsewhere() -> None:
    """Another replica has fewer batches; this process, which gives None for each, has no spec."""
    rows = {"x": torch.zeros(2, 3)}
    asked: list[Any] = []

    def gather(mine: Any) -> list[Any]:
        asked.append(mine)
        if isinstance(mine, tuple):  # (ended, ended and needed, failed) of two others
            over = len(asked) > 2
            return [mine, (over, False, None), (True, True, None)]
        return [mine, flatten(rows)[1], None]

    assert list(in_step([None], gather, lambda: False, flatten)) == [None]
    assert asked[1] is None
