"""An unmodified model -> `JointGraph`: exported, changed by passes, differentiated."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cache, partial
from itertools import product
from typing import Any, TypeVar

import torch
from torch import fx

from ..answers.guards import Guards
from ..answers.inputs import NumberError, Scalars
from ..effects.outside import Read, constants_of
from ..ir.errors import (
    BatchError,
    CaptureError,
    LossError,
    PipecompileError,
    RaisedError,
    RegionError,
)
from ..ir.graph import JointGraph, storage_root
from ..regions.regions import Regions
from ..rows.fewer import Fewer, without
from ..rows.forming import formed
from ..rows.loss import LossForm
from ..rows.outputs import LOSS, Output, outputs_of
from ..rows.weighing import UNWEIGHED
from ..tracing.kept import UNTRACED, nameless
from .batch import BatchSpec, repeated
from .blame import data_dependent, explain, is_explained
from .calling import LossFn, bind, check_texts
from .exporting import Traced, exported, exported_without, tracing
from .exports import Export, Exports
from .joint import differentiated
from .refusals import check_operands
from .skeleton import Skeleton, evaluating

ForwardPass = Callable[[fx.GraphModule, Sequence[torch.Tensor]], str]
"""Rewrites an exported forward graph in place, given its arguments (fake); returns a note on what
it did, or ""."""

Leaves = tuple[torch.Tensor, ...]
T = TypeVar("T")


@dataclass(frozen=True)
class Captured:
    """A graph, and how to put its results back into the structure that the model returned.

    Attributes:
        outputs: per result, how those of microbatches are joined.
        notes: what the passes over the forward graph did.
        outside: what it has as constants and is not the model's.
        guards: what forward has asked the batch, and the answers that the graph is made for.
        loss: how the losses of microbatches make that of the batch, where that was to be told.
        lost: attributes that the next call cannot read -> why.
        scalars: the floats that it is given, between the leaves and the shares.
    """

    graph: JointGraph
    rebuild: Callable[[list[torch.Tensor]], Any]
    outputs: tuple[Output, ...] = ()
    notes: tuple[str, ...] = ()
    outside: tuple[Read, ...] = ()
    guards: Guards = field(default_factory=Guards)
    loss: LossForm | None = None
    lost: Mapping[str, str] = field(default_factory=dict)
    scalars: Scalars = field(default_factory=Scalars)


def capture_training(
    skeleton: Skeleton,
    spec: BatchSpec,
    loss_fn: LossFn | None,
    device: torch.device,
    passes: Sequence[ForwardPass] = (),
    compute: torch.dtype | None = None,
    values: Leaves = (),
    weighs: bool = False,
    exports: Exports | None = None,
) -> Captured:
    """Forward, loss and backward of one microbatch, in the mode that the model is in.

    Args:
        passes: applied to the exported forward graph, before it is differentiated.
        compute: trace under autocast to this dtype, which a pass then has to carry out.
        values: the leaves of the batch, which forward may ask; empty where there are none.
        weighs: tell how the losses of microbatches make that of the batch.
        exports: graphs that other captures of the model need too.

    Raises:
        BatchError, LossError, CaptureError: see each.
    """
    trainable = any(p.requires_grad for p in skeleton.module.parameters())
    if not trainable:
        raise LossError("no parameter has requires_grad=True: there is nothing to train")
    with torch.enable_grad():
        return _capture(
            skeleton, spec, loss_fn, device, "loss", passes, compute, values, weighs, exports
        )


def capture_evaluation(
    skeleton: Skeleton,
    spec: BatchSpec,
    loss_fn: LossFn | None,
    device: torch.device,
    passes: Sequence[ForwardPass] = (),
    compute: torch.dtype | None = None,
    values: Leaves = (),
    weighs: bool = False,
    exports: Exports | None = None,
) -> Captured:
    """Forward and loss in evaluation mode, without backward."""
    with evaluating(skeleton.module), torch.no_grad():
        return _capture(
            skeleton, spec, loss_fn, device, "loss", passes, compute, values, weighs, exports
        )


def capture_forward(
    skeleton: Skeleton,
    spec: BatchSpec,
    device: torch.device,
    passes: Sequence[ForwardPass] = (),
    compute: torch.dtype | None = None,
    values: Leaves = (),
    weighs: bool = False,
    exports: Exports | None = None,
) -> Captured:
    """All that the model returns, in evaluation mode, without backward.

    Exporting it again with twice the rows tells how results of microbatches are joined.
    """
    with evaluating(skeleton.module), torch.no_grad():
        return _capture(
            skeleton, spec, None, device, "results", passes, compute, values, weighs, exports
        )


def _capture(
    skeleton: Skeleton,
    spec: BatchSpec,
    loss_fn: LossFn | None,
    device: torch.device,
    wants: str,
    passes: Sequence[ForwardPass],
    compute: torch.dtype | None,
    values: Leaves,
    weighs: bool = False,
    exports: Exports | None = None,
) -> Captured:
    function, leaves = function_of(skeleton, spec, loss_fn, device, wants, compute)
    function.values = values
    export = exported if exports is None else exports.exported

    def more(traced: fx.GraphModule, rows: int) -> fx.GraphModule:
        """The same way as the last attempt, with so many times as many rows."""
        if rows == 1:
            return traced
        other, given = function_of(skeleton, spec.repeat(rows), loss_fn, device, wants, compute)
        other.values = repeated(values, spec, rows)
        other.denied, other.lazily = function.denied, function.lazily
        # A message names lines of the smaller graph; with one row that is the one of two. What is
        # shared is another's smaller one.
        alone = exports is None and (rows > 2 or spec.rows > 1)
        with nameless() if alone else nullcontext():
            return export(other, given)[0]

    def fewer(traced: fx.GraphModule) -> tuple[Fewer, fx.GraphModule] | None:
        """Without layers that are like others, and the same with twice the rows."""
        bypass = function.bypass if exports is None and function.wants_loss else None
        if bypass is None:
            return None
        short = without(traced, bypass.traced, bypass.kept, bypass.paths)
        if short is None:
            return None
        other, given = function_of(skeleton, spec.repeat(2), loss_fn, device, wants, compute)
        other.values = repeated(values, spec, 2)
        other.denied, other.lazily = function.denied, function.lazily
        try:
            with nameless():
                return short, exported_without(other, given, bypass)
        except Exception:  # all layers tell
            return None

    attempted = _with_numbers if spec.plain_leaves else _attempted
    with skeleton.computing():
        captured = attempted(
            function,
            lambda: differentiated_of(
                skeleton, function, leaves, passes, more, weighs, export, fewer
            ),
        )
    if wants == "loss" and torch.is_grad_enabled() and not captured.graph.trains:
        raise LossError(
            "the loss has no gradient once captured: a part of forward runs without gradients"
        )
    check_operands(captured.graph, spec)
    _check_leaves(captured.graph, spec, function, type(skeleton.model).__name__)
    return captured


def function_of(
    skeleton: Skeleton,
    spec: BatchSpec,
    loss_fn: LossFn | None,
    device: torch.device,
    wants: str,
    compute: torch.dtype | None,
) -> tuple[Traced, Leaves]:
    """What is traced, and its arguments."""
    leaves = tuple(skeleton.fake(leaf.shape, leaf.dtype, device) for leaf in spec.leaves)
    if loss_fn is not None and skeleton.loss_fn is not None:
        loss_fn = skeleton.loss_fn
    whole = [0.0 if leaf.plain else fake for leaf, fake in zip(spec.leaves, leaves, strict=True)]
    call = bind(skeleton.model, spec.build(whole), loss_fn)
    check_texts(skeleton.model, spec.left_out)
    function = Traced(skeleton.module, spec, call, loss_fn, skeleton.regions)
    function.wants_loss = wants == "loss"
    function.compute = compute
    function.floats = skeleton.floats
    function.attributes = skeleton.attributes.names
    function.constants = skeleton.values_of_buffers()
    return function, leaves


def _with_numbers(function: Traced, attempt: Callable[[], T]) -> T:
    """Trace the model with numbers of the batch as inputs.

    Raises:
        NumberError: it cannot be.
    """
    names = [function.spec.leaves[i].name for i in function.spec.plain_leaves]
    if function.regions.patterns:
        raise NumberError(dict.fromkeys(names, "parts of the model run eagerly"))
    try:
        with tracing():
            found, errors = _each_way(function, attempt)
    except NumberError:
        raise
    except PipecompileError as error:
        found, errors = [], [error]
    if not found:
        why = f"with it as an input forward cannot be traced ({errors[0]})"
        raise NumberError(dict.fromkeys(names, why)) from errors[0]
    return found[0]


def _check_taken(taken: Mapping[int, str], spec: BatchSpec) -> None:
    """Raises NumberError where forward takes numbers themselves that were to be inputs."""
    if taken:
        raise NumberError({spec.leaves[leaf].name: why for leaf, why in taken.items()})


def _attempted(function: Traced, attempt: Callable[[], T]) -> T:
    """Trace the model as if it were not traced; if it cannot be, as it likes to be traced; and if
    it cannot be so either, with one more part of it as a region, until it can be traced.

    Raises:
        PipecompileError: what the attempts without regions say, where only the model is left.
    """
    regions = function.regions
    regions.find()
    before, told = dict(regions.why), set(regions.patterns)
    with tracing():
        found, errors = _each_way(function, attempt)
        refused = next(filter(is_explained, reversed(errors)), errors[-1] if errors else None)
        # with regions, the first error that names a module tells which is the next
        while not found and regions.extend(next(filter(_is_of_capture, errors), errors[0])):
            found, errors = _each_way(function, attempt, until=_is_of_capture)
    if found:
        _tell(regions, told)
        return found[0]
    regions.restore(before)
    assert refused is not None
    if isinstance(errors[-1], RegionError) and isinstance(refused, CaptureError):
        raise CaptureError(f"{refused}; and {errors[-1]}", refused.module)
    raise refused


def _each_way(
    function: Traced,
    attempt: Callable[[], T],
    until: Callable[[PipecompileError], bool] = lambda _: False,
) -> tuple[list[T], list[PipecompileError]]:
    """What the first attempt made that succeeded, if one did, and the errors of those before it.

    torch takes no `Number`: where that may be why, forward gets plain ones.

    Args:
        until: an error after which no other way is tried.

    Raises:
        RaisedError: the model raises as it would on one device.
    """
    errors: list[PipecompileError] = []  # each is over before the next attempt, which would name it
    for denied, lazily in product(UNTRACED, (True, False)):
        answering = function.answering
        if errors and not lazily and (answering is None or not answering.numbers):
            continue
        function.denied, function.lazily = denied, lazily
        try:
            return [attempt()], errors
        except (CaptureError, BatchError) as error:
            errors.append(error)
        if lazily and function.answering is not None and function.answering.numbers:
            continue
        raised = [error for error in errors if isinstance(error, RaisedError)]
        if raised:
            raise raised[0]
        if until(errors[-1]):
            break
    return [], errors


def _is_of_capture(error: PipecompileError) -> bool:
    return isinstance(error, CaptureError)


def _tell(regions: Regions, before: Collection[str]) -> None:
    """Warn of parts that were not asked for."""
    new = {pattern: why for pattern, why in regions.patterns.items() if pattern not in before}
    if not new:
        return
    text = (
        f"what cannot be traced runs eagerly, each call as one node on one stage: "
        f"{', '.join(new)}; eager_modules={list(new)} finds it sooner, and says nothing "
        f"({next(iter(new.values()))})"
    )
    if regions.cacheless:
        text += (
            ". It has no part in a cache, so the pipeline runs with use_cache=False, with which "
            "transformers takes position_ids that restart for packed sequences: set "
            "model.config.use_cache = False to have that on one device too, or give an "
            "attention_mask"
        )
    warnings.warn(text, stacklevel=2)


def differentiated_of(
    skeleton: Skeleton,
    function: Traced,
    leaves: Leaves,
    passes: Sequence[ForwardPass],
    scaled: Callable[[fx.GraphModule, int], fx.GraphModule],
    weighs: bool,
    export: Callable[[Traced, Leaves], Export] = exported,
    fewer: Callable[[fx.GraphModule], tuple[Fewer, fx.GraphModule] | None] = lambda _: None,
) -> Captured:
    """What is exported, changed by passes and differentiated.

    Args:
        scaled: the exported graph with so many times as many rows.
        weighs: tell how the losses of microbatches make that of the batch.
        export: makes the first one.
        fewer: what tells the loss sooner, see `formed`.
    """
    traced, results = export(function, leaves)
    _check_taken(results.inputs.taken, function.spec)
    more = cache(partial(scaled, traced))
    names = [leaf.name for leaf in function.spec.leaves]
    cut = function.spec.scales is not None
    outputs: tuple[Output, ...] = ()
    found = None
    if not function.wants_loss:
        outputs = outputs_of(results.names, more(1), more(2), cut)
    if weighs and (function.wants_loss or LOSS in results.names):
        which = 0 if function.wants_loss else results.names.index(LOSS)
        found = formed(traced, more, names, which, cut, partial(fewer, traced))
    weighed = UNWEIGHED if found is None else found.weighed
    leaves = (*leaves, *(skeleton.fake((), each, leaves[0].device) for each in weighed.shares))
    try:
        notes = tuple(note for note in (apply(traced, leaves) for apply in passes) if note)
        graph, counting = differentiated(
            skeleton,
            traced,
            leaves,
            function.wants_loss,
            results.replaced,
            weighed.counts,
            len(names),
            len(results.inputs.scalars),
        )
    except PipecompileError:
        raise
    except Exception as error:
        name = type(skeleton.model).__name__
        raise explain(error, name, *data_dependent(traced, error)) from error
    outside = constants_of(
        graph.used_constants, results.outside.reads, skeleton.originals, graph.mutations
    )
    guards = results.guards
    skeleton.met(graph, results.lost, guards)
    notes += skeleton.regions.notes
    loss = None
    if found is not None:
        factored = bool(weighed.shares)
        loss = LossForm(weighed.terms, factored, counting, weighed.sizes, found.note, found.warning)
    lost, scalars = dict(results.lost), results.inputs.scalars
    return Captured(graph, results.rebuild, outputs, notes, outside, guards, loss, lost, scalars)


def _check_leaves(graph: JointGraph, spec: BatchSpec, function: Traced, name: str) -> None:
    """Whether somebody reads what forward does not name."""
    used = {i for i, node in graph.inputs.items() if any(not _is_output(u) for u in node.users)}
    used |= {i for i, node in graph.inputs.items() if storage_root(node) in graph.results}
    unused = [
        key
        for key in function.call.doubtful
        if not any(
            leaf.name.split(".")[0] == key and i in used for i, leaf in enumerate(spec.leaves)
        )
    ]
    names = ", ".join(map(repr, unused))
    if unused and function.loss_fn is not None:
        raise BatchError(f"neither {name} nor loss_fn reads the batch's {names}: drop the key")
    if unused:  # as untraced, but not silently
        warnings.warn(f"{name} takes {names} as **kwargs and reads none of it", stacklevel=2)


def _is_output(node: fx.Node) -> bool:
    return node.op == "output"
