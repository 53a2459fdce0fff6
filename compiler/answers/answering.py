"""What forward asks a tensor in Python, answered from the batch at hand where that determines it.

``if mask.any():``, ``assert lengths.max().item() <= 512``, ``labels.nonzero()``: no graph follows
these, but where no parameter has a part in it a batch tells the answer. Forward gets it, and it is
written down, to be asked of other batches (`guards`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import fx
from torch.overrides import TorchFunctionMode

from ..effects.code import running
from ..tensors.fakes import FakeTensor
from .guards import Guards, Question, Reading
from .inputs import Inputs
from .known import Known, copied, node_of, untraced
from .number import How, Number, same

PASS = object()
"""Of what is not answered here, but by torch."""


class Answering(TorchFunctionMode):
    """A forward inside, while it is traced.

    Args:
        handlers: torch's function -> what stands for it; may return `PASS`.
        module: names the module that runs.
        lazily: ``.item()`` gives a `Number` instead of Python's own.

    Attributes:
        numbers: whether it has given one.
        inputs: the numbers of the batch that are inputs of the graph.
    """

    def __init__(
        self,
        handlers: Mapping[Any, Callable[..., Any]],
        module: Callable[[], str],
        lazily: bool,
    ):
        super().__init__()
        self._handlers, self._module, self._lazily = handlers, module, lazily
        self._known: Known | None = None
        self._readings: list[tuple[Reading, int]] = []
        self._given: dict[str, torch.Tensor] = {}
        self._names: dict[fx.Node, str] = {}
        self.numbers = False
        self.inputs = Inputs({}, self.where)

    def begin(self, given: Iterable[tuple[str, torch.Tensor, torch.Tensor]]) -> None:
        """What is known.

        Args:
            given: a name, the tensor as it is traced, and its value on the same device.
        """
        values = {}
        for name, traced, value in given:
            node = node_of(traced)
            if node is not None and node.op == "placeholder":
                values[node], self._names[node], self._given[name] = value, name, value
        self._known = Known(values)

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if self._known is None:
            return func(*args, **kwargs)
        if self.numbers or self.inputs:
            args, kwargs = self.inputs.replaced(func, args, kwargs)
        handler = self._handlers.get(func)
        if handler is not None and "input" in kwargs:
            args, kwargs = (kwargs["input"], *args), {k: kwargs[k] for k in kwargs if k != "input"}
        found = PASS if handler is None else handler(self, func, *args, **kwargs)
        return func(*args, **kwargs) if found is PASS else found

    # -- asking -------------------------------------------------------------------------------

    def knows(self, *tensors: Any) -> bool:
        """Whether the batch determines these; other values are what they are."""
        traced = [each for each in tensors if isinstance(each, torch.Tensor)]
        return bool(traced) and all(self._node(each) is not None for each in traced)

    def ask(self, tensor: torch.Tensor, read: Callable[[torch.Tensor], Any]) -> Any:
        """What Python gets of a tensor that is known."""
        return self._asker(tensor, read)[0](same)

    def number(self, tensor: torch.Tensor) -> Any:
        """The one element of a tensor that is known."""
        ask, found = self._asker(tensor, torch.Tensor.item)
        if not self._lazily or type(found) not in (int, float):
            return ask(same)
        self.numbers = True
        return Number(ask, found)

    def _node(self, tensor: torch.Tensor) -> fx.Node | None:
        if self._known is None or type(tensor) is not FakeTensor:
            return None
        return self._known.node(tensor)

    def _asker(
        self, tensor: torch.Tensor, read: Callable[[torch.Tensor], Any]
    ) -> tuple[Callable[[How], Any], Any]:
        node, known = self._node(tensor), self._known
        assert node is not None
        assert known is not None
        with untraced():
            found = read(known.value(node))
        reading = Reading(node, read)
        self._readings.append((reading, len(known.order)))

        def ask(how: How) -> Any:
            question = Question(self.where(), how, how(found))
            reading.questions.append(question)
            return question.answer

        return ask, found

    def where(self) -> str:
        """Which module runs, and where in Python."""
        frame = running()
        at = f"at {frame.filename}:{frame.lineno} ({frame.line})" if frame else ""
        return f"in module {self._module() or '(the model itself)'!r}, {at or 'an unknown line'}"

    # -- what was asked -------------------------------------------------------------------------

    @property
    def asked(self) -> bool:
        return bool(self.inputs.steps()) or any(r.questions for r, _ in self._readings)

    @property
    def noted(self) -> tuple[int, int]:
        """How much has been noted so far."""
        return len(self._readings), len(self.inputs.steps())

    def guards(self, device: torch.device, compute: torch.dtype | None) -> Guards:
        """All questions, and the operators that lead to them."""
        known = self._known
        asked = [(reading, at) for reading, at in self._readings if reading.questions]
        steps = self.inputs.steps()
        if known is None or not (asked or steps):
            return Guards()
        nodes, writes = known.needed([reading.node for reading, _ in asked])
        twin = copied(nodes, self._names)
        constants = {str(n.target): known.value(n) for n in nodes if n.op == "get_attr"}
        given = {self._names[n] for n in nodes if n.op == "placeholder"}
        position = {node: i for i, node in enumerate(known.order)}
        last = max((at for _, at in asked), default=0)
        for node in (node for node in nodes if position[node] < last):
            while asked and asked[0][1] <= position[node]:
                steps.append(_moved(asked.pop(0)[0], twin))
            steps.append(twin[node])
        steps += [_moved(reading, twin) for reading, _ in asked]
        buffers = {name: self._given[name] for name in given if not name.isdecimal()}
        return Guards(tuple(steps), constants | buffers, tuple(buffers), writes, device, compute)


def _moved(reading: Reading, twin: Mapping[fx.Node, fx.Node]) -> Reading:
    return Reading(twin[reading.node], reading.read, reading.questions)
