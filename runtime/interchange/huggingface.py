"""Checkpoints to and from the files that `from_pretrained` and `save_pretrained` know.

Both ways one tensor at a time is in memory. A tied tensor is written once, under its first name,
as `save_pretrained` does; `from_pretrained` ties it again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ... import __version__
from ...compiler.ir.errors import CheckpointError
from ...compiler.options.weight_path import INDEX, SINGLE
from ..checkpoint.storage import check_files, reading, say_without_checksums
from ..files import tensor_file
from ..files.index import Chunk, Entry, Index, file_name, read_index
from ..files.step_folder import Draft, find, published
from ..files.tensor_file import DTYPES, FileFacts, TensorSpec
from .writing import new_folder, read_object, write_object

_CONFIG = "config.json"


def export(
    directory: Path, out: Path, config: dict[str, Any] | None, shard_bytes: int
) -> list[Path]:
    """Write the weights of a checkpoint, and the model's configuration.

    Args:
        config: None takes that of the model that was saved; if it had none, none is written.
        shard_bytes: the most that one file holds, if no tensor is larger.

    Returns:
        The files.

    Raises:
        CheckpointError: the checkpoint is damaged or without its base, or ``out`` is not a new
            folder or full.
    """
    folder = find(directory)
    index = read_index(folder)
    if index.left_out:
        raise CheckpointError(
            f"{folder} was saved with trainable_only=True and lacks {len(index.left_out)} tensors, "
            f"such as {min(index.left_out)!r}: load it into a pipeline of its base, save() that "
            "whole, and export it"
        )
    check_files(folder, index, {f"model.{name}" for name in index.model})
    config = config or index.config
    say_without_checksums(folder, index)
    with new_folder(out) as temporary, reading(folder, index) as read:
        files = _split(index.model, shard_bytes)
        for file, tensors in files.items():
            whole = partial(_of_model, read)
            tensor_file.write(temporary / file, tensors, whole, tells_sums=True)
        if len(files) > 1:
            write_object(temporary / INDEX, _weight_map(files))
        if config is not None:
            write_object(temporary / _CONFIG, config | _dtype(index.model))
    return sorted(out.iterdir())


def import_(source: Path, directory: Path) -> Path:
    """Make a checkpoint of weights alone.

    Args:
        source: a safetensors file, or a folder of them.
        directory: where checkpoints go; it has none yet.

    Returns:
        The checkpoint's folder.

    Raises:
        CheckpointError: the files are missing or damaged, or there are checkpoints already.
    """
    files = _files_of(source)
    if directory.is_dir() and published(directory):
        raise CheckpointError(f"{directory} has checkpoints already: import to another folder")
    config = source / _CONFIG
    draft = Draft.begin(directory, 0)
    try:
        entries: dict[str, Entry] = {}
        facts: dict[str, FileFacts] = {}
        for number, path in enumerate(files):
            target = draft.path / file_name(number)
            facts[target.name], copied = _copy(path, target)
            for name, entry in copied.items():
                if name in entries:
                    raise CheckpointError(f"{source} has {name.partition('.')[2]!r} in two files")
                entries[name] = entry
        Index(
            step=0,
            tensors=entries,
            tied={},
            config=read_object(config) if config.is_file() else None,
            training=None,
            producer={"pipecompile": __version__, "torch": torch.__version__},
            files=facts,
        ).write(draft.path)
        return draft.publish(None)
    except OSError as error:
        raise CheckpointError(f"cannot write to {directory}: {error.strerror}") from error
    finally:
        draft.discard()


def _of_model(read: Callable[[str], torch.Tensor], name: str) -> torch.Tensor:
    return read(f"model.{name}")


def _split(model: Mapping[str, TensorSpec], most_bytes: int) -> dict[str, dict[str, TensorSpec]]:
    """File name -> its tensors, in the model's order."""
    shards: list[dict[str, TensorSpec]] = [{}]
    size = 0
    for name, spec in model.items():
        if shards[-1] and size + spec.nbytes > most_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = spec
        size += spec.nbytes
    if len(shards) == 1:
        return {SINGLE: shards[0]}
    count = len(shards)
    return {f"model-{i:05d}-of-{count:05d}.safetensors": s for i, s in enumerate(shards, 1)}


def _weight_map(files: Mapping[str, Mapping[str, TensorSpec]]) -> dict[str, Any]:
    size = sum(spec.nbytes for tensors in files.values() for spec in tensors.values())
    names = {name: file for file, tensors in files.items() for name in tensors}
    return {"metadata": {"total_size": size}, "weight_map": names}


def _dtype(model: Mapping[str, TensorSpec]) -> dict[str, str]:
    """The dtype that the weights have now, whatever it was when the configuration was made."""
    floating = (s.dtype for s in model.values() if DTYPES[s.dtype][0].is_floating_point)
    found = next(floating, None)
    return {} if found is None else {"dtype": found}


def _copy(source: Path, target: Path) -> tuple[FileFacts, dict[str, Entry]]:
    """Copy a file's tensors under their names in a checkpoint."""
    with tensor_file.opened(source) as file:
        found = {f"model.{name}": file.spec(name) for name in sorted(file.names)}
        read = file.read
        facts, sums = tensor_file.write(target, found, lambda n: read(n.removeprefix("model.")))
    return facts, {
        name: Entry(
            spec, (Chunk((0,) * len(spec.shape), spec.shape, target.name, name, sums[name]),)
        )
        for name, spec in found.items()
    }


def _files_of(source: Path) -> list[Path]:
    if source.is_file():
        return [source]
    if (source / INDEX).is_file():
        found = read_object(source / INDEX).get("weight_map")
        names = sorted(set(found.values())) if isinstance(found, dict) else []
        if not names or any(Path(name).name != name for name in names):
            raise CheckpointError(f"{source / INDEX} is damaged: it names no files beside it")
        return [source / name for name in names]
    if (source / SINGLE).is_file():
        return [source / SINGLE]
    raise CheckpointError(
        f"{source} has neither {SINGLE} nor {INDEX}: give a folder that save_pretrained "
        "wrote, or a .safetensors file"
    )
