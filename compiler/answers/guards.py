"""What forward has asked the batch in Python, and the answers that a graph was made for.

A graph is right for each batch that gives the same answers. They are asked again before every step,
of each microbatch, by running the few operators that lead to them; not where no batch could give
another, as all comes of shapes and buffers.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from ..ir.errors import CaptureError

LONGEST = 60  # characters of an answer that a message has


@dataclass(frozen=True)
class Question:
    """One that forward has asked: whether a mask has any element, how many elements, which number.

    Attributes:
        where: module, file, line and its text.
        how: makes the answer of what was read.
    """

    where: str
    how: Callable[[Any], Any]
    answer: Any


@dataclass
class Reading:
    """A tensor whose values Python has got, and what was asked of them.

    Attributes:
        node: makes the tensor.
        read: makes of it what Python has got.
    """

    node: fx.Node
    read: Callable[[torch.Tensor], Any]
    questions: list[Question] = field(default_factory=list)


@dataclass(frozen=True)
class Difference:
    """A question to which a batch gives another answer."""

    question: Question
    answer: Any

    @property
    def texts(self) -> tuple[str, str, str]:
        """Where, the answer of the graph, and the other one."""
        return self.question.where, told(self.question.answer), told(self.answer)


@dataclass(frozen=True)
class Guards:
    """All that a forward has asked, in order.

    Attributes:
        steps: operators of a graph of their own, and what is read of them.
        constants: the values of attributes of the graph, and of buffers. Other placeholders are
            called by which leaf of a microbatch they are.
        buffers: those of the model whose values are among the constants.
        writes: whether an operator writes into a leaf or a constant.
        device: where forward runs.
        compute: the dtype of autocast around it.
    """

    steps: tuple[fx.Node | Reading, ...] = ()
    constants: Mapping[str, torch.Tensor] = field(default_factory=dict)
    buffers: tuple[str, ...] = ()
    writes: bool = False
    device: torch.device | None = None
    compute: torch.dtype | None = None

    def __bool__(self) -> bool:
        return bool(self.steps)

    @functools.cached_property
    def of_batch(self) -> bool:
        """Whether an answer depends on the batch, and not on constants and buffers alone."""
        nodes = [step for step in self.steps if isinstance(step, fx.Node)]
        return any(n.op == "placeholder" and str(n.target) not in self.constants for n in nodes)

    @property
    def questions(self) -> list[Question]:
        found = [step for step in self.steps if isinstance(step, Reading)]
        return [question for reading in found for question in reading.questions]

    @property
    def heard(self) -> list[tuple[str, str]]:
        """Where something was asked, and the answer as text."""
        return [(each.where, told(each.answer)) for each in self.questions]

    def check(self, buffers: Mapping[str, torch.Tensor]) -> None:
        """Raises CaptureError if a buffer by whose values forward decides has others than then.

        Args:
            buffers: of the model, as they are now.
        """
        for name in self.buffers:
            now = buffers[name]
            asked = self.constants[name]
            if not torch.equal(now.to(asked.device, asked.dtype), asked):
                raise CaptureError(
                    f"forward decides by the values of buffer {name!r}, which are others now "
                    "(loaded, or read by weights=) than in the model that compile() was given: "
                    "build the model with them, and compile that"
                )

    def difference(self, values: Sequence[torch.Tensor]) -> Difference | None:
        """The first question that a microbatch answers otherwise; None where it is as the graph's.

        Args:
            values: its leaves.
        """
        with torch.no_grad(), self._autocast():
            return self._asked(values)

    def _asked(self, values: Sequence[torch.Tensor]) -> Difference | None:
        made: dict[fx.Node, Any] = {}
        for i, step in enumerate(self.steps):
            if not isinstance(step, Reading):
                try:
                    made[step] = self._run(step, made, values)
                except Exception as error:  # an index out of range: forward fails there too
                    left = (each for each in self.steps[i:] if isinstance(each, Reading))
                    return Difference(next(left).questions[0], type(error).__name__)
                continue
            found = step.read(made[step.node])
            for question in step.questions:
                answer = _answered(question, found)
                if told(answer) != told(question.answer):
                    return Difference(question, answer)
        return None

    def _run(self, node: fx.Node, made: Mapping[fx.Node, Any], values: Any) -> Any:
        if node.op == "call_function":
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), made.__getitem__)
            return node.target(*args, **kwargs)  # type: ignore[operator]
        name = str(node.target)
        value = self.constants[name] if name in self.constants else values[int(name)]
        value = value.detach().to(self.device)
        return value.clone() if self.writes else value

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.compute is None or self.device is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.compute)


def _answered(question: Question, found: Any) -> Any:
    try:
        return question.how(found)
    except ArithmeticError as error:  # forward divides by it: one device fails there too
        return type(error).__name__


def told(answer: Any) -> str:
    """An answer as text: equal for equal answers, which 1 and True are not, nor 0.0 and -0.0."""
    return repr(answer)


def unlike(where: str, first: tuple[str, str], second: tuple[str, str]) -> str:
    """The message of a step that would need two programs.

    Args:
        first, second: who has heard which answer.
    """
    heard = " and ".join(f"{who} gives {_shown(answer)}" for who, answer in (first, second))
    return (
        f"forward decides by the values of the batch {where}, where {heard}, and what follows has "
        "other messages or gradients: no step can run both. Put rows into a batch that agree here "
        "(sorted by length, or padded alike), or keep it a tensor and choose with torch.where (a "
        "mean over chosen elements is (x * mask).sum() / mask.sum())"
    )


def _shown(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}..."
