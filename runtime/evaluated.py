"""The part of a pipeline that runs the model in evaluation mode: losses, outputs, metrics."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any, overload

import torch

from ..compiler.capture.batch import BatchSpec
from ..compiler.driver.compiled import Mode
from ..compiler.ir.errors import BatchError, CaptureError, PipecompileError
from ..compiler.ir.program import PipelineProgram
from ..compiler.options.options import CompileOptions
from ..compiler.rows.sums import Sums
from .data.in_step import in_step, is_loader, shown_progress
from .executor import Job
from .monitor.monitored import Monitored
from .outputs.predictions import Fn, Predictions, given_of
from .outputs.scores import Metric, Scores
from .outputs.sharing import ALL, check_gather, shared
from .ready import Ready
from .recording.recording import Recording
from .session import Session
from .world import World


class Evaluated(Monitored):
    """What `Pipeline` has for evaluation."""

    _options: CompileOptions
    _recording: Recording
    _world: World

    def _alone(self, what: str) -> contextlib.AbstractContextManager[None]:
        return self._world.alone(what)

    @property
    def needs_data(self) -> bool:
        raise NotImplementedError

    @property
    def programs(self) -> PipelineProgram:
        raise NotImplementedError

    def _prepare(
        self, mode: Mode, batch: Any, several: bool = False
    ) -> tuple[Session, Ready, dict[int, Job]]:
        raise NotImplementedError

    def _flat(self, batch: Any) -> tuple[list[torch.Tensor], BatchSpec]:
        raise NotImplementedError

    @overload
    def evaluate(
        self, data: Any, *, metrics: None = None, progress: bool | None = None
    ) -> torch.Tensor: ...

    @overload
    def evaluate(
        self, data: Any, *, metrics: Mapping[str, Metric], progress: bool | None = None
    ) -> dict[str, Any]: ...

    def evaluate(
        self,
        data: Any,
        *,
        metrics: Mapping[str, Metric] | None = None,
        progress: bool | None = None,
    ) -> torch.Tensor | dict[str, Any]:
        """The loss in evaluation mode, and metrics, the same on every rank; nothing is stashed.

        Args:
            data: a batch; or what gives batches, such as a `DataLoader`, for the loss of all of
                them as one batch would have it. Where a process has none left, it takes part with
                none; one that `needs_data` says needs none may have an empty one, ``iter(())``.
            metrics: name -> a function of (output, batch), which is called with what the model
                returns for some of the rows, and with these rows of the batch, on the output's
                device. It returns a tensor, whose elements are averaged over all rows of the data
                (``output.logits.argmax(-1) == batch["labels"]``), or (sum, count). What needs all
                rows at once is a `pipecompile.Collected`.
            progress: show how far a loader is; by default where rank 0 writes to a terminal.

        Returns:
            The loss, a 0-dim tensor; with ``metrics=`` a dict of floats, "loss" first, and of what
            `Collected` ones have computed.

        Raises:
            BatchError: a batch does not fit, the loader has none, or a metric fails, on any rank.
            OptionError: ``metrics`` are no such functions.
        """
        if metrics is None:
            loss = self._evaluated(data, progress)
            if self.callbacks:
                self.callbacks.tell("on_evaluate", self, {"loss": float(loss)})
            return loss
        results = self._scored(data, Scores(metrics), progress)
        self.callbacks.tell("on_evaluate", self, results)
        return results

    def _evaluated(self, data: Any, progress: bool | None = None) -> torch.Tensor:
        """As `evaluate`, which callbacks are not told of."""
        sums = None
        with self._world.guard("evaluate()"), self._recording.range("evaluate"):
            if not is_loader(data):
                with _advised(data):
                    session, ready, jobs = self._prepare(Mode.EVALUATE, data)
                return session.evaluated(ready, jobs)
            for batch in self._batches(data, "evaluate a loader", progress):
                session, ready, jobs = self._prepare(Mode.EVALUATE, batch, several=True)
                sums = session.add_evaluated(ready, jobs, sums)
            return self._total(sums)

    def _scored(self, data: Any, scores: Scores, progress: bool | None) -> dict[str, Any]:
        """The loss, and metrics."""
        sums, here = None, self._here
        with self._world.guard("evaluate()"), self._recording.range("evaluate"):
            what = "evaluate with metrics"
            for batch in self._batches(data, what, progress, lambda: scores.trouble):
                with _advised(data):
                    session, ready, jobs = self._prepare(Mode.FORWARD, batch, several=True)
                found = None
                if self._options.loss_fn is None and self._options.loss_weight is None:
                    found = session.scored(ready, jobs, here, sums)
                if found is not None:
                    part, sums = found
                else:  # the loss is no output of the model: another graph has it
                    part = session.returned(ready, jobs, here)
                    session, ready, jobs = self._prepare(Mode.EVALUATE, batch, several=True)
                    sums = session.add_evaluated(ready, jobs, sums)
                scores.add(part, given_of(part, batch))
            loss = float(self._total(sums))
            return {"loss": loss} | scores.results(self._world.agreement)

    def forward(self, batch: Any, *, gather: bool | str = False) -> Any:
        """What the model returns for a batch, in evaluation mode.

        Args:
            gather: "all" (or True): for the rows of all replicas, in their order, on every rank and
                on the CPU; "main": on rank 0 alone, None on others. False: on the ranks of the last
                stage, each for its own replica's rows, where they were computed.

        Returns:
            The model's own output structure, with tensors of the microbatches joined along their
            batch dimension, means averaged and sums added, and the loss that of all rows that are
            joined. None on ranks that get nothing.

        Raises:
            BatchError: an output of several microbatches, or replicas, cannot be joined: it couples
                rows, or replicas have other lengths.
            OptionError: ``gather`` is none of these.
        """
        who, agreement = check_gather(gather), self._world.agreement
        call = f"forward({f'gather={who!r}' if who else ''})"
        with self._world.guard(call), self._recording.range("forward"):
            session, ready, jobs = self._prepare(Mode.FORWARD, batch)
            if not who:
                part = session.returned(ready, jobs, self._here)
                return part.whole() if part.pieces else None
            part = session.returned(ready, jobs, range(self._world.mesh.dp)).on_cpu()
            everyone = shared(agreement, part.pieces, who)
            return agreement.together(
                lambda: None if everyone is None else part.of(everyone).whole(), BatchError
            )

    def predict(
        self,
        data: Any,
        fn: Fn | None = None,
        *,
        gather: bool | str = ALL,
        progress: bool | None = None,
    ) -> Any:
        """What the model returns for all rows of a data set, in evaluation mode, on the CPU.

        The rows stand in the order of the batches, and in each in that of the replicas: for a
        `Pipeline.loader`, that of the data set as it was gone through.

        Args:
            data: as `evaluate` takes it.
            fn: (output, batch) -> what is kept of it: a tensor with rows in dim 0, or a tuple, list
                or dict of such. It is called on the ranks of the last stage, with some of the rows,
                and what it returns is all that is held and sent:
                ``lambda output, batch: output.logits.argmax(-1)``.
            gather: "all" for every rank, "main" for rank 0 alone; others get None.
            progress: show how far a loader is; by default where rank 0 writes to a terminal.

        Returns:
            What ``fn`` returns, joined along dim 0. Without it the model's own structure: tensors
            by rows joined along their batch dimension; what is not by rows, such as a loss, once
            per batch, in a new dim 0.

        Raises:
            BatchError: what is returned for batches cannot be joined (lengths differ: give ``fn``),
                ``fn`` fails on any rank, or the loader has no batch.
            OptionError: ``gather`` is neither.
        """
        who = check_gather(gather) or ALL
        predictions = Predictions(fn)
        here = self._here if fn is not None else range(self._world.mesh.dp)
        with self._world.guard("predict()"), self._recording.range("predict"):
            what = "predict a loader"
            for batch in self._batches(data, what, progress, lambda: predictions.trouble):
                with _advised(data):
                    session, ready, jobs = self._prepare(Mode.FORWARD, batch)
                part = session.returned(ready, jobs, here)
                predictions.add(part, given_of(part, batch))
            return predictions.joined(self._world.agreement, who)

    def returned(self, batch: Any) -> list[list[Any]]:
        """What the model returns for each microbatch, in evaluation mode, on every rank's CPU.

        Nothing is joined, so that microbatches may have any lengths and outputs any dimensions.

        Returns:
            Per replica and microbatch the model's own output structure; None for one without rows.
        """
        agreement = self._world.agreement
        with self._world.guard("returned()"), self._recording.range("forward"):
            session, ready, jobs = self._prepare(Mode.FORWARD, batch)
            part = session.returned(ready, jobs, range(self._world.mesh.dp)).on_cpu()
            everyone = shared(agreement, part.pieces, ALL)
            assert everyone is not None, "all get them"
            return part.of(everyone).apart()

    # -- the inside -------------------------------------------------------------------------

    @property
    def _here(self) -> tuple[int, ...]:
        """The replicas of this process's ranks."""
        mesh = self._world.mesh
        return tuple(dict.fromkeys(map(mesh.replica_of, mesh.local_ranks)))

    def _batches(
        self,
        data: Any,
        what: str,
        progress: bool | None,
        trouble: Callable[[], PipecompileError | None] = lambda: None,
    ) -> Iterator[Any]:
        """Those of a loader, until no process has any left; a batch alone is a loader of one.

        Args:
            what: is done, the same on all ranks.
            trouble: what has gone wrong here with the last one.
        """
        world = self._world
        if not is_loader(data):
            data, progress = iter((data,)), False
        world.agreement.check_call(what)
        shown = world.is_main and (sys.stderr.isatty() if progress is None else progress)
        with shown_progress(data, shown) as advance:
            gather = world.agreement.gather
            for batch in in_step(data, gather, lambda: self.needs_data, self._flat, trouble):
                yield batch
                advance()

    def _total(self, sums: Sums | None) -> torch.Tensor:
        """The loss of all batches."""
        assert sums is not None, "there was a batch"
        total = sums.total(self._world.agreement.gather(sums.here))
        return torch.tensor(total, dtype=self.programs.loss_dtype, device=self._world.device)


@contextlib.contextmanager
def _advised(data: Any) -> Iterator[None]:
    """A batch is prepared inside: the error of a list of batches says how several are given."""
    try:
        yield
    except (BatchError, CaptureError) as error:
        if isinstance(data, (list, tuple)):
            error.add_note("a list is one batch: iter(...) of it gives several")
        raise
