"""How torch.distributed.checkpoint (DCP) reads and writes our files.

DCP decides which rank writes and reads which box of which tensor, for plain tensors and DTensors
alike: resharding is its work. What it asks of a storage is small, and is here, because none of
its own would do. `FileSystemReader` unpickles an index and, for what is no tensor, data: opening
a checkpoint would run code from it. `HuggingFaceStorageWriter` makes safetensors files, but where
every rank writes its own share it leaves no index and no room for state that is no tensor, and it
needs all data in host memory. So: one safetensors file per rank, and one JSON index.
"""

from __future__ import annotations

import os
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    WriteItem,
)
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from ...compiler.ir.errors import CheckpointError
from ..files import checksums, tensor_file
from ..files.index import Chunk, Entry, Index, file_name, read_index
from ..files.tensor_file import DTYPES, FileFacts, TensorSpec, dtype_name
from ..transport.turns import Turns

PLANNED = "the plan of the checkpoint"
WRITES, WRITTEN = "writing its part of the checkpoint", "the parts of all ranks"
PUBLISHES = "publishing the checkpoint"
READS, READ = "reading its part of the checkpoint", "what all ranks read"

Finish = Callable[[dict[str, Entry], dict[str, FileFacts]], None]


class Writer(StorageWriter):
    """Writes this rank's tensors to ``folder``, and calls ``finish`` once all ranks have.

    Args:
        turns: notes for whom this rank waits.
        finish: called on the coordinator with where every tensor is, and the files; it publishes.
    """

    def __init__(self, folder: Path, rank: int, turns: Turns, finish: Finish):
        self._folder, self._rank, self._turns, self._finish = folder, rank, turns, finish

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        pass

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        pass

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        self._turns.wait(PLANNED)
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        self._turns.work(PLANNED)
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        self._turns.work(WRITES)
        try:
            return _done(self._written(plan, planner))
        finally:
            self._turns.wait(WRITTEN)

    def _written(self, plan: SavePlan, planner: SavePlanner) -> list[WriteResult]:
        items = {key_of(item): item for item in plan.items}
        path = self._folder / file_name(self._rank)
        specs = {key: spec_of(item) for key, item in items.items()}
        if not items:
            return []
        try:
            facts, sums = tensor_file.write(path, specs, lambda k: _resolve(planner, items[k]))
        except OSError as error:
            raise CheckpointError(
                f"rank {self._rank} cannot write {path}: {error.strerror or error}; the "
                "checkpoints before it are as they were: make room, or save to another folder"
            ) from error
        return [
            WriteResult(
                item.index, specs[key].nbytes, (_chunk(item, path.name, key, sums[key]), facts)
            )
            for key, item in items.items()
        ]

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        self._turns.work(PUBLISHES)
        chunks: dict[str, list[Chunk]] = defaultdict(list)
        files: dict[str, FileFacts] = {}
        for result in (result for rank in results for result in rank):
            chunk, facts = result.storage_data
            chunks[result.index.fqn].append(chunk)
            files[chunk.file] = facts
        entries = {}
        for name, found in metadata.state_dict_metadata.items():
            assert isinstance(found, TensorStorageMetadata)
            spec = TensorSpec(dtype_name(found.properties.dtype), tuple(found.size))
            entries[name] = Entry(spec, tuple(chunks[name]))
        try:
            self._finish(entries, files)
        except OSError as error:
            raise CheckpointError(
                f"cannot publish {self._folder}: {error.strerror or error}; the checkpoints "
                "before it are as they were: make room, or save to another folder"
            ) from error

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return False


class Source(Protocol):
    """What a training is loaded from; all ranks ask it the same, in this order."""

    @property
    def verify(self) -> bool:
        """Whether checksums of all that is read are compared."""
        ...

    def index(self) -> Index:
        """What there is.

        Raises:
            CheckpointError: nothing of this kind.
        """
        ...

    def check(self, index: Index, names: set[str]) -> None:
        """That the tensors of these names can be read.

        Raises:
            CheckpointError: they cannot.
        """
        ...

    def reader(self, index: Index, turns: Turns) -> StorageReader:
        """What DCP reads them with.

        Args:
            turns: notes for whom this rank waits.
        """
        ...


@dataclass(frozen=True)
class Folder:
    """A checkpoint on disk, as a source.

    Attributes:
        verify: compare the checksums of all that is read.
        tells: whether this rank warns of what has none.
    """

    path: Path
    verify: bool
    tells: bool

    def __str__(self) -> str:
        return str(self.path)

    def index(self) -> Index:
        found = read_index(self.path, self.verify)
        if self.verify and self.tells:
            say_without_checksums(self.path, found)
        return found

    def check(self, index: Index, names: set[str]) -> None:
        check_files(self.path, index, names, self.verify)

    def reader(self, index: Index, turns: Turns) -> StorageReader:
        return Reader(self.path, index, turns, self.verify)


