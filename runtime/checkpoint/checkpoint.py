"""Checkpoints of a pipeline: written by all ranks at once, opened under any division.

    [1] every rank takes its part       snapshot.py, optimizer_state.py
    [2] DCP writes it                   storage.py -> files/tensor_file.py, files/index.py
    [3] one rename publishes it         files/step_folder.py
    [4] another run reads what it needs restore.py -> bounds.py, changes.py

torch.distributed.checkpoint (DCP) plans who writes and reads what, under names that know nothing
of stages and replicas, so that no checkpoint needs conversion. The files are our own, safetensors
and JSON, because DCP's index is a pickle: see storage.py. Nothing is unpickled, and no name in a
checkpoint leads out of its folder.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from ... import __version__
from ...compiler.ir.errors import CheckpointError, OptionError
from ..exchange.agreement import Agreement
from ..files.index import Entry, Index, LeftOut
from ..files.owner import Owner
from ..files.step_folder import Draft, find, step_name
from ..files.tensor_file import FileFacts
from ..transport.doing import HERE
from ..transport.joining import new_group
from ..transport.mesh import Mesh
from ..transport.turns import Turns
from . import left_out, snapshot
from .background import Background
from .restore import Restore
from .snapshot import Training
from .storage import PLANNED, Folder, Source, Writer

# One process that plays all ranks is meant to save alone.
warnings.filterwarnings("ignore", message=r"torch\.distributed is disabled, unavailable or uninit")

# What reading tables raises that are not as they were written.
_NOT_AS_WRITTEN = (
    KeyError,
    TypeError,
    ValueError,
    AttributeError,
    IndexError,
    OverflowError,
    RecursionError,
)


class Checkpoints:
    """Saves and loads what a pipeline trains; every rank makes the same calls."""

    def __init__(self, mesh: Mesh, agreement: Agreement):
        self._mesh, self._agreement = mesh, agreement
        self._rank = mesh.rank or 0
        self._background = Background()
        self._group: dist.ProcessGroup | None = None
        self._owners: dict[Path, Owner] = {}  # of the folders that were saved to
        self._sums = left_out.Sums(agreement)
        self._moved: set[str] = set()  # buffers that a checkpoint without its base has had

    def save(
        self,
        training: Training,
        directory: Path,
        keep: int | None,
        in_background: bool,
        trainable_only: bool = False,
    ) -> Path:
        """Write a checkpoint of this moment; the folder that it is, or will be, in.

        Args:
            trainable_only: leave out what training does not change, but for its checksums.

        Raises:
            CheckpointError: it cannot be written, or the one before, in the background, could
                not; on every rank.
            OptionError: ``keep`` is not at least 1, or there is nothing to leave out.
        """
        if keep is not None and (isinstance(keep, bool) or keep < 1):
            raise OptionError(f"keep={keep} must be at least 1, or None to keep all")
        self.wait()
        directory = Path(self._agreement.gather(str(directory.absolute()))[0])
        facts = self._agreement.together(lambda: snapshot.facts_of(training))
        division = (self._mesh.pp, self._mesh.dp)
        parts = self._agreement.gather(facts)
        merged = snapshot.merge(parts, training.seed, training.steps, division)
        absent = self._left_out(training) if trainable_only else {}
        tensors = snapshot.tensors_of(training, absent)
        if in_background:
            tensors = {name: tensor.to("cpu", copy=True) for name, tensor in tensors.items()}
        draft = self._begin(directory, training.steps)
        index = partial(
            Index,
            step=training.steps,
            tied=snapshot.tied_names(training.state),
            config=training.config,
            training=merged,
            producer={"pipecompile": __version__, "torch": torch.__version__},
            left_out=absent,
            adapters=training.adapters,
        )

        def finish(entries: dict[str, Entry], files: dict[str, FileFacts]) -> None:
            assert isinstance(draft, Draft)
            index(tensors=entries, files=files).write(draft.path)
            draft.publish(keep)

        path = draft.path if isinstance(draft, Draft) else draft
        turns = self._turns(in_background)
        writer = Writer(path, self._rank, turns, finish)
        write = partial(_write, tensors, writer, turns, self._meeting(), draft)
        if in_background:
            self._background.start(write, turns.join)
        else:
            with HERE.phase(PLANNED):
                write()
        return directory / step_name(training.steps)

    def wait(self) -> None:
        """Until the save in the background is done.

        Raises:
            CheckpointError: it failed; on every rank.
        """
        self._agreement.together(self._background.wait)

    def load(self, training: Training, directory: Path, verify: bool) -> Restore:
        """Read a checkpoint for a pipeline, which is to `Restore.finish` it.

        Args:
            verify: compare checksums of all that is read.

        Raises:
            CheckpointError: there is none, or none of this model; on every rank, and nothing has
                been changed.
        """
        self.wait()
        return self.take(training, Folder(self._find(directory), verify, self._rank == 0))

    def take(self, training: Training, source: Source) -> Restore:
        """Read what a source has, as `load` does. Nothing may be saved in the background
        meanwhile."""

        def prepare() -> tuple[Index, Restore]:
            index = source.index()
            try:
                restore = Restore(training, index, self._rank)
            except _NOT_AS_WRITTEN as error:
                raise CheckpointError(f"{source} is damaged: {error!r}") from error
            source.check(index, restore.wanted)
            restore.make_room()
            return index, restore

        index, restore = self._agreement.together(prepare)
        if source.verify and index.left_out:
            sources = restore.sources
            found = self._sums.of(training, left_out.dtypes_of(index, sources))
            self._agreement.together(lambda: left_out.check_base(index, sources, found))
        turns = self._turns()
        with HERE.phase(PLANNED):
            _by_turns(
                turns,
                lambda: dcp_load(
                    restore.tensors,
                    storage_reader=source.reader(index, turns),
                    planner=DefaultLoadPlanner(
                        flatten_state_dict=False, flatten_sharded_tensors=False
                    ),
                    **self._meeting(),
                ),
            )
        self._agreement.together(restore.check)
        try:
            self._agreement.together(restore.change)
        except BaseException as failure:
            restore.take_back(failure)
            raise
        self._moved = restore.buffers if index.left_out else set()
        return restore

    def _left_out(self, training: Training) -> dict[str, LeftOut]:
        """Checkpoint name -> what is known of it, the same on all ranks."""
        found = left_out.sums_of(self._sums, training, self._moved)
        if not found:
            raise OptionError(
                "save(trainable_only=True), and training changes every tensor of the model: leave "
                "it out, or freeze the base with requires_grad_(False) before compile()"
            )
        return found

    def _find(self, directory: Path) -> Path:
        """The folder that rank 0 finds, seen by every rank."""
        main = self._rank == 0
        found = self._agreement.together(lambda: str(find(directory.absolute())) if main else "")
        return Path(self._agreement.gather(found)[0])

    def _begin(self, directory: Path, step: int) -> Draft | Path:
        """A new temporary folder: on rank 0 the draft, elsewhere its path."""
        main = self._rank == 0
        draft = self._agreement.together(lambda: Draft.begin(directory, step) if main else None)
        path = Path(self._agreement.gather(str(draft.path) if draft else "")[0])
        try:
            self._agreement.together(lambda: _see(path))
        except CheckpointError:
            if draft is not None:
                draft.discard()
            raise
        if draft is not None:
            self._owners[directory] = draft.owner
        return draft or path

    def _turns(self, beside: bool = False) -> Turns:
        return Turns(self._rank, self._mesh.size if self._mesh.distributed else 1, beside)

    def _meeting(self) -> dict[str, Any]:
        """How DCP's ranks meet: over a group of their own, for training goes on beside it."""
        if not self._mesh.distributed:
            return {"no_dist": True}
        if self._group is None:
            self._group = new_group(backend="gloo")
        return {"process_group": self._group}


