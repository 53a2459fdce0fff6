"""safetensors files: written tensor by tensor, synced to the disk; read in part.

The library's own writer wants all tensors of a file in host memory at once; this one wants one at
a time. Layout: 8 bytes with the header's length, a JSON header of name -> dtype, shape and
offsets, the data. Reading is the library's: it checks that header and file size agree.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open

from ...compiler.ir.errors import CheckpointError
from ...compiler.tensors.facts import short_name
from . import checksums

# dtype's name -> dtype, its name in the format
DTYPES: dict[str, tuple[torch.dtype, str]] = {
    short_name(dtype): (dtype, code)
    for dtype, code in (
        (torch.float64, "F64"),
        (torch.float32, "F32"),
        (torch.float16, "F16"),
        (torch.bfloat16, "BF16"),
        (torch.float8_e4m3fn, "F8_E4M3"),
        (torch.float8_e5m2, "F8_E5M2"),
        (torch.complex64, "C64"),
        (torch.int64, "I64"),
        (torch.int32, "I32"),
        (torch.int16, "I16"),
        (torch.int8, "I8"),
        (torch.uint64, "U64"),
        (torch.uint32, "U32"),
        (torch.uint16, "U16"),
        (torch.uint8, "U8"),
        (torch.bool, "BOOL"),
    )
}
_NAMES = {dtype: name for name, (dtype, _) in DTYPES.items()}
_CODES = {code: name for name, (_, code) in DTYPES.items()}


@dataclass(frozen=True)
class TensorSpec:
    """Shape and dtype (by name, such as "float32") of a tensor in a file."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype][0].itemsize


def dtype_name(dtype: torch.dtype) -> str:
    """Its name in `DTYPES`.

    Raises:
        CheckpointError: safetensors has no such dtype.
    """
    if dtype not in _NAMES:
        raise CheckpointError(f"{dtype} has no place in a safetensors file: use another dtype")
    return _NAMES[dtype]


_BESIDE_BYTES = 1 << 18  # from which on a checksum is worth a second thread
_SUMS = "pipecompile.xxh3"
"""Of a file's metadata, which `save_pretrained` and others do not carry on: JSON of tensor name ->
checksum."""


@dataclass(frozen=True)
class FileFacts:
    """What is to be remembered of a file, beside its tensors' checksums: together they are of all
    its bytes.

    Attributes:
        size_bytes: of all of it.
        header: checksum of what stands before the data.
    """

    size_bytes: int
    header: str


def write(
    path: Path,
    specs: Mapping[str, TensorSpec],
    read: Callable[[str], torch.Tensor],
    sum_of: Callable[[Any], str] = checksums.of_bytes,
    tells_sums: bool = False,
) -> tuple[FileFacts, dict[str, str]]:
    """Write a new file and wait until it is on the disk.

    Args:
        specs: tensor name -> what it is, in any order.
        read: name -> the tensor, on any device; called once for each.
        sum_of: makes checksums of bytes.
        tells_sums: the file has its tensors' checksums itself, as no index beside it does.

    Returns:
        What to remember of the file, and tensor name -> checksum of what was written of it.

    Raises:
        OSError: for example no space left.
    """
    unknown = dict.fromkeys(specs, checksums.of_bytes(b""))  # as long as those to come
    header, starts = layout(specs, unknown if tells_sums else None)
    sums = {}
    with path.open("xb") as file, ThreadPoolExecutor(1) as beside:
        file.write(header)
        for name in starts:
            data = checksums.bytes_of(read(name))
            if specs[name].nbytes < _BESIDE_BYTES:
                sums[name] = sum_of(data)
                file.write(data)
            else:  # neither holds Python's lock
                pending = beside.submit(sum_of, data)
                file.write(data)
                sums[name] = pending.result()
        size_bytes = file.tell()
        if tells_sums:
            header, _ = layout(specs, {name: sums[name] for name in unknown})
            file.seek(0)
            file.write(header)
        file.flush()
        os.fsync(file.fileno())
        return FileFacts(size_bytes, sum_of(header)), sums


