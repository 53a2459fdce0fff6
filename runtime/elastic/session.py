"""A training that goes on when processes are lost or come back, as its script sees it."""

from __future__ import annotations

import ctypes
import os
import secrets
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import torch.distributed as dist
from torch import nn

from ...compiler.api import compile_among
from ...compiler.driver.auto import Open
from ...compiler.ir.errors import CheckpointError, OptionError, StateError
from ...compiler.options.arguments import Arguments
from ...compiler.options.declaration import declarations_of
from ...compiler.options.parsing import AUTO
from ..checkpoint.restore import Restore
from ..files.owner import same_run
from ..files.step_folder import find, published
from ..monitor.callbacks import check_steps
from ..pipeline import Pipeline
from ..transport.joining import new_group
from ..transport.mesh import world_size
from . import division, guarding, memory
from .division import Stages
from .holdings import Snapshot, complete, next_attempt
from .keeper import Keeper
from .memory import Memory
from .settled import Settled
from .source import InMemory

_PASSES = "elastic"  # among checkpoint_extras
_DEATH_SIGNAL = 1  # of prctl


class Passes:
    """How many passes a loop has made; saved with the pipeline."""

    def __init__(self) -> None:
        self.count: int | None = None

    def state_dict(self) -> dict[str, Any]:
        return {"passes": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count = int(state["passes"])


@dataclass(frozen=True)
class Resumed:
    """What an attempt has gone on from.

    Attributes:
        passes: of the loop, that are done.
        source: "memory", "disk", or "" where it begins.
        seconds: for finding and loading it.
    """

    passes: int
    source: str
    seconds: float


class Session:
    """Keeps a training going through `torchrun --nnodes=1:4 --max-restarts=N`.

        with elastic.Session("run", save_every=500) as session:
            pipe = session.compile(model, (1, 4), global_microbatches=8, example_batch=batch, ...)
            loader = pipe.loader(rows, batch_size=32, shuffle=True)
            for batch in session.batches(loader, epochs=3):
                pipe.step(batch)

    When a process is lost, torchrun's agents start the script anew in those that are there. The
    model is then divided between these, and goes on from the last step that all had finished, which
    is in the memory of machines, or else from the newest checkpoint. Every rank makes the same
    calls.

    Args:
        directory: of checkpoints, as `Pipeline.save` has it; None for none. Where a script has
            several sessions, each needs one of its own: it tells their memory apart, too.
        save_every: passes from one checkpoint to the next, and after the last pass. None leaves
            saving to you.
        keep: checkpoints that stay, as `Pipeline.save` has it.
        memory: keep the state of every pass in memory. Twice the size of parameters and
            optimizer states is taken of each machine, and as much of another's.

    Attributes:
        resumed: what this attempt has gone on from; None before.

    Raises:
        OptionError: ``save_every=`` or ``keep=`` is no such number, or has no ``directory``.
    """

    def __init__(
        self,
        directory: str | Path | None = None,
        *,
        save_every: int | None = None,
        keep: int | None = 3,
        memory: bool = True,
    ):
        if save_every is not None:
            check_steps("Session", "save_every", save_every)
            if directory is None:
                raise OptionError(f"Session(save_every={save_every}) needs a directory to save to")
        if keep is not None:
            check_steps("Session", "keep", keep)
        self.directory = None if directory is None else Path(directory)
        self.resumed: Resumed | None = None
        self._save_every, self._keep, self._wanted = save_every, keep, memory
        self._pipe: Pipeline | None = None
        self._data: Any = None
        self._passes = Passes()
        self._keeper: Keeper | None = None
        self._memory: Memory | None = None
        self._left_out, self._leads = 0, False
        self._saved = -1
        self._told: set[str] = set()

    def compile(
        self,
        model: nn.Module,
        n_stages: Stages = AUTO,
        *,
        global_microbatches: int | None = None,
        **options: Any,
    ) -> Pipeline:
        """`pipecompile.compile` for the processes that are there.

        A process that is too many waits in here, and ends here with the run.

        Args:
            n_stages: a number; the fewest and the most, as in (1, 4); or "auto" for any. Replicas
                follow from the processes. The division with the shortest predicted step is taken.
            global_microbatches: into how many the global batch is cut, of all replicas together:
                fewer replicas have more each, of the same rows. A number of replicas that does not
                divide it is not used. None for what suits each division.
            options: of `pipecompile.compile`; ``example_batch``, the global one, is needed. ``pin``
                and ``cut`` need one number of stages. A ``plan`` is used where the processes allow
                the division that it was made for, and else it is planned anew, which is said.

        Raises:
            OptionError: the processes cannot be divided so, or an option is not for this.
            StateError: this session has a pipeline already.
        """
        if self._pipe is not None:
            raise StateError("this session has compiled a pipeline already: make one for each")
        if refused := {"dp", "microbatches"}.intersection(options):
            name = min(refused)
            instead = {
                "dp": "replicas follow from the processes that are there: give n_stages= limits",
                "microbatches": "give global_microbatches=, those of all replicas together",
            }
            raise OptionError(f"{name}= of session.compile(): {instead[name]}")
        stages = division.limits_of(n_stages)
        division.check_microbatches(global_microbatches)
        arguments = Arguments(model, AUTO, **options)
        settled = Settled.of(arguments, n_stages, stages)
        alone = arguments.devices or settled.devices or (stages or (1,))[0]
        processes = world_size()
        orders = arguments.schedule == AUTO
        shape = (arguments.virtual_stages, arguments.schedule_memory, stages, global_microbatches)
        if processes:
            _end_with_the_agent()
        try:
            used = division.used_of(processes or alone, Open(True, orders, None, *shape))
        except OptionError as error:
            if not (processes and memory.look().mine):
                raise
            division.wait_for_more(error)
        if processes:
            what = f"n_stages={n_stages!r}, global_microbatches={global_microbatches}"
            declarations_of(Arguments)["timeout_s"].check_value(arguments.timeout_s)
            if int(os.environ["RANK"]) < used:
                guarding.allow(arguments.timeout_s)
            else:
                guarding.end()  # nobody waits for one that is too many
            division.leave_out(processes, used, what)
            self._left_out = processes - used
        open_ = Open(True, orders, used, *shape)
        pipe = settled.compiled(arguments, open_, used)
        self._pipe = pipe or compile_among(replace(arguments, plan=None), open_)
        if _PASSES in self._pipe.checkpoint_extras:
            raise OptionError(f"checkpoint_extras has {_PASSES!r}, which is the session's own")
        self._pipe.checkpoint_extras[_PASSES] = self._passes
        return self._pipe

    # -- the loop -----------------------------------------------------------------------------

    def steps(self, total: int, *, data: Any = None) -> Iterator[int]:
        """The numbers of the passes that are left of ``range(total)``, one for each pass.

        Before the first the pipeline goes on from where the run was; after each its state is kept.

        Args:
            data: as `Pipeline.save` has it, for data that is not of `Pipeline.loader`.
        """
        self._data = data
        done = self.resume().passes
        for number in range(done, total):
            yield number
            self._passed()
        self._ended()

    def batches(self, loader: Any, epochs: int, *, data: Any = None) -> Iterator[Any]:
        """The batches that are left of so many epochs of a loader, as `steps` has it.

        Args:
            loader: of `Pipeline.loader`, or a `pipecompile.data.Resumable`, which is ``data=``.
        """
        self._data = data
        self.resume()
        while loader.epoch < epochs:
            for batch in loader:
                yield batch
                self._passed()
        self._ended()

    def resume(self) -> Resumed:
        """Go on from where the run was; the loops above do it by themselves, and it is done once.

        Make loaders, averages and all else that is saved with the pipeline before.

        Raises:
            StateError: `compile` was not called.
            CheckpointError: nothing of what there is can be loaded.
        """
        if self.resumed is not None:
            return self.resumed
        pipe, begun_s = self._compiled(), time.monotonic()
        found: list[Snapshot] = []
        if self._wanted and pipe._world.mesh.distributed:
            found = self._meet(pipe)
        source = self._load(pipe, found)
        if source and self._passes.count is None:  # of a checkpoint that no session has made
            self._passes.count = pipe.steps
        self._passes.count = self._passes.count or 0
        self.resumed = Resumed(self._passes.count, source, time.monotonic() - begun_s)
        if source and pipe.is_main:
            print(
                f"pipecompile: goes on after {self.resumed.passes} passes from {source}, as "
                f"{pipe.plan.n_stages} stages × dp {pipe.plan.dp}",
                file=sys.stderr,
                flush=True,
            )
        if source and self._keeper is not None:  # at once on as many machines as there are now
            self._snapshot(pipe, self._keeper)
        return self.resumed

    def _passed(self) -> None:
        pipe, passes = self._compiled(), self._passes
        assert passes.count is not None
        passes.count += 1
        if self._save_every is not None and passes.count % self._save_every == 0:
            self._save(pipe)
        if self._keeper is not None:
            self._snapshot(pipe, self._keeper)

    def _ended(self) -> None:
        if self._save_every is not None and self._passes.count != self._saved:
            self._save(self._compiled())

    def _snapshot(self, pipe: Pipeline, keeper: Keeper) -> None:
        with pipe._world.guard("snapshot"):
            keeper.take(pipe._training(self._data))
        if keeper.lack:
            self._say_once(keeper.lack + ": the state is kept on disk alone, as far as it is saved")

    def _save(self, pipe: Pipeline) -> None:
        """Save beside the training; where that fails, say so and go on."""
        assert self.directory is not None
        self._saved = self._passes.count or 0
        for _ in range(2):  # the first error may be that of the save before
            try:
                pipe.save(self.directory, data=self._data, keep=self._keep, async_save=True)
            except CheckpointError as error:
                if pipe.is_main:
                    print(f"pipecompile: goes on without a checkpoint: {error}", file=sys.stderr)
            else:
                return

    def _say_once(self, text: str) -> None:
        if text not in self._told:
            self._told.add(text)
            print(f"pipecompile: {text}", file=sys.stderr, flush=True)

    # -- what there is ------------------------------------------------------------------------

    def _meet(self, pipe: Pipeline) -> list[Snapshot]:
        """Find the run's memory on all machines; what snapshots are whole in it, newest first."""
        world = pipe._world
        with world.guard("resume()"):
            gather, rank = world.agreement.gather, world.mesh.rank or 0
            told = gather((memory.machine(), memory.look()))
            fresh = gather(secrets.token_hex(8))
            whose = memory.key_of(gather(str(self.directory and self.directory.absolute()))[0])
            runs = {r for _, found in told for r in found.mine if r.startswith(whose)}
            run = max(runs) if runs else whose + fresh[0]
            self._memory = world.agreement.together(lambda: Memory.of(run))
            same_run(run)
            places = [place for place, _ in told]
            order = list(dict.fromkeys(places))
            leaders = [places.index(place) for place in order]
            held = [told[leader][1].held.get(run, ()) for leader in leaders]
            found = complete(held)
            attempt = next_attempt((h.attempt for each in held for h in each), fresh[0])
            self._numbers = [order.index(place) for place in places]
            self._group = new_group(backend="gloo")
            self._leads = leads = rank in leaders
            mine = self._memory
            if leads:
                memory.clear(run)
            world.agreement.together(lambda: None)

            def first() -> None:
                if leads:
                    mine.keep((attempt,))

            assert isinstance(self._group, dist.ProcessGroup)
            self._keeper = Keeper(mine, attempt, rank, places, self._group, first)
        return found

    def _load(self, pipe: Pipeline, found: list[Snapshot]) -> str:
        """Load the newest that can be; where it is from, or "" if there is nothing.

        Raises:
            CheckpointError: that of the newest checkpoint, where none can be loaded.
        """
        with pipe._world.guard("resume()"):
            known = pipe._world.agreement.gather(_on_disk(self.directory))[0]
        disk, failure = sorted(known), None
        while disk or found:
            snapshot = found.pop(0) if found and found[0].steps >= max(disk, default=-1) else None
            source = "disk" if snapshot is None else "memory"
            try:
                if snapshot is None:
                    pipe.load(known[disk.pop()], data=self._data)
                else:
                    take = partial(self._take, pipe, snapshot=snapshot)
                    pipe._loaded(self._data, take)
                self._let_go(pipe, snapshot)
            except CheckpointError as error:
                failure = failure or (error if snapshot is None else None)
                if pipe.is_main:
                    print(f"pipecompile: cannot go on from {source}: {error}", file=sys.stderr)
            else:
                return source
        self._let_go(pipe, None)
        if failure is not None:
            raise failure
        return ""

    def _let_go(self, pipe: Pipeline, kept: Snapshot | None) -> None:
        """Of what is in memory, but for the snapshot that was loaded."""
        with pipe._world.guard("resume()"):
            if self._leads and self._memory is not None:
                self._memory.keep((), kept)
            pipe._world.agreement.together(lambda: None)

    def _take(self, pipe: Pipeline, training: Any, snapshot: Snapshot) -> Restore:
        assert self._memory is not None
        world, rank = pipe._world, pipe._world.mesh.rank or 0
        source = InMemory(snapshot, self._memory, rank, self._numbers, world.agreement, self._group)
        return pipe._checkpoints.take(training, source)

    # -- the end ------------------------------------------------------------------------------

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is not None:
            if self._keeper is not None:
                self._keeper.abandon()
            return
        self.close()

    def close(self) -> None:
        """The run is over: nothing of it stays in memory. On every rank; ``with`` does it."""
        pipe = self._pipe
        if pipe is None:
            return
        try:
            pipe.wait_for_save()
        except CheckpointError as failure:
            if pipe.is_main:
                print(f"pipecompile: the last checkpoint is missing: {failure}", file=sys.stderr)
        with pipe._world.guard("close()"):
            if self._keeper is not None:
                self._keeper.wait()
            pipe._world.agreement.together(lambda: None)
        if self._memory is not None:
            self._memory.remove()
        self._keeper = self._memory = None
        guarding.end()
        if self._left_out and pipe.is_main:
            division.tell_the_end(self._left_out)

    def _compiled(self) -> Pipeline:
        if self._pipe is None:
            raise StateError("this session has no pipeline: call session.compile() first")
        return self._pipe


def _on_disk(directory: Path | None) -> dict[int, Path]:
    """Step -> checkpoint: the latest one, and those before."""
    known = published(directory) if directory is not None and directory.is_dir() else {}
    if directory is None or not known:
        return {}
    latest = find(directory)
    last = next((step for step, path in known.items() if path == latest), max(known))
    return {step: path for step, path in known.items() if step <= last}


def _end_with_the_agent() -> None:
    """A worker whose agent was killed is nobody's: the others would wait for it, or it for them."""
    if guarding.has_agent() and sys.platform == "linux":
        ctypes.CDLL(None).prctl(_DEATH_SIGNAL, signal.SIGKILL)
