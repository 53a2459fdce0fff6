"""Weights from safetensors files: headers first, then one tensor at a time."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ...compiler.capture.skeleton import Skeleton
from ...compiler.ir.errors import StateError
from ...compiler.options.weight_path import locate_weights
from ...compiler.tensors.facts import short_name
from ..files.tensor_file import check_sum, sums_in
from .allocation import Allocation

_FLOATS = ("F64", "F32", "F16", "BF16")
_INTEGERS = ("I64", "I32", "I16", "I8", "U8")


@dataclass(frozen=True)
class _Entry:
    """What a file's header says of a tensor."""

    file: Path
    shape: tuple[int, ...]
    dtype: str


class WeightFiles:
    """A `materialize.Source` of what a model's state dict has.

    Every process reads all headers, so that all refuse what does not fit, and then the data of its
    own tensors only. Values are cast to the model's dtype. Of tied names one is enough.

    Args:
        path: see `locate_weights`.

    Raises:
        OptionError: there is no such file.
        StateError: a damaged or missing file, a tensor that is missing or has another shape.

    Attributes:
        unexpected: names in the files that the model does not have.
    """

    def __init__(self, path: str | Path, skeleton: Skeleton):
        self.path = locate_weights(path)
        self._entries = _indexed(self.path) if self.path.suffix == ".json" else _header(self.path)
        self._names: dict[str, list[str]] = {}  # first name -> those that the files have
        self.unexpected = set(self._entries)
        state = skeleton.model.state_dict(keep_vars=True)
        for name, first in ((n, skeleton.canonical[n]) for n in state if n in skeleton.canonical):
            found = self._names.setdefault(first, [])
            if name in self._entries:
                found.append(name)
                self.unexpected.discard(name)
                self._check(name, state[name])
        missing = [first for first, found in self._names.items() if not found]
        if missing:
            raise StateError(
                f"{self.path} lacks {_listed(missing)} of the model{self._advice(missing)}"
            )

    def has(self, name: str) -> bool:
        return name in self._names

    def fill(self, allocations: Mapping[str, Allocation]) -> None:
        """Read tensors one after the other, and of those that are divided the rows alone.

        Raises:
            StateError: a file cannot be read or is damaged, or tied names have two values.
        """
        with ExitStack() as stack:
            files: dict[Path, tuple[Any, dict[str, str]]] = {}  # opened, and its checksums

            def read(name: str) -> torch.Tensor:
                file = self._entries[name].file
                with _readable(file, f"{name!r} in "):
                    if file not in files:
                        opened = stack.enter_context(_open(file))
                        files[file] = opened, sums_in(opened)
                    opened, sums = files[file]
                    # A view into the mapped file, of which is read what is used; all of it where
                    # there is a checksum.
                    tensor: torch.Tensor = opened.get_tensor(name)
                    why = check_sum(file, name, tensor, sums)
                if why:
                    raise StateError(why)
                return tensor

            for first, allocation in allocations.items():
                name, *others = self._names[first]
                value = read(name)
                for other in others:
                    if not torch.equal(value, read(other)):
                        raise StateError(
                            f"{self.path}: {name!r} and {other!r} have two values, and are one "
                            "tied tensor in the model: untie them, or leave one out of the file"
                        )
                allocation.take(value)

    def _check(self, name: str, tensor: torch.Tensor) -> None:
        entry = self._entries[name]
        if entry.shape != tuple(tensor.shape):
            raise StateError(
                f"{entry.file}: {name!r} has shape {list(entry.shape)}, and "
                f"{list(tensor.shape)} in the model"
            )
        if not _casts(entry.dtype, tensor.dtype):
            raise StateError(
                f"{entry.file}: {name!r} is {entry.dtype}, which has no meaning as "
                f"{short_name(tensor.dtype)}: convert quantised weights first"
            )

    def _advice(self, missing: Collection[str]) -> str:
        """What to do about names that are not there."""
        one = min(missing)
        for name in self._entries:  # model.x in the model, x in the file, or the other way round
            if one.endswith(f".{name}"):
                prefix = one.removesuffix(name)
                rest = (m.removeprefix(prefix) for m in missing if m.startswith(prefix))
                if all(m in self._entries for m in rest):
                    return f": its names fit without the model's prefix {prefix!r}, add it to them"
            if name.endswith(f".{one}"):
                prefix = name.removesuffix(one)
                if all(prefix + m in self._entries for m in missing):
                    return f": its names have a prefix {prefix!r} that the model's lack, remove it"
        return ": names must be those of the model's state_dict()"


def _casts(stored: str, dtype: torch.dtype) -> bool:
    if stored in _FLOATS:
        return dtype.is_floating_point and dtype.itemsize > 1
    if stored in _INTEGERS:
        return not dtype.is_floating_point and not dtype.is_complex and dtype is not torch.bool
    same = {"BOOL": torch.bool, "C64": torch.complex64}
    return same.get(stored) is dtype


def _indexed(index: Path) -> dict[str, _Entry]:
    """The tensors that an index names, with what their files say of them."""
    try:
        where = json.loads(index.read_text(encoding="utf-8"))["weight_map"].items()
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise StateError(f"{index} is no index of safetensors files: {error!r}") from error
    headers: dict[str, dict[str, _Entry]] = {}
    entries = {}
    for name, shard in where:
        if shard not in headers:
            headers[shard] = _header(_inside(index, shard))
        if name not in headers[shard]:
            raise StateError(f"{index} says that {name!r} is in {shard}, which lacks it")
        entries[name] = headers[shard][name]
    return entries


def _inside(index: Path, shard: object) -> Path:
    """A file that an index names, which has to be in the index's own folder."""
    plain = isinstance(shard, str) and "\\" not in shard and ":" not in shard
    if not plain or PurePosixPath(str(shard)).is_absolute() or ".." in str(shard).split("/"):
        raise StateError(f"{index} names {shard!r}, which is not a file below its own folder")
    return index.parent / str(shard)


def _header(file: Path) -> dict[str, _Entry]:
    with _readable(file), _open(file) as opened:
        slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
        return {
            name: _Entry(file, tuple(piece.get_shape()), piece.get_dtype())
            for name, piece in slices.items()
        }


def _open(file: Path) -> Any:
    return safe_open(str(file), framework="pt", device="cpu")


@contextmanager
def _readable(file: Path, what: str = "") -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise StateError(f"{what}{file}: the file is missing") from error
    except (SafetensorError, OSError) as error:
        raise StateError(
            f"{what}{file} cannot be read, the file is damaged or incomplete: {error}"
        ) from error


def _listed(names: Collection[str]) -> str:
    shown = ", ".join(map(repr, list(names)[:5]))
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5} more"
