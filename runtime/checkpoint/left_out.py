"""What a checkpoint of what training changes leaves out, and how its absence is made safe.

Frozen parameters, and buffers that no forward updates, are as they were in the base that was given
to `compile`; those that peft saves of an adapter are kept nevertheless. Of each the checkpoint has
the checksum, of all of it whatever replicas divide, so that loading it onto another base is told.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch

from ...compiler.ir.errors import CheckpointError
from ..exchange.agreement import Agreement
from ..files import checksums
from ..files.index import Index, LeftOut
from ..files.tensor_file import DTYPES, TensorSpec, dtype_name
from ..state.state_dict import Piece, fetch
from .snapshot import Training, names_of, stored_name

_SHOWN = 3  # names in an error


def unchanged(training: Training, moved: Collection[str]) -> list[str]:
    """First names of the tensors that training leaves as they are, in the model's order.

    Args:
        moved: buffers that another run has updated.
    """
    state = training.state
    changing = set(moved).union(training.updated, training.buffer_stages)
    adapted = {state.skeleton.canonical[name] for name in training.adapted}
    return [
        name
        for name in names_of(state)
        if name not in adapted
        and (name not in state.trained if name in state.homes else name not in changing)
    ]


class Sums:
    """Checksums of whole tensors; one that nobody has written to since is not read again.

    Every rank makes the same calls. Where replicas divide a tensor, its rows travel to the rank
    that reads it, in the first call alone.
    """

    def __init__(self, agreement: Agreement):
        self._agreement = agreement
        self._known: dict[tuple[str, torch.dtype], tuple[int, str]] = {}

    def of(self, training: Training, dtypes: Mapping[str, torch.dtype]) -> dict[str, LeftOut]:
        """First name -> what it is, of those that this process answers for.

        Args:
            dtypes: first name -> the dtype in which its elements are taken, the same on all ranks.
        """
        state, fakes = training.state, names_of(training.state)
        versions = {name: _version(training, name) for name in dtypes}
        stale = [key for key in dtypes.items() if self._is_stale(key, versions[key[0]])]
        again = {name for found in self._agreement.gather([n for n, _ in stale]) for name in found}
        sums = {}
        for name, dtype in dtypes.items():
            stage = _stage(training, name)
            reader = state.mesh.rank_of(0, stage)
            version = versions[name]
            if name in again:
                value = fetch(state, Piece((name,), name, stage, fakes[name]), (reader,))
                here = "" if value is None else checksums.of_tensor(value.to(dtype))
                self._known[name, dtype] = version, here
                del value  # before the next
            if reader in state.ranks:
                spec = TensorSpec(dtype_name(dtype), tuple(fakes[name].shape))
                sums[name] = LeftOut(spec, self._known[name, dtype][1])
        return sums

    def gathered(self, mine: dict[str, LeftOut]) -> list[dict[str, LeftOut]]:
        """What each rank answers for."""
        return self._agreement.gather(mine)

    def _is_stale(self, key: tuple[str, torch.dtype], version: int) -> bool:
        return key not in self._known or self._known[key][0] != version


def sums_of(sums: Sums, training: Training, moved: Collection[str]) -> dict[str, LeftOut]:
    """Checkpoint name -> what is known of a tensor that is left out, those of all ranks."""
    fakes = names_of(training.state)
    names = {name: fakes[name].dtype for name in unchanged(training, moved)}
    mine = sums.of(training, names)
    everyone = {name: each for part in sums.gathered(mine) for name, each in part.items()}
    return {stored_name(training.state, name): everyone[name] for name in names}


def check_base(index: Index, sources: Mapping[str, str], found: Mapping[str, LeftOut]) -> None:
    """What a checkpoint left out is in the pipeline as it was.

    Args:
        sources: first name -> name in the checkpoint.
        found: first name -> what it is here.

    Raises:
        CheckpointError: with the first names that are not.
    """
    other = [n for n, each in found.items() if index.left_out[sources[n]].checksum != each.checksum]
    if other:
        more = f", and {len(other) - _SHOWN} more" if len(other) > _SHOWN else ""
        raise CheckpointError(
            f"the checkpoint was saved with trainable_only=True and is of another base: "
            f"{', '.join(map(repr, other[:_SHOWN]))}{more} {'has' if len(other) == 1 else 'have'} "
            "other values here: compile the base that it was trained on; verify=False loads it "
            "nevertheless"
        )


def dtypes_of(index: Index, sources: Mapping[str, str]) -> dict[str, torch.dtype]:
    """First name -> dtype in the run that saved, of what a checkpoint left out."""
    left_out = index.left_out
    return {
        name: DTYPES[left_out[source].spec.dtype][0]
        for name, source in sources.items()
        if source in left_out
    }


def _stage(training: Training, name: str) -> int:
    homes = training.state.homes
    return homes[name][0] if name in homes else training.buffer_stages.get(name, 0)


def _version(training: Training, name: str) -> int:
    """Changes with every write in place to what this process has of a tensor."""
    state = training.state
    held: torch.Tensor | None = None
    if name in state.primary:
        held = state.primary[name][1]
    elif name not in state.homes:
        reader = state.mesh.rank_of(0, _stage(training, name))
        held = state.ranks[reader].buffers[name] if reader in state.ranks else None
    return -1 if held is None else held._version