class Reader(StorageReader):
    """Reads what DCP plans to from a checkpoint whose index has been read.

    Args:
        turns: notes for whom this rank waits.
        verify: compare the checksums of all chunks of which something is read.
    """

    def __init__(self, folder: Path, index: Index, turns: Turns, verify: bool = True):
        self._folder, self._index, self._turns = folder, index, turns
        self._verify = verify and index.has_checksums
        self._chunks: dict[MetadataIndex, Chunk] = {}
        self._sound: set[MetadataIndex] = set()

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        pass

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        tensors: dict[str, Any] = {}
        for name, entry in self._index.tensors.items():
            boxes = [
                ChunkStorageMetadata(torch.Size(chunk.offsets), torch.Size(chunk.shape))
                for chunk in entry.chunks
            ]
            properties = TensorProperties(dtype=DTYPES[entry.spec.dtype][0])
            tensors[name] = TensorStorageMetadata(properties, torch.Size(entry.spec.shape), boxes)
        return Metadata(tensors)

    def set_up_storage_reader(
        self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any
    ) -> None:
        self._chunks = {
            MetadataIndex(name, chunk.offsets): chunk
            for name, entry in self._index.tensors.items()
            for chunk in entry.chunks
        }

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        self._turns.wait(PLANNED)
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        self._turns.work(PLANNED)
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        self._turns.work(READS)
        try:
            self._read_plan(plan, planner)
        finally:
            self._turns.wait(READ)
        return _done(None)

    def _read_plan(self, plan: LoadPlan, planner: LoadPlanner) -> None:
        by_file: dict[str, list[ReadItem]] = defaultdict(list)
        for item in plan.items:
            by_file[self._chunks[item.storage_index].file].append(item)
        for name, items in by_file.items():
            with tensor_file.opened(self._folder / name) as file:
                for item in items:
                    self._read(file, item, planner)

    def _read(self, file: tensor_file.TensorFile, item: ReadItem, planner: LoadPlanner) -> None:
        chunk = self._chunks[item.storage_index]
        if self._verify and item.storage_index not in self._sound:
            check_sum(self._folder, chunk, file.read(chunk.key))
            self._sound.add(item.storage_index)
        found = file.read(chunk.key, tuple(item.storage_offsets), tuple(item.lengths))
        target = planner.resolve_tensor(item).detach()
        target.copy_(found.reshape(target.shape))
        planner.commit_tensor(item, target)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return False


def check_sum(folder: Path, chunk: Chunk, tensor: torch.Tensor) -> None:
    """Compare what was read with what was written.

    Raises:
        CheckpointError: they differ.
    """
    found = checksums.of_tensor(tensor)
    if found != chunk.checksum:
        raise CheckpointError(
            f"{folder / chunk.file} is damaged: the values of {chunk.key!r} have the checksum "
            f"{found} and were written with {chunk.checksum}: load another checkpoint, or copy "
            "this one again; verify=False reads it as it is"
        )


def check_files(folder: Path, index: Index, names: set[str], verify: bool = True) -> None:
    """The files have the tensors that the index says, so that reading them will not fail half way.

    Args:
        names: of the tensors that will be read.
        verify: the checksums of the files' headers too.

    Raises:
        CheckpointError: a file is missing, cut off, outside of the folder, or another one.
    """
    by_file: dict[str, list[tuple[Chunk, str]]] = defaultdict(list)
    for name in names:
        entry = index.tensors[name]
        for chunk in entry.chunks:
            by_file[chunk.file].append((chunk, entry.spec.dtype))
    for name, chunks in by_file.items():
        path = folder / name
        if path.resolve().parent != folder.resolve():
            raise CheckpointError(f"{path} is a link to outside of the checkpoint: copy it there")
        if verify and name in index.files:
            tensor_file.check_header(path, index.files[name])
        with tensor_file.opened(path) as file:
            for chunk, dtype in chunks:
                found = file.spec(chunk.key)
                if found != TensorSpec(dtype, chunk.shape):
                    raise CheckpointError(
                        f"{path} is damaged: {chunk.key!r} is {found.dtype}{list(found.shape)} "
                        f"and should be {dtype}{list(chunk.shape)}"
                    )


def say_without_checksums(folder: Path, index: Index) -> None:
    """Warn of what cannot be verified; Python shows a warning of one folder once."""
    if not index.has_checksums:
        warnings.warn(
            f"{folder} was written by a pipecompile without checksums: it is taken as it is, and "
            "damage to its values would not be seen; save it anew to have them",
            stacklevel=2,
        )


@contextmanager
def reading(folder: Path, index: Index) -> Iterator[Callable[[str], torch.Tensor]]:
    """Yields a function from a tensor's name to all of it, put together on the CPU."""
    with ExitStack() as stack:
        names = {chunk.file for entry in index.tensors.values() for chunk in entry.chunks}
        files = {n: stack.enter_context(tensor_file.opened(folder / n)) for n in sorted(names)}

        def read(name: str) -> torch.Tensor:
            entry = index.tensors[name]
            tensor = torch.empty(entry.spec.shape, dtype=DTYPES[entry.spec.dtype][0])
            for chunk in entry.chunks:
                box = zip(chunk.offsets, chunk.shape, strict=True)
                target = tuple(slice(start, start + length) for start, length in box)
                found = files[chunk.file].read(chunk.key)
                if index.has_checksums:
                    check_sum(folder, chunk, found)
                tensor[target] = found
            return tensor

        yield read


def key_of(item: WriteItem) -> str:
    """The name of a box in its file: its tensor's, if it is all of it."""
    assert item.tensor_data is not None
    if item.tensor_data.chunk.sizes == item.tensor_data.size:
        return item.index.fqn
    return f"{item.index.fqn}@{','.join(map(str, item.tensor_data.chunk.offsets))}"


def spec_of(item: WriteItem) -> TensorSpec:
    """Of a box."""
    assert item.tensor_data is not None
    data = item.tensor_data
    return TensorSpec(dtype_name(data.properties.dtype), tuple(data.chunk.sizes))


def _chunk(item: WriteItem, file: str, key: str, checksum: str) -> Chunk:
    assert item.tensor_data is not None
    box = item.tensor_data.chunk
    return Chunk(tuple(box.offsets), tuple(box.sizes), file, key, checksum)


def _resolve(planner: SavePlanner, item: WriteItem) -> torch.Tensor:
    tensor = planner.resolve_data(item)
    assert isinstance(tensor, torch.Tensor)
    return tensor


def _done(value: Any) -> Future[Any]:
    future: Future[Any] = Future()
    future.set_result(value)
    return future
