"""The user's model -> an exported graph of its forward and loss, by torch.export."""

from __future__ import annotations

import contextlib
import io
import logging
import sys
import threading
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TextIO

import torch
from torch import fx, nn
from torch.fx._lazy_graph_module import _use_lazy_graph_module

from ..answers.answering import Answering
from ..answers.guards import Guards
from ..answers.inputs import Inputs
from ..answers.known import untraced
from ..answers.number import plain
from ..answers.sizing import HANDLERS
from ..effects.chance import drawing
from ..effects.next_call import Left, check_next_calls
from ..effects.outside import Reading
from ..effects.replaced import Memories, replaced_tensors
from ..effects.world import watching
from ..ir.errors import CaptureError, LossError
from ..ir.precision import autocast
from ..regions.regions import Regions
from ..tensors.fakes import is_symbol
from ..tensors.pytree import tree_leaves
from ..tracing.bypassed import Bypass, bypass_of
from ..tracing.collecting import uncollected
from ..tracing.constants import asked_masks, told_constants
from ..tracing.copies import Copies
from ..tracing.kept import (
    UNTRACED,
    copied_tensors,
    drop_metadata_checks,
    kept_functions,
    kept_modules,
    native_kernels,
    refused_hooks,
    restore_functions,
    sources_of,
    untraced_branches,
)
from ..tracing.kept_checks import Checks
from ..tracing.padding import padded_outputs
from ..tracing.sizes import Sizes
from ..tracing.unwritten import unwritten
from . import batch as batches
from .batch import BatchSpec
from .blame import explain
from .calling import Call, LossFn, find_loss
from .narrowing import cast_floats
from .skeleton import tracking_modules
from .whole import model_of


def only(values: list[torch.Tensor]) -> torch.Tensor:
    (value,) = values
    return value


@dataclass
class Results:
    """What a traced function returned.

    Attributes:
        rebuild: puts tensors into the structure of what the model returned.
        names: of the tensors in it.
        replaced: what forward gave other tensors; these are returned after all others.
        lost: attributes that the next call cannot read -> why.
        left: what else the next call may find changed.
        outside: tensors that are none of the model's, and were read.
        guards: what forward has asked the batch.
        inputs: the numbers of the batch that are inputs of the graph.
    """

    rebuild: Callable[[list[torch.Tensor]], Any] = only
    names: tuple[str, ...] = ()
    replaced: tuple[str, ...] = ()
    lost: Mapping[str, str] = field(default_factory=dict)
    left: Left = field(default_factory=Left)
    outside: Reading = field(default_factory=Reading)
    guards: Guards = field(default_factory=Guards)
    inputs: Inputs = field(default_factory=lambda: Inputs({}, str))


