"""Whose code it is, the user's or a library's, and which line of the user's made a node."""

from __future__ import annotations

import re
import sys
import traceback
import types
from functools import cache
from itertools import pairwise
from pathlib import Path

import torch
from torch import fx

_MODULES = {*sys.stdlib_module_names, "builtins", "torch", "numpy", "pipecompile"}
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


def running() -> traceback.FrameSummary | None:
    """The user's innermost line that is being run."""
    frames = traceback.extract_stack()
    return next((f for f in reversed(frames) if not is_foreign(f.filename)), None)


def user_line(node: fx.Node) -> str:
    """Where in the user's code a node was made: the last frame that torch.export noted."""
    found = ""
    lines = str(node.meta.get("stack_trace", "")).splitlines()
    for line, text in pairwise(lines):
        match = re.match(r'\s*File "(.+)", line (\d+)', line)
        if match and not is_foreign(match[1]):
            found = f"at {match[1]}:{match[2]} ({text.strip()})"
    return found


def is_foreign_module(name: object) -> bool:
    """Whether a module is torch's, NumPy's, Python's own, or pipecompile's.

    Args:
        name: or what a class has in its place: a descriptor, if Cython made it, and then there is
            no code in Python to look into.
    """
    if isinstance(name, types.GetSetDescriptorType):
        return True
    return str(name).split(".")[0] in _MODULES
