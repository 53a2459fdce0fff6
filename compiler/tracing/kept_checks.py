"""Checks of values in a forward: an error where the plain model raises one.

Tracing would drop them, as nothing reads their results.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from ..effects.code import running
from ..ir import checks

_ONE_HOT: Any = torch.nn.functional.one_hot
_INFORMED: dict[Callable[..., Any], tuple[Callable[..., Any], str]] = {
    torch.linalg.cholesky: (torch.linalg.cholesky_ex, "a matrix is not positive definite"),
    **dict.fromkeys(
        (torch.linalg.inv, torch.inverse, torch.Tensor.inverse),
        (torch.linalg.inv_ex, "a matrix is singular"),
    ),
    torch.linalg.solve: (torch.linalg.solve_ex, "a matrix is singular"),
}
"""Function -> the same, with a second result that is 0 for success, and what it is not."""
_UNTRUE = "a check of the forward is untrue"


class Checks(TorchFunctionMode):
    """A forward inside; notes what it demands, for `demanded`.

    Indices that become one-hot vectors are checked by the operator itself.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[torch.Tensor, str]] = []

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        named = kwargs or {}
        if func is _ONE_HOT:
            return _one_hot(*args, **named)
        if func is torch._assert_async:
            self._note(*args, **named)
            return None
        if func in _INFORMED and "out" not in named:
            informed, message = _INFORMED[func]
            made, info = informed(*args, **named)
            self._note((info == 0).all(), f"{informed.__name__}: {message}")
            return made
        return func(*args, **named)

    def demanded(self, values: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Results of the forward, of which the smallest one is there if all holds."""
        made = dict(values)
        if self.found and made:
            key = min(made, key=lambda name: (not made[name].dim(), made[name].numel()))
            for holds, message in self.found:
                made[key] = checks.require(made[key], holds, message)
        return made

    def _note(self, tensor: torch.Tensor, message: str = _UNTRUE) -> None:
        self.found.append((tensor.detach(), f"{message} ({_line()})"))

    @contextmanager
    def of_tensors(self) -> Iterator[None]:
        """`torch._check_tensor_all`, which would make a Python value of them, is noted too."""
        check = torch._check_tensor_all_with

        def noted(kind: type[Exception], tensor: torch.Tensor, message: Any = None) -> None:
            self._note(tensor.all(), message() if message is not None else _UNTRUE)

        torch._check_tensor_all_with = noted
        try:
            yield
        finally:
            torch._check_tensor_all_with = check


def _one_hot(tensor: torch.Tensor, num_classes: int = -1) -> torch.Tensor:
    plain = num_classes < 0 or tensor.numel() == 0  # by the largest index, or refused
    made: torch.Tensor = (_ONE_HOT if plain else checks.one_hot)(tensor, num_classes)
    return made


def _line() -> str:
    """The user's line that is run."""
    frame = running()
    return f"at {frame.filename}:{frame.lineno}" if frame else "at an unknown line"