class Traced(nn.Module):
    """The function that is traced: batch leaves in, loss or results out.

    Args:
        whole: the model, with the loss where that is a module.
        regions: which parts of it run eagerly.

    Attributes:
        floats: dtype that what the model is given is cast to, where it is floating point.
        values: the batch's leaves with their values; empty where there are none.
        constants: buffers of the model with values, which forward may ask too.
        lazily: comparing a number of the batch asks for no more than what comes of that.
        answering: what forward had asked the batch when it could not be traced.
        sizes: the symbols that sizes of leaves are, if some are.
        copies: of layers that do what others did, where that may be.
        bypass: layers that need not be done to tell how values grow with the rows, where it was
            traced with copies.
        calls: of `torch.autograd.Function`s so far.
    """

    whole: nn.Module
    regions: Regions

    def __init__(
        self,
        whole: nn.Module,
        spec: BatchSpec,
        call: Call,
        loss_fn: LossFn | None,
        regions: Regions,
    ):
        super().__init__()
        vars(self)["regions"] = regions
        vars(self)["whole"] = whole  # no submodule: its parts are
        self.model = model_of(whole)
        self.spec, self.call, self.loss_fn = spec, call, loss_fn
        self.wants_loss = True
        self.denied: Collection[str] = UNTRACED[0]
        self.compute: torch.dtype | None = None
        self.floats: torch.dtype | None = None
        self.attributes: Collection[str] = ()
        self.found: Callable[[Results], None] = lambda _: None
        self.values: Sequence[torch.Tensor] = ()
        self.constants: Mapping[str, torch.Tensor] = {}
        self.lazily = True
        self.where: Callable[[], str] = str
        self.began: Callable[[Answering], None] = lambda _: None
        self.answering: Answering | None = None
        self.sizes: Sizes | None = None
        self.copies: Copies | None = None
        self.bypass: Bypass | None = None
        self.calls: Sequence[object] = ()

    def forward(self, *leaves: torch.Tensor) -> tuple[torch.Tensor, ...]:
        others = () if self.loss_fn is None else (self.loss_fn,)  # a module is watched as one
        answering = Answering(HANDLERS, self.where, self.lazily)
        self.began(answering)
        if self.values:
            answering.begin(self._given(leaves))
        places = self.spec.plain_leaves
        numbers = {i: (leaves[i], self.values[i].item()) for i in places}
        answering.inputs = Inputs(numbers, answering.where)
        batch = self.spec.build(answering.inputs.put(leaves))
        args, kwargs = self.call.arguments(batch)
        memories = Memories()
        with (
            drawing() as drawn,
            watching(self.whole, others) as watched,
            replaced_tensors(self.whole, self.attributes, memories) as replaced,
            untraced_branches(self.denied),
            copied_tensors(),
            told_constants(self.sizes, answering.knows)
            if self.denied == UNTRACED[0]
            else asked_masks(answering.knows),
            Checks() as checks,
            checks.of_tensors(),
            Reading() as outside,
            answering,
            memories,
            self._copying(answering, lambda: (len(checks.found), len(outside.found), len(drawn))),
        ):
            if self.floats is not None:
                args, kwargs = cast_floats((args, kwargs), self.floats)
            output = self.model(*args, **kwargs)
            if not self.wants_loss:
                list(map(plain, tree_leaves(output)))  # what is returned is asked
            outside.by = "forward" if self.loss_fn is None else "loss_fn"
            loss = find_loss(output, batch, self.loss_fn) if self.wants_loss else None
        found = Results(replaced=tuple(replaced.values), lost=replaced.lost, outside=outside)
        of_arguments, of_model = sources_of(watched.tensors, leaves)
        of_arguments |= of_model and bool(replaced.values)  # buffers become others in each call
        found.left = Left(watched, drawn, of_arguments, of_model)
        found.guards = answering.guards(leaves[0].device, self.compute)
        found.inputs = answering.inputs
        found.inputs.check_left(tree_leaves(watched.values))
        self.found(found)
        if loss is None:
            values, found.rebuild = batches.flatten_results(output)
            if self.sizes is not None and any(map(is_symbol, tree_leaves(output))):
                raise CaptureError(f"{type(self.model).__name__} returns a size")
            if not values:
                raise CaptureError(
                    f"{type(self.model).__name__} returns a {type(output).__name__}, in which no "
                    "tensor is found: return tensors, in a dict, a tuple or a list"
                )
            found.names = tuple(values)
            return (*checks.demanded(values).values(), *replaced.values.values())
        if torch.is_grad_enabled() and not loss.requires_grad:
            raise LossError(
                "the loss does not depend on any trainable parameter: was it detached, or "
                "computed under torch.no_grad()?"
            )
        return (checks.demanded({"loss": loss})["loss"], *replaced.values.values())

    def _copying(
        self, answering: Answering, noted: Callable[[], tuple[int, ...]]
    ) -> AbstractContextManager[None]:
        """A forward inside, in which layers are copied, if any may be.

        Args:
            noted: how much others have noted so far.
        """
        if self.copies is None:
            return contextlib.nullcontext()
        return self.copies.entered(
            answering.knows, lambda: (answering.noted, noted(), len(self.calls))
        )

    def _given(
        self, leaves: Sequence[torch.Tensor]
    ) -> list[tuple[str, torch.Tensor, torch.Tensor]]:
        """What there are values of, while it is traced: leaves by their numbers, and buffers."""
        given = [(str(i), *pair) for i, pair in enumerate(zip(leaves, self.values, strict=True))]
        named = self.whole.named_buffers()
        given += [(n, each, self.constants[n]) for n, each in named if n in self.constants]
        with untraced():
            values = [v.detach().to(leaves[0].device, traced.dtype) for _, traced, v in given]
        return [(n, each, value) for (n, each, _), value in zip(given, values, strict=True)]


def exported(function: Traced, leaves: tuple[torch.Tensor, ...]) -> tuple[fx.GraphModule, Results]:
    """The graph of a call, and what it returned.

    Raises:
        PipecompileError: why it cannot be traced, or is not the graph of every call.
    """
    with tracking_modules(function.whole) as where:
        function.where = where
        traced, results = _briefly(function, leaves, where)
        evaluates = not function.whole.training and not torch.is_grad_enabled()
        check_next_calls(
            traced,
            results.left,
            lambda: _exported(function, leaves, where),
            partial(_switched, function.whole) if evaluates else None,
        )
    return traced, results


