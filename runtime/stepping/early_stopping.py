"""When to end a training that no longer gets better: the same answer on every rank."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from ...compiler.ir.errors import OptionError, StateError

Agree = Callable[[Any], list[Any]]
"""What every process gives, to all of them, in the order of ranks."""


class EarlyStopping:
    """Counts for how long a value has not got better; made by `Pipeline.early_stopping`.

    Args:
        agree: exchanges a value between all processes.
        patience: how many values in a row may be no better than the best one.
        min_delta: by how much a better one is better at least.
        mode: "min" or "max".

    Attributes:
        best: value so far; None before the first.
        improved: whether the last one was it.
        waited: values since then.
        stopped: whether there were more than ``patience`` of them.

    Raises:
        OptionError: one of these is no such value.
    """

    def __init__(self, agree: Agree, patience: int, min_delta: float, mode: str):
        if type(patience) is not int or patience < 0:
            raise OptionError(f"patience={patience!r}: give the number of values, 0 or more")
        if isinstance(min_delta, bool) or not 0 <= min_delta < math.inf:
            raise OptionError(f"min_delta={min_delta!r}: give a number, 0 or more")
        if mode not in ("min", "max"):
            raise OptionError(f'mode={mode!r}: use "min" or "max"')
        self._agree, self._patience, self._delta = agree, patience, float(min_delta)
        self._sign = 1.0 if mode == "min" else -1.0
        self.best: float | None = None
        self.improved = self.stopped = False
        self.waited = 0

    def update(self, value: Any) -> bool:
        """Take the next value, such as the loss that `evaluate` returns; whether to stop.

        Every rank must call it. Ranks that do not have the value give None; of several values that
        of the first rank counts. NaN is never better.

        Raises:
            OptionError: no rank has a value, or one that is no number; on every rank.
        """
        try:
            mine: Any = None if value is None else float(value)
        except (TypeError, ValueError, RuntimeError):
            mine = f"a {type(value).__name__}"
        given = [each for each in self._agree(mine) if each is not None]
        if not given or any(isinstance(each, str) for each in given):
            odd = next((each for each in given if isinstance(each, str)), "None on every rank")
            raise OptionError(f"EarlyStopping.update() was given {odd}: give a number")
        found = given[0]
        best = math.inf if self.best is None else self._sign * self.best
        self.improved = self._sign * found < best - self._delta
        if self.improved:
            self.best, self.waited = found, 0
        else:
            self.waited += 1
        self.stopped = self.waited > self._patience
        return self.stopped

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "waited": self.waited}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where another left off.

        Raises:
            StateError: what is given is no such state.
        """
        best, waited = state.get("best"), state.get("waited")
        if not (best is None or isinstance(best, float)) or type(waited) is not int or waited < 0:
            raise StateError(f"the state of EarlyStopping has best and waited, and not {state!r}")
        self.best, self.waited = best, waited
        self.improved, self.stopped = False, waited > self._patience
