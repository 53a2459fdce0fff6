"""``checkpoint.json``: what a checkpoint holds, and in which file each piece of it is.

This takes the place of DCP's own ``.metadata``, which is a pickle: reading it would run whatever
somebody put there. Everything read here is checked before it is used, file names above all.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...compiler.capture.whole import LOSS
from ...compiler.ir.errors import CheckpointError
from . import checksums, step_folder
from .step_folder import INDEX, sync
from .tensor_file import DTYPES, FileFacts, TensorSpec

FORMAT = "pipecompile checkpoint"
VERSION = 2
WITHOUT_CHECKSUMS = 1  # a version that is still read
WITHOUT_BASE = 3  # as 2, and tensors that were not trained are left out
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
        checksum: of its elements; "" where it was written without.
    """

    offsets: tuple[int, ...]
    shape: tuple[int, ...]
    file: str
    key: str
    checksum: str = ""


@dataclass(frozen=True)
class Entry:
    """One tensor: all of it, and the chunks that it is made of."""

    spec: TensorSpec
    chunks: tuple[Chunk, ...]


@dataclass(frozen=True)
class LeftOut:
    """A tensor that training does not change, of which a checkpoint has the checksum alone."""

    spec: TensorSpec
    checksum: str


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
        files: name of each file of tensors -> what is known of it; nothing where it was written
            without checksums.
        left_out: what is not in it, by the name that it would have.
        adapters: name of each of peft's -> its configuration, and which tensors it has.
    """

    step: int
    tensors: dict[str, Entry]
    tied: dict[str, str]
    config: dict[str, Any] | None
    training: dict[str, Any] | None
    producer: dict[str, str]
    files: dict[str, FileFacts] = field(default_factory=dict)
    left_out: dict[str, LeftOut] = field(default_factory=dict)
    adapters: dict[str, Any] | None = None

    @property
    def has_checksums(self) -> bool:
        return bool(self.files) or not self.tensors

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
        return _of_the_model(self.tensors)

    @property
    def specs(self) -> dict[str, TensorSpec]:
        """Every tensor of the model and of the loss by its name here, left out or not."""
        held = {name: self.tensors[name].spec for name in self.trained.values()}
        return held | {name: each.spec for name, each in self.left_out.items()}

    @property
    def known(self) -> dict[str, str]:
        """As `trained`, and those that are left out."""
        return self.trained | _of_the_model(self.left_out)

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
        files = {name: vars(facts) for name, facts in self.files.items()}
        left_out = {
            name: {**vars(e.spec), "checksum": e.checksum} for name, e in self.left_out.items()
        }
        version = WITHOUT_BASE if left_out else VERSION
        fields = {"format": FORMAT, "version": version} | vars(self)
        fields |= {"tensors": tensors, "files": files, "left_out": left_out}
        path = folder / INDEX
        path.write_bytes(checksums.sealed(json.dumps(fields)))
        sync(path)


def _of_the_model(names: Iterable[str]) -> dict[str, str]:
    """First name -> name in a checkpoint, of those that are the model's or the loss's."""
    model = {name.removeprefix("model."): name for name in names if name.startswith("model.")}
    return model | {name: name for name in names if name.startswith(f"{LOSS}.")}


def read_index(folder: Path, verify: bool = True) -> Index:
    """Read and check a checkpoint's index.

    Args:
        verify: its checksum too.

    Raises:
        CheckpointError: it is damaged, or of a format that is not known.
    """
    path = folder / INDEX
    if not path.is_file():  # which a pipe is not: opening that would wait
        raise CheckpointError(f"{path} is missing: give the folder of a checkpoint")
    try:
        content = path.read_bytes()
        seal = checksums.seal_of(content)
        if verify and seal is False:
            raise ValueError("its checksum is another than that of what was written")
        fields = json.loads(content.decode("utf-8"))
        if fields["format"] != FORMAT:
            raise ValueError(f"its format is {fields['format']!r}")
        version = fields["version"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise _damaged(path, error) from error
    if type(version) is not int or version not in (VERSION, WITHOUT_CHECKSUMS, WITHOUT_BASE):
        raise CheckpointError(
            f"{path} has format version {version!r} and this pipecompile reads {WITHOUT_BASE}: "
            "use the version of pipecompile that wrote it"
        )
    try:
        if verify and version != WITHOUT_CHECKSUMS and seal is None:
            raise ValueError("the checksum at its end is missing")
        return parsed(fields, version != WITHOUT_CHECKSUMS)
    except NOT_AS_WRITTEN as error:
        raise _damaged(path, error) from error


NOT_AS_WRITTEN = (ValueError, KeyError, TypeError, AttributeError, OverflowError)
"""What `parsed` raises."""


def parsed(fields: Mapping[str, Any], summed: bool = True) -> Index:
    """An index from its JSON data, once all of that is found in order.

    Args:
        summed: whether there are checksums.
    """
    files = {name: _file(name, found) for name, found in fields["files"].items()} if summed else {}
    tensors = {name: _entry(name, found) for name, found in fields["tensors"].items()}
    places = [(chunk.file, chunk.key) for entry in tensors.values() for chunk in entry.chunks]
    if len(set(places)) < len(places):
        raise ValueError("two tensors, or two pieces of one, are in one place")
    for chunk in (chunk for entry in tensors.values() for chunk in entry.chunks if summed):
        if chunk.file not in files or not checksums.is_sum(chunk.checksum):
            raise ValueError(f"{chunk.key!r} in {chunk.file} has no checksum")
    left_out = {name: _left_out(name, found) for name, found in fields.get("left_out", {}).items()}
    odd = {*left_out} & {*tensors} or {*left_out} - {*_of_the_model(left_out).values()}
    if odd:
        raise ValueError(f"{min(odd)!r} is left out, and is there or no tensor of the model")
    return Index(
        step=steps_of(fields["step"]),
        tensors=tensors,
        tied={str(name): str(first) for name, first in fields["tied"].items()},
        config=_object(fields["config"]),
        training=_object(fields["training"]),
        producer={str(name): str(version) for name, version in fields["producer"].items()},
        files=files,
        left_out=left_out,
        adapters=_object(fields.get("adapters")),
    )


def steps_of(value: Any) -> int:
    """A number of steps as it was read.

    Raises:
        ValueError: it is none.
    """
    if _natural(value) > step_folder.MOST_STEPS:
        raise ValueError(f"{value!r} is no number of steps")
    return int(value)


def _file(name: str, found: Mapping[str, Any]) -> FileFacts:
    if not _FILE.fullmatch(name) or not checksums.is_sum(found["header"]):
        raise ValueError(f"{name!r} is no file of a checkpoint, or has no checksum")
    return FileFacts(_natural(found["size_bytes"]), found["header"])


def _left_out(name: str, found: Mapping[str, Any]) -> LeftOut:
    if found["dtype"] not in DTYPES or not checksums.is_sum(found["checksum"]):
        raise ValueError(f"{name!r} is left out, and has dtype {found['dtype']!r} or no checksum")
    return LeftOut(TensorSpec(found["dtype"], _naturals(found["shape"])), found["checksum"])


def _entry(name: str, found: Mapping[str, Any]) -> Entry:
    if found["dtype"] not in DTYPES:
        raise ValueError(f"{name!r} has dtype {found['dtype']!r}")
    spec = TensorSpec(found["dtype"], _naturals(found["shape"]))
    chunks = tuple(_chunk(name, spec, chunk) for chunk in found["chunks"])
    if sum(math.prod(chunk.shape) for chunk in chunks) != math.prod(spec.shape) or not chunks:
        raise ValueError(f"the chunks of {name!r} do not cover it")
    if _overlap(chunks):
        raise ValueError(f"chunks of {name!r} overlap")
    return Entry(spec, chunks)


def _overlap(chunks: Sequence[Chunk]) -> bool:
    """Whether two chunks share an element; in the order of dim 0 few have to be compared."""
    active: list[Chunk] = []
    for chunk in sorted((c for c in chunks if math.prod(c.shape)), key=lambda c: c.offsets):
        active = [other for other in active if _meet(other, chunk, slice(0, 1))]
        if any(_meet(other, chunk, slice(None)) for other in active):
            return True
        active.append(chunk)
    return False


def _meet(one: Chunk, other: Chunk, dims: slice) -> bool:
    """Whether two boxes share a range in each of some dimensions."""
    mine = zip(one.offsets[dims], one.shape[dims], strict=True)
    theirs = zip(other.offsets[dims], other.shape[dims], strict=True)
    return all(a < b + n and b < a + m for (a, m), (b, n) in zip(mine, theirs, strict=True))


def _chunk(name: str, spec: TensorSpec, found: Mapping[str, Any]) -> Chunk:
    chunk = Chunk(
        _naturals(found["offsets"]),
        _naturals(found["shape"]),
        found["file"],
        str(found["key"]),
        found.get("checksum", ""),
    )
    if not isinstance(chunk.file, str) or not _FILE.fullmatch(chunk.file):
        raise ValueError(f"{name!r} is in {chunk.file!r}, which is no file of a checkpoint")
    box = zip(chunk.offsets, chunk.shape, spec.shape, strict=True)
    if any(start + length > whole for start, length, whole in box):
        raise ValueError(f"a chunk of {name!r} is larger than the tensor")
    return chunk


def _natural(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 2**63:
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
