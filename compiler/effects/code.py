"""Whose code a file is."""

from __future__ import annotations

import traceback
from functools import cache
from pathlib import Path

import torch

_FOLDERS = (Path(torch.__file__).parent, Path(__file__).parents[1])


@cache
def is_foreign(filename: str) -> bool:
    """Whether a file is torch's, Python's own, pipecompile's compiler, or no file at all."""
    if filename.startswith(("<eval_with_key", "<frozen")):
        return True
    path = Path(filename)
    installed = {"site-packages", "dist-packages"}.intersection(path.parts)
    own = path.is_relative_to(Path(traceback.__file__).parent) and not installed
    return own or any(map(path.is_relative_to, _FOLDERS))
