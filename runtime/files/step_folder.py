"""The folder of a run's checkpoints: what is published in it, and how something new gets there.

    DIR/step-00000012/              a published checkpoint, complete
    DIR/latest                      the name of the one to resume from, and its checksum
    DIR/.step-00000012.tmp-1a2b3c/  one that is being written, or is left of a run that died
    DIR/.owner                      the process that writes here: see owner.py

A checkpoint is written under a temporary name and published by one rename, which is atomic;
``latest`` follows, by another. So whatever is killed when, a name ``step-*`` stands for a
complete checkpoint. Only in saving the same step again is there a moment without that name: the
old one is ``step-*.replaced`` then, and is taken if it is all there is.

While a temporary is being written its ``lock`` file is locked; a dead process holds no lock, so
the next save knows what to clear away.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import secrets
import shutil
import stat
import warnings
from collections.abc import Collection
from pathlib import Path
from typing import IO

from ...compiler.ir.errors import CheckpointError
from . import checksums
from .owner import OWNER, Owner, own

INDEX = "checkpoint.json"
LATEST = "latest"
MOST_STEPS = 10**18 - 1
_STEP = re.compile(r"step-(\d{8,18})", re.ASCII)
_REPLACED = ".replaced"
_LOCK = "lock"


def step_name(step: int) -> str:
    return f"step-{step:08d}"


def published(directory: Path) -> dict[int, Path]:
    """Step -> its complete checkpoint, oldest first."""
    found: dict[int, Path] = {}
    for path in directory.iterdir():
        match = _STEP.fullmatch(path.name.removesuffix(_REPLACED))
        if match is None or not (path / INDEX).is_file():
            continue
        step = int(match[1])
        if step not in found or not path.name.endswith(_REPLACED):
            found[step] = path
    return dict(sorted(found.items()))


def find(directory: Path) -> Path:
    """The checkpoint to load: ``directory`` itself, its ``latest``, or the newest in it.

    Raises:
        CheckpointError: there is none.
    """
    if not directory.exists():
        raise CheckpointError(f"there is no folder {directory}: give one that save() wrote to")
    if not directory.is_dir():
        raise CheckpointError(
            f"{directory} is a file: give the folder that save() was given, or a step-* in it"
        )
    if (directory / INDEX).is_file():
        return directory
    known = published(directory)
    if (step := _latest(directory, known)) is not None:
        return known[step]
    if not known:
        raise CheckpointError(
            f"{directory} has no complete checkpoint: neither {INDEX} nor a folder step-* with one"
        )
    return list(known.values())[-1]


def _latest(directory: Path, known: Collection[int]) -> int | None:
    """The step that is to be loaded, of those that are there; None where nothing says which.

    Raises:
        CheckpointError: ``latest`` is damaged, and it cannot be told which one it named.
    """
    text = _read_latest(directory)
    name = next(iter(text.split()), "")
    match = _STEP.fullmatch(name)
    step = int(match[1]) if match is not None else None
    by_hand = len(text) < _SEAL_CHARACTERS  # or by a version without
    if by_hand or text == _with_seal(name):
        return step if step in known else None
    for named in known:
        whole = _with_seal(step_name(named))
        if text[-_SEAL_CHARACTERS:] == whole[-_SEAL_CHARACTERS:]:
            warnings.warn(
                f"{directory / LATEST} is damaged: it has the checksum of {step_name(named)!r}, "
                f"which is loaded, and says {name!r}",
                stacklevel=2,
            )
            return named
    if step is not None and step == max(known, default=None):
        return step
    raise CheckpointError(
        f"{directory / LATEST} is damaged: {name!r} is not what was written (its checksum "
        "differs): write the name of the checkpoint to go on from into it, or load that folder"
    )


def _with_seal(name: str) -> str:
    """A name with its checksum behind it, in spaces and tabs: who reads the name and strips it, as
    scripts do, reads the name."""
    bits = f"{int(checksums.of_bytes(name.encode()), 16):064b}"
    return f"{name}{bits.translate(_BLANKS)}\n"


_BLANKS = str.maketrans("01", " \t")
_SEAL_CHARACTERS = 65  # the bits of a checksum, and the end of the line


def _read_latest(directory: Path) -> str:
    """What it says, if it is a file and not, say, a pipe, at which a reader would wait."""
    try:
        handle = os.open(directory / LATEST, os.O_RDONLY | os.O_NONBLOCK)
        try:
            whole = stat.S_ISREG(os.fstat(handle).st_mode)
            return os.read(handle, 100).decode("utf-8", "replace") if whole else ""
        finally:
            os.close(handle)
    except OSError:
        return ""


class Draft:
    """A checkpoint that is being written, under a temporary name."""

    def __init__(self, path: Path, step: int, lock: IO[bytes], owner: Owner):
        self.path, self.owner, self._step, self._lock = path, owner, step, lock

    @classmethod
    def begin(cls, directory: Path, step: int) -> Draft:
        """Make a temporary folder, once what dead runs have left is cleared away.

        Raises:
            CheckpointError: the folder cannot be made or written to, or belongs to another run.
        """
        try:
            directory.mkdir(parents=True, exist_ok=True)
            owner = own(directory)
            _clear(directory)
            path = directory / f".{step_name(step)}.tmp-{secrets.token_hex(4)}"
            path.mkdir()
            try:
                lock = (path / _LOCK).open("wb")
            except OSError:
                path.rmdir()
                raise
            with contextlib.suppress(OSError):  # some network file systems have no locks
                fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError as error:
            raise CheckpointError(
                f"cannot write a checkpoint to {directory}: {error.strerror}; those that are "
                "there are as they were"
            ) from error
        return cls(path, step, lock, owner)

    def publish(self, keep: int | None) -> Path:
        """Give it its name, point ``latest`` at it, and remove what is not to be kept.

        Args:
            keep: how many to keep up to this step, itself included; None for all. Later steps
                (of a run that went on from an earlier checkpoint than this) are left alone.

        Raises:
            OSError: it is not published then, or ``latest`` not yet changed.
        """
        directory = self.path.parent
        final = directory / step_name(self._step)
        (self.path / _LOCK).unlink()
        sync(self.path)
        replaced = directory / (final.name + _REPLACED)
        if _is_there(final):
            _remove(replaced)
            final.rename(replaced)
        self.path.rename(final)
        sync(directory)
        self._lock.close()
        _point_latest(directory, final.name)
        _remove(replaced)
        if keep is not None:
            older = [path for step, path in published(directory).items() if step <= self._step]
            for path in older[:-keep]:
                _remove(path)
        return final

    def discard(self) -> None:
        """Remove it, unless it has been published."""
        self._lock.close()
        shutil.rmtree(self.path, ignore_errors=True)


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _point_latest(directory: Path, name: str) -> None:
    temporary = directory / f".{LATEST}.tmp-{secrets.token_hex(4)}"
    try:
        temporary.write_text(_with_seal(name), encoding="utf-8")
        sync(temporary)
        temporary.replace(directory / LATEST)
    finally:
        temporary.unlink(missing_ok=True)
    sync(directory)


def _is_there(path: Path) -> bool:
    """Also as a link that leads nowhere."""
    return path.is_symlink() or path.exists()


def _remove(path: Path) -> None:
    """Remove a checkpoint; half removed, it does not look like one. Of a link only the link: what
    it leads to was put elsewhere by somebody who wants it."""
    if path.is_symlink():
        path.unlink()
    elif path.exists():
        doomed = path.with_name(f".{path.name}.tmp-{secrets.token_hex(4)}")
        path.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def _clear(directory: Path) -> None:
    """Remove what dead runs have left."""
    for path in directory.glob(".step-*.tmp-*"):
        if path.is_symlink():
            path.unlink(missing_ok=True)
        elif not _is_locked(path / _LOCK):
            shutil.rmtree(path, ignore_errors=True)
    for path in (*directory.glob(f".{LATEST}.tmp-*"), *directory.glob(f"{OWNER}.tmp-*")):
        path.unlink(missing_ok=True)


def _is_locked(path: Path) -> bool:
    try:
        with path.open("rb+") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:  # locked, or there are no locks: then nobody knows
        return True
    return False
