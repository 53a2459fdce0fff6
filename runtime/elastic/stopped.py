"""Ends a process that is stopped for good, which can neither end itself nor be ended by SIGTERM.

    worker   ── imports, starts ──▶ its guard: one look at its state every half second
    worker   ── compiles ─────────▶ its guard: timeout_s
    worker   SIGSTOP ···················· stopped for longer than it may be ──▶ SIGKILL
    agent    (would send SIGTERM, which waits until the process runs, and SIGKILL after 30 s)

The guard is a process of its own, of some MiB, that imports nothing of ours: this file runs as a
script. It starts before a worker imports what takes long, and is told later for how long that may
be stopped. It counts its looks and reads no clock, so that where all of a job is suspended, and it
too, that time does not count. A process that a debugger holds is left to that.
"""

from __future__ import annotations

import os
import select
import signal
import sys
from contextlib import suppress
from pathlib import Path

LOOK_S = 0.5
MARGIN_S = 2.0  # for others, which name it after ``timeout_s=``
BEFORE_S = 30.0  # that a process may be stopped before `Session.compile`


def _state(pid: int) -> str:
    """One letter for what a process does; "" where it is no more."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    return ""


class _Limit:
    """How long the worker may be stopped, as it says itself."""

    def __init__(self) -> None:
        self.seconds = BEFORE_S
        self.whose = f"{BEFORE_S:g} s, which it may be before session.compile()"
        self._said = b""

    def hear(self) -> bool:
        """Whether there may be more to hear."""
        said = os.read(sys.stdin.fileno(), 4096)
        *lines, self._said = (self._said + said).split(b"\n")
        if lines:
            timeout_s = float(lines[-1])
            self.seconds, self.whose = timeout_s + MARGIN_S, f"timeout_s={timeout_s:g}"
        return bool(said)


def _guard(pid: int, rank: str) -> None:
    """Until the process has ended, or has been ended here."""
    for ignored in (signal.SIGINT, signal.SIGTERM):  # meant for the group: the worker decides
        signal.signal(ignored, signal.SIG_IGN)
    try:
        process = os.pidfd_open(pid)
    except OSError:
        return
    if os.getppid() != pid:  # it has ended, and its number may be another's
        return
    limit, stopped_s = _Limit(), 0.0
    events = select.poll()
    events.register(process, select.POLLIN)
    events.register(sys.stdin, select.POLLIN)
    while process not in (ready := [number for number, _ in events.poll(1000 * LOOK_S)]):
        if ready:
            if not limit.hear():
                events.unregister(sys.stdin)
            continue
        stopped_s = stopped_s + LOOK_S if _state(pid) == "T" else 0.0
        if stopped_s >= limit.seconds:
            print(
                f"pipecompile: rank {rank} (process {pid}) has been stopped (as by SIGSTOP) for "
                f"{stopped_s:.0f} s, longer than {limit.whose}: it is killed, so that its agent "
                "can start it anew",
                file=sys.stderr,
                flush=True,
            )
            signal.pidfd_send_signal(process, signal.SIGKILL)
            return


if __name__ == "__main__":
    _guard(int(sys.argv[1]), sys.argv[2])
