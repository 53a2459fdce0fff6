"""Who writes to a folder of checkpoints: one run at a time, for as long as it lives.

    DIR/.owner      JSON: host, process, and what tells whether it still lives

Two runs in one folder would publish each other's steps, and ``keep=`` of one removes those of the
other. So the first save of a run makes this file, and the end of its process removes it. A process
that was killed leaves it; the next run takes it over where it can tell that nobody lives:

* The same kernel (by its boot id): the process is gone, or its number is another process's now.
* The same machine, started anew since. Copies of one image may share name and id, so the owner must
  have begun before this machine was started.
* Another attempt of the same run of torchrun, which has ended the ones before it. Agents count
  attempts each for itself, so that an elastic run goes by a name of its own (`same_run`).

Of a process on another machine nothing can be told, so the error says which file to remove. The
file appears by a hard link, or an exclusive create where there are no links: both are atomic on
network file systems too. Reading checkpoints asks nobody.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import time
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...compiler.ir.errors import CheckpointError

OWNER = ".owner"
_ATTEMPTS = 8  # to take over what others take over at the same time

_names = {"elastic": ""}  # of the run that this process belongs to

_held: weakref.WeakValueDictionary[Path, Owner] = weakref.WeakValueDictionary()
"""Folder -> what this process holds of it: its pipelines share it."""


class Owner:
    """This process as the owner of a folder, until nothing refers to it or the process ends."""

    def __init__(self, folder: Path, token: str):
        self.folder, self.token, self.pid = folder, token, os.getpid()
        self.release = weakref.finalize(self, _release, folder / OWNER, token, self.pid)


def same_run(name: str) -> None:
    """This process belongs to an elastic run, whose attempts have this name and no others. Of those
    before this one nobody saves any more: they have ended, or their machine is cut off."""
    _names["elastic"] = name


def own(directory: Path) -> Owner:
    """Become, or stay, the owner of a folder that exists.

    Raises:
        CheckpointError: another process is.
        OSError: the file cannot be made.
    """
    folder = directory.resolve()
    path, here = folder / OWNER, _held.get(folder)
    if here is not None and here.pid == os.getpid():
        found = _read(path)
        if found is not None and found.get("token") == here.token:
            return here
        here.release.detach()  # it was removed, or taken over: begin anew
    mine = _about_me()
    for _ in range(_ATTEMPTS):
        if _created(path, json.dumps(mine)) and (_read(path) or {}).get("token") == mine["token"]:
            owner = _held[folder] = Owner(folder, mine["token"])
            return owner
        found = _read(path)
        if found is not None and not _is_over(found, mine):
            raise CheckpointError(_refusal(directory, path, found, mine))
        _take_away(path, found)
    raise CheckpointError(f"{path} cannot be made: others make and remove it at the same time")


def _about_me() -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "began": began(os.getpid()),
        "boot": boot_id(),
        "machine": _text("/etc/machine-id"),
        "space": space(),
        "run": os.environ.get("TORCHELASTIC_RUN_ID", ""),
        "attempt": os.environ.get("TORCHELASTIC_RESTART_COUNT", ""),
        **_names,
        "at": time.time(),
        "since": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "token": secrets.token_hex(8),
    }


def _is_over(found: Mapping[str, Any], mine: Mapping[str, Any]) -> bool:
    """Whether an owner is known to live no more."""
    if _is_seen(found, mine):
        pid = found.get("pid")
        return type(pid) is not int or pid < 1 or began(pid) != found.get("began")
    same_machine = mine["machine"] and all(found.get(k) == mine[k] for k in ("machine", "host"))
    if same_machine and mine["boot"] and found.get("boot") != mine["boot"]:
        began_s = found.get("at")
        if isinstance(began_s, (int, float)) and began_s < booted_s():
            return True
    return _later_attempt(found, mine)


def _is_seen(found: Mapping[str, Any], mine: Mapping[str, Any]) -> bool:
    """Whether the owner's number is one of this kernel's, and not of another container's."""
    return bool(mine["boot"]) and all(found.get(key) == mine[key] for key in ("boot", "space"))


def _later_attempt(found: Mapping[str, Any], mine: Mapping[str, Any]) -> bool:
    """Whether the agents of torchrun have ended what owns it before they started this process."""
    if mine["elastic"] and found.get("elastic") == mine["elastic"]:
        return True
    if mine["run"] in ("", "none") or found.get("run") != mine["run"]:
        return False
    try:
        return int(found.get("attempt", "")) < int(mine["attempt"])
    except ValueError:
        return False


def _refusal(directory: Path, path: Path, found: Mapping[str, Any], mine: Mapping[str, Any]) -> str:
    host, pid = str(found.get("host"))[:200], str(found.get("pid"))[:20]
    elsewhere = "" if _is_seen(found, mine) else f"; if it does not run any more, remove {path}"
    return (
        f"{directory} belongs to process {pid} on {host}, which has written checkpoints to it "
        f"since {str(found.get('since'))[:40]}: give every run a folder of its own, or end that "
        f"process first{elsewhere}"
    )


def _created(path: Path, text: str) -> bool:
    """Make a file with this text, unless there is one."""
    temporary = path.with_name(f"{OWNER}.tmp-{secrets.token_hex(4)}")
    try:
        with temporary.open("x", encoding="utf-8") as file:
            file.write(text)
        try:
            path.hardlink_to(temporary)
        except FileExistsError:
            return False
        except OSError:  # a file system without links
            try:
                with path.open("x", encoding="utf-8") as file:
                    file.write(text)
            except FileExistsError:
                return False
    finally:
        temporary.unlink(missing_ok=True)
    return True


def _take_away(path: Path, stale: Mapping[str, Any] | None) -> None:
    """Remove what a dead owner has left; what another has made meanwhile is put back."""
    aside = path.with_name(f"{OWNER}.tmp-{secrets.token_hex(4)}")
    with contextlib.suppress(FileNotFoundError):
        path.rename(aside)
        if _read(aside) != stale:
            with contextlib.suppress(OSError):
                path.hardlink_to(aside)
        aside.unlink(missing_ok=True)


def _read(path: Path) -> dict[str, Any] | None:
    """What a file says of an owner; None where it says nothing."""
    try:
        if not path.is_file():
            return None
        with path.open("rb") as file:
            found = json.loads(file.read(4096))
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _release(path: Path, token: str, pid: int) -> None:
    found = _read(path) if pid == os.getpid() else None  # and not in a fork of the owner
    if found is not None and found.get("token") == token:
        with contextlib.suppress(OSError):
            path.unlink()


def boot_id() -> str:
    """Of this kernel, since it has started; "" where there is none."""
    return _text("/proc/sys/kernel/random/boot_id")


def booted_s() -> float:
    """When this machine was started, as `time.time` has it; 0 where nobody knows."""
    lines = (line.split() for line in _text("/proc/stat").splitlines())
    return next((float(line[1]) for line in lines if line[:1] == ["btime"]), 0.0)


def began(pid: int) -> str:
    """When a process began, in ticks since the machine did; "" where there is none."""
    state, _, rest = _text(f"/proc/{pid}/stat").rpartition(")")
    fields = rest.split()
    return "" if not state or len(fields) < 20 or fields[0] in "ZX" else fields[19]


def space() -> str:
    """In which numbers of processes are told apart."""
    try:
        return str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        return ""


def _text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""
