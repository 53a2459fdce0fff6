"""A checkpoint's adapters as the folder that `PeftModel.from_pretrained` opens."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch

from ...compiler.ir.errors import CheckpointError
from ..checkpoint.storage import check_files, reading, say_without_checksums
from ..files import tensor_file
from ..files.index import Index, read_index
from ..files.step_folder import find
from .adapters import CONFIG, WEIGHTS, Adapter, adapters_in
from .writing import new_folder, write_object

_DEFAULT = "default"  # whose files peft puts into the folder itself


def has_adapters(directory: Path) -> bool:
    """Whether a checkpoint is of a model with adapters.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    return bool(read_index(find(directory)).adapters)


def export_adapters(directory: Path, out: Path, only: str | None = None) -> list[Path]:
    """Write adapters and their configurations, one tensor at a time.

    Args:
        out: ``default`` goes into it, and every other one into a folder in it with its name.
        only: the one to write, into ``out`` itself.

    Returns:
        The files.

    Raises:
        CheckpointError: the checkpoint is damaged or has no such adapter, one cannot be told from
            the rest, or ``out`` is not a new folder or full.
    """
    folder = find(directory)
    index = read_index(folder)
    found = adapters_in(index)
    if only is not None and only not in found:
        known = ", ".join(map(repr, found)) or "none"
        raise CheckpointError(f"{folder} has no adapter {only!r}: it has {known}")
    chosen = found if only is None else {only: found[only]}
    places = {name: _places(folder, index, name, each) for name, each in chosen.items()}
    check_files(folder, index, {name for each in places.values() for name in each.values()})
    say_without_checksums(folder, index)
    with new_folder(out) as temporary, reading(folder, index) as read:
        for name, sources in places.items():
            target = temporary if name in (_DEFAULT, only) else temporary / name
            target.mkdir(exist_ok=True)
            specs = {each: index.tensors[source].spec for each, source in sources.items()}
            tensor_file.write(
                target / WEIGHTS, specs, partial(_read, read, sources), tells_sums=True
            )
            write_object(target / CONFIG, chosen[name].config)
    return sorted(path for path in out.rglob("*") if path.is_file())


def _read(
    read: Callable[[str], torch.Tensor], sources: Mapping[str, str], name: str
) -> torch.Tensor:
    return read(sources[name])


def _places(folder: Path, index: Index, name: str, adapter: Adapter) -> dict[str, str]:
    """Name in peft's file -> name in the checkpoint.

    Raises:
        CheckpointError: it is not known, or the checkpoint lacks one.
    """
    if adapter.obstacle:
        raise CheckpointError(
            f"{folder} does not tell which tensors the adapter {name!r} is of "
            f"({adapter.obstacle}): load the checkpoint, and pipe.load_into(model) and "
            "model.save_pretrained() write it"
        )
    places = {n: f"model.{index.tied.get(source, source)}" for n, source in adapter.tensors.items()}
    if missing := sorted(set(places.values()) - index.tensors.keys()):
        raise CheckpointError(
            f"{folder} is damaged: it has no tensor {missing[0]!r}, which the adapter {name!r} has"
        )
    return places