def _write(
    tensors: dict[str, torch.Tensor],
    writer: Writer,
    turns: Turns,
    meeting: dict[str, Any],
    draft: Draft | Path,
) -> None:
    planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    try:
        save = partial(dcp_save, tensors, storage_writer=writer, planner=planner, **meeting)
        _by_turns(turns, save)
    finally:
        if isinstance(draft, Draft):
            draft.discard()


def _by_turns(turns: Turns, act: Callable[[], Any]) -> None:
    """What DCP does; its report on all ranks' failures as one error: the first rank's.

    It has a Ctrl-C among the failures. Where that was, it stays one: a script that goes on without
    a checkpoint is to end by it.
    """
    turns.wait(PLANNED)
    try:
        act()
    except CheckpointException as report:
        here = report.failures.get(turns.rank, (None,))[0]
        if here is not None and not isinstance(here, Exception):
            raise here from None
        rank, (error, _) = min(report.failures.items())
        if isinstance(error, CheckpointError):
            raise CheckpointError(str(error)) from report
        raise CheckpointError(f"rank {rank} failed: {type(error).__name__}: {error}") from report
    finally:
        turns.end()


def _see(path: Path) -> None:
    if not path.is_dir():
        raise CheckpointError(
            f"rank 0 has made {path} and another rank does not see it: save to a folder that all "
            "machines share"
        )
