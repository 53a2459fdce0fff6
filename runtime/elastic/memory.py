"""The memory of a machine that outlives the processes of a run.

    /dev/shm/pipecompile-elastic-1a2b…/               of one session of a run, on one machine
        agents/4711-123456                            whose workers use it: one of torchrun's
        00000002-5e6f…/a/part-00003.safetensors       what rank 3 had, in the second attempt
        00000002-5e6f…/a/part-00003.json              what that is; it is there, or it is not
        00000002-5e6f…/b/…                            the snapshot before that, or after

torchrun ends all workers of an attempt and starts new ones, so what is to outlive them has to stand
in files; those of /dev/shm are memory. Whose they are follows from the agent: a folder in which the
agent of this process has signed is of this run. If no rank's agent has, the run is a new one, and
whatever is there has been left by another. A folder of which no agent lives is removed.

A piece is published by the rename of its JSON, which has checksums of everything. The one that is
written over becomes the next one's draft, so that a run that has begun takes no more memory: others
may fill it.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..files import checksums
from ..files.index import file_name
from ..files.owner import began, boot_id, space
from .holdings import Held, Snapshot

WHERE = "PIPECOMPILE_ELASTIC_MEMORY"
"""An environment variable: the folder in memory; one of its own for what is to be a machine."""

PREFIX = "pipecompile-elastic-"
_AGENTS = "agents"
_SLOTS = "ab"
_ROOM = 4096  # bytes, of which what is published with a piece has a multiple, but for its seal


def folder_of_machine() -> Path:
    return Path(os.environ.get(WHERE, "/dev/shm"))


def key_of(directory: str) -> str:
    """What the names of runs with this folder of checkpoints begin with."""
    return checksums.of_bytes(directory.encode())[:8] + "-"


def machine() -> str:
    """Where this process keeps its memory; processes that see each other's have the same.

    Containers of one machine may each have a ``/dev/shm`` of their own: their devices differ.
    """
    folder = folder_of_machine().resolve()
    with contextlib.suppress(OSError):
        return f"{boot_id()} {folder} {folder.stat().st_dev}"
    return f"{boot_id()} {folder}"


def agent() -> str:
    """The process that has started this one, and will start those that follow it."""
    return f"{os.getppid()}-{began(os.getppid())}-{_space()}"


def _space() -> str:
    """In which numbers of processes are told apart: that of a container is its own."""
    return "".join(filter(str.isdigit, space()))


@dataclass(frozen=True)
class Found:
    """What was found on a machine when a process came.

    Attributes:
        mine: runs in which the agent of this process has signed.
        held: run -> its pieces.
    """

    mine: tuple[str, ...]
    held: dict[str, tuple[Held, ...]]


def look() -> Found:
    """At the memory of this machine; nothing is changed."""
    mine, held = [], {}
    for folder in _folders():
        run = folder.name.removeprefix(PREFIX)
        if (folder / _AGENTS / agent()).exists():
            mine.append(run)
        held[run] = tuple(held_in(folder))
    return Found(tuple(sorted(mine)), held)


def _folders() -> list[Path]:
    with contextlib.suppress(OSError):
        return sorted(p for p in folder_of_machine().glob(f"{PREFIX}*") if _is_ours(p))
    return []


def _is_ours(folder: Path) -> bool:
    """A folder of this user's, and no link: in /dev/shm anybody may make anything."""
    with contextlib.suppress(OSError):
        state = folder.lstat()
        return folder.is_dir() and not folder.is_symlink() and state.st_uid == os.getuid()
    return False


def held_in(folder: Path) -> Iterator[Held]:
    """The pieces that are published in a run's folder."""
    for path in sorted(folder.glob(f"*-*/[{_SLOTS}]/part-*.json")):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            fields = _read(path)
            held = Held(*(fields["held"][name] for name in Held.__dataclass_fields__))
            if path == Memory(folder).place(held).with_suffix(".json"):
                yield held