def _briefly(
    function: Traced, leaves: tuple[torch.Tensor, ...], where: Callable[[], str]
) -> tuple[fx.GraphModule, Results]:
    """As `_exported`, with copies of layers where they do what others did."""
    if function.sizes is None and not function.spec.plain_leaves and not function.regions.why:
        function.copies = copies = Copies(function)
        try:
            made = _exported(function, leaves, where)
            function.bypass = bypass_of(copies.sources)
            return made
        except Exception:
            if not copies.count and not copies.stood:
                raise
        finally:
            function.copies = None
    return _exported(function, leaves, where)  # and what is wrong is told of all layers


def exported_without(
    function: Traced, leaves: tuple[torch.Tensor, ...], bypass: Bypass
) -> fx.GraphModule:
    """The graph of a call, without some layers: for nothing but to see how values grow.

    Raises:
        Exception: of any kind, where that cannot be.
    """
    function.copies = copies = Copies(function, bypass)
    try:
        with tracking_modules(function.whole) as where, copies.bypassing():
            function.where = where
            return _exported(function, leaves, where)[0]
    finally:
        function.copies = None


def _exported(
    function: Traced, leaves: tuple[torch.Tensor, ...], where: Callable[[], str]
) -> tuple[fx.GraphModule, Results]:
    whole = function.whole
    results = [Results()]
    answering: list[Answering] = []
    function.found, function.began = results.append, answering.append
    with (
        _same_attributes(whole),
        refused_hooks(),
        kept_modules(),
        padded_outputs(),
        kept_functions() as calls,
        function.regions.entered(),
        autocast(function.compute, leaves[0].device),
    ):
        function.calls = calls
        try:
            dynamic = None if function.sizes is None else {"leaves": function.sizes.dynamic}
            program = torch.export.export(function, leaves, strict=False, dynamic_shapes=dynamic)
            traced = program.module(check_guards=False)
        except Exception as error:
            given = _described(whole, where(), function.spec)
            name = type(function.model).__name__
            function.answering = answering[-1] if answering else None
            asked = any(each.asked for each in answering[-1:])
            raise explain(error, name, where(), given=given, asked=asked) from error
    if function.sizes is not None:
        if calls:
            raise CaptureError("a torch.autograd.Function may do anything with sizes")
        function.sizes.met(traced)
    if function.spec.plain_leaves and calls:
        raise CaptureError("a torch.autograd.Function may do anything with a number")
    restore_functions(traced, calls)
    drop_metadata_checks(traced)
    traced.meta["as_untraced"] = function.denied == UNTRACED[0]
    return traced, results[-1]


@contextlib.contextmanager
def _same_attributes(model: nn.Module) -> Iterator[None]:
    """torch.export gives modules copies of the containers that they have."""
    before = [(part, dict(vars(part))) for part in model.modules()]
    try:
        yield
    finally:
        for part, attributes in before:
            vars(part).update(attributes)


@contextlib.contextmanager
def _switched(model: nn.Module) -> Iterator[None]:
    """Inside, the model has been switched to training and back, and done what it does then."""
    with _same_attributes(model):
        model.train()
        model.eval()
        yield


def _described(model: nn.Module, module: str, spec: BatchSpec) -> str:
    """The batch that a module failed on, and the dtype that it may have expected."""
    param = next(model.get_submodule(module).parameters(), None)
    return f"({spec})" if param is None else f"({spec}), with parameters in {param.dtype}"


class _Unheard(io.TextIOBase):
    """Drops what this thread writes; others are heard."""

    def __init__(self, stream: TextIO):
        self._stream, self._thread = stream, threading.get_ident()

    def write(self, text: str) -> int:
        if threading.get_ident() == self._thread:
            return len(text)
        return self._stream.write(text)

    def flush(self) -> None:
        self._stream.flush()


@contextlib.contextmanager
def tracing() -> Iterator[None]:
    """Around all that traces: kernels stay whole, and torch says nothing, and writes no Python code
    for graphs that are never run; nobody looks for garbage.

    torch.export prints the graph when it gives up; the error says what there is to say.
    """
    loggers = [logging.getLogger(name) for name in ("torch", "torch.fx", "torch.export")]
    before = [logger.level for logger in loggers]
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(_Unheard(sys.stdout)),
        contextlib.redirect_stderr(_Unheard(sys.stderr)),
        native_kernels(),
        _use_lazy_graph_module(True),  # code takes a tenth of the time
        unwritten(),
        uncollected(),  # takes an eighth
    ):
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            for logger, level in zip(loggers, before, strict=True):
                logger.setLevel(level)
