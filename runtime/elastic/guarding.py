"""A worker's side of its guard, which ends it where it is stopped for good (`stopped.py`)."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

_SCRIPT = Path(__file__).with_name("stopped.py")
_guards: list[subprocess.Popen[bytes]] = []
"""Of this process: one, or none."""


def has_agent() -> bool:
    """Whether torchrun has started this process, and will start it again."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def begin() -> None:
    """Have this worker guarded from now on; one that torchrun has not started itself is not, and
    none is on systems where a process's state cannot be seen.

    The guard ends with this process, or by `end`.
    """
    if _guards or not has_agent() or multiprocessing.parent_process() is not None:
        return
    if not (hasattr(os, "pidfd_open") and Path("/proc/self/stat").exists()):
        return
    with suppress(OSError):
        command = [
            sys.executable,
            "-I",
            "-S",
            str(_SCRIPT),
            str(os.getpid()),
            os.environ.get("RANK", "?"),
        ]
        _guards.append(subprocess.Popen(command, stdin=subprocess.PIPE))


def allow(timeout_s: float) -> None:
    """How long this process may be stopped, but for a margin."""
    begin()
    for guard in _guards:
        if guard.stdin is not None:
            with suppress(OSError):
                guard.stdin.write(f"{timeout_s!r}\n".encode())
                guard.stdin.flush()


def end() -> None:
    """This process is guarded no longer."""
    while _guards:
        guard = _guards.pop()
        guard.kill()
        guard.wait()
        if guard.stdin is not None:
            with suppress(OSError):
                guard.stdin.close()