def clear(run: str) -> None:
    """Remove what runs have left of which no agent lives any more, but for this one's."""
    for folder in _folders():
        if folder.name != PREFIX + run and not any(map(_lives, _signed(folder))):
            shutil.rmtree(folder, ignore_errors=True)


def _signed(folder: Path) -> list[str]:
    with contextlib.suppress(OSError):
        return [path.name for path in (folder / _AGENTS).iterdir()]
    return []


def _lives(signature: str) -> bool:
    """Of an agent, or whether that cannot be told."""
    pid, since, where = (*signature.split("-"), "", "")[:3]
    return where != _space() or (pid.isdigit() and since != "" and began(int(pid)) == since)


class Memory:
    """A run's folder on this machine."""

    def __init__(self, folder: Path):
        self.folder = folder

    @classmethod
    def of(cls, run: str) -> Memory:
        """Make it, or find it, and sign in it.

        Raises:
            OSError: it cannot be made.
        """
        memory = cls(folder_of_machine() / f"{PREFIX}{run}")
        memory.folder.mkdir(mode=0o700, exist_ok=True)
        (memory.folder / _AGENTS).mkdir(exist_ok=True)
        (memory.folder / _AGENTS / agent()).touch()
        return memory

    def place(self, held: Held) -> Path:
        """The file of a piece's tensors."""
        slot = self.slot(held.attempt, held.sequence)
        return slot / file_name(held.rank)

    def slot(self, attempt: str, sequence: int) -> Path:
        """The folder of a snapshot; every second one has the same."""
        return self.folder / attempt / _SLOTS[sequence % len(_SLOTS)]

    def begin(self, held: Held) -> Path:
        """What is there in a piece's place is none any more, and may be written over; its file."""
        path = self.place(held)
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            path.with_suffix(".json").replace(path.with_suffix(".draft"))
        return path

    def publish(self, held: Held, facts: bytes) -> None:
        """The piece is complete.

        Args:
            facts: as `sealed` makes them.
        """
        path = self.place(held).with_suffix(".json")
        draft = path.with_suffix(".draft")
        if not _written_over(draft, facts):
            draft.write_bytes(facts)
        draft.replace(path)

    def read(self, held: Held) -> dict[str, Any]:
        """What was published with a piece.

        Raises:
            ValueError: it is damaged.
            OSError: it is not there.
        """
        return _read(self.place(held).with_suffix(".json"))

    def keep(self, attempts: Sequence[str], snapshot: Snapshot | None = None) -> None:
        """Remove all but some attempts, and of others but one snapshot."""
        kept = {self.folder / _AGENTS, *(self.folder / attempt for attempt in attempts)}
        if snapshot is not None:
            slot = self.slot(snapshot.attempt, snapshot.sequence)
            kept.add(slot.parent)
            for other in slot.parent.glob("*") if snapshot.attempt not in attempts else ():
                if other != slot:
                    shutil.rmtree(other, ignore_errors=True)
        for path in self.folder.glob("*"):
            if path not in kept:
                shutil.rmtree(path, ignore_errors=True)

    def remove(self) -> None:
        """The run is over."""
        shutil.rmtree(self.folder, ignore_errors=True)


def sealed(held: Held, facts: Mapping[str, Any]) -> bytes:
    """What is published with a piece, of a length that the next one's is likely to have."""
    text = json.dumps({"held": vars(held), **facts})
    room = " " * (-(len(text) + _ROOM // 4) % _ROOM + _ROOM // 4)
    return checksums.sealed(text[:-1] + room + text[-1])


def _written_over(path: Path, content: bytes) -> bool:
    """Whether a file could be given another content of the same length, in the memory it has."""
    try:
        if path.stat().st_size != len(content):
            return False
        with path.open("r+b") as file, mmap.mmap(file.fileno(), len(content)) as there:
            there[:] = content
    except FileNotFoundError:
        return False
    return True


def _read(path: Path) -> dict[str, Any]:
    content = path.read_bytes()
    if checksums.seal_of(content) is not True:
        raise ValueError(f"{path} is damaged")
    fields = json.loads(content)
    if not isinstance(fields, dict):
        raise ValueError(f"{path} is damaged")
    return fields