def layout(
    specs: Mapping[str, TensorSpec], sums: Mapping[str, str] | None = None
) -> tuple[bytes, dict[str, int]]:
    """What a file of these tensors begins with, and tensor name -> the byte that it begins at.

    Wide dtypes come first, so that all data is aligned, as the format recommends.

    Args:
        sums: checksums that it has, by tensor.
    """
    order = sorted(specs, key=lambda name: -DTYPES[specs[name].dtype][0].itemsize)
    told = {} if sums is None else {_SUMS: json.dumps(sums)}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"} | told}
    end, starts = 0, {}
    for name in order:
        starts[name], spec = end, specs[name]
        end += spec.nbytes
        header[name] = {
            "dtype": DTYPES[spec.dtype][1],
            "shape": list(spec.shape),
            "data_offsets": [starts[name], end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    content = len(text).to_bytes(8, "little") + text
    return content, {name: len(content) + start for name, start in starts.items()}


def sums_in(opened: Any) -> dict[str, str]:
    """The checksums of tensors that a file of ours has, by name; none in one of others.

    Args:
        opened: by safetensors.
    """
    try:
        told = json.loads((opened.metadata() or {}).get(_SUMS, "{}"))
    except ValueError:  # damaged, as its data may be
        return dict.fromkeys(opened.keys(), "unreadable")
    return {str(name): str(found) for name, found in told.items()} if told else {}


def check_sum(path: Path, name: str, tensor: torch.Tensor, sums: Mapping[str, str]) -> str:
    """Why a tensor is not what was written, or "".

    Args:
        tensor: all of it, as it is in the file.
        sums: what the file has.
    """
    if name not in sums or checksums.of_tensor(tensor) == sums[name]:
        return ""
    return (
        f"{path} is damaged: {name!r} is not what was written (its checksum differs): copy or "
        f"export it again; a program that has changed it on purpose has to drop {_SUMS!r} from its "
        "metadata"
    )


class TensorFile:
    """An open file; tensors are read when asked for.

    Attributes:
        sums: checksums of its tensors that the file has itself, by name.
    """

    def __init__(self, path: Path, opened: Any):
        self._path, self._opened = path, opened
        self.names: frozenset[str] = frozenset(opened.keys())
        self.sums = sums_in(opened)

    def spec(self, name: str) -> TensorSpec:
        """Of one tensor.

        Raises:
            CheckpointError: the file has no such tensor, or one of an unknown dtype.
        """
        if name not in self.names:
            raise CheckpointError(f"{self._path} is damaged: it has no tensor {name!r}")
        found = self._opened.get_slice(name)
        code = found.get_dtype()
        if code not in _CODES:
            raise CheckpointError(f"{self._path}: {name!r} has dtype {code}, which is not known")
        return TensorSpec(_CODES[code], tuple(found.get_shape()))

    def read(
        self, name: str, start: tuple[int, ...] = (), lengths: tuple[int, ...] | None = None
    ) -> torch.Tensor:
        """A tensor, or the box of it that begins at ``start``.

        Raises:
            CheckpointError: the file has a checksum of its own for it, which differs.
        """
        if lengths is None or not lengths:
            whole = cast(torch.Tensor, self._opened.get_tensor(name))
            if why := check_sum(self._path, name, whole, self.sums):
                raise CheckpointError(why)
            return whole
        box = tuple(slice(a, a + n) for a, n in zip(start, lengths, strict=True))
        return cast(torch.Tensor, self._opened.get_slice(name)[box])


def check_header(path: Path, facts: FileFacts) -> None:
    """Compare a file's size, and what stands before its data, with what was written.

    Raises:
        CheckpointError: they differ, or it cannot be read.
    """
    if not path.is_file():  # opening a pipe would wait for somebody who writes to it
        raise _no_file(path)
    try:
        with path.open("rb") as file:
            size_bytes = os.fstat(file.fileno()).st_size
            start = file.read(8)
            length = min(int.from_bytes(start, "little"), size_bytes)
            header = start + file.read(length)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error}): it is damaged") from error
    if size_bytes != facts.size_bytes:
        raise CheckpointError(
            f"{path} cannot be read: it has {size_bytes:,} bytes and had {facts.size_bytes:,} when "
            "it was written: it is damaged"
        )
    if checksums.of_bytes(header) != facts.header:
        raise CheckpointError(
            f"{path} is damaged: its header, which says what and where its tensors are, is not "
            "what was written: load another checkpoint, or copy this one again"
        )


def _no_file(path: Path) -> CheckpointError:
    missing = not path.is_symlink() and not path.exists()
    what = "is missing" if missing else "is no file"
    return CheckpointError(f"{path} {what}: the checkpoint is incomplete")


@contextmanager
def opened(path: Path) -> Iterator[TensorFile]:
    """Open a file for reading.

    Raises:
        CheckpointError: it is missing, cut off, or no safetensors file.
    """
    if not path.is_file():
        raise _no_file(path)
    try:
        file = safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}): it is damaged") from error
    with file:
        yield TensorFile(path, file)
