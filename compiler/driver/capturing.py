"""The graphs of one model: traced, following from one for many sizes, or kept from another run."""

from __future__ import annotations

from dataclasses import astuple, dataclass, field, replace

import torch

from ..capture.batch import BatchSpec
from ..capture.capture import Captured, capture_evaluation, capture_forward, capture_training
from ..capture.exports import Exports
from ..capture.skeleton import Skeleton
from ..costs.hardware import Device
from ..general.numbers import check_numbers
from ..general.shapes import Shapes, Varying
from ..general.template import Template, capture_template
from ..ir.graph import JointGraph
from ..ir.locality import Locality, locality_of
from ..kept.folder import Folder
from ..kept.store import Store
from ..losses.logits import Chunks
from ..memory.footprint import Footprint
from ..options.options import CompileOptions
from ..planning.parts import Parts
from ..profiling.optimizer_trial import Verdict
from .assembly import forward_passes
from .compiled import Mode
from .record import PassRecord


@dataclass(frozen=True)
class Wanted:
    """A graph that is wanted.

    Attributes:
        spec: of one microbatch.
        batch: leaves of one, which forward may ask; empty where there are none.
        weighs: tell how the losses of microbatches make that of several.
        chunks: how losses are computed in pieces; None for whole.
    """

    mode: Mode
    spec: BatchSpec
    batch: tuple[torch.Tensor, ...]
    weighs: bool
    chunks: Chunks | None = None


class Capturing:
    """Args:
    device: where graphs are traced.
    kind: the type of device that is planned for.
    graphs: of other runs; None for none.
    exports: what other captures of the model need too; None where there are none.
    """

    def __init__(
        self,
        skeleton: Skeleton,
        options: CompileOptions,
        device: torch.device,
        kind: str,
        graphs: Folder | None,
        exports: Exports | None = None,
    ):
        self.skeleton, self.options = skeleton, options
        self.device, self.kind, self._exports = device, kind, exports
        self._compute = options.mixed.autocasts if options.mixed else None
        self._shapes = Shapes()
        self._store = Store(
            graphs,
            skeleton,
            None if skeleton.loss_fn is not None else options.loss_fn,
            (repr(options.mixed), sorted(options.skip), kind, options.eager_modules),
            device,
        )

    def captured(self, wanted: Wanted, records: list[PassRecord]) -> tuple[Captured, str]:
        """A graph, and how it came about where it was not traced for this shape.

        Args:
            records: gets what passes over the exported graph did, and whether it was kept.
        """
        use = (wanted.mode, wanted.weighs, bool(wanted.batch), repr(wanted.chunks))
        found: list[Captured] = []
        looked = False

        def look() -> Captured | None:
            nonlocal looked
            looked = True
            entry = self._store.find(use, wanted.spec, wanted.batch)
            if entry is None:
                return None
            records[:] = [PassRecord(*each) for each in entry.records]
            found.append(entry.captured)
            return entry.captured

        def trace() -> Captured:
            with self._store.noting(looked):
                return self._traced(wanted, records)

        def generalise(example: BatchSpec, varying: Varying) -> Template:
            nonlocal looked
            looked = False
            with self._store.noting():
                return self._generalised(wanted, example, varying, records)

        if self.options.dynamic == "off":
            captured, how = look() or trace(), ""
        else:
            captured, how = self._shapes.captured(
                use, wanted.spec, wanted.batch, look, trace, generalise
            )
        note = "from another run"
        if not found:
            told = [astuple(each) for each in records]
            why = self._store.add(use, wanted.spec, captured, told)
            note = f"not kept for other runs: {why}" if why else "kept for other runs"
        records.append(PassRecord("forward", "keep", 0.0, note, told=False))
        return captured, how

    def trace(self, wanted: Wanted, records: list[PassRecord]) -> Captured:
        """The graph for one shape."""
        skeleton, options, spec = self.skeleton, self.options, wanted.spec
        rewrites = forward_passes(options.mixed, self.kind, options.skip, records, wanted.chunks)
        given = wanted.batch, wanted.weighs, self._exports
        rest = (self.device, rewrites, self._compute, *given)
        if wanted.mode is Mode.FORWARD:
            return capture_forward(skeleton, spec, *rest)
        capture = capture_training if wanted.mode is Mode.TRAIN else capture_evaluation
        return capture(skeleton, spec, options.loss_fn, *rest)

    def _traced(self, wanted: Wanted, records: list[PassRecord]) -> Captured:
        """The graph for one shape; with numbers of the batch as inputs beside the one with them as
        literals, which it has to be."""
        spec, batch = wanted.spec, wanted.batch
        if not spec.plain_leaves:
            return self.trace(wanted, records)
        closed, values = spec.closed(batch)
        literal = self.trace(replace(wanted, spec=closed, batch=tuple(values)), [])
        found = self.trace(wanted, records)
        check_numbers(found, spec, batch, literal)
        return found

    def _generalised(
        self, wanted: Wanted, example: BatchSpec, varying: Varying, records: list[PassRecord]
    ) -> Template:
        """One for many sizes."""
        options, results = self.options, wanted.mode is Mode.FORWARD
        return capture_template(
            self.skeleton,
            example,
            varying,
            None if results else options.loss_fn,
            self.device,
            "results" if results else "loss",
            wanted.mode is Mode.TRAIN,
            forward_passes(options.mixed, self.kind, options.skip, records, wanted.chunks),
            self._compute,
            wanted.weighs,
            wanted.batch,
        )


@dataclass(frozen=True)
class Shared:
    """What builders of the same model with other divisions share; filled as it is asked.

    Attributes:
        exports: as torch made them, before the passes over them, where batches of several sizes
            are looked at; None where they are not.
        graphs: by what was traced for: the joint graph, after the passes over it, and what these
            did.
        footprints: by all that they depend on besides the model.
        verdicts: whether replicas divide anything -> how the optimizer steps.
    """

    exports: Exports | None = None
    graphs: dict[tuple[object, ...], tuple[Captured, tuple[PassRecord, ...]]] = field(
        default_factory=dict
    )
    footprints: dict[object, Footprint] = field(default_factory=dict)
    verdicts: dict[bool, Verdict] = field(default_factory=dict)
    _localities: dict[int, tuple[JointGraph, Locality]] = field(default_factory=dict)
    _parts: dict[tuple[object, ...], tuple[JointGraph, Parts]] = field(default_factory=dict)

    def locality(self, graph: JointGraph) -> Locality:
        """Of a graph that is kept as it is."""
        if id(graph) not in self._localities:
            self._localities[id(graph)] = graph, locality_of(graph)
        return self._localities[id(graph)][1]

    def parts(
        self, graph: JointGraph, locality: Locality, device: Device, remat: str, fuses: bool
    ) -> Parts:
        """Of a graph in which nothing is pinned."""
        known = id(graph), device.name, device.table is None, remat, fuses
        if known not in self._parts:  # the graph is kept, so that its id stays its own
            self._parts[known] = graph, Parts.of(graph, locality, device, remat, {}, fuses)
        return self._parts[known][1]
