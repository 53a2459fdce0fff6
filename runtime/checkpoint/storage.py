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
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

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
from . import tensor_file
from .index import Chunk, Entry, Index, file_name
from .tensor_file import DTYPES, TensorSpec, dtype_name


class Writer(StorageWriter):
    """Writes this rank's tensors to ``folder``, and calls ``finish`` once all ranks have.

    Args:
        finish: called on the coordinator with where every tensor is; it publishes.
    """

    def __init__(self, folder: Path, rank: int, finish: Callable[[dict[str, Entry]], None]):
        self._folder, self._rank, self._finish = folder, rank, finish

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        pass

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        pass

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        items = {_key(item): item for item in plan.items}
        path = self._folder / file_name(self._rank)
        specs = {key: _spec(item) for key, item in items.items()}
        try:
            if items:
                tensor_file.write(path, specs, lambda key: _resolve(planner, items[key]))
        except OSError as error:
            raise CheckpointError(
                f"rank {self._rank} cannot write {path}: {error.strerror or error}; the "
                "checkpoints before it are as they were: make room, or save to another folder"
            ) from error
        written = [
            WriteResult(item.index, specs[key].nbytes, _chunk(item, path.name, key))
            for key, item in items.items()
        ]
        return _done(written)

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        chunks: dict[str, list[Chunk]] = defaultdict(list)
        for result in (result for rank in results for result in rank):
            chunks[result.index.fqn].append(result.storage_data)
        entries = {}
        for name, found in metadata.state_dict_metadata.items():
            assert isinstance(found, TensorStorageMetadata)
            spec = TensorSpec(dtype_name(found.properties.dtype), tuple(found.size))
            entries[name] = Entry(spec, tuple(chunks[name]))
        try:
            self._finish(entries)
        except OSError as error:
            raise CheckpointError(
                f"cannot publish {self._folder}: {error.strerror or error}; the checkpoints "
                "before it are as they were: make room, or save to another folder"
            ) from error

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return False


class Reader(StorageReader):
    """Reads what DCP plans to from a checkpoint whose index has been read."""

    def __init__(self, folder: Path, index: Index):
        self._folder, self._index = folder, index
        self._chunks: dict[MetadataIndex, Chunk] = {}

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
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        by_file: dict[str, list[ReadItem]] = defaultdict(list)
        for item in plan.items:
            by_file[self._chunks[item.storage_index].file].append(item)
        for name, items in by_file.items():
            with tensor_file.opened(self._folder / name) as file:
                for item in items:
                    self._read(file, item, planner)
        return _done(None)

    def _read(self, file: tensor_file.TensorFile, item: ReadItem, planner: LoadPlanner) -> None:
        chunk = self._chunks[item.storage_index]
        found = file.read(chunk.key, tuple(item.storage_offsets), tuple(item.lengths))
        target = planner.resolve_tensor(item).detach()
        target.copy_(found.reshape(target.shape))
        planner.commit_tensor(item, target)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return False


def check_files(folder: Path, index: Index, names: set[str]) -> None:
    """The files have the tensors that the index says, so that reading them will not fail half way.

    Args:
        names: of the tensors that will be read.

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
        with tensor_file.opened(path) as file:
            for chunk, dtype in chunks:
                found = file.spec(chunk.key)
                if found != TensorSpec(dtype, chunk.shape):
                    raise CheckpointError(
                        f"{path} is damaged: {chunk.key!r} is {found.dtype}{list(found.shape)} "
                        f"and should be {dtype}{list(chunk.shape)}"
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
                tensor[target] = files[chunk.file].read(chunk.key)
            return tensor

        yield read


def _key(item: WriteItem) -> str:
    """The name of a box in its file: its tensor's, if it is all of it."""
    assert item.tensor_data is not None
    if item.tensor_data.chunk.sizes == item.tensor_data.size:
        return item.index.fqn
    return f"{item.index.fqn}@{','.join(map(str, item.tensor_data.chunk.offsets))}"


def _spec(item: WriteItem) -> TensorSpec:
    assert item.tensor_data is not None
    data = item.tensor_data
    return TensorSpec(dtype_name(data.properties.dtype), tuple(data.chunk.sizes))


def _chunk(item: WriteItem, file: str, key: str) -> Chunk:
    assert item.tensor_data is not None
    box = item.tensor_data.chunk
    return Chunk(tuple(box.offsets), tuple(box.sizes), file, key)


def _resolve(planner: SavePlanner, item: WriteItem) -> torch.Tensor:
    tensor = planner.resolve_data(item)
    assert isinstance(tensor, torch.Tensor)
    return tensor


def _done(value: Any) -> Future[Any]:
    future: Future[Any] = Future()
    future.set_result(value)
    return future
