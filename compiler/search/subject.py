"""A model, a batch and devices, as a search asks for them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from ..capture.batch import BatchSpec
from ..compression.methods import OFF
from ..driver.auto import BACKENDS, Way, chunks_of
from ..driver.builder import Builder
from ..driver.compiled import Compiled, main_mode
from ..driver.work import Outline
from ..ir.errors import PartitionError, PipecompileError
from ..options.options import CompileOptions
from ..options.parsing import AUTO
from ..plan.plan import Plan
from ..planning.advice import gib
from ..planning.refine import LEAST_GAIN
from ..planning.target import Target
from .bounds import Microbatch, least_compute_s
from .model import Model, UntracedError
from .room import Least, check_room
from .scaling import least_row_s
from .sketch import Prices, Sketch, load_for, sketch_of

MOST_TRACED = 40_000
"""Operators of the graphs that are traced, one for each number of rows that is worth it."""

NARROWED = {"gradients": "bf16"}, {"gradients": "int8"}, {"values": "bf16"}
"""What is tried of compression, of the best way."""

HELPS = 0.01  # of a step

SOLVED_S = 2.0
"""Of the solver, counted, for each plan: what it finds later than that tells no two ways apart."""

MakeBuilder = Callable[[CompileOptions], Builder]
Divide = Callable[[CompileOptions], tuple[BatchSpec, int, Sequence[torch.Tensor]]]
"""(options) -> the spec of a microbatch, their number, and the leaves of one, if there are any."""


@dataclass(frozen=True)
class _Traced:
    """One graph.

    Attributes:
        nodes: of it.
        row_s: whether runs of operators are compiled -> seconds of a row, at least.
    """

    nodes: int
    row_s: Mapping[bool, float]


def twin_of(way: Way) -> Way | None:
    """The same way with the other backend, where that is weighed."""
    if way.backend is None:
        return None
    return replace(way, backend=BACKENDS[1 - BACKENDS.index(way.backend)])


class Subject:
    """Builders and graphs of ways, each made once.

    Args:
        builder: made for options; those of one subject share their graphs.
        most_traced: operators, for graphs of more numbers of rows than one; None for `MOST_TRACED`.
        named: whether the backend is the user's own choice; None for what options say.
    """

    def __init__(
        self,
        options: CompileOptions,
        target: Target,
        devices: int,
        builder: MakeBuilder,
        divide: Divide,
        most_traced: int | None = None,
        named: bool | None = None,
    ):
        self._named = options.backend != AUTO if named is None else named
        self._most_traced = MOST_TRACED if most_traced is None else most_traced
        self.options, self.target, self.devices = options, target, devices
        self._builder, self._divide = builder, divide
        self._prices: dict[tuple[object, ...], Prices] = {}
        self._traced: dict[tuple[object, ...], _Traced] = {}
        self._outlines: dict[Way, Outline] = {}
        self._least: dict[tuple[object, ...], Least] = {}
        self._unfit: dict[Way, tuple[dict[str, int], PartitionError]] = {}
        self.built: dict[Way, Compiled] = {}

    @property
    def model(self) -> Model:
        return Model(
            self.bound,
            self.sketch,
            self._plan,
            self._nodes,
            self.besides,
            twin_of,
            partial(self.sketch, rough=True),
        )

    def _of(self, way: Way) -> CompileOptions:
        return way.of(self.options, dump_dir=None)

    def _key(self, way: Way) -> tuple[object, ...]:
        """What the prices of a way depend on."""
        return self._of(way).fuses, *self._graph(way)

    def _graph(self, way: Way) -> tuple[object, ...]:
        """What the graph of a way depends on."""
        options = self._of(way)
        spec, m, _ = self._divide(options)
        pieces = chunks_of(options, None, None) is not None and options.kind.splits_backward
        return spec.rows, m * way.dp > 1 and spec.varies, pieces

    def bound(self, way: Way) -> float:
        """Seconds of a step, at least."""
        if self.target.spec.cluster is not None:
            return 0.0  # prices are of one kind of its devices
        options, key = self._of(way), self._key(way)
        spec, m, _ = self._divide(options)
        virtual, splits = options.virtual, options.kind.splits_backward
        prices = self._prices.get(key)
        known = [each for each in self._traced.values() if options.fuses in each.row_s]
        if prices is None and not known:
            return 0.0  # the first is looked at to know the others
        if prices is not None:
            one = prices.microbatch
        else:
            one = Microbatch(spec.rows * max(each.row_s[options.fuses] for each in known))
        compute_s = least_compute_s(one, m, way.n_stages, virtual, splits)
        return compute_s * self.target.spec.waiting(self.devices)

    def _outline(self, way: Way) -> Outline:
        if way not in self._outlines:
            options, key, graph = self._of(way), self._key(way), self._graph(way)
            spec, m, values = self._divide(options)
            if graph not in self._traced and self._traced and self._many():
                raise UntracedError(
                    f"not traced for {spec.rows} rows: {len(self._traced)} others are"
                )
            outline = self._builder(options).outline(spec, m, values)
            if key not in self._prices:
                self._prices[key] = Prices(outline)
            if graph not in self._traced:
                kinds = (False, True) if way.backend else (options.fuses,)
                of, spec_of = (outline.graph, spec.rows), self.target.spec.fusing
                row_s = {fuses: least_row_s(*of, spec_of(fuses)) for fuses in kinds}
                self._traced[graph] = _Traced(self._prices[key].nodes, row_s)
            self._outlines[way] = outline
        return self._outlines[way]

    def _many(self) -> bool:
        """Whether the operators of all graphs, and of one more like them, are too many."""
        sizes = [each.nodes for each in self._traced.values()]
        return sum(sizes) + max(sizes, default=0) > self._most_traced

    def sketch(self, way: Way, *, rough: bool = False) -> Sketch:
        """What is expected of its plan.

        Args:
            rough: as `sketch_of` has it.

        Raises:
            PipecompileError: it is not possible, or does not fit by the prices.
        """
        outline = self._outline(way)
        count, most = outline.settings.options.stage_count, len(outline.parts.units)
        if count > most:  # before an order of so many stages is looked for
            raise PartitionError(
                f"n_stages={count}, but the model has only {most} units (runs of operators between "
                f"good cut points): use n_stages={most} or fewer"
            )
        self._check_unfit(way, outline)
        self._check_room(way, outline)
        prices = self._prices[self._key(way)]
        try:
            return sketch_of(outline, prices, self.devices, rough=rough)
        except PartitionError as error:
            self._unfit[replace(way, zero=None)] = outline.held_bytes, error.with_traceback(None)
            raise

    def _check_room(self, way: Way, outline: Outline) -> None:
        """Raises MemoryBudgetError where no division fits, before one is looked for."""
        held, key = outline.held_bytes, self._key(way)
        known = key, way.dp, way.zero, tuple(held.values())
        if known not in self._least:
            self._least[known] = Least.of(outline)
        options, load = outline.settings.options, None
        if not options.kind.searches and options.virtual == 1 and outline.graph.trains:
            load = load_for(options.kind, options.shape(outline.settings.microbatches))
        check_room(outline, self._least[known], load)

    def _check_unfit(self, way: Way, outline: Outline) -> None:
        """Raises PartitionError where the way does not fit at a level of ZeRO that holds no more of
        any parameter."""
        least, refusal = self._unfit.get(replace(way, zero=None), ({}, None))
        held = outline.held_bytes
        if refusal is not None and all(held[name] >= size for name, size in least.items()):
            raise refusal

    def besides(self, way: Way) -> str:
        """Why its backend, where that was weighed; what all ways have alike though it could be
        chosen, and what that would make of this one."""
        options = self._of(way)
        alike = [] if way.backend else [f'backend="{options.backend}"']
        alike.append(f'compress="{options.compression}"')
        brings = [each for each in (self._compiled(way), self._narrowed(way)) if each]
        said = f"all with {' and '.join(alike)}{': ' * bool(brings)}{'; '.join(brings)}"
        return f"{self.weighed(way)}; {said}" if way.backend else said

    def weighed(self, way: Way) -> str:
        """Why its backend: what the other one would make of it, by plans where there are both, else
        by sketches. "" where that was not weighed."""
        if (other := twin_of(way)) is None:
            return ""
        said = f'backend="{way.backend}", '
        try:
            theirs, own = self.sketch(other), self.sketch(way)
        except PipecompileError:
            return f'{said}as with "{other.backend}" it would not fit'
        more, held = theirs.step_s / own.step_s - 1, theirs.peak_bytes - own.peak_bytes
        if {way, other} <= self.built.keys():
            more = self.built[other].plan.step_s / self.built[way].plan.step_s - 1
        if more > LEAST_GAIN:
            return f'{said}as with "{other.backend}" a step would take {more:.1%} longer'
        if held > 0:
            return f'{said}as with "{other.backend}" {gib(held)} more would be held'
        return f'{said}though by its prices "{other.backend}" is as good: its programs are not'

    def _compiled(self, way: Way) -> str:
        """What Inductor would bring where it was not named, and is not weighed."""
        options = self._of(way)
        if self._named or way.backend or options.fuses:
            return ""
        with contextlib.suppress(PipecompileError):
            own, theirs = (self.sketch(replace(way, backend=name)) for name in (None, BACKENDS[0]))
            less_s, less = 1 - theirs.step_s / own.step_s, 1 - theirs.peak_bytes / own.peak_bytes
            found = [f"{less_s:.0%} less of a step"] if less_s >= HELPS else []
            found += [f"{less:.0%} less memory"] if less >= HELPS else []
            roofline = self.target.spec.table is None
            why = ', whose seconds are those of eager kernels by costs="roofline",' * roofline
            if found:
                return f'"{BACKENDS[0]}"{why} would take {" and ".join(found)}, and round otherwise'
            return f'"{BACKENDS[0]}"{why} would bring nothing'
        return ""

    def _narrowed(self, way: Way) -> str:
        """What compression would, where it was not asked for."""
        options = self._of(way)
        if options.compress != OFF or not options.training:
            return ""
        own_s, found = self.sketch(way).step_s, list[tuple[float, dict[str, str]]]()
        for what in NARROWED:
            with contextlib.suppress(PipecompileError):
                tried = replace(options, compress=what)
                tried.check_shared()
                spec, m, values = self._divide(tried)
                outline = self._builder(tried).outline(spec, m, values)
                step_s = sketch_of(outline, self._prices[self._key(way)], self.devices).step_s
                found.append((step_s, what))
        if not found:
            return ""
        step_s, what = min(found, key=lambda pair: pair[0])
        if (less := 1 - step_s / own_s) < HELPS:
            return "no compression would make it faster"
        return f"{what} would take {less:.0%} less of a step, and change what is learned"

    def _nodes(self, way: Way) -> int:
        traced = self._traced.get(self._graph(way))
        return 0 if traced is None else traced.nodes

    def _plan(self, way: Way) -> Plan:
        options = self._of(way)
        options = replace(options, time_limit_s=min(options.time_limit_s, SOLVED_S))
        spec, m, values = self._divide(options)
        self.built[way] = self._builder(options).build(main_mode(options), spec, m, batch=values)
        return self.built[way].plan
