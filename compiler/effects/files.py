"""Whether a forward opens files, whose contents no hash of its code has."""

from __future__ import annotations

import builtins
import io
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock


@contextmanager
def opened() -> Iterator[list[str]]:
    """A forward inside; what is yielded names the files that this thread opens, but for the
    sources that Python reads to show lines of them."""
    found: list[str] = []
    real, mine = io.open, threading.get_ident()

    def opening(file: Any, *args: Any, **kwargs: Any) -> Any:
        if threading.get_ident() == mine and not str(file).endswith(".py"):
            found.append(str(file))
        return real(file, *args, **kwargs)

    with mock.patch.object(builtins, "open", opening), mock.patch.object(io, "open", opening):
        yield found
