"""The shapes of batches that were met: at first each is traced, then one graph serves them all."""

from __future__ import annotations

import contextlib
import warnings
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from ..capture.batch import BatchSpec
from ..capture.capture import Captured
from ..ir.errors import CaptureError, PipecompileError
from ..tracing import sizes
from .template import Template

ANSWERS = 4  # graphs for many sizes: for other answers of the batch, or other sides of a branch
ROWS = 3  # numbers of rows that are traced before their number becomes a symbol
Leaves = Sequence[torch.Tensor]
Varying = tuple[frozenset[int], ...]
"""Of each leaf, the dimensions that vary."""


@dataclass
class _Kind:
    """Batches that differ in sizes alone.

    Attributes:
        traced: shapes that were traced, with the fingerprints of their graphs; "" where forward
            has asked the batch.
        templates: graphs for many sizes; of several, each for other answers of the batch.
        tried: how often one was made, or could not be, by what was to vary.
    """

    traced: dict[BatchSpec, str] = field(default_factory=dict)
    templates: list[Template] = field(default_factory=list)
    tried: Counter[Varying] = field(default_factory=Counter)

    def met(self, spec: BatchSpec, captured: Captured) -> str:
        """The graph of one shape is there; its fingerprint."""
        fingerprint = captured.graph.fingerprint()
        self.traced[spec] = "" if captured.guards.of_batch else fingerprint
        return fingerprint


class Shapes:
    """Of one model."""

    def __init__(self) -> None:
        self._kinds: dict[Hashable, _Kind] = {}
        self._warned = False

    def captured(
        self,
        use: Hashable,
        spec: BatchSpec,
        batch: Leaves,
        look: Callable[[], Captured | None],
        trace: Callable[[], Captured],
        generalise: Callable[[BatchSpec, Varying], Template],
    ) -> tuple[Captured, str]:
        """The graph for microbatches of one shape, and how it came about where it was not traced.

        Args:
            use: what else a graph depends on.
            batch: the leaves of one, which forward may ask; empty where it may not.
            look: finds it where another run has left it.
            trace: traces it.
            generalise: traces one for an example, with symbols for what varies.
        """
        kind = self._kinds.setdefault((use, _structure(spec)), _Kind())
        why, candidate = "", None
        if spec not in kind.traced or batch:
            found, why = _followed(kind, spec, batch)
            if found is not None:
                return found, _said(kind, spec)
        known = look()
        if known is not None:
            kind.met(spec, known)
            return known, ""
        if spec not in kind.traced or batch:
            try:
                candidate = self._generalised(kind, spec, batch, generalise)
            except PipecompileError as error:
                why = str(error)
            if candidate is not None and _agrees(candidate, kind.traced):
                kind.templates.append(candidate)
                candidate = None
                found, why = _followed(kind, spec, batch)
                if found is not None:
                    return found, _said(kind, spec)
            if why and candidate is None:
                self._warn(why)
        captured = trace()
        fingerprint = kind.met(spec, captured)
        if candidate is not None and _agrees(candidate, {spec: fingerprint}):
            kind.templates.append(candidate)
        return captured, why and f"traced anew, as {why}"

    def _generalised(
        self,
        kind: _Kind,
        spec: BatchSpec,
        batch: Leaves,
        generalise: Callable[[BatchSpec, Varying], Template],
    ) -> Template | None:
        """A graph for all sizes, once something varies that those that are there have not, or
        forward is answered otherwise.

        Raises:
            PipecompileError: it cannot be made.
        """
        varying = _varying([*kind.traced, spec])
        for template in kind.templates:
            varying = tuple(a.union(b) for a, b in zip(varying, template.varying, strict=True))
        of_rows = spec.scales is None and not any(dims - {0} for dims in varying)
        if not kind.traced or (of_rows and len(kind.traced) < ROWS):
            return None
        if kind.tried[varying] >= ANSWERS:
            return None
        kind.tried[varying] += 1
        try:
            return generalise(spec, varying)
        except PipecompileError:
            kind.tried[varying] = ANSWERS  # it would not be another time
            raise

    def _warn(self, why: str) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"batches of other sizes are traced one by one ({why}): pad them to a few sizes",
                stacklevel=2,
            )


def _followed(kind: _Kind, spec: BatchSpec, batch: Leaves) -> tuple[Captured | None, str]:
    """The graph that follows from one for many sizes, if one of them is for this batch; and why
    none is for its sizes, where there are some."""
    why = ""
    for template in kind.templates:
        try:
            found = template.at(spec)
        except CaptureError as error:
            why = str(error)
            continue
        if not found.guards or (batch and found.guards.difference(batch) is None):
            return found, ""
    return None, why


def _agrees(made: Template, traced: Mapping[BatchSpec, str]) -> bool:
    """Whether a graph for many sizes is that of shapes that were traced, where it is for them.

    Of those in which forward has asked the batch nothing can be said.
    """
    found = []
    for spec, fingerprint in traced.items():
        if fingerprint:
            with contextlib.suppress(CaptureError):
                found.append(made.at(spec).graph.fingerprint() == fingerprint)
    return bool(found) and all(found)


def _structure(spec: BatchSpec) -> Hashable:
    """What is alike in batches that differ in sizes alone, of those that can be symbols."""
    small = tuple(tuple(min(n, sizes.LEAST) for n in each) for each in spec.amounts)
    return small, spec.without_sizes()


def _varying(specs: Sequence[BatchSpec]) -> Varying:
    """Rows, if there are several, and what is not the same in all of them."""
    shapes = zip(*(spec.amounts for spec in specs), strict=True)
    found = (list(enumerate(zip(*each, strict=True))) for each in shapes)
    return tuple(
        frozenset(d for d, n in each if (not d and n[0] >= sizes.LEAST) or len({*n}) > 1)
        for each in found
    )


def _said(kind: _Kind, spec: BatchSpec) -> str:
    varying = _varying([*kind.traced, spec])
    pairs = zip(spec.leaves, varying, strict=True)
    named = (f"{leaf.name} {sorted(dims)}" for leaf, dims in pairs if dims)
    return f"follows from one graph for all sizes of {', '.join(named)}"
