"""Ranges in torch's own profiler, named after actions.

`torch.profiler.record_function` costs microseconds even where nobody profiles, so it is asked
first whether somebody does; only a private function tells that.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from ...compiler.ir.actions import Action

_profiling = torch.autograd._profiler_enabled  # type: ignore[attr-defined]
_NOTHING = contextlib.nullcontext()


def named(action: Action) -> contextlib.AbstractContextManager[object]:
    """A range ``2F0`` while torch's profiler is on."""
    return torch.profiler.record_function(str(action)) if _profiling() else _NOTHING


def in_ranges(action: Action, run: Iterator[None]) -> Iterator[None]:
    """The same steps, each in a range: between them other ranks of the process run."""
    while True:
        with named(action):
            over = next(run, run) is run
        if over:
            return
        yield
