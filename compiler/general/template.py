"""A graph for batches of many sizes, and those for each size that follow from it untraced."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import fx

from ..capture.batch import BatchSpec, repeated
from ..capture.calling import LossFn
from ..capture.capture import Captured, ForwardPass, differentiated_of, function_of
from ..capture.exporting import exported, tracing
from ..capture.refusals import check_operands
from ..capture.skeleton import Skeleton, evaluating
from ..ir.errors import CaptureError, PipecompileError
from ..ir.graph import JointGraph
from ..rows.loss import Counting
from ..tensors.fakes import FakeTensorMode, is_symbol
from ..tracing.sizes import Dims, Numbers, Sizes, instance


@dataclass(frozen=True)
class Template:
    """What was traced with symbols for sizes.

    Attributes:
        captured: its graph has symbols.
        varying: of each leaf, the dimensions that may vary.
    """

    captured: Captured
    sizes: Sizes
    mode: FakeTensorMode

    @property
    def varying(self) -> Sequence[Dims]:
        return self.sizes.varying

    def at(self, spec: BatchSpec) -> Captured:
        """The graph for microbatches of one size, as tracing them would give it.

        Raises:
            CaptureError: tracing them would give another graph; it names what differs.
        """
        numbers = self.sizes.at([leaf.shape for leaf in spec.leaves])
        graph = _graph_at(self.captured.graph, numbers, self.mode)
        check_operands(graph, spec)
        loss = self.captured.loss
        if loss is not None:
            counting = loss.counting and _counting_at(loss.counting, numbers, self.mode)
            sizes = tuple(numbers.value(n) if is_symbol(n) else n for n in loss.sizes)
            loss = replace(loss, counting=counting, sizes=sizes)
        return replace(self.captured, graph=graph, loss=loss)


def capture_template(
    skeleton: Skeleton,
    spec: BatchSpec,
    varying: Sequence[Dims],
    loss_fn: LossFn | None,
    device: torch.device,
    wants: str,
    trains: bool,
    passes: Sequence[ForwardPass],
    compute: torch.dtype | None,
    weighs: bool,
    values: Sequence[torch.Tensor] = (),
) -> Template:
    """Trace with symbols in the places of some sizes; arguments as of `capture_training`.

    Args:
        spec: an example, in which sizes that vary are 2 or more.
        varying: of each leaf, the dimensions whose sizes are symbols.
        wants: the loss or the results.
        values: the leaves of the example, which forward may ask; others may be asked the same.
        trains: with a backward, in the mode that the model is in.

    Raises:
        CaptureError: what is traced would not hold for other sizes.
    """
    if skeleton.regions.patterns:
        raise CaptureError("parts of the model run eagerly, and were tried with one size")
    shapes = [leaf.shape for leaf in spec.leaves]

    def attempt(lazily: bool) -> Template | None:
        """None where it has to be tried with numbers that are Python's own."""
        sizes = Sizes(skeleton.mode, shapes, varying)

        def scaled(traced: fx.GraphModule, times: int) -> fx.GraphModule:
            """What was exported, for so many times as many rows as the example has."""
            more = spec.repeat(times)
            try:
                numbers = sizes.at([leaf.shape for leaf in more.leaves])
                return fx.GraphModule(traced, instance(traced.graph, numbers, skeleton.mode)[0])
            except CaptureError:  # what grows is no symbol, or forward does something else then
                if times == 1:
                    raise
            with sizes.without():
                other, given = function_of(skeleton, more, loss_fn, device, wants, compute)
                other.values, other.lazily = repeated(values, spec, times), lazily
                return exported(other, given)[0]

        mode = (torch.enable_grad(),) if trains else (evaluating(skeleton.module), torch.no_grad())
        with contextlib.ExitStack() as stack:
            for each in (*mode, sizes.traced(), tracing(), skeleton.computing()):
                stack.enter_context(each)
            leaves = tuple(sizes.leaf(i, x.dtype, device) for i, x in enumerate(spec.leaves))
            function, _ = function_of(skeleton, spec, loss_fn, device, wants, compute)
            function.sizes, function.values, function.lazily = sizes, values, lazily
            try:
                captured = differentiated_of(skeleton, function, leaves, passes, scaled, weighs)
            except Exception as error:  # also of torch, which has met a symbol
                asked = function.answering is not None and function.answering.numbers
                if lazily and asked:
                    return None
                if isinstance(error, PipecompileError):
                    raise
                raise CaptureError(f"{type(error).__name__}: {error}") from error
        sizes.check_free()
        return Template(captured, sizes, skeleton.mode)

    made = attempt(True) or attempt(False)
    assert made is not None
    return made


def _graph_at(graph: JointGraph, numbers: Numbers, mode: FakeTensorMode) -> JointGraph:
    made, twin = instance(graph.graph, numbers, mode)
    for node in made.find_nodes(op="output"):
        made.erase_node(node)
    found = graph.moved(made, twin)
    found.set_output()
    return found


def _counting_at(counting: Counting, numbers: Numbers, mode: FakeTensorMode) -> Counting:
    made, _ = instance(counting.module.graph, numbers, mode)
    return Counting(fx.GraphModule(counting.module, made), counting.inputs)
