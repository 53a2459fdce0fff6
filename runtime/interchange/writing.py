"""Folders that are there when all is well or not at all, and JSON in them."""

from __future__ import annotations

import json
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ...compiler.ir.errors import CheckpointError


def read_object(path: Path) -> dict[str, Any]:
    """A JSON file such as config.json.

    Raises:
        CheckpointError: it is missing, or something else.
    """
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(fields, dict):
        raise CheckpointError(f"{path} is not a JSON object")
    return fields


def write_object(path: Path, fields: dict[str, Any]) -> None:
    path.write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n", encoding="utf-8")


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A temporary folder that becomes ``out`` when all is well.

    Raises:
        CheckpointError: ``out`` is there and not empty, or cannot be written.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"{out} exists and is not an empty folder: give another OUT")
    out = out.absolute()
    temporary = out.with_name(f".{out.name}.tmp-{secrets.token_hex(4)}")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        temporary.replace(out)
    except OSError as error:
        raise CheckpointError(f"cannot write to {out}: {error.strerror}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
