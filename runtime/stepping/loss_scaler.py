"""Dynamic loss scaling: the number that the loss is multiplied by before it is differentiated.

A step may have several runs, whose gradients add up. One that is not finite spoils the step: the
runs that follow leave no gradients either, until the step is over. Then the scale is updated.
"""

from __future__ import annotations

from typing import Any

from ...compiler.ir import precision
from ...compiler.ir.errors import StateError
from ...compiler.ir.precision import LossScale


class LossScaler:
    """Grows after good steps, backs off after one with a gradient that is not finite.

    Attributes:
        scale: now.
        skipped: how many steps had such a gradient.
        overflowed: whether this step has.
    """

    def __init__(self, config: LossScale):
        self.config = config
        self.restart()

    def restart(self) -> None:
        """Nothing has been seen."""
        self.scale = self.config.init
        self.skipped = 0
        self.overflowed = False
        self._good = 0
        self._runs = 0

    def saw(self, finite: bool) -> None:
        """After a run: were the gradients of all stages and replicas finite?"""
        self._runs += 1
        self.overflowed |= not finite

    def end_step(self) -> None:
        """The optimizer has stepped, or gradients were dropped; nothing if there was no run."""
        if not self._runs:
            return
        if self.overflowed:
            self.scale = max(self.scale * self.config.backoff, precision.MIN_SCALE)
            self.skipped += 1
            self._good = 0
        else:
            self._good += 1
        if self._good == self.config.interval:
            self.scale = min(self.scale * self.config.growth, precision.MAX_SCALE)
            self._good = 0
        self._runs, self.overflowed = 0, False

    def state_dict(self) -> dict[str, Any]:
        return {"scale": self.scale, "skipped": self.skipped, "good": self._good}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where another left off.

        Raises:
            StateError: what is given is no scaler's state.
        """
        if set(state) != set(self.state_dict()):
            raise StateError(
                f"a loss scaler's state has {sorted(self.state_dict())}, not {sorted(state)}"
            )
        for name in ("skipped", "good"):
            if type(state[name]) is not int or not 0 <= state[name] < 2**63:
                raise StateError(f"a loss scaler cannot have {name}={state[name]!r}")
        scale = state["scale"]
        number = isinstance(scale, (int, float)) and not isinstance(scale, bool)
        if not number or not precision.MIN_SCALE <= scale <= precision.MAX_SCALE:
            raise StateError(
                f"a loss scale is from {precision.MIN_SCALE} to {precision.MAX_SCALE}, "
                f"not {scale!r}"
            )
        self.scale, self.skipped, self._good = float(scale), state["skipped"], state["good"]
