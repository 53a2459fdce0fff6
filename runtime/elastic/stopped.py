"""Ends a process that is stopped for good, which can neither end itself nor be ended by SIGTERM.

    worker   ── starts ──▶ its guard: one look at the worker's state every half second
    worker   SIGSTOP ···················· stopped for longer than it may be ──▶ SIGKILL
    agent    (would send SIGTERM, which waits until the process runs, and SIGKILL after 30 s)

The guard is a process of its own, of some MiB, that imports nothing of ours: this file runs as a
script. It counts its looks and reads no clock, so that where all of a job is suspended, and it too,
that time does not count. A process that a debugger holds is left to that.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

LOOK_S = 0.5
MARGIN_S = 2.0  # for others, which name it after ``timeout_s=``


def guarded(rank: int, timeout_s: float) -> subprocess.Popen[bytes] | None:
    """A guard of this process; None on systems where a process's state cannot be seen.

    It ends with this process, or when it is killed.
    """
    if not (hasattr(os, "pidfd_open") and Path("/proc/self/stat").exists()):
        return None
    known = [str(os.getpid()), str(rank), repr(timeout_s)]
    with suppress(OSError):
        return subprocess.Popen(
            [sys.executable, "-I", "-S", __file__, *known], stdin=subprocess.DEVNULL
        )
    return None


def _state(pid: int) -> str:
    """One letter for what a process does; "" where it is no more."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    return ""


def _guard(pid: int, rank: int, timeout_s: float) -> None:
    """Until the process has ended, or has been ended here."""
    for ignored in (signal.SIGINT, signal.SIGTERM):  # meant for the group: the worker decides
        signal.signal(ignored, signal.SIG_IGN)
    try:
        process = os.pidfd_open(pid)
    except OSError:
        return
    if os.getppid() != pid:  # it has ended, and its number may be another's
        return
    ended = select.poll()
    ended.register(process, select.POLLIN)
    stopped_s = 0.0
    while not ended.poll(1000 * LOOK_S):
        stopped_s = stopped_s + LOOK_S if _state(pid) == "T" else 0.0
        if stopped_s >= timeout_s + MARGIN_S:
            print(
                f"pipecompile: rank {rank} (process {pid}) has been stopped (as by SIGSTOP) for "
                f"{stopped_s:.0f} s, longer than timeout_s={timeout_s:g}: it is killed, so that "
                "its agent can start it anew",
                file=sys.stderr,
                flush=True,
            )
            signal.pidfd_send_signal(process, signal.SIGKILL)
            return


if __name__ == "__main__":
    _guard(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]))
