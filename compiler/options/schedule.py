"""The option ``schedule``: a name, "auto", or a file."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from ...passes.schedule.registry import DEFAULT, SCHEDULES
from ..ir.errors import OptionError
from .parsing import AUTO


def check_schedule(name: str, given: Any) -> None:
    """Raises OptionError for what is neither a schedule's name nor a file with one."""
    from ...passes.schedule.from_file import kind_of

    if not isinstance(given, str):
        raise OptionError(f"{name}={given!r}: give a name, such as {DEFAULT!r}, or a file's path")
    if given != AUTO:
        kind_of(given)


def order_of_schedule(_: str, options: Any) -> object:
    """Its name, or a hash of what the file has in it: what ranks compare."""
    if options.schedule in (*SCHEDULES, AUTO):
        return options.schedule
    text = Path(options.schedule).read_bytes()
    return hashlib.sha256(text).hexdigest()
