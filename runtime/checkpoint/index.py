"""``checkpoint.json``: what a checkpoint holds, and in which file each piece of it is.

This takes the place of DCP's own ``.metadata``, which is a pickle: reading it would run whatever
somebody put there. Everything read here is checked before it is used, file names above all.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...compiler.capture.whole import LOSS
from ...compiler.ir.errors import CheckpointError
from .step_folder import INDEX, sync
from .tensor_file import DTYPES, TensorSpec

FORMAT = "pipecompile checkpoint"
VERSION = 1
_FILE = re.compile(r"part-\d{5,9}\.safetensors")


def file_name(number: int) -> str:
    """Of one rank's, or one part's, tensors."""
    return f"part-{number:05d}.safetensors"


@dataclass(frozen=True)
class Chunk:
    """A box of a tensor, and where it is.

    Attributes:
        offsets: of the box in the tensor, per dimension.
        shape: of the box.
        key: its name in the file.
    """

    offsets: tuple[int, ...]
    shape: tuple[int, ...]
    file: str
    key: str


@dataclass(frozen=True)
class Entry:
    """One tensor: all of it, and the chunks that it is made of."""

    spec: TensorSpec
    chunks: tuple[Chunk, ...]


@dataclass(frozen=True)
class Index:
    """A checkpoint but for the tensors' data.

    Attributes:
        step: after how many.
        tensors: ``model.FQN``, ``loss_fn.NAME`` and ``optimizer.FQN.STATE`` -> where it is.
        tied: further names of a model's tensors -> the name that they are stored under.
        config: the model's configuration, if it had one.
        training: what `runtime.checkpoint.restore` knows of; None for weights alone.
        producer: name -> version of what wrote it; for people.
    """

    step: int
    tensors: dict[str, Entry]
    tied: dict[str, str]
    config: dict[str, Any] | None
    training: dict[str, Any] | None
    producer: dict[str, str]

    @property
    def model(self) -> dict[str, TensorSpec]:
        """The model's tensors under their own names, without the tied ones."""
        prefix = "model."
        return {
            name.removeprefix(prefix): entry.spec
            for name, entry in self.tensors.items()
            if name.startswith(prefix)
        }

    @property
    def trained(self) -> dict[str, str]:
        """First name of each tensor of the model, and of the loss -> its name here."""
        names = {name: f"model.{name}" for name in self.model}
        return names | {name: name for name in self.tensors if name.startswith(f"{LOSS}.")}

    def write(self, folder: Path) -> None:
        """Write it and wait until it is on the disk."""
        tensors = {
            name: {
                "dtype": entry.spec.dtype,
                "shape": entry.spec.shape,
                "chunks": [vars(chunk) for chunk in entry.chunks],
            }
            for name, entry in self.tensors.items()
        }
        fields = {"format": FORMAT, "version": VERSION} | vars(self) | {"tensors": tensors}
        path = folder / INDEX
        path.write_text(json.dumps(fields), encoding="utf-8")
        sync(path)


def read_index(folder: Path) -> Index:
    """Read and check a checkpoint's index.

    Raises:
        CheckpointError: it is damaged, or of a format that is not known.
    """
    path = folder / INDEX
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        if fields["format"] != FORMAT:
            raise ValueError(f"its format is {fields['format']!r}")
        version = fields["version"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise _damaged(path, error) from error
    if version != VERSION:
        raise CheckpointError(
            f"{path} has format version {version!r} and this pipecompile reads {VERSION}: "
            "use the version of pipecompile that wrote it"
        )
    try:
        return _parse(fields)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(path, error) from error


def _parse(fields: Mapping[str, Any]) -> Index:
    return Index(
        step=_natural(fields["step"]),
        tensors={str(name): _entry(name, found) for name, found in fields["tensors"].items()},
        tied={str(name): str(first) for name, first in fields["tied"].items()},
        config=_object(fields["config"]),
        training=_object(fields["training"]),
        producer={str(name): str(version) for name, version in fields["producer"].items()},
    )


def _entry(name: str, found: Mapping[str, Any]) -> Entry:
    if found["dtype"] not in DTYPES:
        raise ValueError(f"{name!r} has dtype {found['dtype']!r}")
    spec = TensorSpec(found["dtype"], _naturals(found["shape"]))
    chunks = tuple(_chunk(name, spec, chunk) for chunk in found["chunks"])
    if sum(math.prod(chunk.shape) for chunk in chunks) != math.prod(spec.shape) or not chunks:
        raise ValueError(f"the chunks of {name!r} do not cover it")
    return Entry(spec, chunks)


def _chunk(name: str, spec: TensorSpec, found: Mapping[str, Any]) -> Chunk:
    chunk = Chunk(
        _naturals(found["offsets"]), _naturals(found["shape"]), found["file"], str(found["key"])
    )
    if not isinstance(chunk.file, str) or not _FILE.fullmatch(chunk.file):
        raise ValueError(f"{name!r} is in {chunk.file!r}, which is no file of a checkpoint")
    box = zip(chunk.offsets, chunk.shape, spec.shape, strict=True)
    if any(start + length > whole for start, length, whole in box):
        raise ValueError(f"a chunk of {name!r} is larger than the tensor")
    return chunk


def _natural(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{value!r} is no count")
    return value


def _naturals(values: Any) -> tuple[int, ...]:
    return tuple(map(_natural, values))


def _object(value: Any) -> dict[str, Any] | None:
    if value is not None and not isinstance(value, dict):
        raise ValueError(f"{type(value).__name__} where an object belongs")
    return value


def _damaged(path: Path, error: Exception) -> CheckpointError:
    reason = f"{error.args[0]} is missing" if isinstance(error, KeyError) else str(error)
    return CheckpointError(f"{path} is damaged: {reason}")
