"""Whether the graph of one call is that of every call.

A graph holds what Python did once. If forward has changed something that it may read, or has asked
for randomness or the time, it is traced again as the next call would find things, and far from
there: another graph means that one is not enough.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from itertools import zip_longest
from typing import Any

import torch
from torch import fx

from ..ir.errors import CaptureError
from ..ir.graph import describe
from ..tensors.facts import digest
from ..tensors.fakes import is_fake
from .chance import FRACTIONS, drawn_as
from .code import user_line
from .world import Watched, left_by

FAR = 1_000_000  # calls later

Export = Callable[[], tuple[fx.GraphModule, Any]]
Switch = Callable[[], AbstractContextManager[None]]


@dataclass
class Left:
    """What a call has done besides its results.

    Attributes:
        watched: what it has changed.
        drawn: sources of randomness and time that it has read.
        of_arguments: whether it has left tensors behind that depend on its arguments.
        of_model: whether it has left such that depend on the model's parameters and buffers.
    """

    watched: Watched = field(default_factory=Watched)
    drawn: set[str] = field(default_factory=set)
    of_arguments: bool = False
    of_model: bool = False


def check_next_calls(
    traced: fx.GraphModule, left: Left, export: Export, switched: Switch | None = None
) -> None:
    """Trace again where something was left behind or drawn.

    Args:
        export: traces anew; its second result has what it left behind, as ``left``.
        switched: inside, the model has been trained and evaluates again; None in training.

    Raises:
        CaptureError: the next call would compute something else.
    """
    if not left.watched.changes and not left.drawn:
        return
    streams = [c.where for part in left.watched.apart() for c in part.changes if part.is_stream]
    if streams:
        raise _drawn(streams, "")
    if left.drawn:
        _check_draws(_text(traced), left.drawn, export)
    call = _Call(traced, left, export, switched)
    if call.keeps(left.watched):
        left.watched.keep()  # so that other graphs of the model need not be traced twice
    else:
        parts = left.watched.apart()
        guilty = [part for part in parts if not call.keeps(part)]
        changes = [c for part in guilty or [left.watched] for c in part.changes]
        named = "; ".join(map(str, changes[:3]))
        mode = "" if switched is None else "in evaluation, "
        raise CaptureError(
            f"{mode}forward changes {named}, and what it computes in the next call depends on it"
            f"{call.otherwise()}, which a graph that is made once cannot follow: keep tensors in "
            "buffers (register_buffer), numbers too (torch.tensor(0)), decide with torch.where, "
            "and change weights before compiling"
        )


@dataclass(frozen=True)
class _Call:
    """A call that has left something behind, and those that come after it."""

    traced: fx.GraphModule
    left: Left
    export: Export
    switched: Switch | None

    def keeps(self, watched: Watched) -> bool:
        """Whether the calls that follow have the same graph."""
        grows = any(_later(2, c.old, c.new) != _later(1, c.old, c.new) for c in watched.numbers)
        for calls in (1, FAR) if grows else (1,) if watched.contents else ():
            with left_by(watched, partial(_later, calls)):
                try:
                    traced, results = self.export()
                except CaptureError:
                    return False
            if _text(traced) == _text(self.traced):
                continue
            settled = calls == 1 and not results.left.watched.changes
            return settled and not self.left.of_arguments and self._reads_what_was_kept(traced)
        return True

    def _reads_what_was_kept(self, traced: fx.GraphModule) -> bool:
        """Whether the next graph lacks nothing but what this one has made of no argument: that was
        kept, and to make it again in every call gives the same.

        What was made of parameters must not outlive a step of the optimizer: training the model
        in between forgets it.
        """
        before, constant, of_model = _operators(self.traced)
        after, _, _ = _operators(traced)
        if self.left.of_model and not self._forgets():
            return False
        return not after - before and not (before - after) - (
            of_model if self.left.of_model else constant
        )

    def _forgets(self) -> bool:
        """Whether an evaluation is as the first one again, once the model has been trained."""
        if self.switched is None:
            return False
        with left_by(self.left.watched, partial(_later, 1)), self.switched():
            try:
                traced, _ = self.export()
            except CaptureError:
                return False
        return _text(traced) == _text(self.traced)

    def otherwise(self) -> str:
        """The first line that the next call computes otherwise."""
        with left_by(self.left.watched, partial(_later, 1)):
            try:
                traced, _ = self.export()
            except CaptureError:
                return ""
        for node, later in zip_longest(_calls(self.traced), _calls(traced)):
            if str(node and (node.target, node.args)) != str(later and (later.target, later.args)):
                line = user_line(node or later)
                return f" ({line})" if line else ""
        return ""


def _calls(traced: fx.GraphModule) -> Iterator[Any]:
    return (node for node in traced.graph.nodes if node.op == "call_function")


def _operators(traced: fx.GraphModule) -> tuple[Counter[str], Counter[str], Counter[str]]:
    """All operators of a graph, those of constants, and those of constants and of what
    the model has and does not change."""
    every, constant, of_model = Counter[str](), Counter[str](), Counter[str]()
    free: set[fx.Node] = set()
    state: set[fx.Node] = set()
    for node in traced.graph.nodes:
        if node.op == "get_attr":
            if not any(map(_writes, node.users)):
                state.add(node)
            if _is_real(operator.attrgetter(str(node.target))(traced)):
                free.add(node)
        elif node.op == "call_function":
            described = f"{node.target} {describe(node)}"
            every[described] += 1
            for nodes, counted in ((free, constant), (state, of_model)):
                if nodes.issuperset(node.all_input_nodes):
                    nodes.add(node)
                    counted[described] += 1
    return every, constant, of_model


def _writes(node: fx.Node) -> bool:
    return bool(getattr(getattr(node.target, "_schema", None), "is_mutable", False))


def _later(calls: int, old: Any, new: Any) -> Any:
    """What a value is some calls later, if each does what the first has done."""
    if isinstance(new, torch.Tensor):
        return _stand_in(new) if is_fake(new) else new
    if isinstance(new, (int, float)) and type(new) is type(old) and not isinstance(new, bool):
        return old + (new - old) * calls
    return new


def _stand_in(tensor: torch.Tensor) -> torch.Tensor:
    """Of what an earlier trace has left: its shape."""
    mode: Any = getattr(tensor, "fake_mode", None)
    if mode is None:
        return tensor
    with mode:
        return torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)


def _check_draws(first: str, drawn: set[str], export: Export) -> None:
    asked: list[str] = []
    for fraction in FRACTIONS:
        with drawn_as(fraction) as found:
            try:
                traced, results = export()
            except CaptureError:
                traced, results = None, None
        asked += found.lines
        unsure = found.unsure or (
            results is not None and results.left.drawn & {"random", "numpy.random"}
        )
        if traced is None or unsure or _text(traced) != first:
            raise _drawn(sorted(drawn), f", at {asked[0]}" if asked else "")


def _drawn(sources: list[str], where: str) -> CaptureError:
    return CaptureError(
        f"forward reads {' and '.join(sources)}{where}: a graph is made once, so it would get the "
        "same value in every step. Draw with torch.rand and choose with torch.where, or pass the "
        "value in with the batch"
    )


def _constants(traced: fx.GraphModule) -> list[tuple[str, torch.Tensor]]:
    """The tensors that a graph reads and that are none of the model's."""
    found = []
    for module in traced.modules():
        if isinstance(module, fx.GraphModule):
            for node in module.graph.find_nodes(op="get_attr"):
                value = operator.attrgetter(str(node.target))(module)
                if isinstance(value, torch.Tensor) and node.users:
                    found.append((str(node.target), value))
    return found


def _text(traced: fx.GraphModule) -> str:
    """A graph and its constants: equal texts compute the same."""
    lines = []
    for module in traced.modules():
        if isinstance(module, fx.GraphModule):
            for node in module.graph.nodes:
                target = getattr(node.target, "__name__", node.target)
                lines.append(f"{node} {target} {node.args} {node.kwargs} {describe(node)}")
    for name, value in _constants(traced):
        lines.append(f"{name} {'fake' if is_fake(value) else digest(value)}")
    return "\n".join(lines)


def _is_real(value: object) -> bool:
    return isinstance(value, torch.Tensor) and not is_fake(value)
