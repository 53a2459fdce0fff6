"""A rank's part of the state in a file of memory, and all parts of a snapshot as one checkpoint.

What is in it, under which names, is that of a checkpoint on disk, so that any division loads it.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import create_default_local_save_plan
from torch.distributed.checkpoint.planner import WriteItem

from ... import __version__
from ...compiler.ir.errors import CheckpointError
from ..checkpoint import snapshot
from ..checkpoint.optimizer_state import local_rows
from ..checkpoint.snapshot import Training
from ..checkpoint.storage import key_of, spec_of
from ..files import checksums
from ..files.index import NOT_AS_WRITTEN, Index, parsed
from ..files.tensor_file import DTYPES, TensorSpec, dtype_name, layout


@dataclass(frozen=True)
class Room:
    """A file of memory that this process can write to.

    Attributes:
        content: all its bytes, uint8.
    """

    path: Path
    content: torch.Tensor

    @staticmethod
    def of(path: Path, size_bytes: int) -> Room:
        """Make the file, or take the one that is there.

        Raises:
            OSError: there is not so much memory; nothing is left then.
        """
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            os.ftruncate(handle, size_bytes)
            os.posix_fallocate(handle, 0, size_bytes)  # else writing would end the process
            mapped = mmap.mmap(handle, size_bytes)
        except OSError:
            path.unlink(missing_ok=True)
            raise
        finally:
            os.close(handle)
        return Room(path, torch.frombuffer(mapped, dtype=torch.uint8))

    def view(self, start: int, spec: TensorSpec) -> torch.Tensor:
        """A tensor in it, from some byte on."""
        flat = self.content[start : start + spec.nbytes].view(DTYPES[spec.dtype][0])
        return flat.view(spec.shape)


@dataclass(frozen=True)
class Form:
    """What of a rank's state is where in a file.

    Attributes:
        items: key in the file -> a box of a tensor, as DCP describes it.
        header: what the file begins with.
        starts: key -> the byte that its data begins at.
    """

    items: dict[str, WriteItem]
    specs: dict[str, TensorSpec]
    header: bytes
    starts: dict[str, int]

    @staticmethod
    def of(tensors: Mapping[str, torch.Tensor]) -> Form:
        plan = create_default_local_save_plan(dict(tensors), True)
        items = {key_of(item): item for item in plan.items}
        specs = {key: spec_of(item) for key, item in items.items()}
        return Form(items, specs, *layout(specs))

    @property
    def size_bytes(self) -> int:
        data = sum(spec.nbytes for spec in self.specs.values())
        return len(self.header) + data


def copy(form: Form, tensors: Mapping[str, torch.Tensor], room: Room) -> None:
    """The values of this moment."""
    head = len(form.header)
    room.content[:head] = torch.frombuffer(bytearray(form.header), dtype=torch.uint8)
    for key, start in form.starts.items():
        target = room.view(start, form.specs[key])
        target.copy_(local_rows(tensors[form.items[key].index.fqn]).detach())


def described(form: Form, room: Room) -> dict[str, Any]:
    """The tensors of a file, with their checksums, in the form of a checkpoint's index."""
    tensors: dict[str, Any] = {}
    for key, item in form.items.items():
        assert item.tensor_data is not None
        box = item.tensor_data.chunk
        tensors[item.index.fqn] = {
            "dtype": dtype_name(item.tensor_data.properties.dtype),
            "shape": list(item.tensor_data.size),
            "chunks": [
                {
                    "offsets": list(box.offsets),
                    "shape": list(box.sizes),
                    "file": room.path.name,
                    "key": key,
                    "checksum": checksums.of_tensor(room.view(form.starts[key], form.specs[key])),
                }
            ],
        }
    header = checksums.of_bytes(form.header)
    files = {room.path.name: {"size_bytes": form.size_bytes, "header": header}}
    return {"tensors": tensors, "files": files}


def rest(training: Training) -> dict[str, Any]:
    """What is no tensor, as JSON data."""
    mesh = training.state.mesh
    return {
        "facts": snapshot.facts_of(training),
        "seed": training.seed,
        "steps": training.steps,
        "division": [mesh.pp, mesh.dp],
        "tied": snapshot.tied_names(training.state),
        "config": training.config,
    }


def joined(parts: Sequence[Mapping[str, Any]]) -> Index:
    """The index of a checkpoint of all parts of a snapshot, in rank order.

    Raises:
        CheckpointError: they are not what one snapshot consists of.
    """
    try:
        tensors: dict[str, Any] = {}
        files: dict[str, Any] = {}
        for part in parts:
            files |= part["files"]
            for name, found in part["tensors"].items():
                known = tensors.setdefault(name, found | {"chunks": []})
                if any(known[what] != found[what] for what in ("dtype", "shape")):
                    raise ValueError(f"{name!r} is another tensor on another rank")
                boxes = [chunk["offsets"] for chunk in known["chunks"]]
                known["chunks"] += [c for c in found["chunks"] if c["offsets"] not in boxes]
        first = parts[0]
        facts = [part["facts"] for part in parts]
        pp, dp = first["division"]
        fields = {
            "step": first["steps"],
            "tensors": tensors,
            "tied": first["tied"],
            "config": first["config"],
            "training": snapshot.merge(facts, first["seed"], first["steps"], (pp, dp)),
            "producer": {"pipecompile": __version__, "torch": torch.__version__},
            "files": files,
        }
        return parsed(fields)
    except NOT_AS_WRITTEN as error:
        raise CheckpointError(f"the snapshot in memory is damaged: {error!r}") from error
