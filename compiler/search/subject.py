"""A model, a batch and devices, as a search asks for them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from ..capture.batch import BatchSpec
from ..compression.methods import OFF
from ..driver.auto import Way, chunks_of
from ..driver.builder import Builder
from ..driver.compiled import Compiled, main_mode
from ..driver.work import Outline
from ..ir.errors import PartitionError, PipecompileError
from ..options.options import CompileOptions
from ..plan.plan import Plan
from ..planning.target import Target
from .bounds import Microbatch, least_compute_s
from .room import Least, check_room
from .scaling import least_row_s
from .search import Model, UntracedError
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


class Subject:
    """Builders and graphs of ways, each made once.

    Args:
        builder: made for options; those of one subject share their graphs.
        most_traced: operators, for graphs of more numbers of rows than one; None for `MOST_TRACED`.
    """

    def __init__(
        self,
        options: CompileOptions,
        target: Target,
        devices: int,
        builder: MakeBuilder,
        divide: Divide,
        most_traced: int | None = None,
    ):
        self._most_traced = MOST_TRACED if most_traced is None else most_traced
        self.options, self.target, self.devices = options, target, devices
        self._builder, self._divide = builder, divide
        self._prices: dict[tuple[object, ...], Prices] = {}
        self._rows: dict[tuple[object, ...], tuple[int, float]] = {}
        self._outlines: dict[Way, Outline] = {}
        self._least: dict[tuple[object, ...], Least] = {}
        self._unfit: dict[Way, tuple[dict[str, int], PartitionError]] = {}
        self.built: dict[Way, Compiled] = {}

    @property
    def model(self) -> Model:
        return Model(self.bound, self.sketch, self._plan, self._nodes, self.besides)

    def _of(self, way: Way) -> CompileOptions:
        return way.of(self.options, dump_dir=None)

    def _key(self, way: Way) -> tuple[object, ...]:
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
        if prices is None and not self._rows:
            return 0.0  # the first is looked at to know the others
        if prices is not None:
            one = prices.microbatch
        else:
            one = Microbatch(spec.rows * max(s for _, s in self._rows.values()))
        compute_s = least_compute_s(one, m, way.n_stages, virtual, splits)
        return compute_s * self.target.spec.waiting(self.devices)

    def _outline(self, way: Way) -> Outline:
        if way not in self._outlines:
            options, key = self._of(way), self._key(way)
            spec, m, values = self._divide(options)
            if key not in self._prices and self._prices and self._traced() > self._most_traced:
                raise UntracedError(
                    f"not traced for {spec.rows} rows: {len(self._rows)} others are"
                )
            outline = self._builder(options).outline(spec, m, values)
            if key not in self._prices:
                self._prices[key] = Prices(outline)
                self._rows[key] = spec.rows, least_row_s(outline.graph, spec.rows, self.target.spec)
            self._outlines[way] = outline
        return self._outlines[way]

    def _traced(self) -> int:
        """Operators of all graphs, and of one more like them."""
        sizes = [prices.nodes for prices in self._prices.values()]
        return sum(sizes) + max(sizes, default=0)

    def sketch(self, way: Way) -> Sketch:
        """What is expected of its plan.

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
            return sketch_of(outline, prices, self.devices)
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
        """What all ways have alike though it could be chosen, and what compression would make of
        this one."""
        options = self._of(way)
        alike = f'all with backend="{options.backend}" and compress="{options.compression}"'
        if options.compress != OFF or not options.training:
            return alike
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
            return alike
        step_s, what = min(found, key=lambda pair: pair[0])
        if (less := 1 - step_s / own_s) < HELPS:
            return f"{alike}, which would be no faster"
        return f"{alike}: {what} would take {less:.0%} less of a step, and change what is learned"

    def _nodes(self, way: Way) -> int:
        prices = self._prices.get(self._key(way))
        return 0 if prices is None else prices.nodes

    def _plan(self, way: Way) -> Plan:
        options = self._of(way)
        options = replace(options, time_limit_s=min(options.time_limit_s, SOLVED_S))
        spec, m, values = self._divide(options)
        self.built[way] = self._builder(options).build(main_mode(options), spec, m, batch=values)
        return self.built[way].plan
