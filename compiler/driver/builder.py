"""Drives the passes: a batch's shape in, stage programs, schedule and plan out."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from types import MappingProxyType

import torch

from ...passes.graph.verify import verify_graph, verify_placement
from ...passes.losses.chunks import chunk_rows
from ..answers.inputs import NumberError
from ..capture.batch import BatchSpec
from ..capture.capture import Captured
from ..capture.skeleton import Skeleton
from ..costs.cost import notes_on_costs
from ..general.lookups import check_lookups
from ..ir.errors import (
    BatchError,
    CaptureError,
    LossError,
    MemoryBudgetError,
    OptionError,
    PartitionError,
    PipecompileError,
)
from ..ir.graph import JointGraph
from ..ir.locality import Locality, locality_of
from ..ir.zero import Zero
from ..kept.cache import Cache, default_cache_dir
from ..losses.logits import Chunks
from ..options.options import CompileOptions
from ..options.parsing import AUTO
from ..options.ranges import check_sizes, largest, ranges_of, stretched
from ..plan.plan import Plan
from ..planning.keeping import kept_notes
from ..planning.tables import Tables
from ..planning.target import Target
from ..planning.team import Alone, Team
from ..profiling.optimizer_trial import Verdict
from . import passes
from .assembly import assemble, corrected, run
from .auto import check_pieces, chosen, chunks_of
from .capturing import Capturing, Shared, Wanted
from .closing import Closing
from .compiled import Compiled, Mode, main_mode
from .deciding import Decided, Deciding, divisions, tried
from .layout import Layout, check_memory, layout_of
from .record import PassRecord, Recorder
from .summary import Summary, placement_note, placement_text
from .work import Joint, Outline, Settings, footprint_of


class Builder:
    """Compiles the graphs of one model. The first graph decides the layout; others follow it.

    Args:
        notes: name -> what was chosen before, and why: notes in the plan; "" for none.
        cache: what other runs have left; by default that of this machine, without plans.
        captured: what builders of the same model with other divisions share.
    """

    def __init__(
        self,
        skeleton: Skeleton,
        options: CompileOptions,
        target: Target,
        team: Team | None = None,
        notes: Mapping[str, str] = MappingProxyType({}),
        cache: Cache | None = None,
        captured: Shared | None = None,
    ):
        passes.check_skip(options.skip)
        spec = target.spec.fusing(options.fuses).with_ranks(options.numbering)
        self.skeleton, self.options, self.target = skeleton, options, replace(target, spec=spec)
        self.team: Team = team or Alone()
        self.notes = notes
        self._cache = cache or Cache(default_cache_dir(), searches=True)
        self.given = (
            Plan.load(options.plan) if isinstance(options.plan, str | Path) else options.plan
        )
        self._closing = Closing(self.target, self.team)
        self._shared = captured
        self._tables = Tables(options, dict(skeleton.module.named_parameters()))
        if options.sparse_embeddings != "step":  # or a graph tells first what the optimizer gets
            self._divisions  # noqa: B018
        self._footprints = (captured or Shared()).footprints
        self._warned: set[str] = set()
        exports = None if captured is None else captured.exports
        known = target.device, target.kind, self._cache.graphs, exports
        self._capturing = Capturing(skeleton, options, *known)

    @cached_property
    def _verdict(self) -> Verdict | None:
        """How the optimizer steps, where that matters."""
        of = self.skeleton, self.options, self.target.device, self.team, self._shared
        return tried(self._tables.optimizer(), *of)

    @cached_property
    def _divisions(self) -> tuple[Zero, ...]:
        return divisions(self.options, self._verdict)

    def build(
        self,
        mode: Mode,
        spec: BatchSpec,
        microbatches: int,
        layout: Layout | None = None,
        dump: bool = True,
        batch: Sequence[torch.Tensor] = (),
        weighs: bool = False,
    ) -> Compiled:
        """Compile one mode for one microbatch shape.

        Where no layout is given it is decided by training on such a batch, or, for a model that
        is not or cannot be trained on it, by the graph itself.

        Args:
            spec: of one microbatch.
            layout: what another graph of the model has decided.
            dump: write the files that ``dump_dir`` asks for (one rank does).
            batch: leaves of one microbatch, which forward may ask, and to measure with.
            weighs: tell how the losses of microbatches make that of several, also where a batch
                has one.

        Raises:
            BatchError: forward asks the batch, and ranks hear different answers; or it has a size
                that it may not have.
            MemoryBudgetError: the graph follows another one, and does not fit as that does.
        """
        check_sizes(spec, ranges_of(self.options.dynamic))
        follows = layout is not None
        if layout is None and mode is not Mode.TRAIN and self.options.training:
            with contextlib.suppress(LossError, CaptureError):
                first = self.build(Mode.TRAIN, spec, microbatches, dump=False, batch=batch)
                layout = first.layout
        dump &= self.options.dump_dir is not None

        def build(chunks: Chunks | None, writes: bool) -> Compiled:
            given = mode, spec, microbatches, layout, writes, batch, weighs
            return self._built(*given, follows, chunks)

        if layout is None and self.given is None and self.options.chunked_loss == AUTO:
            return chosen(build, self.options, self.team, dump)
        return build(chunks_of(self.options, self.given, layout), dump)

    def outline(
        self, spec: BatchSpec, microbatches: int, batch: Sequence[torch.Tensor] = ()
    ) -> Outline:
        """What plans are made from, at the lowest level of ZeRO that options allow.

        Raises:
            PipecompileError: it cannot be trained on, or run.
        """
        weighs = microbatches * self.options.dp > 1 and spec.varies
        given = main_mode(self.options), spec, batch, Recorder(None), weighs
        graph = self._captured(*given, chunks_of(self.options, self.given, None)).graph
        lookups = self._tables.lookups(graph)
        settings = self._settings(self._divisions[0], lookups, spec, microbatches)
        shared = self._shared or Shared()
        locality = shared.locality(graph)
        known = graph, locality, self.target.spec, self.options.remat, self.options.fuses
        with self._explained():
            return Outline(settings, graph, locality, shared.parts(*known), spec.rows)

    def _built(
        self,
        mode: Mode,
        spec: BatchSpec,
        microbatches: int,
        layout: Layout | None,
        dump: bool,
        batch: Sequence[torch.Tensor],
        weighs: bool,
        follows: bool,
        chunks: Chunks | None,
    ) -> Compiled:
        """As `build` does, with losses whole or in pieces.

        Args:
            follows: the layout is one that was given.

        Raises:
            WholeError: losses are to be in pieces of any size, and none can be.
        """
        recorder = Recorder(self._folder(mode, spec) if dump else None)
        weighs |= microbatches * self.options.dp > 1 and spec.varies
        captured = self._captured(mode, spec, batch, recorder, weighs, chunks)
        graph, shared = captured.graph, self._shared
        locality = locality_of(graph) if shared is None else shared.locality(graph)
        if layout is not None:
            layout.check(self.skeleton.updated)
        with self._explained():
            decided = self._decided(graph, locality, spec, microbatches, layout, batch, recorder)
        settings, placement, again = decided.settings, decided.placement, decided.again
        work = graph, locality, placement.stage, again
        decision = replace(decided.decision, chunk_rows=chunk_rows(graph.graph))
        free = not follows and not decided.planned
        if free and settings.schedule.searches and self.target.measures:
            drafts = replace(settings, drafts=True)
            draft = assemble(drafts, *work, decision, decided.order, None, Recorder(None))
            decision = corrected(decision, draft, self.target, self.team, batch)
        assembly = decided.assembled(graph, locality, decision, recorder)
        if layout is None:
            self._check_skipped(recorder.records)
            if free and not settings.schedule.searches:
                decision = corrected(decision, assembly, self.target, self.team, batch)
            of = self.skeleton.params, settings.zero, assembly.pace, decision
            tables = self._tables.names, self._tables.stepped
            layout = layout_of(placement, again, locality, assembly.program, *of, *tables)
        summary = Summary(
            self.skeleton,
            settings,
            placement,
            assembly,
            decision,
            decided.closing_s or self._closing.seconds(assembly, settings),
            self.given.costs if self.given else self.target.costs,
        )
        timeline = summary.timeline()
        plan = summary.plan(spec, timeline, recorder.records)
        if recorder.folder is not None:
            plan.save(recorder.folder / "plan.json")
        if follows:
            check_memory(plan, spec)
        else:
            self.team.share(lambda: self._cache.plans.add(plan, *decided.told))
            self._check_largest(mode, spec, microbatches, layout, weighs, batch)
        return Compiled(
            assembly.program,
            assembly.schedule,
            plan,
            captured.rebuild,
            captured.outputs,
            timeline,
            layout,
            tuple(recorder.records),
            decided.problem,
            captured.outside,
            captured.guards,
            captured.loss,
            captured.scalars,
            assembly.fused,
            assembly.graphed,
        )

    def _check_largest(
        self,
        mode: Mode,
        spec: BatchSpec,
        microbatches: int,
        layout: Layout,
        weighs: bool,
        batch: Sequence[torch.Tensor],
    ) -> None:
        """Whether the largest batch that was announced can be run, too."""
        most = largest(spec, ranges_of(self.options.dynamic))
        if mode is main_mode(self.options) and most != spec:
            try:
                values = stretched(batch, most) if batch else ()
                self.build(mode, most, microbatches, layout, False, values, weighs)
            except (MemoryBudgetError, NumberError):
                raise
            except PipecompileError as error:
                raise BatchError(
                    f"dynamic= announces batches of ({most}), which cannot be "
                    f"{'trained on' if self.options.training else 'run'}: {error}"
                ) from error

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """Why the model may have fewer units than its layers would have."""
        try:
            yield
        except PartitionError as error:
            notes = "; ".join(self.skeleton.regions.notes)
            if not notes or type(error) is not PartitionError:
                raise
            raise PartitionError(f"{error} ({notes})") from error

    def _folder(self, mode: Mode, spec: BatchSpec) -> Path | None:
        if self.options.dump_dir is None:
            return None
        shape = "x".join(str(n) for n in spec.leaves[0].shape)
        return Path(self.options.dump_dir) / f"{mode}-{shape}"

    def _captured(
        self,
        mode: Mode,
        spec: BatchSpec,
        batch: Sequence[torch.Tensor],
        recorder: Recorder,
        weighs: bool,
        chunks: Chunks | None,
    ) -> Captured:
        """The joint graph, with the passes over it.

        Args:
            weighs: tell how the losses of microbatches make that of several.
        """
        options = self.options
        splits = chunks is not None and options.kind.splits_backward and options.stage_count > 1
        known = mode, spec, weighs, chunks, splits
        if self._shared is not None and known in self._shared.graphs:
            captured, records = self._shared.graphs[known]
            recorder.records += records
            return captured
        before = len(recorder.records)
        weighs &= options.loss_normalization != "microbatch" and options.loss_weight is None
        for name, note in self.notes.items():
            if note:
                with recorder.record("joint", name) as outcome:
                    outcome.note = note
        inner: list[PassRecord] = []
        wanted = Wanted(mode, spec, tuple(batch), weighs, chunks)
        with recorder.record("joint", "capture") as outcome:
            captured, how = self.team.together(lambda: self._capturing.captured(wanted, inner))
            self.team.alike(captured.guards)
            recorder.records += inner
            graph = captured.graph
            verify_graph(graph)
            check_lookups(graph, str(spec))
            counts = f"{len(list(graph.ops()))} operators, {len(graph.params)} parameters"
            outcome.note = "; ".join(filter(None, (counts, how, *captured.notes)))
            outcome.texts[".py"] = graph.text
        check_pieces(chunks, chunk_rows(graph.graph), inner)
        if captured.loss is not None:
            with recorder.record("forward", "loss") as outcome:
                outcome.note = captured.loss.note
            if mode is not Mode.FORWARD:
                self._warn(captured.loss.warning)
        joint = Joint(graph, options.mixed, self.skeleton.held, splits)
        run("joint", passes.JOINT, joint, recorder, options.skip)
        measures = self.target.measures
        for name, note in notes_on_costs(list(graph.ops()), self.target.spec, measures):
            with recorder.record("joint", name) as outcome:
                outcome.note = note
        if self._shared is not None:
            self._shared.graphs[known] = captured, tuple(recorder.records[before:])
        return captured

    def _warn(self, text: str) -> None:
        """Once, of a loss that is not that of the whole batch.

        Raises:
            LossError: it was to be that.
        """
        if text and self.options.loss_normalization == "batch":
            raise LossError(f'loss_normalization="batch": {text}')
        if text and text not in self._warned:
            self._warned.add(text)
            warnings.warn(text, stacklevel=2)

    # -- deciding, and following --------------------------------------------------------------

    def _settings(
        self, zero: Zero, lookups: Mapping[str, int], spec: BatchSpec, microbatches: int
    ) -> Settings:
        """``lookups``: by a microbatch, in tables."""
        keep = self.options.zero_keep if zero.streams or zero.divides_params else AUTO
        touched = {name: count * microbatches for name, count in lookups.items()}
        optimizer = self._tables.optimizer(touched)
        options = replace(
            self.options, zero=zero.level, zero_by=zero.by, zero_keep=keep, optimizer=optimizer
        )
        told = self.target.kind, repr(options.dtypes), repr(options.compression), options.dp
        own = id(self.options.optimizer), tuple(touched.items()), self._tables.stepped
        known = zero, *told, options.training, *own
        if known not in self._footprints:
            memory = partial(self._cache.optimizers.memory, kind=self.target.kind)
            of = self.skeleton, options, zero, memory, touched, self._tables.stepped
            self._footprints[known] = footprint_of(*of)
        return Settings(
            options,
            zero,
            self._footprints[known],
            microbatches,
            spec.nbytes,
            self.target.kind,
            self.target.spec,
            self.target.budget_bytes,
            whole=self.target.whole,
            drafts=self.target.roughly,
            runs=self.target.runs,
        )

    def _decided(
        self,
        graph: JointGraph,
        locality: Locality,
        spec: BatchSpec,
        microbatches: int,
        layout: Layout | None,
        batch: Sequence[torch.Tensor],
        recorder: Recorder,
    ) -> Decided:
        lookups = self._tables.lookups(graph)
        settings = partial(self._settings, lookups=lookups, spec=spec, microbatches=microbatches)
        with recorder.record("placed", "partition") as outcome:
            if layout is not None:
                followed = layout.follow(graph, locality)
                own = settings(layout.zero).along(followed[0])
                decided = Decided(own, *followed, pace=layout.pace)
            else:
                known = self.skeleton, self.target, self.team, self.given, self._cache.plans
                deciding = Deciding(*known, graph, locality, spec, batch, self._shared)
                decided = deciding.decide(self._divisions, settings)
            verify_placement(graph, decided.placement.stage)
            outcome.note = placement_note(decided.decision)
            outcome.texts[".txt"] = partial(placement_text, decided.decision, locality)
        if note := self._zero_note(decided):
            with recorder.record("placed", "zero") as outcome:
                outcome.note = note
        return decided

    def _zero_note(self, decided: Decided) -> str:
        parts = [decided.why_zero] if decided.why_zero else []
        if decided.settings.zero.matrices:
            tried = self._verdict
            why = f", as {tried.kind} needs them: {tried.why}" if tried and tried.why else ""
            parts.append(f"each replica owns whole parameters{why}")
        if decided.decision.kept and not decided.pace:
            footprint = decided.settings.footprint
            parts += kept_notes(decided.decision.kept, lambda name: footprint.size(name)[1])
        return "; ".join(parts)

    def _check_skipped(self, records: Sequence[PassRecord]) -> None:
        met = {record.name for record in records}
        for name in self.options.skip:
            if name not in met:
                raise OptionError(f"skip={name!r} has no effect: it has nothing to do here")
