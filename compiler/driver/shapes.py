"""The shapes of batches that were met: at first each is traced, then one graph serves them all."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field

from ..capture.batch import BatchSpec
from ..capture.capture import Captured
from ..capture.template import Template
from ..ir.errors import CaptureError, PipecompileError
from ..tracing.sizes import LEAST

ROWS = 3  # numbers of rows that are traced before their number becomes a symbol
Varying = tuple[frozenset[int], ...]
"""Of each leaf, the dimensions that vary."""


@dataclass
class _Kind:
    """Batches that differ in sizes alone.

    Attributes:
        traced: shapes that were traced, with the fingerprints of their graphs.
        template: a graph for many sizes.
        candidate: one that no shape has been compared with.
        tried: what was to vary when one was made, or could not be.
    """

    traced: dict[BatchSpec, str] = field(default_factory=dict)
    template: Template | None = None
    candidate: Template | None = None
    tried: set[Varying] = field(default_factory=set)


class Shapes:
    """Of one model."""

    def __init__(self) -> None:
        self._kinds: dict[Hashable, _Kind] = {}
        self._warned = False

    def captured(
        self,
        use: Hashable,
        spec: BatchSpec,
        trace: Callable[[], Captured],
        generalise: Callable[[BatchSpec, Varying], Template],
    ) -> tuple[Captured, str]:
        """The graph for microbatches of one shape, and how it came about where it was not traced.

        Args:
            use: what else a graph depends on.
            trace: traces it.
            generalise: traces one for an example, with symbols for what varies.
        """
        kind = self._kinds.setdefault((use, _structure(spec)), _Kind())
        why = ""
        if spec not in kind.traced:
            try:
                self._generalise(kind, spec, generalise)
                if kind.template is not None:
                    return kind.template.at(spec), _said(kind.template, spec)
            except PipecompileError as error:
                why = str(error)
                self._warn(why)
        captured = trace()
        kind.traced[spec] = "" if captured.guards.of_batch else captured.graph.fingerprint()
        if kind.candidate is not None:
            kind.template, kind.candidate = _compared(kind.candidate, {spec: kind.traced[spec]})
        return captured, why and f"traced anew, as {why}"

    def _generalise(
        self, kind: _Kind, spec: BatchSpec, generalise: Callable[[BatchSpec, Varying], Template]
    ) -> None:
        """Make a graph for all sizes, once something varies that the one that is there has not.

        Raises:
            PipecompileError: there is none.
        """
        varying = _varying([*kind.traced, spec])
        if kind.template is not None:
            known = kind.template.varying
            varying = tuple(a | frozenset(b) for a, b in zip(varying, known, strict=True))
            if all(a == frozenset(b) for a, b in zip(varying, known, strict=True)):
                return
        of_rows = not any(dims - {0} for dims in varying)
        if not kind.traced or varying in kind.tried or (of_rows and len(kind.traced) < ROWS):
            return
        kind.tried.add(varying)
        if "" in kind.traced.values():
            return  # forward asks the batch, which has no symbols to answer with
        example = next((each for each in (spec, *kind.traced) if _is_example(each, varying)), None)
        if example is None:
            return
        kind.template, kind.candidate = _compared(generalise(example, varying), kind.traced)

    def _warn(self, why: str) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"batches of other sizes are traced one by one ({why}): pad them to a few sizes",
                stacklevel=2,
            )


def _compared(
    made: Template, traced: Mapping[BatchSpec, str]
) -> tuple[Template | None, Template | None]:
    """A graph for many sizes, if it is that of a shape that was traced, and of no other another;
    and the same, if there was none to compare it with."""
    found = False
    for spec, fingerprint in traced.items():
        try:
            same = made.at(spec).graph.fingerprint() == fingerprint
        except CaptureError:
            continue  # it is not for that shape
        if not same:
            return None, None
        found = True
    return (made, None) if found else (None, made)


def _structure(spec: BatchSpec) -> Hashable:
    """What is alike in batches that differ in sizes alone."""
    kinds = tuple((leaf.name, len(leaf.shape), leaf.dtype) for leaf in spec.leaves)
    return kinds, spec.without_sizes()


def _varying(specs: Sequence[BatchSpec]) -> Varying:
    """Rows, and what is not the same in all of them."""
    shapes = zip(*([leaf.shape for leaf in spec.leaves] for spec in specs), strict=True)
    return tuple(
        frozenset(
            d for d, sizes in enumerate(zip(*each, strict=True)) if not d or len({*sizes}) > 1
        )
        for each in shapes
    )


def _is_example(spec: BatchSpec, varying: Varying) -> bool:
    pairs = zip(spec.leaves, varying, strict=True)
    return all(leaf.shape[d] >= LEAST for leaf, dims in pairs for d in dims)


def _said(template: Template, spec: BatchSpec) -> str:
    leaves = zip(spec.leaves, template.varying, strict=True)
    named = (f"{leaf.name} {sorted(dims)}" for leaf, dims in leaves if dims)
    return f"follows from one graph for all sizes of {', '.join(named)}"
